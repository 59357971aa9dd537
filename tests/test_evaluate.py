"""evaluate.py and study.py: the whole way on a tiny untrained model, from any interruption on; its exit status."""

import json
import os
import shutil
import sys
from dataclasses import FrozenInstanceError, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

import dataset
import evaluate
import features
import modules
import study
import train
from generator import Generator
from ldm.data import masks as tissue_masks
from ldm.diffusion import samplers
from ldm.drawing import figures
from ldm.judging import metrics, schema
from ldm.training import records, runs

SIZE = 32
COUNT = 70  # three batches, the last one not full
ALL = 6 * 32  # slices of the phantoms
FEW = ["--count", str(COUNT), "--steps", "2", "--precision", "float32"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantom.zip"
    dataset.write_phantoms(path, people=6, image_size=SIZE)
    return str(path)


def make_run(folder, data):
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


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What costs minutes and is tested elsewhere stands still: UMAP's compilation, feature training, the clock."""

    def project(images):
        directions = np.random.default_rng(1).standard_normal((images[0].size, 24)).astype("float32")
        return images.reshape(len(images), -1) @ directions / SIZE, None

    shapes = np.zeros((1, 16, 16), int)
    with pytest.MonkeyPatch.context() as patch:
        first_two = SimpleNamespace(fit_transform=lambda x: x[:, :2])
        patch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **_: first_two))
        patch.setattr(study, "describer", lambda *_: project)
        patch.setattr(features, "names_of", lambda *_: ["projection"])
        patch.setattr(study, "phantoms", lambda: (shapes, shapes))
        for module in (study, evaluate):
            patch.setattr(module, "time", SimpleNamespace(time=lambda: 0.0))
        usage = SimpleNamespace(ru_maxrss=1)
        patch.setattr(study, "resource", SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage))
        yield


@pytest.fixture(scope="module")
def evaluated(phantoms, tmp_path_factory):
    """A run that was evaluated, what the evaluation knew, and the exit status."""
    run, known = make_run(tmp_path_factory.mktemp("runs") / "tiny", phantoms), []
    make = study.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "make", lambda *words, **options: known.append(make(*words, **options)) or known[0])
        status = evaluate.main(["--run", str(run), *FEW, "--fail-above", "0.5"])
    return run, known[0], status


def stored_samples(run):
    (store,) = (run / "evaluation").glob("samples_*.npz")
    with np.load(store) as file:
        return store, file["images"]


# ---- the whole way ---------------------------------------------------------------------------------------------------


def test_the_report_has_every_part(evaluated):
    run, _, status = evaluated
    assert status == 0
    page, facts = (run / "report.html").read_text(encoding="utf-8"), json.loads((run / "report.json").read_text())
    for title in (
        "Reconstruction",
        "Samples",
        "Distribution",
        "Texture",
        "Anatomy",
        "Use",
        "Copies",
        "Leaks",
        "Embedding",
        "Cost",
    ):
        assert f">{title}</h2>" in page
    assert "src=" in page and "http://" not in page and "https://" not in page
    parts = {"distribution", "texture", "anatomy", "copies", "leaks", "cost"}
    assert set(facts) == {"about", *parts, "by person"}
    assert schema.problems(facts) == []
    assert facts["about"]["image size"] == SIZE and facts["about"]["features"] == ["projection"]
    assert set(facts["leaks"]) == {"near-identical pairs", "misfiled", "repeated", "said"}
    assert facts["copies"]["pixels"]["rate"] == 0.0  # grey noise is nobody's copy
    assert facts["distribution"]["samples"]["precision"] == 0.0
    card = (run / "model_card.md").read_text(encoding="utf-8")
    assert "Intended use" in card and runs.versions()["keras"] in card


def test_interrupted_and_gone_on_with_it_writes_the_same_report(evaluated, tmp_path, monkeypatch, capsys):
    """Status 130 in the middle of sampling, what was drawn is kept; then the very same bytes."""
    run, _, _ = evaluated
    again = tmp_path / "tiny"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("evaluation", "report*", "model_card*"))
    draw, drawn = Generator.draw, []

    def interrupted(self, x_T, *words, **options):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(x_T))
        return draw(self, x_T, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "draw", interrupted)
        assert evaluate.main(["--run", str(again), *FEW]) == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert len(stored_samples(again)[1]) == sum(drawn) == 64 and not (again / "report.json").exists()
    assert evaluate.main(["--run", str(again), *FEW]) == 0
    np.testing.assert_array_equal(stored_samples(again)[1], stored_samples(run)[1])
    for name in ("report.json", "report.html", "model_card.md"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_measures_can_be_taken_in_any_order_and_write_nothing_into_the_study(evaluated):
    run, known, _ = evaluated
    with pytest.raises(FrozenInstanceError):
        known.samples = None
    sets = [known.samples, *known.people.real.values(), *known.bad.values()]
    arrays = [getattr(slices, entry.name) for slices in sets for entry in fields(slices)]
    for array in arrays:
        if array is not None:
            array.setflags(write=False)
    found = study.measure(known, tuple(reversed(study.MEASURES)))
    facts = {key: value for measured in found.values() for key, value in measured.facts.items()}
    stored = json.loads((run / "report.json").read_text(encoding="utf-8"))
    del stored["cost"], stored["leaks"]["said"], stored["about"], stored["by person"]
    assert json.loads(json.dumps(facts)) == stored


def test_without_a_diffusion_model_there_are_sentences_and_what_can_be_measured(evaluated, tmp_path, capsys):
    run, known, _ = evaluated
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    shutil.copy(run / "diffusion.json", untrained)
    assert evaluate.main(["--run", str(untrained), *FEW]) == 0
    assert "`python train.py diffusion --run untrained` makes one" in capsys.readouterr().out
    parts = {"about", "texture", "leaks", "cost", "by person"}
    assert set(json.loads((untrained / "report.json").read_text(encoding="utf-8"))) == parts
    assert evaluate.main(["--run", str(untrained), *FEW, "--fail-above", "0.1"]) == 2
    assert "copies could not be counted" in capsys.readouterr().err


# ---- sections --------------------------------------------------------------------------------------------------------


def test_sections_are_the_same_alone_and_nothing_else_is_made(evaluated, tmp_path, monkeypatch, capsys):
    """Leaks and the cost need no samples; what is said of leaks is what the whole report says."""
    run, _, _ = evaluated
    monkeypatch.setattr(study, "draw_samples", lambda *_: pytest.fail("samples were drawn"))
    words = ["--run", str(run), *FEW, "--out", str(tmp_path), "--sections", "leaks"]
    assert evaluate.main(words) == 0
    said = capsys.readouterr()
    assert "leaks: 0.0 minutes" in said.out.splitlines() and "\r" not in said.err, "a bar is for a terminal"
    whole = json.loads((run / "report.json").read_text(encoding="utf-8"))
    part = json.loads((tmp_path / "report_part.json").read_text(encoding="utf-8"))
    about = {**whole["about"], "features": []}
    assert part == {"about": about, "leaks": whole["leaks"], "by person": {}}
    page = (tmp_path / "report_part.html").read_text(encoding="utf-8")
    assert ">Leaks</h2>" in page and ">Copies</h2>" not in page
    assert not {"report.html", "report.json", "model_card.md"} & {path.name for path in tmp_path.iterdir()}


def test_features_are_made_only_for_sections_that_compare_them(evaluated, tmp_path, monkeypatch):
    run, known, _ = evaluated
    monkeypatch.setattr(study, "describer", lambda *_: pytest.fail("features were made"))
    found = study.make(run, count=COUNT, steps=2, out=run, needs=study.needs(["samples", "leaks"]))
    np.testing.assert_array_equal(found.samples.images, known.samples.images)
    assert found.samples.features is None and not found.bad
    assert study.needs(["distribution"]) == {"samples", "features", "bad"} and not study.needs(["cost"])


def test_sections_that_need_samples_are_refused_where_there_is_no_model(evaluated, tmp_path, capsys):
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    shutil.copy(evaluated[0] / "diffusion.json", untrained)
    assert evaluate.main(["--run", str(untrained), *FEW, "--sections", "anatomy", "copies"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("evaluate.py: --sections anatomy copies: there is no diffusion model yet: `python train.py")


# ---- other commands --------------------------------------------------------------------------------------------------


def test_runs_side_by_side(evaluated, tmp_path, capsys):
    run, _, _ = evaluated
    page, facts = tmp_path / "page.html", json.loads((run / "report.json").read_text(encoding="utf-8"))
    kid = {"value": 0.1, "error": 0.01, "left out": True, "people": {"p1": 0.1, "p2": 0.12}}
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "by person": {"KID": kid}}))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert evaluate.main(["compare", *files, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert (
        "b less a" in said
        and "0.000 ± 0.014 (cannot be told)" in said
        and "side by side" in page.read_text(encoding="utf-8")
    )
    assert evaluate.main(["compare", str(run), str(tmp_path / "none")]) == 2
    assert "report.json is not there: `python evaluate.py --run none` writes it" in capsys.readouterr().err
    part = tmp_path / "part"
    part.mkdir()
    sections = {name: of for name, of in facts.items() if name not in ("distribution", "copies")}
    sections |= {"about": {**facts["about"], "features": []}, "by person": {}}
    (part / "report_part.json").write_text(json.dumps(sections))
    assert evaluate.main(["compare", str(part), *files, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert f"note: {part} has a report of some sections only, " in said and "different networks" not in said
    rows = {line.split("  ")[0]: line.split()[1:] for line in said.splitlines()}
    assert rows["KID"] == ["n/a", "0.100", "0.100", "n/a", "n/a"] and rows["precision"][0] == "n/a"
    assert evaluate.main(["compare", str(part / "report.json"), *files]) == 2, "what is named is read, or nothing"
    assert "report.json is not there" in capsys.readouterr().err
    del facts["by person"]
    (tmp_path / "old.json").write_text(json.dumps(facts))
    assert evaluate.main(["compare", str(run), str(tmp_path / "old.json")]) == 2
    assert "is of another version (report.json lacks by person)" in capsys.readouterr().err
    (part / "report.json").write_text("{")
    assert evaluate.main(["compare", str(part), *files]) == 2
    assert f"--run {part.name}` writes it anew" in capsys.readouterr().err
    assert evaluate.main(["compare", str(run)]) == 2 and "two runs or more" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_or_left_out(evaluated, tmp_path, capsys):
    facts = json.loads((evaluated[0] / "report.json").read_text(encoding="utf-8"))
    entry = {"value": 0.1, "error": 0.01, "left out": False, "people": {"p1": 0.1, "p2": 0.12}}
    facts["by person"] = {"KID": entry, "first stage, SSIM": entry}

    def compared(**about):
        for name, more in (("a", {}), ("b", about)):
            (tmp_path / f"{name}.json").write_text(json.dumps({**facts, "about": {**facts["about"], **more}}))
        files = [str(tmp_path / f"{name}.json") for name in "ab"]
        status = evaluate.main(["compare", *files, "--out", str(tmp_path / "page.html")])
        return status, capsys.readouterr()

    status, said = compared(run="another", seed=1, steps=9)
    assert status == 0 and "note" not in said.out and "KID" in said.out and "precision" in said.out
    status, said = compared(**{"image size": 64})
    assert status == 2 and said.err.startswith("evaluate.py: a has slices of 32 pixels and b of 64: their numbers")
    status, said = compared(features=["others"])
    assert status == 0 and "copy features_*.keras of a into the other runs' folders" in said.out
    third = str(tmp_path / "c.json")
    (tmp_path / "c.json").write_text(json.dumps({**facts, "about": {**facts["about"], "features": []}}))
    assert (
        evaluate.main(["compare", third, *(str(tmp_path / f"{n}.json") for n in "ba"), "--out", third + ".html"]) == 0
    )
    assert "copy features_*.keras of b into" in capsys.readouterr().out, "not of one that has none"
    rows = {line.split("  ")[0]: line for line in said.out.splitlines()}
    assert "first stage, SSIM" in rows and "KID" not in rows, "distances in other features are no distances"
    assert rows["precision"].count("n/a") == 2 == rows["share of copies, features"].count("n/a")
    assert "n/a" not in rows["share of copies, pixels"]
    assert "note: 9 slices of b, 70 of a" in compared(count=9)[1].out


def test_a_quiz_is_written_and_scored(evaluated, tmp_path, capsys):
    run, _, _ = evaluated
    assert evaluate.main(["--run", str(run), *FEW, "--out", str(tmp_path), "--quiz"]) == 0
    sheet = json.loads((tmp_path / "quiz_sheet.json").read_text(encoding="utf-8"))
    page = (tmp_path / "quiz.html").read_text(encoding="utf-8")
    assert sheet["quiz"] in page and '"drawn"' not in page
    answers = {"quiz": sheet["quiz"], "answers": {str(n): row["drawn"] for n, row in enumerate(sheet["sheet"][:30])}}
    (tmp_path / "anna.json").write_text(json.dumps(answers))
    words = ["score", str(tmp_path / "anna.json"), "--sheet", str(tmp_path / "quiz_sheet.json")]
    assert evaluate.main(words) == 0
    said = capsys.readouterr().out
    assert "anna" in said and "30 of 30" in said and "100%   89% to 100%: told apart" in said
    (tmp_path / "anna.json").write_text(json.dumps({**answers, "quiz": "another"}))
    assert evaluate.main(words) == 2 and "answers no quiz of" in capsys.readouterr().err
    (tmp_path / "anna.json").write_text(json.dumps({**answers, "answers": {"0": "both"}}))
    assert evaluate.main(words) == 2 and "is no answer to this quiz" in capsys.readouterr().err


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_a_function_of_its_seed_and_number_and_conditions(evaluated, tmp_path, monkeypatch):
    """x_T, the sampler's noise and the conditions of sample 33 are its own, in whichever batch it is drawn."""
    run, known, _ = evaluated
    generator, people, asked = Generator(run), known.people, []

    def draw(self, x_T, conditions, sampler, steps, *, seed, first, shared):
        asked.append((x_T, conditions, (sampler, steps, seed, shared), first))
        return 0.1 * x_T

    monkeypatch.setattr(Generator, "draw", draw)
    kept, taken = study.draw_samples(run, generator, people, 40, "ddpm", 3, 5, tmp_path)
    told, heads = study.conditions_of(generator, people, 40, 5)
    x_T, places = np.concatenate([part[0] for part in asked]), np.concatenate([part[3] for part in asked])
    noise = generator.noise(5, 40, places, shared=samplers.COHERENCE)
    np.testing.assert_array_equal(x_T, noise)
    np.testing.assert_array_equal(
        noise[2:4], generator.noise(5, 2, first=1, shared=samplers.COHERENCE), "head 1, of two slices"
    )
    np.testing.assert_allclose(kept.images, metrics.to_unit(0.1 * noise), atol=0.51 / 255)
    for name, values in told.items():
        np.testing.assert_array_equal(np.concatenate([part[1][name] for part in asked]), values)
    np.testing.assert_array_equal(kept.z, told["z"])
    np.testing.assert_array_equal(kept.label, told["label"])
    assert {part[2] for part in asked} == {("ddpm", 3, 5, samplers.COHERENCE)}
    np.testing.assert_array_equal(places[:, 0], heads)
    np.testing.assert_array_equal(kept.case, heads)
    assert taken["network calls per slice"] == 3 and taken["parameters"] == generator.model.count_params()


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_what_another_model_drew_is_drawn_anew(evaluated, tmp_path, monkeypatch, stage):
    generator, drawn = Generator(evaluated[0]), []
    monkeypatch.setattr(Generator, "draw", lambda self, x_T, *words, **options: drawn.append(len(x_T)) or x_T)
    for name in ("autoencoder", "diffusion"):
        (tmp_path / f"{name}.keras").touch()
    for made in (1, 1, 2):
        os.utime(tmp_path / f"{stage}.keras", ns=(made, made))
        study.draw_samples(tmp_path, generator, evaluated[1].people, 4, "ddim", 2, 0, tmp_path)
    assert drawn == [4, 4]


def test_nothing_is_drawn_a_second_time_unless_conditions_differ(evaluated, tmp_path, monkeypatch):
    run, known, _ = evaluated
    generator, drawn = Generator(run), []

    def draw(self, x_T, *words, **options):
        drawn.append(len(x_T))
        return x_T

    monkeypatch.setattr(Generator, "draw", draw)
    words = (40, "ddim", 2, 0, tmp_path)
    study.draw_samples(run, generator, known.people, *words)
    study.draw_samples(run, generator, known.people, *words)
    assert drawn == [32, 8]
    train = known.people.real["train"]
    unlabelled = replace(train, label=np.full_like(train.label, -1))  # as of other --data
    study.draw_samples(run, generator, replace(known.people, real={"train": unlabelled}), *words)
    assert drawn == [32, 8, 32, 8]


def test_conditions_of_a_sample_are_those_of_one_training_slice(evaluated):
    _, known, _ = evaluated
    people, train = known.people, known.people.real["train"]
    ages = {int(name): str(50 + i) for i, name in enumerate(people.source.case_names.values())}
    source = replace(people.source, covariates={"age": ages})
    columns = source.columns(["age"])
    record = {"data": {"columns": columns}, "settings": {"diffusion": {"condition_on_mask": True}}}

    def tissue_fractions(masks):
        return np.asarray(tissue_masks.tissue_fractions(masks, (8, 8), None))

    generator = SimpleNamespace(record=record, tissue_fractions=tissue_fractions)
    told, heads = study.conditions_of(generator, replace(people, source=source), 50, seed=3)
    masks = tissue_fractions(dataset.read_split(people.source, "train", SIZE, masks=True)["mask"])
    whose = {}
    for i in range(0, 50, 7):
        (row,) = np.flatnonzero((masks == told["mask"][i]).all(axis=(1, 2, 3)) & (train.z == told["z"][i]))
        assert told["label"][i] == train.label[row]
        expected = dataset.covariates_of(source, train.case[row : row + 1], columns)
        np.testing.assert_array_equal(told["covariates"][i : i + 1], expected)
        assert whose.setdefault(heads[i], train.case[row]) == train.case[row], "a head has one person's conditions"
    assert len(np.unique(told["z"])) > 10


def test_noise_is_put_into_latents_and_is_the_same_at_every_size():
    """With a first stage that changes nothing, what comes out is the slice and the noise: half of it, of [0, 1]."""
    first_stage = SimpleNamespace(encode=lambda x, z, label: x, decode=lambda latents, z, label: latents)
    index = np.arange(3)
    some = study.Slices(np.full((3, SIZE, SIZE, 1), 0.5, "float32"), index, index, index)
    found = study.with_noise(first_stage, some, seed=1)
    assert list(found) == [0, 0.1, 0.2, 0.3]
    np.testing.assert_array_equal(found[0].images, some.images)
    noise = found[0.1].images - some.images
    assert noise.std() == pytest.approx(0.05, rel=0.05)
    np.testing.assert_allclose(found[0.2].images - some.images, 2 * noise, atol=1e-6)


# ---- exit status -----------------------------------------------------------------------------------------------------


def test_of_a_large_archive_whole_people_are_looked_at_and_copies_searched_among_all(evaluated, phantoms, monkeypatch):
    run, whole, _ = evaluated
    every = whole.people.real["train"]
    assert not whole.everybody and whole.people.some is whole.people.source
    monkeypatch.setattr(study, "MOST", len(every) // 2)
    known = study.make(run, count=COUNT, steps=2)
    some = known.people.real["train"]
    assert 0 < some.people < every.people
    np.testing.assert_array_equal(some.images, every.images[np.isin(every.case, some.case)])
    for split, slices in study.all_people(known).items():
        np.testing.assert_array_equal(slices.case, whole.people.real[split].case)
        np.testing.assert_array_equal(slices.images, whole.people.real[split].images)  # of 32 pixels: nothing to shrink
    np.testing.assert_allclose(known.everybody["train"].features, every.features, atol=1e-5)
    left_out = every.take(~np.isin(every.case, some.case))
    found = study.MEASURES["copies"].take(replace(known, samples=left_out))
    assert found.facts["copies"]["pixels"]["rate"] == found.facts["copies"]["features"]["rate"] == 1
    assert sum(found.facts["copies"]["people"].values()) == len(left_out)


def test_leaks_are_searched_among_all_where_there_is_no_diffusion_model_yet(evaluated, tmp_path, monkeypatch):
    run, whole, _ = evaluated
    shutil.copy(run / "diffusion.json", tmp_path)
    monkeypatch.setattr(study, "MOST", len(whole.people.real["train"]) // 2)
    known = study.make(tmp_path)
    assert known.samples is None and known.people.some is not known.people.source
    for split, slices in study.all_people(known).items():
        np.testing.assert_array_equal(slices.case, whole.people.real[split].case)


def test_samples_that_are_copies_end_with_status_3(evaluated, tmp_path, monkeypatch, capsys):
    run, known, _ = evaluated
    train = known.people.real["train"].spread(COUNT)
    copied = replace(known, samples=replace(train, case=np.arange(COUNT)))
    monkeypatch.setattr(study, "make", lambda *words, **options: copied)
    words = ["--run", str(run), *FEW, "--out", str(tmp_path), "--sections", "copies"]
    assert evaluate.main([*words, "--fail-above", "0.02"]) == 3
    said = capsys.readouterr().out
    assert "100.0% of the samples are nearer to a training slice than --fail-above allows" in said
    assert (tmp_path / "report_part.html").exists(), "the report is written first"
    assert evaluate.main(words) == 0


@pytest.mark.parametrize(("rate", "limit", "status"), [(0.02, None, 0), (0.02, 0.02, 0), (0.021, 0.02, 3)])
def test_exit_status_3_means_more_copies_than_allowed(rate, limit, status):
    for kind in ("pixels", "features"):
        facts = {"copies": {"pixels": {"rate": 0.0}, "features": {"rate": 0.0}, kind: {"rate": rate}}}
        assert evaluate.audit_status(facts, limit) == status


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--count", "0"], "--count"),
        (["--steps", "0"], "--steps"),
        (["--feature-steps", "0"], "--feature-steps"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(runs.LAST_SEED + 1)], "--seed must be at most"),
        (["--fail-above", "1.5"], "--fail-above"),
        (["--fail-above", "0.1", "--quiz"], "--fail-above is about a report, which --quiz does not write"),
        (["--sections", "copies", "--quiz"], "--sections is about a report"),
        (["--sections", "copies", "beauty"], "--sections beauty: there are reconstruction, samples, "),
        (["--sections", "leaks", "--fail-above", "0.1"], "--fail-above needs copies among the --sections"),
        (["--run", "nowhere"], "checkpoint/nowhere is no run: train one with `python train.py --run nowhere`"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(argv, named, capsys):
    assert evaluate.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and named in said[0]


def test_other_people_are_refused_or_warned_of(evaluated, tmp_path, phantoms, capsys, monkeypatch):
    """Without training people there is nothing to read against; people whom a stage saw are no test people."""
    run, known, _ = evaluated
    folder = tmp_path / "only" / "keras_png_slices_test"
    folder.mkdir(parents=True)
    for z in range(2):
        figures.save_png(folder / f"case_001_slice_{z}.nii.png", np.full((32, 32), 99, np.uint8))
    assert evaluate.main(["--run", str(run), "--data", str(folder.parent)]) == 2
    assert "train split is empty" in capsys.readouterr().err
    record = json.loads((run / "diffusion.json").read_text(encoding="utf-8"))
    person = record["data"]["splits"]["test"]["cases"][0]
    record["data"]["splits"]["train"]["cases"].append(person)
    other = tmp_path / "other"
    other.mkdir()
    (other / "diffusion.json").write_text(json.dumps(record))
    assert evaluate.main(["--run", str(other), "--data", phantoms]) == 0
    said = f"The diffusion stage saw 1 of the test people, {person} among them."
    assert f"note: {said}" in capsys.readouterr().out
    assert said in json.loads((other / "report.json").read_text(encoding="utf-8"))["leaks"]["said"]


def test_inception_without_its_weights_names_the_way_out(monkeypatch):
    def offline(**options):
        raise OSError("no network")

    monkeypatch.setattr(features.keras, "applications", SimpleNamespace(InceptionV3=offline))
    with pytest.raises(runs.RunError, match="leave the flag out"):
        features.inception()


# ---- what another generator drew -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(evaluated, phantoms, tmp_path_factory):
    """The report on slices that came from an archive: here a copy of the run's own people."""
    run, _, _ = evaluated
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    out = tmp_path_factory.mktemp("out")
    status = evaluate.main(["--run", str(run), "--samples", phantoms, "--out", str(out), "--count", str(ALL)])
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    return status, out, json.loads((out / "report_part.json").read_text())


def test_slices_of_another_generator_are_read_like_samples(elsewhere):
    status, out, facts = elsewhere
    assert status == 0
    assert schema.problems(facts) == []
    assert facts["about"]["samples"].endswith("phantom.zip") and facts["about"]["count"] == ALL
    assert "reconstruction" not in facts and "cost" not in facts and not (out / "model_card.md").exists()
    assert facts["distribution"]["samples"]["precision"] > 0  # of grey noise it is 0, see above
    assert facts["copies"]["pixels"]["rate"] >= 4 / 6  # the share of training people: each slice is its own copy


def test_a_quiz_of_samples_needs_no_diffusion_model(evaluated, phantoms, tmp_path):
    run, known, _ = evaluated
    other = tmp_path / "without"
    other.mkdir()
    shutil.copy(run / "diffusion.json", other)
    words = ["--run", str(other), "--samples", phantoms, "--out", str(tmp_path / "out"), "--count", "1", "--quiz"]
    assert evaluate.main(words) == 0
    sheet = json.loads((tmp_path / "out" / "quiz_sheet.json").read_text(encoding="utf-8"))["sheet"]
    assert {row["z"] for row in sheet} == {int(study.read_samples(known.people, phantoms, 1).z[0])}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "other.zip"], "--out"),
        (["--samples", "other.zip", "--out", "there", "--sections", "reconstruction"], "--sections reconstruction"),
        (["--samples", "absent.zip", "--out", "there"], "--samples absent.zip does not exist"),
    ],
)
def test_flags_for_other_samples_are_checked(evaluated, words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, _, _ = evaluated
    assert evaluate.main(["--run", str(run), *words]) == 2
    assert said in capsys.readouterr().err
