"""The programs in the README and the documentation run as they are written, and the pages agree with the package."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import tnt_optax

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def programs():
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 2
            yield pytest.param(page, line, match.group(1), id=f"{page.relative_to(ROOT)}:{line}")


@pytest.mark.parametrize(("page", "line", "source"), list(programs()))
def test_program(page, line, source):
    if "sklearn" in source or "experiments" in source:
        pytest.importorskip("sklearn", reason="needs the extra `examples`")
    variables = {"__name__": "program"}
    # Blank lines, so that a traceback shows the line of the page.
    exec(compile("\n" * (line - 1) + source, str(page), "exec"), variables)
    if "train_step" in variables and "labels" in variables and "step" in variables:  # It trains a classifier.
        assert variables["loss"] < 0.7, "the example does not train"


def test_the_tables_are_those_of_the_committed_results():
    pytest.importorskip("typer", reason="the examples need the extra `examples`")
    report = importlib.import_module("experiments.report")
    tables = report.tables(ROOT / "docs/results")
    pages = [page for page in PAGES if "<!-- results" in page.read_text()]
    assert len(pages) > 3
    for page in pages:
        assert report.filled(page, tables) == page.read_text(), (
            f"run the command `report` of the experiments for {page}"
        )


def test_the_page_on_hyperparameters_has_the_arguments_of_tnt():
    text = (ROOT / "docs/guide/hyperparameters.md").read_text()
    (table,) = re.findall(r"^## Arguments of `tnt`$(.*?)^`scale_by_tnt`", text, re.M | re.S)
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| `?([^|`]+)`? \|", table, re.MULTILINE)
    parameters = inspect.signature(tnt_optax.tnt).parameters.values()
    assert [(name, ast.literal_eval(default)) for name, default in rows] == [(p.name, p.default) for p in parameters]


def test_the_reference_has_all_public_names():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    names = re.findall(r"^\.\. auto\w+:: tnt_optax\.(.*)$", pages, re.MULTILINE)
    assert sorted(names) == sorted([*tnt_optax.__all__, "linen.TrainState"])
    (index,) = [page.read_text() for page in (ROOT / "docs/api").glob("index.md")]
    assert set(re.findall(r"`~tnt_optax\.([\w.]+)`", index)) == set(names)


def test_the_page_on_the_design_has_all_modules_above_those_that_import_them():
    text = (ROOT / "docs/development/design.md").read_text()
    listed = re.findall(r"^\| `(\w+)\.py` \|", text, re.MULTILINE)
    files = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "tnt_optax").glob("*.py")}
    assert sorted(listed) == sorted(files.keys() - {"__init__"})
    for index, name in enumerate(listed):
        for node in (node for node in ast.walk(files[name]) if isinstance(node, ast.ImportFrom)):
            package, _, module = str(node.module).partition(".")
            imported = {module} if module else {alias.name for alias in node.names}
            assert package != "tnt_optax" or imported <= {*listed[:index]}, name


def test_the_address_of_the_repository_is_that_of_pyproject():
    hosts = r"(?:raw\.githubusercontent\.com|github\.com|colab\.research\.google\.com/github)"
    pattern = rf"https://{hosts}/([\w.-]+)/tnt[_-]optax\b"
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    (owner,) = re.findall(pattern + "$", urls["Repository"])
    files = [*PAGES, ROOT / "pyproject.toml", ROOT / "CITATION.cff", *(ROOT / "examples/notebooks").glob("*.md")]
    for path in files:
        assert set(re.findall(pattern, path.read_text())) <= {owner}, path


def anchors(page):
    """Those that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    """On the repository's own pages too; `make docs` checks those of the site."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
            if "://" not in target:
                place = page.parent / target if target else page
                assert place.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(place), f"{page.name} links to {target}#{anchor}"
