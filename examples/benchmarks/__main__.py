"""Measures and counts the cost of TNT in time, arithmetic and memory, compared with other optimizers."""

import typer

from benchmarks import counting, step

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
app.command("step")(step.measure)
for command in (step.growth, counting.complexity, counting.meshes, counting.memory):
    app.command()(command)

if __name__ == "__main__":
    app()
