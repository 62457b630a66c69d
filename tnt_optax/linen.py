"""For users of Flax Linen: a `TrainState` that forwards `sampled_grads` to the optimizer."""

import functools
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` takes `sampled_grads` too.

    Subclass it to add fields, such as `batch_stats`, as Flax's own.
    """

    def apply_gradients(self, *, grads: Any, sampled_grads: Any = None, **kwargs: Any) -> Any:
        """One step of `tx`; `grads` and `**kwargs` as in Flax's `TrainState.apply_gradients`.

        Args:
          grads: the gradients, a tree like `params`.
          sampled_grads: what `value_and_sampled_grad` returned: a tree like `params`, or a function that returns one.
          **kwargs: other fields to replace.
        """
        tx = self.tx
        # Flax's method calls `tx.update` without extra arguments, so the argument is bound here.
        update = functools.partial(optax.with_extra_args_support(tx).update, sampled_grads=sampled_grads)
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        return train_state.TrainState.apply_gradients(bound, grads=grads, **kwargs).replace(tx=tx)
