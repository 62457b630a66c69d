"""`python -m experiments`, inside `examples/`."""

import sys

from experiments.runner import UsageError

if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["gpu"]:  # On a machine that may have nothing but JAX's family of packages.
            from experiments import gpu

            gpu.main(sys.argv[2:])
        else:
            from experiments.command_line import app

            app()
    except (UsageError, OSError) as error:
        sys.exit(str(error))
