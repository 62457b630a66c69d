"""Plain implementations of Shampoo, KFAC, SOAP and energy natural gradient descent: baselines for TNT.

Shampoo (Gupta, Koren & Singer, 2018) and KFAC (Martens & Grosse, 2015; for dense layers) have the momentum, averages
and periods of `tnt_optax.tnt`: the first averages are plain means, and during the first `inverse_period` steps the
inverses are updated after each statistics update. SOAP (Vyas et al., 2024) is Adam in the eigenbases of the statistics
of Shampoo. Energy natural gradient descent (Müller & Zeinhofer, 2023) is the method of Gauss and Newton with the dense
matrix and a line search: the reference of accuracy for small networks and few points.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve

import tnt_optax

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # GPUs have a lower precision by default.
_tensordot = functools.partial(jnp.tensordot, precision=lax.Precision.HIGHEST)


class KroneckerState(NamedTuple):
    """The momentum of each block (a parameter or a layer) and, by mode, its statistics and inverses."""

    count: jax.Array
    momentum: list[jax.Array]
    statistics: list[list[jax.Array]]
    inverses: list[list[jax.Array]]


def shampoo(
    learning_rate: Any, *, damping=1e-4, statistics_decay=0.9, momentum=0.9, statistics_period=1, inverse_period=20
) -> optax.GradientTransformationExtraArgs:
    """W <- W - learning_rate * m x_1 (L_1 + damping I)^(-1/2k) ... x_k (L_k + damping I)^(-1/2k).

    L_i is the moving average of mat_i(g) mat_i(g)^T, where g is the gradient itself.
    """
    averages = statistics_decay, momentum, statistics_period, inverse_period
    return _by_kronecker(learning_rate, averages, damping, lambda c, k: inverse_root(c, 2 * k), None)


def kfac(
    learning_rate: Any, *, damping=0.3, statistics_decay=0.9, momentum=0.9, statistics_period=1, inverse_period=20
) -> optax.GradientTransformationExtraArgs:
    """V <- V - learning_rate * (A + sqrt(damping) I)^-1 m (B + sqrt(damping) I)^-1, V = [kernel; bias] of each layer.

    `update` takes A and B as `sampled_grads`: see `value_and_layer_factors`. Martens & Grosse divide the damping by the
    ratio of the traces of A and B. It is not divided here: with the damping that the authors of TNT published for KFAC,
    the division makes KFAC diverge within an epoch of MNIST.
    """
    averages = statistics_decay, momentum, statistics_period, inverse_period
    return _by_kronecker(
        learning_rate, averages, damping**0.5, lambda c, _: solve(c, jnp.eye(len(c)), assume_a="pos"), _is_layer
    )


def engd(halvings: int = 30) -> optax.GradientTransformationExtraArgs:
    """W <- W - 2^-h J^T (J J^T + eps I)^-1 r, with the h in 0, ..., `halvings` of the lowest loss.

    `update` takes `residuals_fn`, a function of the parameters whose leaves (m,) are residuals, and `value_fn`. The
    loss is the sum over the leaves of half their mean square. r are the residuals divided by sqrt(m), and J is
    their Jacobian. eps is the rounding error of J J^T. By Woodbury's identity, the direction is that of (J^T J + eps
    I)^-1 J^T r, from a matrix whose size is the number of residuals.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        residuals_fn: Any = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del updates, extra_args
        flat, as_tree = ravel_pytree(params)

        def scaled(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
            r = jnp.concatenate([r / len(r) ** 0.5 for r in jax.tree.leaves(residuals_fn(as_tree(flat)))])
            return r, r

        jacobian, r = jax.jacrev(scaled, has_aux=True)(flat)
        kernel = _matmul(jacobian, jacobian.T)
        eps = len(r) * jnp.finfo(r.dtype).eps * jnp.max(jnp.diagonal(kernel))
        direction = jacobian.T @ solve(kernel + eps * jnp.eye(len(r), dtype=r.dtype), r, assume_a="pos")
        factors = 0.5 ** jnp.arange(halvings + 1, dtype=r.dtype)
        losses = lax.map(lambda factor: value_fn(as_tree(flat - factor * direction)), factors)
        return as_tree(-factors[jnp.argmin(jnp.nan_to_num(losses, nan=jnp.inf))] * direction), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def value_and_layer_factors(forward: Callable[..., Any], predictive: tnt_optax.PredictiveDistribution) -> Any:
    """`tnt_optax.value_and_sampled_grad` for KFAC: the third result returns A and B for targets sampled from the model.

    For each layer, A is the mean of x x^T, where x is an input with a one appended. B is the mean of g g^T, where g is
    the gradient with respect to an output.
    `forward(params, inputs, tap)` replaces the output of each layer, in the order of `params`, by `tap(input, output)`.
    """

    def value_and_grads(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
        layers, structure = jax.tree.flatten(params, is_leaf=_is_layer)

        def tapped(params: Any, probes: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
            layer_inputs = []

            def tap(x: jax.Array, y: jax.Array) -> jax.Array:
                layer_inputs.append(x)
                return y + probes[len(layer_inputs) - 1]

            return forward(params, inputs, tap), layer_inputs

        m = len(inputs)
        probes = [jnp.zeros((m, len(layer["bias"]))) for layer in layers]
        outputs, pullback, layer_inputs = jax.vjp(tapped, params, probes, has_aux=True)
        loss, cotangent = jax.value_and_grad(predictive.loss)(outputs, targets)

        def factors() -> Any:
            sampled = predictive.sample(key, outputs)
            _, cotangents = pullback(jax.grad(predictive.loss)(outputs, sampled))
            with_ones = [jnp.concatenate([x, jnp.ones((m, 1))], axis=1) for x in layer_inputs]
            pairs = zip(with_ones, cotangents, strict=True)
            # The loss is a mean: the gradient of an example is m times its share.
            return structure.unflatten([[_matmul(x.T, x) / m, m * _matmul(g.T, g)] for x, g in pairs])

        return loss, pullback(cotangent)[0], factors

    return value_and_grads


def _by_kronecker(
    learning_rate: Any, averages: Any, damping: Any, invert: Callable[[jax.Array, int], jax.Array], is_block: Any
) -> optax.GradientTransformationExtraArgs:
    decay, mu, statistics_period, inverse_period = averages

    def init(params: Any) -> KroneckerState:
        shapes = [_view(block).shape for block in jax.tree.leaves(params, is_leaf=is_block)]
        statistics, inverses = ([[jnp.zeros((d, d)) for d in shape] for shape in shapes] for _ in range(2))
        return KroneckerState(jnp.zeros([], jnp.int32), [jnp.zeros(shape) for shape in shapes], statistics, inverses)

    def update(updates: Any, state: Any, params: Any = None, *, sampled_grads=None, **_: Any) -> Any:
        t = state.count
        blocks, structure = jax.tree.flatten(updates, is_leaf=is_block)

        def absorb(weight: Any) -> Any:
            observed = sampled_grads if is_block else updates  # Shampoo uses the gradients.
            new = structure.flatten_up_to(observed() if callable(observed) else observed)
            if is_block is None:
                new = [[_contraction(g, mode) for mode in range(g.ndim)] for g in map(_view, new)]
            return jax.tree.map(lambda c, x: (1 - weight) * c + weight * x, state.statistics, new)

        def refresh() -> Any:
            return [[invert(c + damping * jnp.eye(len(c)), len(modes)) for c in modes] for modes in statistics]

        absorb_now = t % statistics_period == 0
        refresh_now = (t % inverse_period == 0) | (absorb_now & (t < inverse_period))
        weight = jnp.maximum(1 - decay, 1 / (t // statistics_period + 1))
        statistics = lax.cond(absorb_now, lambda: absorb(weight), lambda: state.statistics)
        inverses = lax.cond(refresh_now, refresh, lambda: state.inverses)
        momentum = [mu * m + g for m, g in zip(state.momentum, map(_view, blocks), strict=True)]
        directions = [_mode_products(m, dict(enumerate(p))) for m, p in zip(momentum, inverses, strict=True)]
        state = KroneckerState(t + 1, momentum, statistics, inverses)
        return structure.unflatten(map(_as_block, directions, blocks)), state

    return optax.chain(optax.GradientTransformationExtraArgs(init, update), optax.scale_by_learning_rate(learning_rate))


class SoapMoments(NamedTuple):
    """The state of SOAP for one parameter. A mode without matrices keeps the basis of the parameter."""

    first: jax.Array  # In the parameter's own basis.
    second: jax.Array  # In the eigenbases.
    statistics: dict[int, jax.Array]  # By mode.
    bases: dict[int, jax.Array]


def soap(
    learning_rate: Any,
    *,
    b1=0.95,
    b2=0.95,
    eps=1e-8,
    shampoo_beta=0.95,
    precondition_frequency=10,
    max_dim=10_000,
    weight_decay=0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam with decoupled weight decay, in the eigenbases of the averages of mat_i(g) mat_i(g)^T (the authors' code).

    The first step computes the bases, and its update is 0. Vectors, and modes longer than `max_dim`, keep their basis.
    """

    def init(params: Any) -> Any:
        def moments(w: jax.Array) -> SoapMoments:
            shape = _view(w).shape
            dims = {mode: d for mode, d in enumerate(shape) if w.ndim > 1 and d <= max_dim}
            squares = ({mode: jnp.zeros((d, d)) for mode, d in dims.items()} for _ in range(2))
            return SoapMoments(jnp.zeros(shape), jnp.zeros(shape), *squares)

        return jnp.zeros([], jnp.int32), [moments(w) for w in jax.tree.leaves(params)]

    def step(t: jax.Array, w: jax.Array, update: jax.Array, old: SoapMoments) -> tuple[jax.Array, SoapMoments]:
        g, n = _view(update), jnp.maximum(t, 1).astype(jnp.float32)
        first = jnp.where(t > 0, b1 * old.first + (1 - b1) * g, 0)
        second = jnp.where(t > 0, b2 * old.second + (1 - b2) * jnp.square(_mode_products(g, old.bases)), 0)
        adam = _mode_products(first, old.bases) / (jnp.sqrt(second) + eps) * jnp.sqrt(1 - b2**n) / (1 - b1**n)
        direction = jnp.where(t > 0, _mode_products(adam, old.bases, axis=1) + weight_decay * _view(w), 0)
        statistics = {i: shampoo_beta * c + (1 - shampoo_beta) * _contraction(g, i) for i, c in old.statistics.items()}
        return _as_block(direction, update), SoapMoments(first, second, statistics, old.bases)

    def initialized(m: SoapMoments) -> tuple[Any, Any]:
        return m.second, {i: jnp.linalg.eigh(c)[1] for i, c in m.statistics.items()}

    def refreshed(m: SoapMoments) -> tuple[Any, Any]:  # A power iteration; the largest eigenvalues are first.
        products = {i: _matmul(c, m.bases[i]) for i, c in m.statistics.items()}
        orders = {i: jnp.argsort(-jnp.sum(m.bases[i] * x, axis=0)) for i, x in products.items()}
        bases = {i: jnp.linalg.qr(x[:, orders[i]])[0] for i, x in products.items()}
        return functools.reduce(lambda v, i: jnp.take(v, orders[i], axis=i), orders, m.second), bases

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        (t, moments), (leaves, structure) = state, jax.tree.flatten(updates)
        pairs = [step(t, *columns) for columns in zip(jax.tree.leaves(params), leaves, moments, strict=True)]
        directions, moments = [d for d, _ in pairs], [m for _, m in pairs]
        # The directions use the old bases, so that no gradient is projected on a basis that depends on it.
        branch = jnp.where(t == 0, 0, jnp.where(t % precondition_frequency == 0, 1, 2))
        branches = initialized, refreshed, lambda m: (m.second, m.bases)
        new = lax.switch(branch, [lambda f=f: [f(m) for m in moments] for f in branches])
        moments = [m._replace(second=second, bases=bases) for m, (second, bases) in zip(moments, new, strict=True)]
        return structure.unflatten(directions), (t + 1, moments)

    return optax.chain(optax.GradientTransformationExtraArgs(init, update), optax.scale_by_learning_rate(learning_rate))


def inverse_root(matrix: jax.Array, p: int) -> jax.Array:
    """A^(-1/p) of a symmetric positive definite matrix, by the coupled Newton iteration (Guo & Higham, 2006).

    X_0 = z^(1/p) I, M_0 = z A, T = ((p+1) I - M) / p, X <- X T, M <- T^p M, until M is I. The scale z makes the
    eigenvalues of M_0 less than p + 1. For an ill-conditioned A in float32, M does not reach I. The result is then the
    X before the error grows, as in Anil et al. (2021).
    """
    eye = jnp.eye(len(matrix))
    z = (1 + p) / (2 * jnp.linalg.norm(matrix))

    def iterate(carry: Any) -> Any:
        count, x, m, error, _ = carry
        t = ((p + 1) * eye - m) / p
        with jax.default_matmul_precision("highest"):
            new, m = x @ t, jnp.linalg.matrix_power(t, p) @ m
        now = jnp.max(jnp.abs(m - eye))
        good = now < 1.2 * error  # False for NaN too.
        return count + 1, jnp.where(good, new, x), m, now, good

    start = jnp.int32(0), z ** (1 / p) * eye, z * matrix, jnp.float32(jnp.inf), jnp.bool_(True)
    return lax.while_loop(lambda c: (c[0] < 100) & (c[3] > 1e-5) & c[4], iterate, start)[1]


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mapping) and set(node) == {"kernel", "bias"}


def _contraction(view: jax.Array, mode: int) -> jax.Array:
    others = [axis for axis in range(view.ndim) if axis != mode]
    return _tensordot(view, view, axes=(others, others))


def _mode_products(view: jax.Array, matrices: Mapping[int, jax.Array], axis: int = 0) -> jax.Array:
    """The products with the matrices, summed over each mode and this axis of its matrix. Other modes do not change."""
    for mode in range(view.ndim):  # Each turn moves its mode to the end, so that they end in order.
        view = _tensordot(view, matrices[mode], axes=(0, axis)) if mode in matrices else jnp.moveaxis(view, 0, -1)
    return view


def _view(block: Any) -> jax.Array:
    """A layer as [kernel; bias]. A parameter as in TNT: one spatial mode for convolutions, a vector for a scalar."""
    if _is_layer(block):
        return jnp.concatenate([block["kernel"], block["bias"][None]])
    view = block.reshape(-1, *block.shape[-2:]) if block.ndim >= 4 else jnp.atleast_1d(block)
    return view.astype(jnp.float32)


def _as_block(view: jax.Array, block: Any) -> Any:
    """The inverse of `_view`. The leaves of a layer are in the order of their names."""
    if _is_layer(block):
        return jax.tree.unflatten(jax.tree.structure(block), [view[-1], view[:-1]])
    return view.reshape(block.shape).astype(block.dtype)
