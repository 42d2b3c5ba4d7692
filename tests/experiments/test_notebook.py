"""The notebook runs from top to bottom, on a quick run of its own, and is kept without outputs."""

from pathlib import Path

import pytest

from tests.support import DEADLOCK

PATH = Path(__file__).parent.parent.parent / "experiments" / "posterior_analysis.ipynb"

# ipykernel's own imports warn, and warnings are errors here.
pytestmark = pytest.mark.filterwarnings("ignore")


def read():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(PATH, as_version=4)


def test_it_is_kept_without_outputs():
    for cell in read().cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(PATH.parent.parent))
    notebook = read()
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, long = first.source.replace("epochs=6, milestones=(4,)", "epochs=1, milestones=()"), first.source
    assert first.source != long, "shorter than what a reader runs"
    nbclient.NotebookClient(notebook, timeout=int(DEADLOCK), resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 5
    compared = code[-1].outputs[0]["data"]["text/plain"]
    assert "jaccard" in compared
    assert "all" in compared
