"""The programs in the README and the documentation run as they are written, and the pages agree with the package."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

import tnt_optax

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def programs():
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 2
            yield pytest.param(page, line, match.group(1), id=f"{page.name}:{line}")


@pytest.mark.parametrize(("page", "line", "source"), list(programs()))
def test_program(page, line, source):
    if "sklearn" in source:
        pytest.importorskip("sklearn", reason="needs the extra `examples`")
    variables = {"__name__": "program"}
    # Blank lines, so that a traceback shows the line of the page.
    exec(compile("\n" * (line - 1) + source, str(page), "exec"), variables)
    if "train_step" in variables and "labels" in variables and "step" in variables:  # It trains a classifier.
        assert variables["loss"] < 0.7, "the example does not train"


def test_the_readme_has_the_numbers_of_the_demo():
    readme = (ROOT / "README.md").read_text()
    for dataset in ("digits", "mnist"):
        curves = json.loads((ROOT / f"docs/demo_{dataset}.json").read_text())["curves"]
        for curve in curves.values():
            assert f"{curve['train_loss'][-1]:.1f}" in readme


def test_the_stability_page_has_the_numbers_of_its_program():
    page = (ROOT / "docs/stability.md").read_text()
    runs = json.loads((ROOT / "docs/stability_mnist.json").read_text())["runs"]
    for seed in range(10):
        (row,) = re.findall(rf"^\| {seed} \|.*$", page, re.MULTILINE)
        for run in (run for run in runs if run["seed"] == seed):
            if run["diverged"]:
                assert f"step {run['not_finite_at_step']} " in row
            else:
                assert all(f"{loss:.1f}" in row for loss in run["train_loss"][1:])
    for radius in (None, 0.0316):
        diverged = sum(run["diverged"] for run in runs if run["trust_radius"] == radius)
        assert f"{diverged} of 10" in page


def test_the_performance_page_has_the_numbers_of_its_programs():
    page = (ROOT / "docs/performance.md").read_text()
    bench, transformer, adaptive, fraction = (
        json.loads((ROOT / f"docs/{name}.json").read_text())
        for name in ("bench", "bench_transformer", "bench_adaptive", "fraction_digits")
    )
    models = {**bench["models"], **transformer["models"]}
    races = [entry["race"] for entry in (*models.values(), *adaptive["models"].values())]
    for row in (row for race in races for row in race if "error" not in row):
        numbers = f"{row['median_ms']:.1f} | {row['ratio']:.2f} | {row['median_ratio']:.2f}"
        assert re.search(rf"\| \W*{re.escape(row['optimizer'])}\W* \| {re.escape(numbers)} \|", page)
    for parts in zip(*(entry["parts"] for entry in models.values()), strict=True):
        cells = " | ".join(f"{part['ms']:.0f} | {part['floor_ms']:.0f}" for part in parts)
        assert f"| {parts[0]['part']} | {cells} |" in page
    for share, curves in fraction["curves"].items():
        losses = " | ".join(
            f"{np.mean([curve['train_loss'][epoch] for curve in curves]):.2f}" for epoch in (10, 20, 40)
        )
        assert f"| {share} of the batch | {losses} |" in page
    for name in ("width", "depth"):
        for row in bench["growth"][name]:
            assert f"| {row[name]} | {row['adam_ms']:.1f} | {row['tnt_ms']:.1f} | {row['tnt_refresh_ms']:.1f} |" in page


def test_the_page_of_the_paper_has_the_numbers_of_its_programs():
    page = (ROOT / "docs/paper.md").read_text()
    mnist = json.loads((ROOT / "docs/autoencoder_mnist.json").read_text())
    for name, of_seeds in mnist["curves"].items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        for epoch in (1, 5, 10, 20):
            losses = [curve["train_loss"][epoch] for curve in of_seeds if epoch < len(curve["train_loss"])]
            assert None in losses or not losses or f"| {np.median(losses):.1f} " in line
    digits = json.loads((ROOT / "docs/autoencoder_digits.json").read_text())["curves"]
    for name, of_seeds in digits.items():
        losses = [np.median([curve["train_loss"][epoch] for curve in of_seeds]) for epoch in (1, 10, 40)]
        cells = " | ".join(f"{loss:.2f}" for loss in losses)
        assert re.search(rf"^\| {name} \|.*{re.escape(cells)}", page, re.MULTILINE), name
    for name, (curve,) in json.loads((ROOT / "docs/autoencoder_faces.json").read_text())["curves"].items():
        start, loss = curve["train_loss"]
        after = "diverged |" if loss is None else f"{loss:.1f} | {curve['test_loss'][1]:.1f}"
        assert f"| {name} | {start:.1f} | {after} | {curve['seconds'][1]:.0f} |" in page
    bounded = mnist["curves"]["TNT, bounded"]
    assert all(curve["train_loss"][4] < 63.2 for curve in bounded)
    for epoch in (4, 5):
        assert ", ".join(f"{curve['train_loss'][epoch]:.1f}" for curve in bounded) in page
    assert bounded[0]["train_loss"][22] < 54.22
    tuned = {
        (name, round(curve["seconds"][-1])): (curve["train_loss"][-1], curve["seconds"][-1])
        for file in ("tuned", "tuned_300s")
        for name, (curve,) in json.loads((ROOT / f"docs/autoencoder_mnist_{file}.json").read_text())["curves"].items()
    }
    for (name, rounded), (loss, budget) in tuned.items():
        epoch = next(i for i, value in enumerate(bounded[0]["train_loss"]) if value < loss)
        seconds = bounded[0]["seconds"][epoch]
        shares = f"{seconds / budget:.2f} | {(seconds + bounded[0]['warm_start_seconds']) / budget:.2f}"
        assert f"| {name} | {rounded} | {loss:.1f} | {epoch} | {seconds:.0f} | {shares} |" in page
    cosines = json.loads((ROOT / "docs/fisher_cosine_mnist.json").read_text())["cosines"]
    for name, values in cosines.items():
        cells = " | ".join(f"{value:.2f}" for value in np.mean(values, axis=0))
        assert f"| {name} | {cells} |" in page


def test_the_page_of_the_diagnostics_has_the_numbers_of_its_program():
    page = (ROOT / "docs/diagnostics.md").read_text()
    for run in json.loads((ROOT / "docs/diagnostics_digits.json").read_text())["runs"]:
        at = run["epoch"].index(10)
        condition = f"{run['condition'][at]:.{0 if run['condition'][at] > 10 else 1}f}"
        row = (
            f"| {run['damping']:g} | {run['mean_eigenvalue'][at]:.2g} | {condition} "
            f"| {run['share_below_damping'][at]:.0%} | {run['cosine'][at]:.2f} "
            f"| {run['train_loss'][at]:.1f} | {run['train_loss'][-1]:.1f} |"
        )
        assert row in page


def test_the_page_on_memory_has_the_numbers_of_its_program():
    page = (ROOT / "docs/memory.md").read_text()
    result = json.loads((ROOT / "docs/memory.json").read_text())
    rows = {row["optimizer"]: row for row in result["state"]}
    for name, row in rows.items():
        cells = " | ".join(f"{count / 1e6:.0f}" for count in row["bytes"].values())
        line = f"| {cells} | {row['total'] / 1e9:.2f} | {row['per_parameter']:.1f} |"
        optimizer, _, options = name.partition(", ")
        label = "".join(rf".*\b{int(number):,}\b" for number in re.findall(r"\d+", options))
        shown = re.findall(rf"^\| {optimizer}\b{label}.* {re.escape(line)}$", page, re.MULTILINE)
        assert any(("vectors" in row) == ("vectors" in name) for row in shown), name
    epochs, dampings = (10, 20, 40), result["arguments"]["dampings"]
    for storage, size in result["storages"].items():
        losses = {
            damping: [
                run["train_loss"] for run in result["runs"] if (run["storage"], run["damping"]) == (storage, damping)
            ]
            for damping in dampings
        }
        means = [f"{np.mean([loss[e] for loss in losses[d]]):.2f}" for d in dampings for e in epochs]
        assert f"| {storage} | {size / 1e9:.2f} | {' | '.join(means)} |" in page


def test_the_page_on_meshes_has_the_numbers_of_its_program():
    page = (ROOT / "docs/meshes.md").read_text()
    for rows in json.loads((ROOT / "docs/meshes.json").read_text())["models"].values():
        for row in rows:
            shares = " | ".join(f"{row[key]:.1%}" for key in ("largest", "largest_in_operations", "ideal", "one_mode"))
            sizes = " | ".join(f"{row[key] / 1e6:.1f}" for key in ("parameters", "state"))
            assert f"| {row['devices']} | {shares} | {sizes} |" in page


def test_the_page_of_the_language_model_has_the_numbers_of_its_program():
    page = (ROOT / "docs/language_model.md").read_text()
    written = json.loads((ROOT / "docs/language_model.json").read_text())
    assert f"{written['parameters']:,} parameters" in page
    steps = written["arguments"]["steps"]
    for name, curves in written["curves"].items():
        train, test, seconds = (
            np.mean([curve[key][-1] for curve in curves]) for key in ("train_loss", "test_loss", "seconds")
        )
        losses = f"{train:.2f} | {test:.2f} | {test / np.log(2):.2f}"
        rate = written["chosen"][name]["learning_rate"]
        assert f"| {name} | {rate:g} | {losses} | {seconds:.0f} | {1000 * seconds / steps:.0f} |" in page


def test_the_page_on_the_quadratic_model_has_the_table_of_its_program():
    pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
    program = importlib.import_module("quadratic_model")
    page = (ROOT / "docs/quadratic_model.md").read_text()
    result = json.loads((ROOT / "docs/quadratic_model.json").read_text())
    assert f"<!-- results -->\n\n{program.table(result)}\n\n<!-- /results -->" in page


def test_the_readme_has_the_arguments_of_tnt():
    (table,) = re.findall(r"^## Arguments of `tnt`$(.*?)^`scale_by_tnt`", (ROOT / "README.md").read_text(), re.M | re.S)
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `?([^|`]+)`? \|", table, re.MULTILINE)
    parameters = inspect.signature(tnt_optax.tnt).parameters.values()
    assert [(name, ast.literal_eval(default)) for name, default in rows] == [(p.name, p.default) for p in parameters]


def test_the_page_of_the_api_has_all_public_names():
    names = re.findall(r"^::: tnt_optax\.(.*)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted([*tnt_optax.__all__, "linen.TrainState"])


def test_the_page_on_the_design_has_all_modules_above_those_that_import_them():
    text = (ROOT / "docs/design.md").read_text()
    listed = re.findall(r"^\| `(\w+)\.py` \|", text, re.MULTILINE)
    files = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "tnt_optax").glob("*.py")}
    assert sorted(listed) == sorted(files.keys() - {"__init__"})
    for index, name in enumerate(listed):
        for node in (node for node in ast.walk(files[name]) if isinstance(node, ast.ImportFrom)):
            package, _, module = str(node.module).partition(".")
            imported = {module} if module else {alias.name for alias in node.names}
            assert package != "tnt_optax" or imported <= {*listed[:index]}, name


def anchors(page):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
            if "://" not in target:
                place = page.parent / target if target else page
                assert place.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(place), f"{page.name} links to {target}#{anchor}"
