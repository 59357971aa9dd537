"""evaluate.py: the whole way on a tiny untrained model; what it says where nothing can be said; its exit status."""

import functools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import dataset
import evaluate
import features
import modules
import train
from ldm.training import records, runs

SIZE = 32


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantom.zip"
    dataset.write_phantoms(path, people=8, image_size=SIZE)
    return str(path)


def make_run(folder, data, **more):
    """A run in pixels whose model was never trained."""
    flags = train.parser().parse_args(["--data", data, "--autoencoder", "none", "--image-size", str(SIZE)])
    flags.run = str(folder)
    _, _, settings = train.resolve(flags)
    unet = modules.UNet(SIZE, 1, width=8, multipliers=(1,), blocks=1, attention=(), head_size=8)
    model = modules.DiffusionModel(unet, clip_x_0=True)
    folder.mkdir(exist_ok=True)
    model.save(folder / "diffusion.keras")
    records.write(folder, "diffusion", settings, dataset.open_source(data).manifest(), finished=True)
    return folder


@pytest.fixture(scope="module")
def evaluated(phantoms, tmp_path_factory):
    """A run that was evaluated with 60 samples, and what its report says."""
    run = make_run(tmp_path_factory.mktemp("runs") / "tiny", phantoms)
    few = ["--count", "60", "--steps", "2", "--feature-steps", "5"]
    with pytest.MonkeyPatch.context() as patch:  # UMAP compiles itself for half a minute; the smoke run waits for it
        first_two = SimpleNamespace(fit_transform=lambda x: x[:, :2])
        patch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **_: first_two))
        status = evaluate.main(["--run", str(run), *few, "--fail-above", "0.5"])
    return run, status, json.loads((run / "report.json").read_text())


def test_the_report_has_every_part(evaluated):
    run, status, facts = evaluated
    assert status == 0
    page = (run / "report.html").read_text()
    for title in ("Reconstruction", "Samples", "Distribution", "Anatomy", "Copies", "Leaks", "Embedding", "Cost"):
        assert f">{title}</h2>" in page
    assert "src=" in page and "http://" not in page and "https://" not in page
    assert {"distribution", "anatomy", "copies", "leaks", "cost"} <= set(facts)
    assert facts["copies"]["pixels"]["rate"] == 0.0  # grey noise is nobody's copy
    assert facts["distribution"]["samples"]["precision"] == 0.0
    card = (run / "model_card.md").read_text()
    assert "8" in card and "Intended use" in card and runs.versions()["keras"] in card


def test_samples_are_kept_and_gone_on_with(evaluated, phantoms, monkeypatch):
    run, _, _ = evaluated
    flags = evaluate.parser().parse_args(["--run", str(run), "--count", "60", "--steps", "2"])
    study = evaluate.open_study(flags)
    (store,) = (run / "evaluation").glob("samples_*.npz")
    whole = np.load(store)["images"]
    np.savez(store, images=whole[:41], seconds=1.0)
    again = evaluate.draw_samples(study)
    np.testing.assert_array_equal(np.round(255 * again.images), whole)
    np.testing.assert_array_equal(np.sort(again.z), np.sort(np.resize(study.real["train"].z, 60)))
    monkeypatch.setattr(evaluate, "draw", None)  # nothing is drawn a second time
    np.testing.assert_array_equal(evaluate.draw_samples(study).images, again.images)


def test_samples_of_all_batches_have_noise_of_their_own(evaluated, tmp_path, monkeypatch):
    run, _, _ = evaluated
    few = ["--count", "70", "--steps", "20", "--sampler", "ddpm", "--out", str(tmp_path)]
    seeds = []

    def recorded(denoise, x_T, schedule, steps, seed):
        seeds.append(seed)
        yield x_T, x_T

    monkeypatch.setitem(evaluate.samplers.SAMPLERS, "ddpm", recorded)
    evaluate.draw_samples(evaluate.open_study(evaluate.parser().parse_args(["--run", str(run), *few])))
    assert len(seeds) == len(set(seeds)) == 3


def test_samples_of_other_conditions_are_not_the_stored_ones(evaluated, monkeypatch):
    run, _, _ = evaluated
    flags = evaluate.parser().parse_args(["--run", str(run), "--count", "60", "--steps", "2"])
    study, drawn = evaluate.open_study(flags), []
    study.out = run
    study.real["train"].label[:] = -1  # as of other --data
    monkeypatch.setattr(evaluate, "draw", lambda *arguments: drawn.append(1) or arguments[3])
    evaluate.draw_samples(study)
    assert drawn


def test_data_without_training_people_is_refused(evaluated, tmp_path, capsys):
    run, _, _ = evaluated
    folder = tmp_path / "keras_png_slices_test"
    folder.mkdir()
    for z in range(2):
        evaluate.figures.save_png(folder / f"case_001_slice_{z}.nii.png", np.full((32, 32), 99, np.uint8))
    assert evaluate.main(["--run", str(run), "--data", str(tmp_path)]) == 2
    assert "train split is empty" in capsys.readouterr().err


def test_a_planted_test_person_and_a_planted_slice_are_leaks(evaluated, tmp_path):
    run, _, _ = evaluated
    study = evaluate.open_study(evaluate.parser().parse_args(["--run", str(run)]))
    evaluate.leaks(study)
    assert not study.sections[-1].warnings
    stored = json.loads((run / "diffusion.json").read_text())
    person = stored["data"]["splits"]["test"]["cases"][0]
    stored["data"]["splits"]["train"]["cases"].append(person)
    (tmp_path / "diffusion.json").write_text(json.dumps(stored))
    study.run = tmp_path
    study.real["test"].images[3] = 0.9 * study.real["train"].images[40]
    neighbours = np.flatnonzero(study.real["train"].case == study.real["train"].case[100])
    study.real["test"].images[9] = study.real["train"].images[neighbours[9:11]].mean(axis=0)  # near two of them
    evaluate.leaks(study)
    said = " ".join(study.sections[-1].warnings)
    assert f"saw 1 of the test people, {person}" in said and "Nearly the same slice" in said
    assert "filed under the wrong person" in said
    whose = study.source.case_names[int(study.real["train"].case[100])]
    assert [person, 9] in [list(pair[0]) for pair in study.facts["leaks"]["misfiled"] if pair[1][0] == whose]
    assert study.facts["leaks"]["near-identical pairs"]["train, test"] >= 1


def test_twenty_samples_and_no_test_people_give_sentences_and_no_numbers(evaluated):
    run, _, _ = evaluated
    study = evaluate.open_study(evaluate.parser().parse_args(["--run", str(run)]))
    study.samples = study.real["train"].spread(20)
    evaluate.distribution_section(study, None)
    assert "20 samples are too few" in study.sections[-1].warnings[0]
    del study.real["test"]
    study.first_stage = object()
    sections = (evaluate.distribution_section, evaluate.copies)
    for section in (evaluate.reconstruction, *(functools.partial(section, describe=None) for section in sections)):
        section(study)
        assert "There are no test people" in study.sections[-1].warnings[0] and not study.sections[-1].tables
    assert not study.facts
    with pytest.raises(runs.RunError, match="could not be counted"):
        evaluate.audit_status(study.facts, 0.1)


def test_an_order_that_makes_numbers_meaningless_is_said():
    def facts(floor, samples, noisy, blurred):
        kid = {"floor: validation people": floor, "samples": samples, "noisy": noisy, "blurred": blurred}
        return {name: {"KID": value} for name, value in kid.items()} | {"real people": {"MS-SSIM of pairs": 0.8}}

    assert evaluate.rank_warnings(facts(0.0, 0.1, 0.5, 0.3)) == []
    assert "no better than: blurred" in " ".join(evaluate.rank_warnings(facts(0.0, 0.4, 0.5, 0.3)))
    assert "suspect a leak" in " ".join(evaluate.rank_warnings(facts(0.2, 0.1, 0.5, 0.3)))


@pytest.mark.parametrize(("rate", "limit", "status"), [(0.02, None, 0), (0.02, 0.02, 0), (0.021, 0.02, 3)])
def test_exit_status_3_means_more_copies_than_allowed(rate, limit, status):
    facts = {"copies": {"pixels": {"rate": rate}, "features": {"rate": 0.0}}}
    assert evaluate.audit_status(facts, limit) == status


def test_sets_are_compared_at_the_same_slice_indices():
    z = np.random.default_rng(0).integers(0, 8, 1000)
    z = np.concatenate([z, np.arange(8)])
    slices = evaluate.Slices(np.zeros((len(z), 1, 1, 1)), z, z, np.arange(len(z)))
    counts = np.bincount(slices.spread(96).z)
    assert len(counts) == 8 and np.ptp(counts / np.bincount(z)) < 0.02  # in proportion, none left out
    people = evaluate.Slices(np.zeros((64, 1, 1, 1)), np.tile(np.arange(8), 8), np.tile(z[:8], 8), np.arange(64))
    assert (np.bincount(people.spread(32).z) == 4).all()


def test_halving_averages_blocks():
    images = np.random.default_rng(0).random((2, 256, 256, 1))
    np.testing.assert_allclose(evaluate.half(images)[1, 3, 5], images[1, 6:8, 10:12, 0].mean())
    assert evaluate.half(images[:, :64, :64]).shape == (2, 64, 64)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--count", "0"], "--count"),
        (["--steps", "0"], "--steps"),
        (["--feature-steps", "0"], "--feature-steps"),
        (["--fail-above", "1.5"], "--fail-above"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(argv, named, capsys):
    assert evaluate.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and named in said[0]


def test_inception_without_its_weights_names_the_way_out(monkeypatch):
    def offline(**options):
        raise OSError("no network")

    monkeypatch.setattr(features.keras, "applications", SimpleNamespace(InceptionV3=offline))
    with pytest.raises(runs.RunError, match="leave the flag out"):
        features.inception()
