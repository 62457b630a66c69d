"""Settings for all tests: strict dtype promotion, so that no statistic changes its precision unnoticed."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_promotion(request):
    # Flax itself relies on implicit promotion.
    if "flax" in request.module.__name__ or "documents" in request.module.__name__:
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield
