"""encoding.py: an encoding that is killed goes on after its last piece, and with nothing of anything else.

What the latents are is tested in test_stages.py, with the stages that read them.
"""

import shutil
import types
from pathlib import Path

import numpy as np
import pytest

import dataset
import encoding
from ldm.training import records, runs
from ldm.training import settings as schema

OLD = Path(__file__).parent / "old_runs" / "vqvae"
BATCHES = 2 * 3 + 1  # two views of the 3 batches of the training split, and the one of the validation split


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantom.zip"
    dataset.write_phantoms(path, people=7, image_size=32)
    return dataset.open_source(path)


@pytest.fixture
def run(tmp_path):
    for name in ("autoencoder.keras", "autoencoder.json"):
        shutil.copy(OLD / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def work(monkeypatch):
    """Pieces of one batch, which cost nothing; how many were encoded, and after which of them the power fails."""
    done = {"batches": 0, "last": None}

    def described(autoencoder, masks):
        def describe(batch):
            if done["batches"] == done["last"]:
                raise KeyboardInterrupt
            done["batches"] += 1
            small = batch["image"][:, ::4, ::4].numpy()
            row = {"latents": small.astype("float16"), "codes": (small[..., 0] > 0).astype("int32")}
            return row | {key: batch[key].numpy() for key in ("z", "label", "case")}

        return describe

    monkeypatch.setattr(encoding, "described", described)
    monkeypatch.setattr(records, "load_first_stage", lambda run: types.SimpleNamespace(image_size=32))
    monkeypatch.setattr(encoding, "PIECE", 1)
    return done


def encode(run, source, **changes):
    settings = schema.merged(records.of(OLD, "latents")["settings"], {"latents": {"views": 2}, **changes})
    encoding.encode_latents(run, settings, source, source.manifest())


def stored(run):
    return {split: dict(np.load(run / "latents" / f"{split}.npz")) for split in ("train", "validate")}


def killed(run, source, work, after):
    work["last"] = after
    with pytest.raises(KeyboardInterrupt):
        encode(run, source)
    assert work["batches"] == after
    work["last"], work["batches"] = None, 0


@pytest.mark.parametrize("after", [0, 2, 3, 5, 6])
def test_a_killed_encoding_goes_on_after_its_last_piece_to_the_same_latents(run, source, work, after, capsys):
    encode(run, source)
    assert work["batches"] == BATCHES
    whole, work["batches"] = stored(run), 0
    shutil.rmtree(run / "latents")
    killed(run, source, work, after)
    capsys.readouterr()
    encode(run, source)
    assert work["batches"] == BATCHES - after
    assert ("going on after" in capsys.readouterr().out) == (
        after % 3 > 0
    )  # a view that is complete is not gone on with
    again = stored(run)
    for split in whole:
        assert whole[split].keys() == again[split].keys() >= {"latents", "codes", "z", "label", "case"}
        for name in whole[split]:
            np.testing.assert_array_equal(whole[split][name], again[split][name])
    assert sorted(path.name for path in (run / "latents").iterdir()) == ["train.npz", "validate.npz"]


def test_pieces_of_another_first_stage_or_another_seed_are_not_taken(run, source, work):
    killed(run, source, work, 2)
    encode(run, source, seed=5)
    assert work["batches"] == BATCHES
    work["batches"] = 0
    shutil.rmtree(run / "latents")
    killed(run, source, work, 2)
    with open(run / "autoencoder.keras", "ab") as file:
        file.write(b"another")
    encode(run, source)
    assert work["batches"] == BATCHES


def test_pieces_of_other_labels_are_not_taken(run, source, work, tmp_path):
    killed(run, source, work, 2)
    rows = [f"{person},{('NC', 'AD')[person % 2]}" for person in range(1, 8)]
    (tmp_path / "people.csv").write_text("\n".join(["case,label", *rows]))
    other = dataset.open_source(source.path, labels=tmp_path / "people.csv")
    assert other.manifest() == source.manifest() and np.any(other.label != source.label)
    encode(run, other)
    assert work["batches"] == BATCHES
    np.testing.assert_array_equal(stored(run)["train"]["label"], other.label[other.select("train")])


def test_a_piece_that_cannot_be_read_is_made_again(run, source, work):
    killed(run, source, work, 2)
    (second,) = (run / "latents").glob("train.*/0-1.npz")
    second.write_bytes(second.read_bytes()[:100])
    encode(run, source)
    assert work["batches"] == BATCHES - 1


def test_of_several_machines_one_encodes(run, source, work, monkeypatch):
    monkeypatch.setattr(runs, "is_chief", lambda: False)
    encode(run, source)
    assert work["batches"] == 0 and not (run / "latents").exists()
