"""The hyper-parameters of TNT's direction."""

import dataclasses
from typing import Literal, cast

import jax
import numpy as np
import optax

from tnt_optax import checks
from tnt_optax.sharding import AxisNames
from tnt_optax.views import ViewFn

Number = float | jax.Array
NumberOrSchedule = Number | optax.Schedule

# Not an int, because `optax.inject_hyperparams` makes arrays of ints, which are traced under jit: the shapes of the
# state depend on this number.
MAX_DIM = cast(int, np.int64(8192))


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `scale_by_tnt`, which describes them. A wrong one raises an error that names it."""

    damping: NumberOrSchedule
    statistics_decay: Number
    momentum: Number | None
    statistics_period: int | jax.Array
    inverse_period: int | jax.Array
    fisher: Literal["sampled", "empirical"]
    trust_radius: NumberOrSchedule | None
    views: ViewFn | None
    max_dim: int
    inverse_parts: int | None
    inverse_axis: AxisNames | None

    def __post_init__(self) -> None:  # noqa: D105
        checks.check_number("damping", self.damping, 0, schedule=True)
        checks.check_number("statistics_decay", self.statistics_decay, 0, 1, closed=True)
        if self.momentum is not None:
            checks.check_number("momentum", self.momentum, 0, 1, closed=True)
        checks.check_period("statistics_period", self.statistics_period)
        checks.check_period("inverse_period", self.inverse_period)
        if self.fisher not in ("sampled", "empirical"):
            raise ValueError(f"fisher: expected 'sampled' or 'empirical', got {self.fisher!r}.")
        if self.trust_radius is not None:
            checks.check_number("trust_radius", self.trust_radius, 0, schedule=True)
        if self.views is not None and not callable(self.views):
            raise TypeError(
                f"views: expected a function (path, shape) -> TensorView or None, got {type(self.views).__name__}."
            )
        checks.check_static_period("max_dim", self.max_dim)
        if self.inverse_parts is not None:
            checks.check_static_period("inverse_parts", self.inverse_parts)
        checks.check_axis_names("inverse_axis", self.inverse_axis)
