"""The baselines of the experiments against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from experiments.baselines import engd, inverse_root, kfac, shampoo, soap, value_and_layer_factors
from reference import contraction, mode_product

import tnt_optax

SHAPES = {"bias": (3,), "conv": (2, 2, 3, 4), "matrix": (4, 3), "scalar": (), "tall": (5, 2)}


def draws(seed, number, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(number)]


def view(x):
    return np.atleast_1d(x.reshape(-1, *x.shape[-2:]) if x.ndim > 3 else x).astype(float)


def steps(tx, params, gradients, sampled=None):
    state, update = tx.init(params), jax.jit(tx.update, donate_argnums=1)
    for grads, observed in zip(gradients, sampled or gradients, strict=True):
        updates, state = update(grads, state, params, sampled_grads=observed, unknown=1)
        yield updates


def dense_updates(gradients, observations, p, damping):
    """-P^(-1/p) m, where P is the dense Kronecker product of the damped averages of each mode's observations."""
    averages, velocity = observations[0], 0
    for t, (g, observed) in enumerate(zip(gradients, observations, strict=True)):
        weight = max(0.2, 1 / (t + 1))
        averages = [(1 - weight) * a + weight * o for a, o in zip(averages, observed, strict=True)]
        if t < 3 or t % 3 == 0:
            damped = [a + damping * np.eye(len(a)) for a in averages]
            values, vectors = np.linalg.eigh(functools.reduce(np.kron, damped))
        velocity = 0.5 * velocity + g
        yield -(vectors @ (values ** (-1 / p) * (vectors.T @ velocity.ravel()))).reshape(g.shape)


def test_shampoo_against_dense_matrices():
    gradients, options = draws(1, 7), {"statistics_decay": 0.8, "momentum": 0.5, "inverse_period": 3}
    tx = optax.inject_hyperparams(lambda rate, damping: shampoo(rate, damping=damping, **options))(0.1, 0.1)  # Traced.
    actual = [*steps(tx, gradients[0], gradients)]
    for name in SHAPES:
        views = [view(grads[name]) for grads in gradients]
        statistics = [[contraction(g, mode) for mode in range(g.ndim)] for g in views]
        for updates, expected in zip(actual, dense_updates(views, statistics, 2 * views[0].ndim, 0.1), strict=True):
            # The Newton iteration stops at an error of 1e-5, which roots of condition numbers up to 1e3 multiply.
            np.testing.assert_allclose(view(updates[name]), 0.1 * expected, atol=1e-4 * np.abs(expected).max())
    # Float32 knows the small eigenvalues to 1e-4, ten times their size; without its stop the iteration ends in NaN.
    vectors, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
    matrix = jnp.asarray(vectors * np.where(np.arange(40) < 2, 1e3, 1e-5) @ vectors.T, jnp.float32)
    assert np.linalg.norm(inverse_root(matrix, 4), 2) < 10 * 1e-5 ** (-1 / 4)


def test_kfac_against_dense_matrices():
    rng, predictive, ones = np.random.default_rng(2), tnt_optax.Normal(), np.ones((5, 1))
    params = [draws(3, 1, {"kernel": (3, 4), "bias": (4,)})[0], draws(4, 1, {"kernel": (4, 2), "bias": (2,)})[0]]
    w, v = (np.append(layer["kernel"], [layer["bias"]], axis=0).astype(float) for layer in params)

    def forward(params, x, tap):
        hidden = tap(x, x @ params[0]["kernel"] + params[0]["bias"])
        return tap(hidden, hidden @ params[1]["kernel"] + params[1]["bias"])

    shown, expected = [], ([], [])
    for t in range(7):
        x, y, key = *(rng.normal(size=(5, d)).astype(np.float32) for d in (3, 2)), jax.random.key(t)
        loss, grads, factors = value_and_layer_factors(forward, predictive)(params, x, y, key)
        shown.append((grads, factors()))
        x = np.append(x, ones, axis=1)
        hidden = np.append(x @ w, ones, axis=1)
        errors, sampled = hidden @ v - y, hidden @ v - predictive.sample(key, jnp.asarray(hidden @ v, jnp.float32))
        np.testing.assert_allclose(loss, np.sum(errors**2) / 10, rtol=1e-5)  # Float32.
        for layer, (a, back) in enumerate(((x, v[:-1].T), (hidden, np.eye(2)))):
            expected[layer].append((a.T @ errors @ back / 5, [a.T @ a / 5, (sampled @ back).T @ sampled @ back / 5]))
    # Float32, factors of condition numbers up to 100.
    tx = kfac(lambda t: 1 / (1 + t), damping=0.04, statistics_decay=0.8, momentum=0.5, inverse_period=3)
    for t, updates in enumerate(steps(tx, params, *zip(*shown, strict=True))):
        for layer, pairs in zip(updates, expected, strict=True):
            u = [*dense_updates(*zip(*pairs, strict=True), 1, 0.2)][t] / (1 + t)
            np.testing.assert_allclose(np.append(layer["kernel"], [layer["bias"]], 0), u, atol=1e-4 * np.abs(u).max())


def soap_updates(gradients, w, *, b1, b2, eps, shampoo_beta, precondition_frequency, max_dim, weight_decay):
    """SOAP of one tensor as in its authors' code: the first moment is in the eigenbases, and moves with them."""

    def rotate(x, back=False):
        for mode, basis in bases.items():
            x = mode_product(x, basis if back else basis.T, mode)
        return x

    modes = [mode for mode, d in enumerate(view(w).shape) if w.ndim > 1 and d <= max_dim]
    averages = {i: (1 - shampoo_beta) * contraction(view(gradients[0]), i) for i in modes}
    bases, m, v = {i: np.linalg.eigh(a)[1] for i, a in averages.items()}, 0, 0
    yield np.zeros_like(w)
    for t, g in enumerate(map(view, gradients[1:]), start=1):
        m, v = b1 * m + (1 - b1) * rotate(g), b2 * v + (1 - b2) * rotate(g) ** 2
        step = m / (1 - b1**t) / ((np.sqrt(v) + eps) / np.sqrt(1 - b2**t))
        yield -0.1 * (rotate(step, back=True).reshape(w.shape) + weight_decay * w)
        averages = {i: shampoo_beta * a + (1 - shampoo_beta) * contraction(g, i) for i, a in averages.items()}
        if t % precondition_frequency == 0:
            m = rotate(m, back=True)
            for i, q in bases.items():
                order = np.argsort(np.diag(q.T @ averages[i] @ q))[::-1]
                v, bases[i] = np.take(v, order, axis=i), np.linalg.qr(averages[i] @ q[:, order])[0]
            m = rotate(m)


def test_soap_against_its_authors_algorithm():
    params, *gradients = draws(5, 10)
    options = {"b1": 0.9, "b2": 0.8, "eps": 1e-2, "shampoo_beta": 0.7, "weight_decay": 0.1}
    options |= (static := {"precondition_frequency": 3, "max_dim": 4})
    actual = [*steps(optax.inject_hyperparams(soap, tuple(static))(0.1, **options), params, gradients)]
    for name, w in params.items():
        expected = [*soap_updates([g[name] for g in gradients], w.astype(float), **options)]
        # Elements of size 0.1, float32; an eigenvector's error is that of the matrix over the gap of its eigenvalue.
        np.testing.assert_allclose([u[name] for u in actual], expected, atol=1e-4, err_msg=name)


def test_soap_of_a_vector_is_adam():
    params, *gradients = draws(6, 13, {"w": (5,)})
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        adam = optax.with_extra_args_support(optax.adam(lambda t: 0.1 / (t + 2), 0.95, 0.95))
        ours = [u["w"] for u in steps(soap(lambda t: 0.1 / (t + 1)), params, gradients)]
        expected = [u["w"] for u in steps(adam, params, gradients[1:])]
    # The first step makes no update. Float32; eps is 1e-8 of the gradients.
    np.testing.assert_allclose(ours, [np.zeros(5), *expected], rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "overshooting"])
def test_engd_against_least_squares(name):
    """The first step of a linear problem is that of the pseudo-inverse. Where it is too long, it is halved."""
    rng = np.random.default_rng(0)
    matrices, targets = [rng.normal(size=(n, 30)) for n in (6, 4)], [rng.normal(size=n) for n in (6, 4)]

    def residuals_fn(params):
        linear = [m.astype("f") @ params["w"] - t.astype("f") for m, t in zip(matrices, targets, strict=True)]
        return linear if name == "linear" else [jnp.arctan(5 * r) for r in linear]  # Flat, far from the solution.

    def value_fn(params):
        return sum(jnp.mean(jnp.square(r)) / 2 for r in residuals_fn(params))

    params = {"w": jnp.zeros(30)}
    tx = engd()
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p, residuals_fn=residuals_fn, value_fn=value_fn))(params)
    step = np.asarray(updates["w"], float)
    if name == "linear":
        weights = np.repeat([6**-0.5, 4**-0.5], [6, 4])
        expected = np.linalg.lstsq(weights[:, None] * np.concatenate(matrices), weights * np.concatenate(targets))[0]
        np.testing.assert_allclose(step, expected, atol=1e-4)  # Float32, condition number below 100.
    else:
        losses = [value_fn({"w": jnp.float32(2.0**h * step)}) for h in (-1, 0, 1)]
        assert losses[1] < min(losses[::2])
    assert value_fn({"w": jnp.float32(step)}) < value_fn(params)
