"""The notebooks run from top to bottom, small, on what this machine has."""

import json
import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


RUNS = [(p, "tensorflow") for p in NOTEBOOKS]
RUNS += [(p, "jax") for p in NOTEBOOKS if p.stem.startswith("tpu")]  # as on a TPU


@pytest.mark.parametrize("path, backend", RUNS, ids=lambda x: getattr(x, "stem", x))
def test_runs(path, backend, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    monkeypatch.setenv("KERAS_ADAM_SMALL", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # libtpu aborts where there is no TPU
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert f"on {backend}" in printed or path.stem == "gpu_embeddings"
    losses = re.findall(r"^(?:keras|SGD).* (\d+\.\d+)", printed, re.MULTILINE)
    assert len(losses) >= 3, printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_committed_bare_and_opens_in_colab(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    badge = (
        "https://colab.research.google.com/github/OWNER/keras_adam/blob/main/colab/"
        + path.name
    )
    assert badge in "".join(notebook["cells"][0]["source"])
    assert badge in (ROOT / "colab" / "README.md").read_text()
    assert "verified" in "".join(notebook["cells"][0]["source"])
