"""The example notebook, run from its first cell to its last."""

import nbformat
from nbclient import NotebookClient

from tests.support.paths import ROOT


def test_the_notebook_runs_and_is_kept_without_outputs():
    notebook = nbformat.read(ROOT / "examples" / "heads.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    printed = [
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stdout"
    ]
    assert any("nats/token" in text for text in printed)
