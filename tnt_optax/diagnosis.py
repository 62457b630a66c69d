"""What an optimizer's state tells of the training, as numbers for a logger."""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from tnt_optax import checks, factors, sharding, states
from tnt_optax.dtypes import as_float, float32_or_better
from tnt_optax.inversion import eigenvalues
from tnt_optax.states import Found, TNTState
from tnt_optax.transform import NumberOrSchedule


def diagnostics(
    opt_state: optax.OptState, *, damping: NumberOrSchedule, grads: Any = None, updates: Any = None
) -> dict[str, jax.Array]:
    """Numbers by name, of the factors of every parameter and of the steps until now. Nothing is changed.

    It computes the eigenvalues of every factor, which takes longer than a refresh of the inverses: call it rarely,
    inside `jax.jit` or not. (With a state that is stacked by `jax.vmap`, inside `jax.vmap`.) On a mesh of devices every
    device gets all numbers.

    For mode i = 0, 1, ... of every parameter, with the factor U of Eq. (5) that belongs to the present statistics, its
    eigenvalues l_1 <= ... <= l_d (of a diagonal factor: its entries) and the damping eps. All are float32 (float64 for
    float64 parameters) scalars, or of the shape of the stack where `Modes.batch` stacks independent parameters:

      "<path>/mode_<i>/trace": tr U.
      "<path>/mode_<i>/mean_eigenvalue": tr U / d, which is the same for all modes of a parameter.
      "<path>/mode_<i>/smallest_eigenvalue", "<path>/mode_<i>/largest_eigenvalue": l_1 and l_d.
      "<path>/mode_<i>/condition": l_d / l_1, of U. Infinity where U is singular, also for U = 0.
      "<path>/mode_<i>/damped_condition": (l_d + eps) / (l_1 + eps), of U + eps I, the matrix that is inverted; 1 for
        U = 0.
      "<path>/mode_<i>/share_below_damping": of the eigenvalues, those that are smaller than eps; 1 for U = 0.

    The eigenvalues of a dense factor are known to within rounding errors of the size d * (the dtype's epsilon) * l_d:
    smaller ones, and negative ones, count as 0.

    For every parameter:

      "<path>/age": int32; how many steps were made with its present inverses: 1 after the step that computed them, 0
        after a warm start, -1 if there are none. Only for `tnt`, as everything that `scale_by_tnt` does not count.
      "<path>/update_to_gradient": |u| / |g|, the norm of the update by that of the gradient; infinity where only g = 0,
        0 where both are.
      "<path>/cosine": <u, g> / (|u| |g|); -1 for gradient descent; 0 where one of them is 0.

    The last two need `grads` and `updates`. A parameter without elements has no numbers. For the whole:

      "tnt/steps": int32; how many steps were made, t.
      "tnt/absorbed": int32; how many sampled gradients the statistics absorbed.
      "tnt/damping": eps.
      "tnt/bounded_steps": int32; how many steps the trust radius shortened. Only for `tnt`, as all that follow.
      "tnt/bounded_share": the same by the number of all steps; 0 before the first.
      "tnt/rejected_gradients", "tnt/rejected_sampled_gradients", "tnt/rejected_inverses": int32; see `RejectedState`.

    <path> is `jax.tree_util.keystr(path, simple=True, separator="/")`, such as "dense/kernel"; where that is the same
    for two parameters, `keystr(path)`. Where `opt_state` holds several states of this library (in `optax.partition`,
    say), the place of each stands before all of its names.

    Args:
      opt_state: of `tnt` or `scale_by_tnt`, also inside chained, masked, partitioned or injected states.
      damping: what the optimizer has: a number, an array without axes, or a schedule, which is evaluated at the last
        step. (Of `optax.inject_hyperparams`: `opt_state.hyperparams["damping"]`.)
      grads: None, or the gradients of the last step, a tree like the parameters.
      updates: None, or what `update` made of them.

    Raises:
      ValueError: there is no `TNTState` in `opt_state`, `damping` is out of range, only one of `grads` and `updates`
        came, or one of them has another structure or shape than the parameters.
      TypeError: `damping` is no number, or `opt_state` is stacked.
    """
    if not callable(damping):
        checks.check_positive("damping", damping)
    if (grads is None) != (updates is None):
        given, missing = ("grads", "updates") if updates is None else ("updates", "grads")
        raise ValueError(f"{missing}: expected together with {given}, got None.")
    return sharding.everywhere(functools.partial(_read, damping))(opt_state, grads, updates)


def _read(damping: NumberOrSchedule, opt_state: optax.OptState, grads: Any, updates: Any) -> dict[str, jax.Array]:
    found = states.find(opt_state)
    values: dict[str, jax.Array] = {}
    for state in found:
        count = _array(state.tnt.count)
        if count.ndim:
            raise TypeError(
                f"opt_state: expected that of one optimizer, got a stack of shape {count.shape}: call diagnostics "
                "inside jax.vmap."
            )
        last = jnp.maximum(count - 1, 0)
        eps = as_float(damping(last) if callable(damping) else damping)
        numbers = {**_of_the_whole(state, eps), **_of_the_parameters(state, eps, grads, updates)}
        place = "" if len(found) == 1 else keystr(state.path, simple=True, separator="/") + "/"
        values |= {place + name: value for name, value in numbers.items()}
    return values


def _of_the_whole(state: Found, eps: jax.Array) -> dict[str, jax.Array]:
    steps = _array(state.tnt.count)
    values = {"tnt/steps": steps, "tnt/absorbed": _array(state.tnt.statistics_count), "tnt/damping": eps}
    if state.history is not None:
        bounded = _array(state.history.bounded)
        values["tnt/bounded_steps"] = bounded
        values["tnt/bounded_share"] = as_float(bounded) / as_float(jnp.maximum(steps, 1))
    if state.rejected is not None:
        values |= {f"tnt/rejected_{what}": _array(n) for what, n in state.rejected._asdict().items()}
    return values


def _of_the_parameters(state: Found, eps: jax.Array, grads: Any, updates: Any) -> dict[str, jax.Array]:
    sizes, structure = jax.tree.flatten(jax.tree.map(jnp.size, state.tnt.momentum))
    # flax.nnx.Optimizer may hold the tuples as mappings {0: C_1, 1: C_2}; a checkpoint may hold lists.
    contractions = [tuple(jax.tree.leaves(matrices)) for matrices in structure.flatten_up_to(state.tnt.contractions)]
    names = _names(state.tnt)
    values: dict[str, jax.Array] = {}

    factors_of = {
        (index, mode): _factors(mode, matrices, size)
        for index, (matrices, size) in enumerate(zip(contractions, sizes, strict=True))
        for mode in range(len(matrices))
        if size
    }
    for (index, mode), (factor, spectrum) in _with_spectra(factors_of).items():
        matrix = contractions[index][mode]
        stack = matrix.shape[: matrix.ndim - factor.ndim + 1]
        for what, value in _of_a_factor(factor, spectrum, eps.astype(factor.dtype)).items():
            values[f"{names[index]}mode_{mode}/{what}"] = value.reshape(stack)

    if state.history is not None:
        count, refreshed = _array(state.tnt.count), _array(state.history.refreshed)
        for place, part in factors.equal_parts(contractions, len(refreshed)):
            age = jnp.where(refreshed[place] < 0, -1, count - refreshed[place])
            values |= {f"{name}age": age for name, size in zip(names[part], sizes[part], strict=True) if size}

    if grads is not None:
        pairs = [
            jax.tree.leaves(checks.match(name, tree, state.tnt.momentum, "the optimizer's state"))
            for name, tree in (("grads", grads), ("updates", updates))
        ]
        for name, size, g, u in zip(names, sizes, *pairs, strict=True):
            if size:
                values[f"{name}update_to_gradient"], values[f"{name}cosine"] = _compare(u, g)
    return values


def _names(state: TNTState) -> list[str]:
    """The beginning of the names of every parameter's numbers."""
    # flax.nnx.Optimizer's own state has every array in a box, a variable, which is no part of a parameter's path.
    ((box, _),) = jax.tree_util.tree_leaves_with_path(state.count)
    paths = [path[: len(path) - len(box)] for path, _ in jax.tree_util.tree_leaves_with_path(state.momentum)]
    simple = [keystr(path, simple=True, separator="/") for path in paths]
    often = collections.Counter(simple)
    names = [keystr(path) if often[name] > 1 else name for path, name in zip(paths, simple, strict=True)]
    return [f"{name}/" if name else "" for name in names]


def _factors(mode: int, contractions: tuple[jax.Array, ...], size: int) -> jax.Array:
    """U of one mode and all slices of a stack: (slices, d, d), or (slices, d) where only the diagonal is kept."""
    dims = [matrix.shape[-1] for matrix in contractions]
    matrix, d = contractions[mode], dims[mode]
    slices = size // math.prod(dims)
    shape = (slices, d, d) if matrix.size == slices * d * d else (slices, d)
    return jax.vmap(lambda c: factors.identify(c, len(dims), math.prod(dims)))(matrix.reshape(shape))


def _with_spectra(factors_of: dict[Any, jax.Array]) -> dict[Any, tuple[jax.Array, jax.Array]]:
    """Each stack of factors with its eigenvalues (slices, d), the smallest first.

    Factors of one length go through one program together, so that a model of many equal layers compiles as fast as one
    of few.
    """
    groups: dict[Any, list[Any]] = {}
    for key, factor in factors_of.items():
        groups.setdefault((factor.shape[1:], factor.dtype), []).append(key)
    spectra = {}
    for keys in groups.values():
        together = jax.vmap(_spectrum)(jnp.concatenate([factors_of[key] for key in keys]))
        start = 0
        for key in keys:
            spectra[key] = together[start : start + len(factors_of[key])]
            start += len(factors_of[key])
    return {key: (factor, spectra[key]) for key, factor in factors_of.items()}


def _spectrum(factor: jax.Array) -> jax.Array:
    if factor.ndim == 1:
        return jnp.sort(factor)
    spectrum = eigenvalues(factor)
    rounding = len(factor) * jnp.finfo(factor.dtype).eps * spectrum[-1]
    return jnp.where(spectrum > rounding, spectrum, 0)


def _of_a_factor(factor: jax.Array, spectrum: jax.Array, eps: jax.Array) -> dict[str, jax.Array]:
    trace = jnp.sum(factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=1, axis2=2), axis=-1)
    smallest, largest = spectrum[:, 0], spectrum[:, -1]
    return {
        "trace": trace,
        "mean_eigenvalue": trace / factor.shape[-1],
        "smallest_eigenvalue": smallest,
        "largest_eigenvalue": largest,
        "condition": jnp.where(smallest > 0, largest / jnp.where(smallest > 0, smallest, 1), jnp.inf),
        "damped_condition": (largest + eps) / (smallest + eps),
        "share_below_damping": jnp.mean((spectrum < eps).astype(factor.dtype), axis=-1),
    }


def _compare(u: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|u| / |g| and the cosine of u and g."""
    dtype = jnp.promote_types(float32_or_better(u), float32_or_better(g))
    (u, scale_u, norm_u), (g, scale_g, norm_g) = (_normed(x.astype(dtype)) for x in (u, g))
    ratio = jnp.where(norm_u > 0, (scale_u / scale_g) * (norm_u / norm_g), 0)
    cosine = jnp.vdot(u, g, precision=jax.lax.Precision.HIGHEST) / jnp.where(norm_u * norm_g > 0, norm_u * norm_g, 1)
    # NaN is no direction, and is told.
    return jnp.where(jnp.isnan(norm_u), norm_u, ratio), cosine


def _normed(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x = scale * y; y, scale, and |y|, which does not overflow."""
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1)
    y = x / scale
    return y, scale, jnp.sqrt(jnp.sum(jnp.square(y)))


def _array(box: Any) -> jax.Array:
    """A counter, which may be in a box (a Flax variable)."""
    (array,) = jax.tree.leaves(box)
    return array
