"""The notebooks run from their first cell to their last, and are stored with outputs."""

import json
from pathlib import Path

import pytest
from quick import MEASURE, ONE_CAMERA

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FEWER = ("workload.steps=1", ONE_CAMERA, *MEASURE, "tracking=none")
NAMES = ["01-read-a-study", "02-where-the-time-goes", "03-plan-a-sweep"]


def test_every_notebook_is_tried():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stored_with_outputs_and_without_errors(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_bytes())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert len(outputs) >= 3
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.filterwarnings("ignore")  # the kernel's own libraries
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    for cell in notebook.cells:  # the same trials, but small
        words = FEWER if "profile=" in cell.source else (*FEWER, "profile=none")
        cell.source = cell.source.replace('"workload.steps=2"', json.dumps(words)[1:-1])
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
