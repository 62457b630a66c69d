"""Tensor Normal Training (Ren & Goldfarb, NeurIPS 2021) as an Optax gradient transformation."""

from tnt_optax.diagnosis import diagnostics
from tnt_optax.drawing import draw_diagnostics
from tnt_optax.fisher import value_and_sampled_grad
from tnt_optax.modes import Modes, flax_modes
from tnt_optax.predictive import Bernoulli, Categorical, Normal, PredictiveDistribution
from tnt_optax.states import HistoryState, RejectedState, TNTState
from tnt_optax.transform import scale_by_tnt, tnt
from tnt_optax.warmstart import warm_start

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "HistoryState",
    "Modes",
    "Normal",
    "PredictiveDistribution",
    "RejectedState",
    "TNTState",
    "diagnostics",
    "draw_diagnostics",
    "flax_modes",
    "scale_by_tnt",
    "tnt",
    "value_and_sampled_grad",
    "warm_start",
]
