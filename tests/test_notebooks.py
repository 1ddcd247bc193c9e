"""The notebooks of examples/: each runs from top to bottom, and shows what it means to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SHOWN: dict[str, dict[str, str]] = {
    "first_explanation": {
        "explainer": "<b>GradCAM</b>",
        "describe(model, images)": "taken by</th>",
        "photo": "image/png",
        "drawn": "image/png",
    },
    "comparing_methods": {"table": 'class="results"', "sheet": "image/png", "plot": "image/png"},
    "fit_and_export": {
        "explainer": "<b>TTAME</b>",
        "sheet": "image/png",
        'again.attribute(scenes.inputs, target).equal(maps["T-TAME"])': "True",
        'torch.allclose(exported, maps["T-TAME"][:, :1], atol=1e-5)': "True",
    },
}
"""Notebook -> the last line of a cell -> what it must show: a part of its HTML, a kind of picture, or its text."""


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(cell: Any) -> dict[str, str]:
    """What a cell displays, by its kind."""
    found: dict[str, str] = {}
    for output in cell["outputs"]:
        found |= {kind: "".join(content) for kind, content in output.get("data", {}).items()}
    return found


def run(path: Path, folder: Path) -> Any:
    pytest.importorskip("nbclient", reason="notebooks are run where the extra test is installed")
    pytest.importorskip("ipykernel", reason="notebooks are run where the extra test is installed")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


def test_there_are_three_and_they_are_kept_without_outputs():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code(notebook)), path.name
        assert notebook["cells"][0]["cell_type"] == "markdown"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own, which depend on its version
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_means_to(path, tmp_path):
    done = run(path, tmp_path)
    last = {}
    for cell in code(done):
        last.setdefault(cell["source"].splitlines()[-1], []).append(outputs(cell))
    for line, wanted in SHOWN[path.stem].items():
        assert line in last, line
        for shown in last[line]:
            known = shown.keys() | {shown.get("text/plain", "")}
            assert wanted in known or wanted in shown.get("text/html", ""), (line, list(shown))
