"""Settings for all tests: strict dtype promotion, fast compilation, one cache of compiled programs."""

import os
from pathlib import Path

# Threads of OpenBLAS that wait for each other make LAPACK up to ten times as slow, where workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Most of the tests' time is compilation, much of it of the same small programs: in the workers of pytest-xdist, in the
# processes that tests start, and in the next run. Read by JAX when it is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest


def pytest_configure(config):
    """Compilation without XLA's fusion emitters takes two thirds of the time; `make test-all` has what users have."""
    # Only where the flag is known: the XLA of JAX 0.12 does not have it, and ends the process.
    if config.option.markexpr == "not slow" and jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(autouse=True)
def _strict_promotion(request):
    """So that no statistic changes its precision unnoticed."""
    # Flax itself relies on implicit promotion.
    if "flax" in request.module.__name__ or "documents" in request.module.__name__:
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def _fast_compilation(request):
    """`make test` leaves XLA's optimizations out, but for tests about compiled programs; `make test-all` has them."""
    quick = request.config.option.markexpr == "not slow" and "optimized" not in request.keywords
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))  # In the processes that tests start.
