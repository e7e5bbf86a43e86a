"""The tutorial: runs from top to bottom (shortened), and is committed as it came out of a real run."""

import json

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "air.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(PATH, as_version=4)


def outputs(notebook):
    """All outputs, each as its code cell's number and itself."""
    return [(i, output) for i, cell in enumerate(notebook.cells) for output in cell.get("outputs", ())]


def check_outputs(notebook):
    for i, output in outputs(notebook):
        assert output.output_type != "error", f"cell {i}: {output.get('evalue')}"
        assert output.get("name") != "stderr", f"cell {i} warns: {output.text}"


def test_it_runs(monkeypatch):
    monkeypatch.setenv("AIR_NOTEBOOK_SHORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    check_outputs(notebook)
    assert "300 scenes to learn from" in json.dumps(notebook), "this was to be the shortened run"


def test_it_is_committed_as_it_was_run(committed):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_outputs(committed)
    text = PATH.read_text()
    assert "60,000 scenes to learn from" in text, "the committed run was a shortened one"
    assert sum("image/png" in output.get("data", {}) for _, output in outputs(committed)) > 12
    assert len(text) < 1_500_000
    for debris in ("/home/", "/root/", "/Users/", "/tmp/", "site-packages", "it/s]"):
        assert debris not in text, debris
