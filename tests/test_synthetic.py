"""predict.py archive: whole people, told truly, whom `train.py` reads back; bounded, resumable, and nobody's copy."""

import functools
import io
import json
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import dataset
import predict
import synthetic
import train
from generator import Generator
from ldm.data import phantom
from ldm.training import runs

OLD = Path(__file__).parent / "old_runs"
HALF = "keras_png_slices_data"


@pytest.fixture(scope="module", autouse=True)
def each_run_is_loaded_once():
    """To load and to compile a run takes longer than all that is drawn here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "Generator", functools.cache(Generator))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny run in latents and one in pixels, and the slices that they say they were trained on."""
    folder = tmp_path_factory.mktemp("home")
    dataset.write_phantoms(folder / "phantom.zip", people=4, image_size=32)
    (folder / "people.csv").write_text("case,label,age,sex\n1,AD,71,F\n2,NC,64,M\n3,AD,80,F\n4,NC,,M\n")
    for name in ("vqvae", "pixels"):
        (folder / name).mkdir()
        for path in (OLD / name).glob("*.*"):
            (folder / name / path.name).write_bytes(path.read_bytes())
        for path in (folder / name).glob("*.json"):
            text = path.read_text().replace('"phantom.zip"', json.dumps(str(folder / "phantom.zip")))
            path.write_text(text.replace('"people.csv"', json.dumps(str(folder / "people.csv"))))
    return folder


def archive(home, run, out, *more, count=96):
    words = ["archive", "--run", f"{home}/{run}", "--out", str(out), "--steps", "1", "--count", str(count), *more]
    return predict.main(words)


@pytest.fixture(scope="module")
def zipped(home, tmp_path_factory):
    """A data set of 97 slices, which are four people of 32, out of the run that names tissues."""
    out = tmp_path_factory.mktemp("drawn") / "synthetic.zip"
    assert archive(home, "vqvae", out, count=97) == 0
    return out


def provenance(path):
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read(f"{HALF}/provenance.json"))


def test_it_is_read_back_as_whole_people_with_labels_and_columns(zipped):
    source = dataset.open_source(zipped)
    assert source.kind == "oasis" and source.label_names == ("AD", "NC")
    for case in np.unique(source.case):
        mine = source.case == case
        assert source.z[mine].tolist() == list(range(32))
        assert len(set(source.split[mine])) == len(set(source.label[mine])) == 1
    people = {split: len(np.unique(source.case[source.split == split])) for split in dataset.SPLITS}
    assert people == {"train": 2, "validate": 1, "test": 1}
    assert {"archive"} == set(source.made.values())  # nothing had to be carved out
    assert source.columns()["sex"] == {"kind": "category", "values": sorted(set(source.covariates["sex"].values()))}
    assert all(67.5 - 7 <= float(age) <= 67.5 + 7 for age in source.covariates["age"].values())


def test_there_are_never_fewer_than_three_people(home, tmp_path, capsys):
    assert archive(home, "pixels", tmp_path / "a.zip", count=1) == 0
    said = capsys.readouterr().out
    assert "archive: 3 people, 96 slices -> " in said, "and not a word of copies, which were not looked for"
    source = dataset.open_source(tmp_path / "a.zip")
    assert [len({*source.case[source.split == split]}) for split in dataset.SPLITS] == [1, 1, 1]


def test_train_reads_it(zipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(zipped), "--run", "again", "--preset", "64-f8", "--dry-run"]
    assert train.main(words) == 0
    assert "128 slices, people 2/1/1" in capsys.readouterr().out


def test_every_picture_says_that_it_is_synthetic(zipped):
    with zipfile.ZipFile(zipped) as file:
        pictures = [name for name in file.namelist() if name.endswith(".png")]
        assert len(pictures) == 4 * 32
        for name in pictures:
            assert Image.open(io.BytesIO(file.read(name))).text["Description"].startswith("synthetic: ")


def test_provenance_says_what_it_was_made_with(home, zipped):
    told = provenance(zipped)
    assert told["synthetic"] is True and told["people"] == 4 and told["slices"] == 128
    assert told["drawn with"]["seed"] == 0 and told["drawn with"]["steps"] == 1
    assert told["versions"] == runs.versions()
    assert told["trained on"]["people"] == {"train": 2, "validate": 1, "test": 1}
    assert told["report"].startswith("not measured")
    assert set(told["models"]) == {"autoencoder.keras", "diffusion.keras"}
    assert sorted(sum(told["splits"].values(), [])) == [1, 2, 3, 4]


def test_provenance_has_the_numbers_of_the_report(home, tmp_path):
    report = {"distribution": {"samples": {"KID": 0.5, "recall": 0.25, "Frechet distance": 3}}}
    report["copies"] = {"pixels": {"rate": 0.01}, "features": {"rate": 0.02}, "people": {}}
    (home / "pixels" / "report.json").write_text(json.dumps(report))
    assert archive(home, "pixels", tmp_path / "out.zip") == 0
    (home / "pixels" / "report.json").unlink()
    expected = {"KID": 0.5, "recall": 0.25, "share of copies by pixels": 0.01, "share of copies by features": 0.02}
    assert provenance(tmp_path / "out.zip")["report"] == expected


def test_it_goes_on_where_it_was_interrupted_and_comes_to_the_same_bytes(home, tmp_path, monkeypatch):
    whole, drawn = synthetic.draw_person, []

    def stops(generator, parts, case, *more):
        drawn.append(case)
        if case == 2 and len(drawn) == 2:
            raise KeyboardInterrupt
        whole(generator, parts, case, *more)

    monkeypatch.setattr(synthetic, "draw_person", stops)
    assert archive(home, "pixels", tmp_path / "a.zip") == 130
    assert not (tmp_path / "a.zip").exists()
    assert archive(home, "pixels", tmp_path / "a.zip") == 0
    assert drawn == [1, 2, 2, 3]
    assert archive(home, "pixels", tmp_path / "b.zip") == 0
    first, second = (zipfile.ZipFile(tmp_path / name) for name in ("a.zip", "b.zip"))
    assert first.namelist() == second.namelist()
    assert all(first.read(name) == second.read(name) for name in first.namelist())
    assert not list(tmp_path.glob("*.parts"))


def test_whoever_goes_on_must_want_the_same(home, tmp_path, monkeypatch, capsys):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "draw_person", stops)
    assert archive(home, "pixels", tmp_path / "a.zip") == 130
    assert archive(home, "pixels", tmp_path / "a.zip", "--seed", "3") == 2
    assert "begun with another seed (0)" in capsys.readouterr().err
    monkeypatch.setattr(synthetic, "models_of", lambda run: {"diffusion.keras": "another"})
    assert archive(home, "pixels", tmp_path / "a.zip") == 2
    assert "begun before the run was trained on: remove the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "count, more, named",
    [
        (96, ("--label", "MCI"), "this run knows AD and NC"),
        (96, ("--conditions", "age=70"), "was told no columns"),
        (96, ("--voxel", "1", "1", "2"), "--voxel has no effect without"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(home, tmp_path, capsys, count, more, named):
    assert archive(home, "pixels", tmp_path / "a.zip", *more, count=count) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a.zip").exists()


def test_nothing_is_written_over(home, tmp_path, capsys):
    (tmp_path / "a.zip").write_text("mine")
    assert archive(home, "pixels", tmp_path / "a.zip") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "a.zip").read_text() == "mine"


def test_a_folder_gets_volumes_that_are_read_back(home, tmp_path):
    out = tmp_path / "volumes"
    assert archive(home, "pixels", out, "--voxel", "1", "1", "4") == 0
    found = sorted(path.relative_to(out).as_posix() for path in out.glob("*/*.nii.gz"))
    assert found == ["test/case_00003.nii.gz", "train/case_00001.nii.gz", "validate/case_00002.nii.gz"]
    stored = nibabel.load(out / found[0])
    assert stored.shape == (32, 32, 32) and stored.header.get_zooms() == (1, 1, 4)
    assert bytes(stored.header["descrip"]).startswith(b"synthetic: ")
    source = dataset.open_source(out, labels=out / "labels.csv")
    assert source.kind == "volumes" and source.label_names == ("AD", "NC")
    assert sorted(set(zip(source.split.tolist(), source.case.tolist(), strict=True))) == [
        ("test", 3),
        ("train", 1),
        ("validate", 2),
    ]


def test_who_is_a_copy_is_drawn_again(home, tmp_path, monkeypatch):
    seen = []

    def suspicious(images):
        seen.append(images.mean())
        return 0.5 if len(seen) in (2, 3) else 0.1  # the second person, twice

    monkeypatch.setattr(synthetic, "copies_of", lambda generator: suspicious)
    assert archive(home, "pixels", tmp_path / "a.zip", "--reject-copies") == 0
    told = provenance(tmp_path / "a.zip")
    assert told["noises"] == {"1": 10_000, "2": 22_000, "3": 30_000}
    assert told["drawn anew as copies"] == {
        "2": [{"noise": 20_000, "share of copies": 0.5}, {"noise": 21_000, "share of copies": 0.5}]
    }
    assert len(set(seen)) == 5  # each time another head


def test_a_run_that_only_copies_is_said_to(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "copies_of", lambda generator: lambda images: 1.0)
    assert archive(home, "pixels", tmp_path / "a.zip", "--reject-copies") == 2
    assert "knows its people by heart" in capsys.readouterr().err


@pytest.mark.slow
def test_training_slices_are_told_as_copies_and_new_people_are_not(tmp_path):
    """The real measure, on a first stage that loses nothing."""
    dataset.write_phantoms(tmp_path / "p.zip", people=8, image_size=64)
    source = dataset.open_source(tmp_path / "p.zip")

    class Exact:
        record = {"settings": {"data": str(tmp_path / "p.zip"), "image_size": 64, "seed": 0, "axis": 2}}

        def encode(self, images, known):
            return images

        decode = encode

    Exact.record["data"] = source.manifest()
    share = synthetic.copies_of(Exact())
    train_people = dataset.read_split(source, "train", 64)["image"][:32]
    assert share(train_people) == 1.0
    other = [item["image"] for item in phantom.slices(1, 64, seed=5)]
    assert share(np.float32(other)[..., None] / 127.5 - 1) <= synthetic.COPIED
