"""The Colab notebook, from top to bottom, at a small size."""

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "brain_slices.ipynb"
TINY = (
    "--data phantom.zip --image-size 32 --epochs 1 --steps-per-epoch 4 --batch-size 8 --autoencoder-width 16 --width 16"
)


def test_it_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = (
        pytest.importorskip("nbclient", reason="nbclient is not installed"),
        pytest.importorskip("nbformat"),
    )
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import dataset

    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "ldm"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    dataset.write_phantoms(tmp_path / "phantom.zip", people=8, image_size=32)
    monkeypatch.setenv("NOTEBOOK_TRAIN", f"{TINY} --head-size 16 --views 1")
    monkeypatch.setenv("NOTEBOOK_DRAW", "--steps 2 --count 4")
    monkeypatch.setenv("NOTEBOOK_JUDGE", "--count 60 --steps 2 --feature-steps 10")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out]
    assert sum("image/png" in out["data"] or "image/gif" in out["data"] for out in shown) >= 4
    assert (tmp_path / "checkpoint" / "notebook" / "report.html").exists()
