"""Tensor Normal Training (Ren & Goldfarb, NeurIPS 2021) as an Optax gradient transformation."""

from tnt_optax.alias import adaptive_tnt, tnt
from tnt_optax.diagnosis import diagnostics
from tnt_optax.drawing import draw_diagnostics
from tnt_optax.predictive import Bernoulli, Categorical, DiagonalNormal, Joint, Normal, PredictiveDistribution
from tnt_optax.quadratic_model import scale_by_quadratic_model
from tnt_optax.sampled_grad import SampledGrad, value_and_sampled_grad
from tnt_optax.state import QuadraticModelState, TNTState
from tnt_optax.transform import scale_by_tnt
from tnt_optax.views import TensorView, flax_views
from tnt_optax.warmstart import warm_start

__version__ = "0.2.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalNormal",
    "Joint",
    "Normal",
    "PredictiveDistribution",
    "QuadraticModelState",
    "SampledGrad",
    "TNTState",
    "TensorView",
    "adaptive_tnt",
    "diagnostics",
    "draw_diagnostics",
    "flax_views",
    "scale_by_quadratic_model",
    "scale_by_tnt",
    "tnt",
    "value_and_sampled_grad",
    "warm_start",
]
