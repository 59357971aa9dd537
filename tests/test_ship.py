"""The model that comes with the repository: half as large, drawing the same, and never trained over unasked."""

import importlib.util
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import dataset
import train
from ldm.data import phantom
from ldm.training import runs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ship():
    spec = importlib.util.spec_from_file_location("ship", ROOT / "benchmarks" / "ship.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def run(tmp_path):
    """A tiny run, as if of `python train.py` without data."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (ROOT / "tests" / "old_runs" / "vqvae").glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"data": "phantom.zip"', '"data": null'))
    return folder


@pytest.mark.slow
def test_a_shipped_run_is_half_as_large_and_draws_the_same(ship, run, tmp_path):
    facts = ship.ship(run, tmp_path / "phantom")
    assert facts["PSNR to the run"] > 40
    names = ("autoencoder.keras", "diffusion.keras")
    before, after = (sum((home / name).stat().st_size for name in names) for home in (run, tmp_path / "phantom"))
    assert after < 0.55 * before
    assert json.loads((tmp_path / "phantom" / "shipped.json").read_text())["run"] == "run"
    assert not list(tmp_path.glob("~*"))


def test_titles_get_the_new_name_and_facts_keep_theirs(ship):
    said = b"# Model card of the\n<h1>Can the pictures of the be trusted?</h1> share of the copies, run: the"
    assert ship.titled(said, "the", "phantom") == said.replace(b"card of the", b"card of phantom").replace(
        b"pictures of the be", b"pictures of phantom be"
    )


def test_what_is_too_large_or_of_other_data_is_not_shipped(ship, run, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "MOST_BYTES", 1000)
    monkeypatch.setattr(ship, "drawn", lambda folder: np.zeros((1, 16, 16, 1)))
    with pytest.raises(runs.RunError, match="at most 1000 bytes"):
        ship.ship(run, tmp_path / "phantom")
    path = run / "diffusion.json"
    path.write_text(path.read_text().replace('"data": null', '"data": "mine.zip"'))
    with pytest.raises(runs.RunError, match="nobody else's data"):
        ship.ship(run, tmp_path / "phantom")
    assert not (tmp_path / "phantom").exists()


def test_its_phantoms_are_drawn_where_real_slices_are_asked_for(tmp_path, monkeypatch, capsys):
    about = json.loads((ROOT / "checkpoint" / "phantom" / "diffusion.json").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phantom, "STAND_IN_PEOPLE", 3)
    assert len(dataset.open_recorded(about).entries) == 96
    assert f"drawing 3 phantom brains into {phantom.STAND_IN}" in capsys.readouterr().out
    phantom.STAND_IN.unlink()
    about["settings"]["data"] = str(phantom.STAND_IN)  # somebody's own of that name is not made up
    with pytest.raises(dataset.DataError, match="does not exist"):
        dataset.open_recorded(about)


def test_training_never_writes_into_what_was_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint" / "phantom").mkdir(parents=True)
    (tmp_path / "checkpoint" / "phantom" / "shipped.json").write_text("{}")
    assert train.folder_of(train.parser().parse_args([])) == Path("checkpoint/my-phantom")
    assert train.main(["--run", "phantom", "--dry-run"]) == 2
    assert "comes with this repository: give another --run" in capsys.readouterr().err


def test_git_takes_what_is_shipped_and_no_other_run():
    def ignored(path):
        return not subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode

    assert ignored("checkpoint/other/diffusion.keras") and ignored("checkpoint/phantom/diffusion.last.weights.h5")
    assert not ignored("checkpoint/phantom/diffusion.keras")
