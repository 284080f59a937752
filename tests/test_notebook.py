"""The notebook in examples runs in a real kernel, and shows what it should; so does the progress of a run there."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "examples" / "digits.ipynb"

pytestmark = [
    pytest.mark.slow,
    # the kernel's own sockets are closed late, which is not ours to mend
    pytest.mark.filterwarnings("default::ResourceWarning", "default::DeprecationWarning"),
]


def executed(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


def shown(notebook: Any) -> str:
    """All that its cells show, as HTML or text."""
    out = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            out.append(output.get("text", "") or output["data"].get("text/html", output["data"].get("text/plain", "")))
    return "\n".join(out)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(nbformat.read(PATH, as_version=4), tmp_path, monkeypatch)
    text = shown(notebook)
    assert "conv_1/conv_1</td>" in text  # the graph
    assert '<svg class="rf"' in text or "<svg" in text
    assert "<b>Run</b>" in text
    assert text.count("<polyline") >= 8  # loss and accuracy, training and validation, of progress and run
    assert "done after 176 of 176 steps" in text
    assert "rank 1</td>" in text  # the plan
    accuracy = float(re.search(r"test accuracy: ([\d.]+)", text)[1])  # type: ignore[index]
    assert accuracy > 0.95
    assert f"{accuracy:.2%} of 360 labels right" in text  # the confusion matrix
    (progress,) = (cell for cell in notebook.cells if "ProgressBar" in cell.source)
    assert len(progress.outputs) == 1  # drawn anew in the same place
    assert "stderr" not in {output.get("name") for cell in notebook.cells for output in cell.get("outputs", ())}
