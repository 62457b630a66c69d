"""The notebooks and their texts agree, and their outputs have no errors or warnings. `make notebooks` runs them."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the extra `notebooks`")

FOLDER = Path(__file__).parent.parent / "examples/notebooks"
TEXTS = sorted(FOLDER.glob("*.md"))


def cells(path):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_each_text_has_a_notebook():
    assert TEXTS
    assert [path.stem for path in TEXTS] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_the_badge_opens_the_notebook_itself(text):
    place = text.with_suffix(".ipynb").relative_to(FOLDER.parent.parent)
    assert cells(text)[0][1].count(f"/blob/main/{place})") == 1


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_the_notebook_has_the_cells_of_its_text(text):
    assert cells(text.with_suffix(".ipynb")) == cells(text), (
        f"run: jupytext --to ipynb --execute --set-kernel python3 {text.relative_to(FOLDER.parent.parent)}"
    )


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_the_outputs_are_committed_and_have_no_errors_or_warnings(text):
    code = [cell for cell in jupytext.read(text.with_suffix(".ipynb")).cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(cell.execution_count for cell in code), "a cell was not executed"
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
