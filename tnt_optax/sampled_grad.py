"""The gradient of the loss and, from the same forward pass, the gradient for targets sampled from the predictions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from tnt_optax import checks
from tnt_optax import predictive as distributions
from tnt_optax.closures import Closures
from tnt_optax.microbatches import Part, accumulate, part_of, split_batch, sum_over_parts
from tnt_optax.numerics import as_float, symmetric_products, widen
from tnt_optax.sharding import AxisNames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledGrad:
    """The sampled gradient and the quadratic model of a batch, which are computed when they are used.

    :func:`value_and_sampled_grad` returns it. Pass it to ``tx.update(..., sampled_grads=sampled_grads)`` without
    calling it: the optimizer calls it inside :func:`jax.lax.cond`, at the steps that use it.

    It is a pytree, and can be an argument or a result of a jitted function. Its leaves are the arrays that its
    computations need: the residuals of the forward pass, the outputs, keys, and the arrays that ``forward``, ``loss``
    and ``regularizer`` close over.

    Attributes:
      loss: the loss that was returned.
      grads: the gradients that were returned.
      params: the parameters of both.

    Example:
      >>> import jax, jax.numpy as jnp, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params
      >>> value_and_grads = jax.jit(tnt_optax.value_and_sampled_grad(forward, tnt_optax.Normal()))
      >>> params, inputs, targets = jnp.zeros((4, 3)), jnp.eye(4), jnp.ones((4, 3))
      >>> _, grads, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(0))
      >>> sampled_grads().shape  # The sampled gradient.
      (4, 3)
      >>> sampled_grads.fisher_products([grads, params]).shape
      (2, 2)
      >>> float(sampled_grads.loss_at(targets))
      0.0
    """

    loss: jax.Array
    grads: Any
    _closures: Closures
    _microbatches: int = dataclasses.field(metadata={"static": True})
    _axis_name: AxisNames | None = dataclasses.field(metadata={"static": True})

    def __call__(self) -> Any:
        """The sampled gradient, a tree like the parameters, times sqrt(m) with ``scale="fisher"``."""
        return self._closures.call("gradient")

    @property
    def params(self) -> Any:
        """The parameters at which the loss and the gradients were computed."""
        return self._closures.call("params")

    def fisher_products(self, directions: Sequence[Any]) -> jax.Array:
        r"""The exact Fisher matrix of the batch in the span of some directions.

        .. math::

          \left( d_i^\top J^\top H J\, d_j \right)_{ij}

        :math:`J` is the Jacobian of the outputs with respect to the parameters. :math:`H` is the Fisher information of
        the predictive distribution with respect to the outputs, mean over the batch, with its weights. It does not
        depend on ``scale``. So :math:`J^\top H J` is the exact Fisher matrix of the mean loss of this batch. The
        covariance of ``sampled_grads()`` with ``scale="fisher"`` is an estimate of it. A regularizer is not part of it.

        All :math:`J d_i` are computed in one batched pass, from the residuals of the pullback. Each costs about a
        forward pass. With microbatches, each part runs its forward pass once more.

        Args:
          directions: :math:`k` trees like the parameters. ``optax.MaskedNode`` and None, in place of an array or of a
            subtree, stand for zeros.

        Returns:
          A matrix of shape (k, k). The :math:`J d_i` are computed in the dtypes of the model, all other products in
          float32 or better.

        Raises:
          TypeError: ``directions`` is not a list or tuple of trees of real floating-point arrays, or the backward pass
            of ``forward`` cannot be transposed. An example is that of a :func:`jax.custom_vjp` function whose backward
            function is not linear in the cotangent, or calls a kernel without a transpose.
          ValueError: there are no directions, or one has another structure or shape than the parameters.
        """
        stacked, number = self._stack(directions), len(directions)

        def of_part(part: jax.Array | int) -> jax.Array:
            products = jax.vmap(lambda direction: self._closures.call("products", part, direction))(stacked)
            tangents, curved = (_unstacked(tree, number) for tree in products)
            return symmetric_products(tangents, curved)

        if not jax.tree.leaves(stacked):
            return as_float(jnp.zeros((number, number)))
        return _mean(sum_over_parts(of_part, self._microbatches), self._axis_name)

    def regularizer_products(self, directions: Sequence[Any]) -> jax.Array:
        r"""The matrix of :math:`d_i^\top R\, d_j`, where :math:`R` is the Hessian of the regularizer.

        Args:
          directions: :math:`k` trees like the parameters, as in :meth:`fisher_products`.

        Returns:
          A matrix of shape (k, k), in float32 or better: zeros without a regularizer.

        Raises:
          TypeError: as :meth:`fisher_products`.
          ValueError: as :meth:`fisher_products`.
        """
        stacked, number = self._stack(directions), len(directions)
        if "regularizer_product" not in self._closures or not jax.tree.leaves(stacked):
            return as_float(jnp.zeros((number, number)))
        products = jax.vmap(lambda direction: self._closures.call("regularizer_product", direction))(stacked)
        return symmetric_products(_unstacked(stacked, number), _unstacked(products, number))

    def loss_at(self, params: Any) -> jax.Array:
        """The loss of the same batch, with the same keys, at other parameters. It costs a forward pass.

        Args:
          params: a tree like the parameters. ``optax.MaskedNode`` and None stand for the parameters of this object.

        Returns:
          A scalar: the mean over the batch (and over the devices of ``axis_name``), plus the regularizer.

        Raises:
          ValueError: ``params`` has another structure or shape than the parameters.
        """
        return self._closures.call("loss_at", checks.fill("params", params, self.params, "the parameters"))

    def _stack(self, directions: Sequence[Any]) -> Any:
        if not isinstance(directions, Sequence):
            kind = type(directions).__name__
            raise TypeError(f"directions: expected a list of trees, got {kind}. For one direction: [direction].")
        if not directions:
            raise ValueError("directions: expected at least one tree like the parameters, got none.")
        zeros = optax.tree.zeros_like(self.grads)
        for i, direction in enumerate(directions):
            checks.check_floating(f"directions[{i}]", direction)
        trees = [checks.fill(f"directions[{i}]", d, zeros, "the parameters") for i, d in enumerate(directions)]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def is_function(sampled_grads: Any) -> TypeGuard[Callable[[], Any]]:
    """Whether it is a function that returns a tree, and not a tree that can be called, such as an Equinox module."""
    lazy = isinstance(sampled_grads, Partial | SampledGrad) or jax.tree_util.all_leaves([sampled_grads])
    return callable(sampled_grads) and lazy


def check_sampled_grads(sampled_grads: Any) -> SampledGrad:
    """An error for an object that has no quadratic model."""
    if isinstance(sampled_grads, SampledGrad):
        return sampled_grads
    raise ValueError(
        "sampled_grads: expected, for the quadratic model, the SampledGrad of tnt_optax.value_and_sampled_grad, got "
        f"{type(sampled_grads).__name__}. Pass it as it is: tx.update(grads, opt_state, params, "
        "sampled_grads=sampled_grads). flax.nnx.Optimizer.update forwards it; with Flax Linen, use "
        "tnt_optax.linen.TrainState, because Flax's own TrainState does not."
    )


def value_and_sampled_grad(
    forward: Callable[..., Any],
    predictive: distributions.PredictiveDistribution,
    *,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    regularizer: Callable[[Any], jax.Array] | None = None,
    has_aux: bool = False,
    scale: Literal["mean", "fisher"] = "fisher",
    microbatches: int = 1,
    axis_name: AxisNames | None = None,
) -> Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, SampledGrad]]:
    r"""Like :func:`jax.value_and_grad`, and the *sampled gradient*, for targets sampled from the model's predictions.

    .. math::

      \hat y_n \sim p(\cdot \mid x_n, \theta), \qquad
      G = \nabla_\theta\, \frac1m \sum_{n=1}^{m} -\log p(\hat y_n \mid x_n, \theta), \qquad
      m\, \mathbb{E}[G G^\top] = F

    :math:`F` is the Fisher matrix of Eq. (1), for the examples of the batch (lines 3 and 4 of Algorithm 1). There is
    one forward pass. The pullback of :func:`jax.vjp` gives the gradient for the targets of the data and, when the
    :class:`SampledGrad` is called, the gradient for the sampled targets.

    Args:
      forward: ``forward(params, inputs) -> outputs``, or ``(outputs, aux)`` with ``has_aux``. ``inputs`` is any pytree.
        A dropout key or the running averages of a BatchNorm can be part of it, or of the closure of ``forward``.
      predictive: :class:`Categorical`, :class:`Bernoulli`, :class:`Normal`, :class:`DiagonalNormal`, a :class:`Joint`
        of several, or an object of your own with the methods ``loss`` and ``sample`` (see
        :class:`PredictiveDistribution`).
      loss: None, or a training loss ``(outputs, targets) -> scalar`` that is not the negative log-likelihood, such as
        label smoothing, PPO or a focal loss. It is a mean over the batch, like ``predictive.loss``. The returned loss
        and gradient are those of this function. Sampled targets and statistics are still those of ``predictive``, which
        then does not get the targets.
      regularizer: None, or a function ``(params) -> scalar``. It is added to the loss, and its gradient to the
        gradient. It is not part of the Fisher matrix. If it is not finite, the gradient is NaN, and the optimizer
        rejects the step.
      has_aux: whether ``forward`` returns ``(outputs, aux)``. ``aux`` is, for example, the new averages of a BatchNorm.
      scale: ``"fisher"``: the sampled gradient :math:`G` is multiplied by :math:`\sqrt m`, so that the Kronecker
        factors estimate :math:`F` for any batch size. ``"mean"``: it is not multiplied, as in the paper, and the
        factors estimate :math:`F / m`. The published hyper-parameters assume ``"mean"``. :math:`m` is
        ``predictive.batch_size(outputs)`` if there is such a method, else the length of the leading axis of the
        outputs.
      microbatches: the number of sequential microbatches of equal size. Only one has its activations in memory at a
        time. Part :math:`j` has the examples :math:`j`, :math:`j` + ``microbatches``, and so on. All leaves of inputs
        and targets therefore need the leading axis of the batch (of the targets and outputs of a :class:`Joint`, each
        part its own). In place of a dropout key, pass ``jax.random.split(key, batch_size)``, and use the first one in
        ``forward``. Loss and gradients are those of the whole batch, summed in float32 or better. A microbatch counts
        by its share of the weights of ``predictive`` (of a :class:`Joint`, by the mean of the shares of its parts), so
        a ``loss`` should apply these weights. ``aux`` has a leading axis of the microbatches: take the mean of the
        averages of a BatchNorm, and the last value of a counter. ``sampled_grads()`` runs its own forward passes.
      axis_name: None, or the name (or names) of an axis of :func:`jax.shard_map` or :func:`jax.pmap` over which the
        batch is divided. Loss, gradients and the sampled gradient are averaged over it. Each device samples targets
        with its own key, and :math:`m` is the size of the global batch. With weights, the loss of each device is
        divided by the total weight of this device. ``aux`` is that of the device.

    Returns:
      A function ``value_and_grads(params, inputs, targets, key) -> (loss, grads, sampled_grads)``. With ``has_aux`` it
      returns ``((loss, aux), grads, sampled_grads)``. ``loss`` is a scalar, ``grads`` a tree like ``params``, and
      ``sampled_grads`` a :class:`SampledGrad`. Call the function inside :func:`jax.jit`: outside, each call traces the
      model again, and jitted functions that get the :class:`SampledGrad` are compiled again.

      With ``microbatches=1``, the residuals of the forward pass stay in memory until the update of the optimizer, at
      each step.

    Raises:
      TypeError: ``forward``, ``loss``, ``regularizer`` or a method of ``predictive`` is missing or not callable, or
        ``microbatches`` is not an integer. When called: ``key`` is not a random key, the outputs are not real
        floating-point arrays, or a loss or the regularizer does not return a real floating-point number.
      ValueError: ``scale`` is unknown, or ``microbatches`` is below 1. When called: the targets do not fit the outputs,
        a loss or the regularizer returns an array with axes, ``microbatches`` does not divide the batch, or the batch
        has no common leading axis.

    Example:
      >>> import jax, jax.numpy as jnp, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params  # The logits of three classes.
      >>> value_and_grads = jax.jit(tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical()))
      >>> params, inputs, labels = jnp.zeros((4, 3)), jnp.eye(4), jnp.array([0, 1, 2, 0])
      >>> loss, grads, sampled_grads = value_and_grads(params, inputs, labels, jax.random.key(0))
      >>> bool(jnp.isclose(loss, jnp.log(3))), grads.shape, sampled_grads().shape
      (True, (4, 3), (4, 3))

    References:
      Ren and Goldfarb, `Tensor Normal Training for Deep Learning Models <https://arxiv.org/abs/2106.02925>`_, 2021.
    """
    for name, function in (("forward", forward), ("loss", loss), ("regularizer", regularizer)):
        if not callable(function) and (function is not None or name == "forward"):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}.")
    distributions.check_predictive("predictive", predictive)
    if scale not in ("mean", "fisher"):
        raise ValueError(f"scale: expected 'mean' or 'fisher', got {scale!r}.")
    checks.check_static_period("microbatches", microbatches)
    checks.check_axis_names("axis_name", axis_name)
    model = _Model(forward, has_aux, loss)

    def value_and_grads(params: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[Any, Any, SampledGrad]:
        checks.check_key("key", key)
        own_key = key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))
        whole = Part(inputs, targets, own_key, predictive, distributions.unit_weights(predictive))
        batch = _Batch(model, _of_this_device(params, axis_name), split_batch(microbatches, whole), microbatches)
        value, aux, grads, sizes = batch.train()
        value, grads = _mean((value, grads), axis_name)
        if regularizer is not None:
            value, grads = _add_regularizer(regularizer, params, value, grads)

        def gradient() -> Any:
            shares = batch.parts.shares
            weights = shares if scale == "mean" else _fisher_weights(shares, sizes, axis_name)
            return _mean(batch.sampled_gradient(weights), axis_name)

        def products(part: jax.Array, direction: Any) -> tuple[Any, Any]:
            return batch.products(part, _of_this_device(direction, axis_name))

        def loss_at(params: Any) -> jax.Array:
            value = _mean(batch.loss_at(params), axis_name)
            return value if regularizer is None else value + _penalty(regularizer, params).astype(value.dtype)

        functions = {
            "params": (lambda: params, ()),
            "gradient": (gradient, ()),
            "products": (products, (0, params)),
            "loss_at": (loss_at, (params,)),
        }
        if regularizer is not None:
            hessian = functools.partial(_regularizer_product, regularizer, params)
            functions["regularizer_product"] = (hessian, (params,))
        sampled_grads = SampledGrad(value, grads, Closures(functions), microbatches, axis_name)
        return ((value, aux) if has_aux else value), grads, sampled_grads

    return value_and_grads


class _Pass(NamedTuple):
    """A forward pass: outputs, and their pullback to the parameters."""

    outputs: Any
    pullback: Callable[[Any], Any]
    aux: Any


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model with its training loss; None is the loss of the predictive distribution."""

    forward: Callable[..., Any]
    has_aux: bool
    loss: Callable[[Any, Any], jax.Array] | None

    def outputs_and_aux(self, params: Any, inputs: Any) -> tuple[Any, Any]:
        result = self.forward(params, inputs)
        if not self.has_aux:
            return result, None
        if not (isinstance(result, tuple) and len(result) == 2):
            shape = getattr(result, "shape", None)
            got = type(result).__name__ if shape is None else f"an array of shape {shape}"
            raise TypeError(
                f"forward: expected it to return (outputs, aux) with has_aux=True, got {got}. Without aux, leave "
                "has_aux out."
            )
        return result

    def linearize(self, params: Any, inputs: Any) -> _Pass:
        forward = functools.partial(self.outputs_and_aux, inputs=inputs)
        outputs, pullback, aux = jax.vjp(forward, params, has_aux=True)
        if not (leaves := jax.tree.leaves(outputs)):
            raise TypeError(f"forward: expected it to return an array or a tree of arrays, got {outputs!r}.")
        for leaf in leaves:
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"outputs: expected real floating-point arrays, got {dtype}. If `forward` returns (outputs, aux), "
                    f"pass has_aux=True."
                )
        return _Pass(outputs, pullback, aux)

    def value_and_cotangent(self, outputs: Any, part: Part) -> tuple[jax.Array, Any]:
        """The part's share of the loss, and its gradient with respect to the outputs."""
        own = self.loss
        if own is None:
            loss = distributions.weighted_loss
            return jax.value_and_grad(loss, argnums=2)(part.predictive, part.shares, outputs, part.targets)
        loss = jax.value_and_grad(lambda outputs: checks.check_scalar("loss", own(outputs, part.targets)))
        shares = jax.tree.leaves(part.shares)
        share = as_float(sum(shares) / len(shares))
        # A microbatch without a share may have no loss: the mean over no examples is NaN.
        return jax.tree.map(lambda x: jnp.where(share == 0, 0, share.astype(x.dtype) * x), loss(outputs))


class _Batch:
    """A model on a batch in parts, which are processed one after the other; the only part is linearized once.

    Args:
      model: the model.
      params: its parameters.
      parts: the parts, stacked.
      number: how many.
    """

    def __init__(self, model: _Model, params: Any, parts: Part, number: int):
        self.model, self.params, self.parts, self.number = model, params, parts, number
        self._only = model.linearize(params, parts.inputs) if number == 1 else None

    def train(self) -> tuple[jax.Array, Any, Any, Any]:
        """Loss, aux, gradient, and the batch sizes of the parts."""

        def of_part(part: Part, forward_pass: _Pass) -> tuple[Any, Any]:
            value, cotangent = self.model.value_and_cotangent(forward_pass.outputs, part)
            sizes = distributions.batch_sizes(part.predictive, forward_pass.outputs)
            return forward_pass.pullback(cotangent)[0], (value, forward_pass.aux, sizes)

        grads, (values, aux, sizes) = self._sum(of_part)
        return jnp.sum(values), aux, grads, sizes

    def sampled_gradient(self, weights: Any) -> Any:
        """The gradient for sampled targets, with these weights of the parts' losses."""

        def of_part(part: Part, forward_pass: _Pass, weights: Any) -> tuple[Any, None]:
            targets = part.predictive.sample(part.key, forward_pass.outputs)
            loss = functools.partial(distributions.weighted_loss, part.predictive, weights)
            return forward_pass.pullback(jax.grad(loss)(forward_pass.outputs, targets))[0], None

        return self._sum(of_part, weights)[0]

    def products(self, index: jax.Array | int, direction: Any) -> tuple[Any, Any]:
        """J d and H J d of one part, in float32 or better; H is weighted by its share."""
        part, forward_pass = self._run(index)
        tangents, outputs = widen((_pushforward(forward_pass, direction), forward_pass.outputs))

        def targets() -> Any:
            return part.predictive.sample(part.key, outputs)

        return tangents, distributions.fisher_product(part.predictive, part.shares, outputs, tangents, targets)

    def loss_at(self, params: Any) -> jax.Array:
        """The loss at other parameters."""

        def of_index(index: jax.Array | int) -> jax.Array:
            part = self._part(index)
            outputs, _ = self.model.outputs_and_aux(params, part.inputs)
            return self.model.value_and_cotangent(outputs, part)[0]

        return sum_over_parts(of_index, self.number)

    def _part(self, index: jax.Array | int) -> Part:
        return self.parts if self.number == 1 else part_of(self.parts, index)

    def _run(self, index: jax.Array | int) -> tuple[Part, _Pass]:
        part = self._part(index)
        return part, self._only or self.model.linearize(self.params, part.inputs)

    def _sum(self, of_part: Callable[..., tuple[Any, Any]], *stacks: Any) -> tuple[Any, Any]:
        """The sum over the parts of trees like the parameters, and whatever else the function returns, stacked."""
        if self.number == 1:
            return of_part(*self._run(0), *stacks)

        def of_index(index: jax.Array) -> tuple[Any, Any]:
            return of_part(*self._run(index), *part_of(stacks, index))

        total, rest = accumulate(of_index, self.params, self.number)
        return optax.tree.cast_like(total, self.params), rest


def _pushforward(forward_pass: _Pass, direction: Any) -> Any:
    """J d, the transpose of the pullback, which holds all residuals already and runs no forward pass.

    `jax.jvp` would run one, and does not work for a `jax.custom_vjp` function.
    """
    try:
        (tangents,) = jax.linear_transpose(lambda x: forward_pass.pullback(x)[0], forward_pass.outputs)(direction)
    except Exception as error:  # JAX raises errors of many types here.
        raise TypeError(
            "fisher_products: expected a `forward` whose backward pass can be transposed, as all of JAX's own "
            f"operations can, got one that cannot ({type(error).__name__}: {error}). Is there a jax.custom_vjp "
            "function in it, whose backward function is not linear in the cotangent, or calls a kernel? Write that as "
            "linear JAX operations, or use jax.custom_jvp. "
            "Without the quadratic model, as in tnt_optax.tnt, no such products are needed."
        ) from error
    return tangents


def _unstacked(tree: Any, number: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(number)]


def _fisher_weights(shares: Any, sizes: Any, axis_name: AxisNames | None) -> Any:
    """Weights of the parts' sampled losses whose gradient has the covariance F (`scale="fisher"`).

    The mean over a part has the covariance F / size, so that the mean over all, weighted by their shares, has F / m
    with 1/m = sum of shares^2 / sizes.
    """

    def of_one_distribution(share: jax.Array, size: jax.Array) -> jax.Array:
        share, size = as_float(share), as_float(size)
        empty = share * size == 0  # All weights of the part are 0, and so is its gradient.
        reciprocal = jnp.sum(jnp.where(empty, 0, jnp.square(share) / jnp.where(empty, 1, size)))
        if axis_name is not None:
            reciprocal = lax.pmean(reciprocal, axis_name) / lax.psum(1, axis_name)
        # Where all weights are 0, so is the gradient.
        return share / jnp.sqrt(jnp.where(reciprocal == 0, 1, reciprocal))

    return jax.tree.map(of_one_distribution, shares, sizes)


def _of_this_device(tree: Any, axis_name: AxisNames | None) -> Any:
    """The same numbers, but as arrays of the device's own.

    Inside `shard_map`, the gradient with respect to an array that is equal on all devices is already a sum over them.
    """
    if axis_name is None:
        return tree
    zero = 0 * lax.axis_index(axis_name)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _mean(tree: Any, axis_name: AxisNames | None) -> Any:
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def _penalty(regularizer: Callable[[Any], jax.Array], params: Any) -> jax.Array:
    return checks.check_scalar("regularizer", regularizer(params))


def _add_regularizer(
    regularizer: Callable[[Any], jax.Array], params: Any, value: jax.Array, grads: Any
) -> tuple[jax.Array, Any]:
    penalty, gradient = jax.value_and_grad(functools.partial(_penalty, regularizer))(params)
    finite = jnp.isfinite(penalty)
    grads = jax.tree.map(lambda g, r: g + jnp.where(finite, r, jnp.nan), grads, gradient)
    return value + penalty.astype(value.dtype), grads


def _regularizer_product(regularizer: Callable[[Any], jax.Array], params: Any, direction: Any) -> Any:
    return jax.jvp(jax.grad(functools.partial(_penalty, regularizer)), (params,), (direction,))[1]
