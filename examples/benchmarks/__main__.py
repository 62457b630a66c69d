"""The command line: `python -m benchmarks step|growth|complexity|meshes|memory`."""

import typer

from benchmarks import counting, step

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("step")(step.measure)
for command in (step.growth, counting.complexity, counting.meshes, counting.memory):
    app.command()(command)

if __name__ == "__main__":
    app()
