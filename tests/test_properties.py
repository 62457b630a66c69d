"""Properties that hold for every shape, dtype, period and spectrum: Hypothesis draws them.

The truth is always float64 NumPy: what the library makes of a transformed input is compared with the transformed
result of `reference`, or with a bound of the paper. XLA compiles for each shape, so shapes come from short lists and
whole runs are one compiled scan, whose hyper-parameters are arguments; what is drawn is numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from tnt_optax import TensorView, scale_by_tnt
from tnt_optax.blocks import describe, map_normalized_factors

STEPS = 6
# The same examples on every run: a failure is a change of the library, never luck. Hypothesis' explanations of
# failures are left out because they take a minute each.
properties = functools.partial(
    settings, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink)
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A parameter, and by hand: the tensors in which it is preconditioned, and back from them."""

    shape: tuple[int, ...]
    dtype: Any
    views: tuple[tuple[int, ...], ...]
    split: Callable[[np.ndarray], list[np.ndarray]]
    join: Callable[[list[np.ndarray]], np.ndarray]
    view: TensorView | None = None
    max_dim: int = 100


def whole(shape, view, dtype, max_dim=100):
    """A parameter that is one tensor in the default view."""
    return Case(shape, dtype, (view,), lambda x: [x.reshape(view)], lambda t: t[0].reshape(shape), None, max_dim)


# Ranks 0 to 4; that of rank 4 merges its two leading axes. With max_dim=3 the longer modes are diagonal.
DEFAULT = [
    whole((), (1,), jnp.float32),
    whole((5,), (5,), jnp.bfloat16),
    whole((4, 3), (4, 3), jnp.float32),
    whole((1, 5), (1, 5), jnp.float64, max_dim=3),
    whole((3, 2, 4), (3, 2, 4), jnp.float64),
    whole((3, 1, 2, 4), (3, 2, 4), jnp.bfloat16, max_dim=3),
]
DENSE, DIAGONAL = DEFAULT[2], [DEFAULT[3], DEFAULT[5], whole((4, 3), (4, 3), jnp.float32, max_dim=1)]

MERGED = [
    Case(
        (2, 3, 4),
        jnp.float32,
        ((4, 6),),
        lambda x: [x.transpose(2, 0, 1).reshape(4, 6)],
        lambda t: t[0].reshape(4, 2, 3).transpose(1, 2, 0),
        TensorView(((2,), (0, 1))),
    ),
    Case(
        (2, 3, 4),
        jnp.float64,
        ((8, 3),),
        lambda x: [x.transpose(2, 0, 1).reshape(8, 3)],
        lambda t: t[0].reshape(4, 2, 3).transpose(1, 2, 0),
        TensorView(((-1, 0), (1,))),
    ),
    Case(
        (2, 1, 3, 2),
        jnp.bfloat16,
        ((6, 2),),
        lambda x: [x[:, 0].transpose(1, 0, 2).reshape(6, 2)],
        lambda t: t[0].reshape(3, 2, 2).transpose(1, 0, 2)[:, None],
        TensorView(((2, 0, 1), (3,))),
    ),
    Case((3, 2), jnp.float32, ((6,),), lambda x: [x.T.ravel()], lambda t: t[0].reshape(2, 3).T, TensorView(((1, 0),))),
]

BATCHED = [
    Case(
        (3, 4, 2),
        jnp.float32,
        4 * ((3, 2),),
        lambda x: [x[:, i] for i in range(4)],
        lambda t: np.stack(t, axis=1),
        TensorView(((0,), (2,)), batch_axes=(1,)),
    ),
    Case(
        (3, 2, 2, 3),
        jnp.float64,
        6 * ((3, 2),),
        lambda x: [x[j, :, i].T for i in range(2) for j in range(3)],
        lambda t: np.stack([np.stack([t[3 * i + j].T for j in range(3)]) for i in range(2)], axis=2),
        TensorView(((3,), (1,)), batch_axes=(2, 0)),
    ),
    Case(
        (2, 5, 2),
        jnp.bfloat16,
        2 * ((10,),),
        lambda x: [x[..., i].ravel() for i in range(2)],
        lambda t: np.stack([s.reshape(2, 5) for s in t], axis=-1),
        TensorView(((0, 1),), batch_axes=(-1,)),
        max_dim=4,
    ),
    # Slices that are scalars: k = 1 and d_1 = 1.
    Case(
        (5,),
        jnp.float32,
        5 * ((1,),),
        lambda x: [s.reshape(1) for s in x],
        np.concatenate,
        TensorView((), batch_axes=(0,)),
    ),
]


def rounded(x, dtype):
    """The float64 numbers that are left of `x` in `dtype`: what library and reference both get."""
    return np.asarray(x).astype(dtype).astype(np.float64)


def gradients(seed, shape, decades):
    """STEPS gradients with entries of size 1, whose singular values along every axis spread over `decades`."""
    rng = np.random.default_rng(seed)
    tensors = rng.normal(size=(STEPS, *shape))
    for axis, d in enumerate(shape, start=1):
        rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
        tensors = reference.mode_product(tensors, rotation * np.logspace(0, -decades, d), axis)
    return tensors / np.sqrt(np.mean(tensors**2))


@dataclasses.dataclass(frozen=True)
class Problem:
    case: Case
    hyperparams: dict[str, float]
    seed: int
    decades: float

    @functools.cached_property
    def grads(self):
        return rounded(gradients(self.seed, self.case.shape, 0), self.case.dtype)

    @functools.cached_property
    def sampled(self):
        return rounded(gradients(self.seed + 1, self.case.shape, self.decades), self.case.dtype)


SEEDS, DECADES = st.integers(0, 2**32 - 1), st.floats(0, 2)
# The sampled gradients' entries have size 1, and so the U_i the mean eigenvalue 1: condition numbers of a few 100.
HYPERPARAMS = st.fixed_dictionaries(
    {
        # Hundredths, because XLA takes numbers as small as 1e-310 for zero, and NumPy does not.
        "damping": st.integers(3, 100).map(lambda n: n / 100),
        "statistics_decay": st.integers(0, 99).map(lambda n: n / 100),
        "momentum": st.integers(0, 95).map(lambda n: n / 100),
        "statistics_period": st.integers(1, 4),
        "inverse_period": st.integers(1, 4),
    }
)


def problems(cases):
    return st.builds(Problem, st.sampled_from(cases), HYPERPARAMS, SEEDS, DECADES)


@functools.partial(jax.jit, static_argnames=("view", "max_dim", "fisher"))
def scan(hyperparams, grads, sampled, view, max_dim, fisher):
    tx = scale_by_tnt(views=lambda path, shape: view, max_dim=max_dim, fisher=fisher, **hyperparams)

    def step(state, gradients):
        updates, state = tx.update(gradients[0], state, sampled_grads=gradients[1])
        return state, (updates, state)

    return lax.scan(step, tx.init(grads[0]), (grads, sampled))[1]


def library(case, hyperparams, grads, sampled, fisher="sampled"):
    """The updates and the states of all steps."""
    with jax.enable_x64(case.dtype == jnp.float64):
        args = (jnp.asarray(x, case.dtype) for x in (grads, sampled))
        updates, states = scan(hyperparams, *args, case.view, case.max_dim, fisher)
        assert updates.dtype == case.dtype
        return np.asarray(updates, np.float64), jax.tree.map(np.asarray, states)


def epsilon(case):
    """The rounding error of the state, which is at least float32."""
    return float(jnp.finfo(jnp.float64 if case.dtype == jnp.float64 else jnp.float32).eps)


def truth(case, hyperparams, grads, sampled):
    """The updates of the reference, how far a correct computation may be from them, and the reference at the end."""
    algorithm = reference.TNT(case.views, learning_rate=1.0, max_dim=case.max_dim, **hyperparams)
    size = 0.0  # Of the numbers that were summed up to the momentum.
    updates, tolerances = [], []
    for g, s in zip(grads, sampled, strict=True):
        directions = algorithm.direction(case.split(g), case.split(s))
        size = hyperparams["momentum"] * size + max(np.linalg.norm(x) for x in case.split(g))
        # A product with inverses multiplies their errors by up to the product of their norms.
        errors = [
            relative_error(case, inverses) * math.prod(np.linalg.norm(p, 2) for p in inverses) * size
            for inverses in algorithm.inverses
        ]
        updates.append(case.join(directions))
        # The update is also rounded to the dtype of the gradients, once.
        rounding = float(jnp.finfo(case.dtype).eps) * np.abs(updates[-1])
        tolerances.append(case.join([np.full(v, e) for v, e in zip(case.views, errors, strict=True)]) + rounding)
    return np.stack(updates), np.stack(tolerances), algorithm


def relative_error(case, inverses):
    """An inverse of condition number c has a relative error of some c*eps.

    The 8 is for the roundings of up to 6 moving averages, and of sums of up to 10 products.
    """
    return 8 * epsilon(case) * sum(np.linalg.cond(p) for p in inverses)


def assert_close(actual, expected, tolerance):
    wrong = ~(np.abs(actual - expected) <= tolerance)
    assert not np.any(wrong), f"{actual[wrong]} instead of {expected[wrong]}, tolerance {tolerance[wrong]}"


def as_matrix(m):
    """In float64, and with its zeros where only the diagonal is kept."""
    return np.diag(m.astype(np.float64)) if m.ndim == 1 else m.astype(np.float64)


SMALL = st.integers(-8, 8)


@properties(max_examples=20)
@given(problems(DEFAULT), SMALL, SMALL)
def test_updates_are_linear_in_the_gradients(problem, a, b):
    """The momentum begins at zero, and refreshes depend on the sampled gradients alone."""
    case, hyperparams, sampled = problem.case, problem.hyperparams, problem.sampled
    x, y = whole_numbers(problem)
    ours, _ = library(case, hyperparams, a * x + b * y, sampled)
    of_x, tolerance_x, _ = truth(case, hyperparams, x, sampled)
    of_y, tolerance_y, _ = truth(case, hyperparams, y, sampled)
    assert_close(ours, a * of_x + b * of_y, abs(a) * tolerance_x + abs(b) * tolerance_y)


@properties(max_examples=15)
@given(problems([DENSE]), SMALL, SMALL)
def test_updates_are_linear_in_the_gradients_between_empirical_refreshes(problem, a, b):
    """Here the gradients are the statistics too, but only those of the first step."""
    case = problem.case
    hyperparams = {**problem.hyperparams, "momentum": 0.0, "statistics_period": STEPS, "inverse_period": STEPS}
    x, y = whole_numbers(problem)
    gradients = np.concatenate([problem.sampled[:1], a * x[1:] + b * y[1:]])
    ours, _ = library(case, hyperparams, gradients, np.full_like(gradients, np.nan), fisher="empirical")
    of_x, tolerance_x, _ = truth(case, hyperparams, x, problem.sampled)
    of_y, tolerance_y, _ = truth(case, hyperparams, y, problem.sampled)
    assert_close(ours[1:], (a * of_x + b * of_y)[1:], (abs(a) * tolerance_x + abs(b) * tolerance_y)[1:])


def whole_numbers(problem):
    """Two runs' gradients, of which bfloat16 too holds every combination with SMALL coefficients exactly."""
    return np.random.default_rng(problem.seed).integers(-5, 6, size=(2, STEPS, *problem.case.shape)).astype(float)


@properties(max_examples=20)
@given(problems(DEFAULT), st.lists(st.permutations(range(5)), min_size=4, max_size=4))
def test_permuted_gradients_give_permuted_updates(problem, permutations):
    def permuted(x):
        for axis, d in enumerate(problem.case.shape):
            x = np.take(x, [i for i in permutations[axis] if i < d], axis=axis + 1)  # Axis 0 counts the steps.
        return x

    ours, _ = library(problem.case, problem.hyperparams, permuted(problem.grads), permuted(problem.sampled))
    expected, tolerance, _ = truth(problem.case, problem.hyperparams, problem.grads, problem.sampled)
    assert_close(ours, permuted(expected), permuted(tolerance))


@properties(max_examples=20)
@given(problems(MERGED))
def test_merged_and_permuted_axes_equal_the_parameter_reshaped_by_hand(problem):
    assert_equals_truth(problem)


@properties(max_examples=20)
@given(problems(BATCHED))
def test_a_batch_axis_equals_separate_parameters(problem):
    assert_equals_truth(problem)


def assert_equals_truth(problem):
    ours, _ = library(problem.case, problem.hyperparams, problem.grads, problem.sampled)
    expected, tolerance, _ = truth(problem.case, problem.hyperparams, problem.grads, problem.sampled)
    assert_close(ours, expected, tolerance)


@properties(max_examples=20)
@given(problems(DEFAULT), st.integers(-12, 12).map(lambda n: 2.0**n))
def test_scaled_sampled_gradients_scale_the_contractions_and_leave_mean_eigenvalues_equal(problem, scale):
    """By powers of two, which no dtype rounds."""
    case, (view,) = problem.case, problem.case.views
    _, states = library(case, problem.hyperparams, problem.grads, scale * problem.sampled)
    *_, algorithm = truth(case, problem.hyperparams, problem.grads, problem.sampled)
    ours = [c[-1] for c in states.contractions]
    for c, expected in zip(ours, algorithm.contractions[0], strict=True):
        # Up to 6 averages of sums of 12 products, each of which is at most the largest diagonal entry.
        tolerance = 40 * epsilon(case) * scale**2 * np.max(expected)
        np.testing.assert_allclose(as_matrix(c), scale**2 * expected, rtol=0, atol=tolerance)
    with jax.enable_x64(case.dtype == jnp.float64):
        block = describe(jnp.zeros(case.shape, case.dtype), lambda path, shape: case.view, case.max_dim)
        (modes,) = map_normalized_factors(lambda factor, u: u, [block], [[jnp.asarray(c) for c in ours]])
        normalized = [as_matrix(np.asarray(u)) for u in modes]
    c0 = (scale**2 * np.trace(algorithm.contractions[0][0]) / math.prod(view)) ** (1 / len(view))
    # The same roundings, now of sums of numbers that are not negative, and those of k-th roots.
    np.testing.assert_allclose([np.trace(u) / len(u) for u in normalized], c0, rtol=40 * epsilon(case))


@properties(max_examples=20)
@given(problems(DIAGONAL))
def test_diagonal_factors_are_the_diagonals_of_dense_contractions(problem):
    case, hyperparams = problem.case, problem.hyperparams | {"inverse_period": 1}
    _, states = library(case, hyperparams, problem.grads, problem.sampled)
    *_, dense = truth(dataclasses.replace(case, max_dim=100), hyperparams, problem.grads, problem.sampled)
    normalized = reference.normalize_factors(dense.contractions[0])
    ours = zip(states.contractions, states.inverses, strict=True)
    for (c, p), expected, u in zip(ours, dense.contractions[0], normalized, strict=True):
        assert (c.ndim == 2) == (len(expected) > case.max_dim)
        if c.ndim == 2:  # The first axis counts the steps.
            # Some 20 roundings of sums of numbers that are not negative; in U, those of the trace's k-th root too.
            np.testing.assert_allclose(c[-1], np.diag(expected), rtol=20 * epsilon(case))
            np.testing.assert_allclose(p[-1], 1 / (np.diag(u) + hyperparams["damping"]), rtol=40 * epsilon(case))


def norms_of_contractions(case, hyperparams, sampled):
    """For every mode, ||E[G^(i)]||, Lemma 1's bound on it, and tr(F)/d_i, where E is the mean of `sampled`."""
    plain_mean = {**hyperparams, "statistics_decay": 1 - 1 / STEPS, "statistics_period": 1}
    _, states = library(case, plain_mean, np.zeros_like(sampled), sampled)
    vectors = np.stack([case.split(s)[0].ravel() for s in sampled])
    fisher = vectors.T @ vectors / STEPS
    return [
        (np.linalg.norm(as_matrix(c[-1]), 2), fisher.shape[0] / d * np.linalg.norm(fisher, 2), np.trace(fisher) / d)
        for c, d in zip(states.contractions, case.views[0], strict=True)
    ]


@properties(max_examples=20)
@given(problems(DEFAULT))
def test_lemma_1_bounds_the_contractions(problem):
    slack = 40 * epsilon(problem.case)  # The roundings of up to 6 averages of sums of 24 products.
    for norm, bound, mean_eigenvalue in norms_of_contractions(problem.case, problem.hyperparams, problem.sampled):
        assert mean_eigenvalue * (1 - slack) <= norm <= bound * (1 + slack)


@properties(max_examples=15)
@given(problems(DEFAULT), st.integers(0, 4))
def test_lemma_1_is_attained_by_one_row_with_uncorrelated_entries(problem, row):
    """For such a distribution the bound is an equation, so that a contraction that is too large does not pass."""
    case, (view,) = problem.case, problem.case.views
    attainable = [mode for mode, d in enumerate(view) if math.prod(view) // d <= STEPS]
    assert attainable
    for mode in attainable:
        units = np.zeros((STEPS, *view))
        for unit, other in zip(units, np.ndindex(*view[:mode], *view[mode + 1 :]), strict=False):
            unit[(*other[:mode], row % view[mode], *other[mode:])] = 1.0
        sampled = np.stack([case.join([u]) for u in units])
        norm, bound, _ = norms_of_contractions(case, problem.hyperparams, sampled)[mode]
        assert norm == pytest.approx(bound, rel=40 * epsilon(case))  # As above.


@properties(max_examples=20)
@given(problems(DEFAULT), st.integers(-6, -1).map(lambda n: 2.0**n), st.booleans())
def test_lemma_2_bounds_the_preconditioner_on_both_sides(problem, scale, one_draw):
    """With one draw, which is an outer product, the U_i are singular, and eps^-k is attained."""
    case = problem.case
    # Refreshed in every step, the inverses at the end are those of the contractions at the end.
    hyperparams = {**problem.hyperparams, "inverse_period": 1}
    sampled = scale * problem.sampled
    if one_draw:
        corner = np.zeros(case.views[0])
        corner.flat[problem.seed % corner.size] = scale
        sampled = np.stack(STEPS * [case.join([corner])])
    _, states = library(case, hyperparams, problem.grads, sampled)
    *_, algorithm = truth(case, hyperparams, problem.grads, sampled)
    eps, inverses = hyperparams["damping"], [as_matrix(p[-1]) for p in states.inverses]
    eigenvalues = np.linalg.eigvalsh(functools.reduce(np.kron, inverses))
    spectra = [np.linalg.eigvalsh(u) for u in reference.normalize_factors(algorithm.contractions[0])]
    lowest, highest = (math.prod(1 / (u[i] + eps) for u in spectra) for i in (-1, 0))
    slack = relative_error(case, algorithm.inverses[0])
    # The smallest eigenvalue is smaller than the norm, to which errors are relative, by the condition number; and
    # `eigvalsh` itself errs by the dimension, of up to 24, times float64's epsilon times the largest eigenvalue.
    slack_below = slack * max(np.linalg.cond(p) for p in algorithm.inverses[0])
    slack_below += 24 * np.finfo(np.float64).eps * highest / lowest
    assert slack_below < 0.05  # In float32; in float64 it is below 1e-8.
    assert lowest * (1 - slack_below) <= eigenvalues[0]
    assert eigenvalues[-1] <= eps ** -len(spectra) * (1 + slack)
    # Both ends of the spectrum are known, and the upper one is the bound where every U_i is singular.
    assert eigenvalues[0] == pytest.approx(lowest, rel=slack_below)
    assert eigenvalues[-1] == pytest.approx(highest, rel=slack)


@st.composite
def shapes_and_views(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    axes = draw(st.permutations([draw(st.sampled_from([i, i - len(shape)])) for i in range(len(shape))]))
    stacked = draw(st.integers(0, len(shape)))
    modes: list[tuple[int, ...]] = []
    for axis in axes[stacked:]:
        if modes and draw(st.booleans()):
            modes[-1] += (axis,)
        else:
            modes.append((axis,))
    return shape, TensorView(tuple(modes), batch_axes=tuple(axes[:stacked]))


@properties(max_examples=25)
@given(shapes_and_views())
def test_to_tensor_and_back(shape_and_view):
    shape, view = shape_and_view
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)  # Every entry is another number.
    block = describe(jnp.asarray(x), lambda path, shape: view, 100)
    tensor = block.to_tensor(jnp.asarray(x))
    # Where each entry should be: the indices along batch axes, then one for every mode.
    at = np.indices(shape).reshape(len(shape), x.size)
    merged = [np.ravel_multi_index([at[axis] for axis in mode], [shape[axis] for axis in mode]) for mode in view.modes]
    places = (*(at[axis] for axis in view.batch_axes), *(merged or [np.zeros(x.size, int)]))
    # A view moves numbers, and computes none.
    np.testing.assert_array_equal(np.asarray(tensor)[places], x.ravel())
    assert tensor.size == x.size
    np.testing.assert_array_equal(block.from_tensor(tensor), x)
