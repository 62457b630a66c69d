"""For users of Flax Linen: a `TrainState` that forwards `sampled_grads` to the optimizer."""

import functools
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """The ``TrainState`` of Flax, with an ``apply_gradients`` that also takes ``sampled_grads``.

    Subclass it to add fields, such as ``batch_stats``, in the same way as that of Flax.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, tnt_optax
      >>> from tnt_optax.linen import TrainState
      >>> model, inputs = nn.Dense(3), jnp.eye(4)
      >>> variables = model.init(jax.random.key(0), inputs)
      >>> state = TrainState.create(apply_fn=model.apply, params=variables, tx=tnt_optax.adaptive_tnt())
      >>> value_and_grads = tnt_optax.value_and_sampled_grad(model.apply, tnt_optax.Categorical())
      >>> labels, key = jnp.array([0, 1, 2, 0]), jax.random.key(1)
      >>> loss, grads, sampled_grads = value_and_grads(state.params, inputs, labels, key)
      >>> state = state.apply_gradients(grads=grads, sampled_grads=sampled_grads)
      >>> int(state.step)
      1
    """

    def apply_gradients(self, *, grads: Any, sampled_grads: Any = None, **kwargs: Any) -> Any:
        """A step of ``tx``, as in the ``TrainState.apply_gradients`` of Flax.

        Args:
          grads: the gradients, a tree like ``params``.
          sampled_grads: the :class:`tnt_optax.SampledGrad` of the batch; for :func:`tnt_optax.tnt`, also a tree like
            ``params``, or a function that returns one.
          **kwargs: other fields to replace.

        Returns:
          The new state.
        """
        tx = self.tx
        # Flax's method calls `tx.update` without extra arguments, so the argument is bound here.
        update = functools.partial(optax.with_extra_args_support(tx).update, sampled_grads=sampled_grads)
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        return train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs).replace(tx=tx)
