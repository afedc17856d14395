"""Every notebook runs from top to bottom, and is kept with the outputs of one clean run."""

import os
import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
SHARED = Path(os.environ.get("PROBDIFF_SHARED", FOLDER.parents[1] / "shared")) / "data"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))


def find_mnist(monkeypatch):
    """Published files where they are given, or none: a test downloads nothing."""
    if (SHARED / "mnist").is_dir():
        monkeypatch.setenv("PROBDIFF_DATA", str(SHARED / "mnist"))
    elif "PROBDIFF_DATA" not in os.environ:
        pytest.skip("MNIST files are not at hand")


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """In a kernel and a folder of its own, so that nothing is left beside the notebook."""
    shutil.copytree(FOLDER / "models", tmp_path / "models")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # the kernel starts elsewhere
    notebook = nbformat.read(path, as_version=4)
    if any("datasets.mnist()" in cell.source for cell in notebook.cells):
        find_mnist(monkeypatch)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    assert [cell.execution_count for cell in code_cells(notebook)] == list(
        range(1, len(code_cells(notebook)) + 1)
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_from_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [text for text in texts(notebook) if re.search(r"(^|\s)/\w+/|Warning", text)]
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_ends_in_what_it_claims(path):
    assert "assert " in code_cells(nbformat.read(path, as_version=4))[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_points_at_what_is_there(path):
    """Files by their path, and names that follow a file, as `file.py`: `name`, `name`."""
    package = FOLDER.parent / "probdiff"
    for cell in nbformat.read(path, as_version=4).cells:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            files = re.findall(r"`([\w/]+\.py)`", line)
            sources = [(package / file).read_text() for file in files]
            named = re.search(r"\.py`: ([^;|]*)", line)
            for name in re.findall(r"`(\w+)`", named[1]) if named else ():
                assert any(re.search(rf"(def|class) {name}\b", s) for s in sources), name
