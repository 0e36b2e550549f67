"""Notebooks run top to bottom in a fresh kernel, end in asserts, and are kept with the outputs of such a run."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A fresh kernel, in the notebooks' folder as a reader would run it."""
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


def texts(notebook: nbformat.NotebookNode) -> str:
    """Everything printed or shown as text; pictures left out."""
    found = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            found.append(output.get("text", ""))
            found += [str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "\n".join(found)


def asserts_in(source: str) -> int:
    """Number of assert statements, magics left out."""
    plain = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
    return sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(plain)))


def test_the_notebooks_are_there():
    kept = {"01_no_never_yes", "02_exact_solution", "03_theorems", "04_ches", "05_your_own_loss", "06_loss_zoo"}
    kept |= {"07_persona", "08_unintentional_unalignment", "09_your_model_and_data"}
    assert kept <= {p.stem for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_top_to_bottom(path):
    notebook = execute(read(path))
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"a warning in {path.name}: {output.text}"
    pictures = sum("image/png" in o.get("data", {}) for cell in code_cells(notebook) for o in cell.outputs)
    assert pictures >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_ends_in_asserts_and_is_kept_as_run(path):
    notebook = read(path)
    cells = code_cells(notebook)
    assert asserts_in(cells[-1].source) >= 3
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it top to bottom, then save"
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 1.2e6
    # Nothing of the machine it was run on.
    shown = texts(notebook)
    assert not re.search(r"(?<![\w/])/(home|root|tmp|work|Users|usr|opt)/|[A-Z]:\\|\w@\w", shown)
    assert not any(cell.metadata for cell in notebook.cells)


def test_the_run_fails_where_an_assert_fails():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1\nassert x == 2, 'not two'")])
    with pytest.raises(CellExecutionError, match="not two"):
        execute(notebook)


def test_asserts_are_counted_as_statements():
    assert asserts_in("%matplotlib inline\nassert x\n# assert y\nprint('assert z')") == 1
