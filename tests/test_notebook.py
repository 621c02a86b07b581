"""The notebook of the documentation, executed as a reader would, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs/own_loop.ipynb"
NUMBERS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.timeout(400)
def test_the_notebook_runs_and_its_model_has_learned(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = printed(notebook)
    losses = [float(value) for value in re.search(r"^\[([\d., ]+)\]$", said, re.MULTILINE)[1].split(",")]
    assert losses[0] > 5 and losses[-1] < 0.1
    answers = re.findall(r"^(\w+) -> (\w+)$", said, re.MULTILINE)
    assert [number for _, number in answers] == NUMBERS
    assert (tmp_path / "output/notebook/adapter/adapter_model.safetensors").is_file()


def test_the_notebook_shows_outputs_and_no_path_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.source and cell.execution_count for cell in code)
    said = printed(notebook)
    assert "Neptune -> eighth" in said and "dotted lines are exchanges" in NOTEBOOK.read_text()
    assert not re.search(r"(?<![\w.])/(?:tmp|home|root|work)\b", NOTEBOOK.read_text())
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
