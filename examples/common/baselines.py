"""Shampoo and KFAC, plain: baselines for TNT, with the same momentum, moving averages, update periods and warm start.

Shampoo: Gupta, Koren & Singer (2018), with the coupled Newton iteration for its roots. KFAC: Martens & Grosse (2015),
for models of dense layers. And an ablation of TNT itself: factors that maximize the likelihood.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

import tnt_optax


class KroneckerState(NamedTuple):
    """Counts, momentum, and for every block (a parameter or a layer) the statistics and what is computed from them."""

    count: jax.Array
    statistics_count: jax.Array
    momentum: Any
    statistics: Any
    inverses: Any


class Averages(TypedDict, total=False):
    """The arguments that all these optimizers have in common with `tnt_optax.tnt`.

    Attributes:
      statistics_decay: of the moving averages of the statistics, whose first ones are a plain mean; 0.9.
      momentum: accumulated before preconditioning, not dampened; 0.9.
      statistics_period: every how many steps the averages absorb a new observation; 1.
      inverse_period: every how many steps inverses or roots are computed; in the first of these periods with every
        observation that is absorbed; 20.
    """

    statistics_decay: float
    momentum: float
    statistics_period: int
    inverse_period: int


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: Any = 1e-4,
    **averages: Unpack[Averages],
) -> optax.GradientTransformationExtraArgs:
    """W <- W - learning_rate * m x_1 (L_1 + eps I)^(-1/2k) ... x_k (L_k + eps I)^(-1/2k).

    Args:
      learning_rate: a number or a schedule.
      damping: eps.
      averages: of the L_i, each of mat_i(g) mat_i(g)^T, g being the gradient itself.
    """

    def contractions(w: jax.Array) -> list[jax.Array]:
        view = _view(w)
        unfolded = [_unfold(view, i) for i in range(view.ndim)]
        return [u @ u.T for u in unfolded]

    def roots(w: jax.Array, factors: list[jax.Array]) -> list[jax.Array]:
        del w
        return [inverse_root(c + damping * jnp.eye(len(c)), 2 * len(factors)) for c in factors]

    return _by_kronecker(
        learning_rate,
        lambda grads, sampled, inverses: jax.tree.map(contractions, grads),
        roots,
        _multiply_modes,
        is_block=None,
        **averages,
    )


def tensor_normal_mle(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: Any = 0.1,
    **averages: Unpack[Averages],
) -> optax.GradientTransformationExtraArgs:
    """TNT, but its factors follow the equations of the maximum-likelihood estimate of a tensor-normal covariance.

    U_i <- mat_i(G x_{j != i} P_j) mat_i(G)^T / prod_{j != i} e_j, averaged as TNT's contractions are, with the inverses
    so far, P_j = (U_j + eps I)^-1, and e_j = tr(P_j U_j): d_j without damping (Manceur & Dutilleul, 2013), and under a
    damping far above the factors what is left is TNT's own Eq. (5). Before the first inverses U_j stands for a multiple
    of I, which is Eq. (5) for this gradient. The U_i are then given the same mean eigenvalue, their product unchanged.

    Args:
      learning_rate: a number or a schedule.
      damping: eps.
      averages: of the U_i, each of the above for G, the sampled gradient.
    """

    def estimates(g: jax.Array, inverses: list[jax.Array]) -> list[jax.Array]:
        view = _view(g)
        c0 = jnp.mean(view**2) ** (1 / view.ndim)
        begun = jnp.any(inverses[0] != 0)
        shares = [
            jnp.where(begun, p / (len(p) - damping * jnp.trace(p)), jnp.eye(len(p)) / (c0 * len(p))) for p in inverses
        ]
        factors = []
        for i, d in enumerate(view.shape):
            others = [jnp.eye(d) if j == i else share for j, share in enumerate(shares)]
            factor = _unfold(_multiply_modes(view, others), i) @ _unfold(view, i).T
            # There are no shares of a gradient or of factors that are zero.
            factors.append(jnp.where(jnp.isfinite(factor), factor, 0))
        return factors

    def invert(w: jax.Array, factors: list[jax.Array]) -> list[jax.Array]:
        del w
        means = jnp.stack([jnp.mean(jnp.diagonal(u)) for u in factors])
        ratios = jnp.where(means > 0, jnp.prod(means ** (1 / len(factors))) / means, 1)
        return [_inverse(ratio * u, damping) for ratio, u in zip(ratios, factors, strict=True)]

    return _by_kronecker(
        learning_rate,
        lambda grads, sampled, inverses: jax.tree.map(estimates, sampled, inverses),
        invert,
        _multiply_modes,
        is_block=None,
        **averages,
    )


class LayerFactors(NamedTuple):
    """KFAC's two factors of a dense layer: of its inputs with a one appended, and of its outputs' gradients."""

    inputs: jax.Array
    outputs: jax.Array


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: Any = 0.3,
    **averages: Unpack[Averages],
) -> optax.GradientTransformationExtraArgs:
    """V <- V - learning_rate * (A + sqrt(eps) I)^-1 m (B + sqrt(eps) I)^-1 for V = [kernel; bias] of each layer.

    Args:
      learning_rate: a number or a schedule.
      damping: eps, whose root each factor has. Divided by the ratio of their traces, as Martens & Grosse do, the
        settings that TNT's authors published for KFAC diverge within an epoch of MNIST.
      averages: of A and B, which `value_and_layer_factors` gives: `update` takes them, or a function that returns them,
        as `sampled_grads`.
    """

    def inverses(layer: Any, factors: LayerFactors) -> LayerFactors:
        del layer
        return LayerFactors(*(_inverse(factor, jnp.sqrt(damping)) for factor in factors))

    def precondition(layer: Any, factors: LayerFactors) -> Any:
        bias, kernel = jax.tree.leaves(layer)
        direction = factors.inputs @ jnp.concatenate([kernel, bias[None]]) @ factors.outputs
        return jax.tree.unflatten(jax.tree.structure(layer), [direction[-1], direction[:-1]])

    return _by_kronecker(
        learning_rate,
        lambda grads, sampled, inverses: sampled,
        inverses,
        precondition,
        is_block=_is_layer,
        **averages,
    )


def value_and_layer_factors(forward: Callable[..., Any], predictive: tnt_optax.PredictiveDistribution) -> Any:
    """What `tnt_optax.value_and_sampled_grad` is for TNT: the loss, its gradient, and a function that gives the factors
    of this batch, with targets sampled from the model.

    Args:
      forward: `forward(params, inputs, tap)`, which passes every dense layer's output through `tap(input, output)`, in
        the order of the layers in `params`.
      predictive: of the outputs.
    """

    def value_and_grads(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
        layers, structure = jax.tree.flatten(params, is_leaf=_is_layer)

        def tapped(params: Any, probes: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
            remaining, layer_inputs = list(probes), []

            def tap(x: jax.Array, y: jax.Array) -> jax.Array:
                layer_inputs.append(x)
                return y + remaining.pop(0)

            return forward(params, inputs, tap), layer_inputs

        probes = [jnp.zeros((len(inputs), len(layer["bias"]))) for layer in layers]
        outputs, pullback, layer_inputs = jax.vjp(tapped, params, probes, has_aux=True)
        loss, cotangent = jax.value_and_grad(predictive.loss)(outputs, targets)

        def factors() -> Any:
            sampled = predictive.sample(key, outputs)
            _, cotangents = pullback(jax.grad(predictive.loss)(outputs, sampled))
            m = len(inputs)  # The loss is a mean: an example's own gradient is m times its share.
            with_ones = [jnp.concatenate([x, jnp.ones((m, 1))], axis=1) for x in layer_inputs]
            pairs = zip(with_ones, cotangents, strict=True)
            return structure.unflatten([LayerFactors(x.T @ x / m, m * g.T @ g) for x, g in pairs])

        return loss, pullback(cotangent)[0], factors

    return value_and_grads


def value_and_gradient_twice(forward: Callable[..., Any], predictive: tnt_optax.PredictiveDistribution) -> Any:
    """The same for Shampoo, whose statistics are of the gradient itself."""

    def value_and_grads(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
        del key
        loss, grads = jax.value_and_grad(lambda params: predictive.loss(forward(params, inputs), targets))(params)
        return loss, grads, lambda: grads

    return value_and_grads


def warm_start(
    tx: optax.GradientTransformationExtraArgs, opt_state: Any, params: Any, observations: Iterable[Any]
) -> Any:
    """What `tnt_optax.warm_start` is for TNT: statistics are the mean over all observations, then the inverses."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, KroneckerState)

    @functools.partial(jax.jit, static_argnames="stage")
    def advance(opt_state: Any, observation: Any, stage: str) -> Any:
        # KFAC takes the one, Shampoo the other.
        _, new = tx.update(observation, opt_state, params, sampled_grads=observation, warm_start=stage)
        # Whatever else counts steps has not seen one.
        return jax.tree.map(lambda o, n: n if is_ours(o) else o, opt_state, new, is_leaf=is_ours)

    for observation in observations:
        opt_state = advance(opt_state, observation, "absorb")
    return advance(opt_state, params, "refresh")


def _by_kronecker(
    learning_rate: optax.ScalarOrSchedule,
    observe: Callable[[Any, Any, Any], Any],
    invert: Callable[[Any, Any], Any],
    precondition: Callable[[Any, Any], Any],
    *,
    is_block: Callable[[Any], bool] | None,
    statistics_decay: float = 0.9,
    momentum: float = 0.9,
    statistics_period: int = 1,
    inverse_period: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """Steps along the momentum, preconditioned block by block.

    Args:
      learning_rate: a number or a schedule.
      observe: (gradients, `sampled_grads`, the inverses so far) -> what the statistics average.
      invert: (a block of parameters, its statistics) -> its inverses, of the same shapes.
      precondition: (a block of the momentum, its inverses) -> the direction.
      is_block: which nodes of the parameters' tree are blocks; None: the leaves.
      statistics_decay, momentum, statistics_period, inverse_period: see `Averages`.
    """

    def init(params: optax.Params) -> KroneckerState:
        zeros = jax.tree.map(jnp.zeros_like, params)

        # Arrays of their own, so that all can be donated.
        def count() -> jax.Array:
            return jnp.zeros([], jnp.int32)

        def blocks() -> Any:
            return jax.tree.map(_zero_statistics, params, is_leaf=is_block)

        return KroneckerState(count(), count(), zeros, blocks(), blocks())

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        sampled_grads: Any = None,
        warm_start: str | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params, extra_args
        t, n = state.count, state.statistics_count

        def absorb(weight: jax.Array) -> Any:
            new = observe(updates, sampled_grads() if callable(sampled_grads) else sampled_grads, state.inverses)
            return jax.tree.map(lambda c, x: (1 - weight) * c + weight * x, state.statistics, new)

        def refresh(statistics: Any) -> Any:
            return jax.tree.map(invert, updates, statistics, is_leaf=is_block)

        if warm_start == "absorb":
            return updates, state._replace(statistics_count=n + 1, statistics=absorb(1 / (n + 1)))
        if warm_start == "refresh":
            return updates, state._replace(inverses=refresh(state.statistics))
        absorb_now = t % statistics_period == 0
        refresh_now = (t % inverse_period == 0) | (absorb_now & (t < inverse_period))
        weight = jnp.maximum(1 - statistics_decay, 1 / (n + 1))
        statistics = lax.cond(absorb_now, lambda: absorb(weight), lambda: state.statistics)
        inverses = lax.cond(refresh_now, lambda: refresh(statistics), lambda: state.inverses)
        n = jnp.where(absorb_now, n + 1, n)
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        direction = jax.tree.map(precondition, velocity, inverses, is_leaf=is_block)
        return direction, KroneckerState(jnp.asarray(optax.safe_increment(t)), n, velocity, statistics, inverses)

    scale = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(scale, optax.scale_by_learning_rate(learning_rate))


def inverse_root(matrix: jax.Array, p: int) -> jax.Array:
    """A^(-1/p) of a symmetric positive definite matrix, by the coupled Newton iteration (Guo & Higham, 2006).

    X_0 = z^(1/p) I, M_0 = z A, T = ((p+1) I - M) / p, X <- X T, M <- T^p M, until M is the identity; the factor z
    puts the eigenvalues of M_0 below p + 1. In float32 an ill-conditioned A does not get there: where the error begins
    to grow, the X before it is taken, as in the implementation of Anil et al. (2021).
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    z = (1 + p) / (2 * jnp.linalg.norm(matrix))

    def iterate(carry: Any) -> Any:
        count, x, m, error, _ = carry
        t = ((p + 1) * eye - m) / p
        new, m = x @ t, jnp.linalg.matrix_power(t, p) @ m
        now = jnp.max(jnp.abs(m - eye))
        good = now < 1.2 * error  # False for NaN, too.
        return count + 1, jnp.where(good, new, x), m, now, good

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < 100) & (carry[3] > 1e-5) & carry[4]

    start = (jnp.int32(0), z ** (1 / p) * eye, z * matrix, jnp.asarray(jnp.inf, matrix.dtype), jnp.bool_(True))
    return lax.while_loop(unfinished, iterate, start)[1]


def _inverse(matrix: jax.Array, damping: jax.Array) -> jax.Array:
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix + damping * eye), eye)


def _zero_statistics(block: Any) -> Any:
    if _is_layer(block):
        n, m = block["kernel"].shape
        return LayerFactors(jnp.zeros((n + 1, n + 1)), jnp.zeros((m, m)))
    return [jnp.zeros((d, d)) for d in _view(block).shape]


def _is_layer(node: Any) -> bool:
    return isinstance(node, Mapping) and set(node) == {"kernel", "bias"}


def _unfold(view: jax.Array, mode: int) -> jax.Array:
    return jnp.moveaxis(view, mode, 0).reshape(view.shape[mode], -1)


def _multiply_modes(w: jax.Array, matrices: list[jax.Array]) -> jax.Array:
    """The view of w times the matrix of each mode; all are symmetric."""
    product = _view(w)
    for matrix in matrices:  # Each product moves its mode to the end: after all of them they are in order.
        product = jnp.tensordot(product, matrix, axes=(0, 0))
    return product.reshape(w.shape)


def _view(w: jax.Array) -> jax.Array:
    """As TNT: the leading axes of a convolution kernel are one mode, and a scalar is a vector."""
    return w.reshape(-1, *w.shape[-2:]) if w.ndim >= 4 else jnp.atleast_1d(w)
