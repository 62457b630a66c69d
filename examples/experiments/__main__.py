"""`python -m experiments`, inside `examples/`."""

import sys

from experiments.runner import UsageError

if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["gpu"]:  # The machine may have only JAX, Flax and Optax.
            from experiments import gpu

            gpu.main(sys.argv[2:])
        else:
            from experiments.command_line import app

            app()
    except (UsageError, OSError) as error:
        sys.exit(str(error))
