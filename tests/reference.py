"""Algorithm 3 of the paper, and the quadratic model, in plain float64 NumPy: the truth for the library's tests.

Written from the paper, for reading: every tensor is dense, every factor is a full matrix, every inverse is
`numpy.linalg.inv`, and nothing is shared with the library. Tensors are given in the view in which they are
preconditioned (a convolution kernel as (H*W, I, O)).
"""

import numpy as np


def matricize(tensor, mode):
    """mat_i: the rows run over axis `mode`, the columns over all the others."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def contraction(tensor, mode):
    """G^(i) = mat_i(G) mat_i(G)^T."""
    unfolded = matricize(tensor, mode)
    return unfolded @ unfolded.T


def mode_product(tensor, matrix, mode):
    """tensor x_mode matrix."""
    return np.moveaxis(np.tensordot(matrix, tensor, axes=(1, mode)), 0, mode)


def normalize_factors(contractions):
    """Eq. (5): U_i from the (averaged) contractions."""
    dims = [len(c) for c in contractions]
    k, size = len(dims), np.prod(dims, dtype=float)
    c0 = (np.trace(contractions[0]) / size) ** (1 / k)
    if c0 == 0:
        return [np.zeros_like(c) for c in contractions]
    return [c / (c0 ** (k - 1) * (size / d)) for c, d in zip(contractions, dims, strict=True)]


class TNT:
    """Tensor Normal Training of a list of tensors."""

    def __init__(
        self,
        shapes,
        *,
        learning_rate,
        damping,
        statistics_decay=0.9,
        momentum=0.9,
        weight_decay=0.0,
        statistics_period=1,
        inverse_period=1,
        max_dim=10**9,
    ):
        self.learning_rate, self.damping = learning_rate, damping
        self.statistics_decay, self.mu, self.weight_decay = statistics_decay, momentum, weight_decay
        self.statistics_period, self.inverse_period = statistics_period, inverse_period
        self.max_dim = max_dim
        self.t, self.n = 0, 0
        self.momentum = [np.zeros(shape) for shape in shapes]
        self.contractions = [[np.zeros((d, d)) for d in shape] for shape in shapes]
        self.inverses = [[np.zeros((d, d)) for d in shape] for shape in shapes]

    def absorb(self, sampled_grads, weight):
        for averages, tensor in zip(self.contractions, sampled_grads, strict=True):
            for mode, average in enumerate(averages):
                new = contraction(tensor, mode)
                if len(new) > self.max_dim:
                    new = np.diag(np.diag(new))
                averages[mode] = (1 - weight) * average + weight * new
        self.n += 1

    def refresh(self):
        self.inverses = [
            [np.linalg.inv(u + self.damping * np.eye(len(u))) for u in normalize_factors(averages)]
            for averages in self.contractions
        ]

    def warm_start(self, batches):
        """One pass over `batches` of sampled gradients: the plain mean of their contractions."""
        for sampled_grads in batches:
            self.absorb(sampled_grads, 1 / (self.n + 1))
        self.refresh()

    def direction(self, grads, sampled_grads):
        self.momentum = [self.mu * m + g for m, g in zip(self.momentum, grads, strict=True)]
        new_statistics = self.t % self.statistics_period == 0
        if new_statistics:
            self.absorb(sampled_grads, max(1 - self.statistics_decay, 1 / (self.n + 1)))
        if self.t % self.inverse_period == 0 or (self.t < self.inverse_period and new_statistics):
            self.refresh()
        self.t += 1
        directions = []
        for p, inverses in zip(self.momentum, self.inverses, strict=True):
            for mode, inverse in enumerate(inverses):
                p = mode_product(p, inverse, mode)
            directions.append(p)
        return directions

    def step(self, params, grads, sampled_grads):
        directions = self.direction(grads, sampled_grads)
        return [w - self.learning_rate * (p + self.weight_decay * w) for w, p in zip(params, directions, strict=True)]


class QuadraticModel:
    """The minimizer of the quadratic model in the span of a direction and the step before; all trees are vectors."""

    def __init__(self, size, *, damping=0.1, adaptive_damping=True, use_momentum=True):
        self.damping, self.adaptive_damping, self.use_momentum = damping, adaptive_damping, use_momentum
        self.t, self.u, self.slope = 0, np.zeros(size), 0.0

    def step(self, direction, gradient, curvature, loss=None, own_gradient=None):
        """u for the direction p and the gradient g.

        `curvature` is J^T H J + R, a dense matrix. `loss(u)` is the loss at theta - u, with `own_gradient` at u = 0;
        None: that is g. It is needed to adapt the damping.
        """
        damped = curvature + self.damping * np.eye(len(direction))
        directions = [direction, self.u] if self.use_momentum and np.any(self.u) else [direction]
        basis = np.stack(directions, axis=1)
        self.coefficients = np.linalg.solve(basis.T @ damped @ basis, basis.T @ gradient)
        # The minimizer over the directions with |c_2| <= the share of the last slope that this batch confirms, or 1/4.
        if self.adaptive_damping and len(directions) > 1:
            share = np.clip((gradient @ self.u + self.u @ curvature @ self.u) / self.slope, 0.25, 1)
            if abs(self.coefficients[1]) > share:
                second = share * np.sign(self.coefficients[1])
                first = direction @ (gradient - second * damped @ self.u) / (direction @ damped @ direction)
                self.coefficients = np.array([first, second])
        u = basis @ self.coefficients
        self.predicted = gradient @ u - u @ damped @ u / 2
        if self.adaptive_damping and (self.t < 20 or self.t % 5 == 0 or not np.any(self.u)):
            expected = (gradient if own_gradient is None else own_gradient) @ u - u @ damped @ u / 2
            true = loss(0 * u) - loss(u)
            if expected > 0:
                share = self.damping * u @ u / (u @ damped @ u)
                if true < 0.25 * expected:
                    self.damping *= 2 if true >= -0.01 * abs(loss(0 * u)) else 4
                elif share > 0.01 and true > 0.75 * expected:
                    self.damping *= 0.5 if true > 1.5 * expected else 0.95
                if true < -0.01 * abs(loss(0 * u)):
                    u = 0 * u
        self.t, self.u, self.slope = self.t + 1, u, gradient @ u
        return u
