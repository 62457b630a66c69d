"""The programs in the README and the documentation run as they are written."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_the_performance_page_has_the_numbers_of_its_program():
    page = (ROOT / "docs/performance.md").read_text()
    written = json.loads((ROOT / "docs/bench_autoencoder.json").read_text())
    entry = written["models"]["autoencoder"]
    for row in entry["race"]:
        if "error" not in row:
            name, ratios = re.escape(row["optimizer"]), f"{row['ratio']:.2f} | {row['median_ratio']:.2f}"
            assert re.search(rf"\| \W*{name}\W* \| {re.escape(ratios)} \|", page)
    for part in entry["parts"]:
        assert f"| {part['part']} | {part['ms']:.0f} | {part['floor_ms']:.0f} |" in page


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
