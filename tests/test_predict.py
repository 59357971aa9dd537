"""predict.py: a user's mistake costs one sentence and exit status 2; what is drawn is drawn of what was asked for."""

import json
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import nibabel
import numpy as np
import pytest
import small_records

import conditions as room
import dataset
import predict
import predict_flags
from generator import Generator
from ldm import tissue as tissue_classes
from ldm.data import phantom
from ldm.diffusion import samplers
from ldm.drawing import figures
from ldm.training import records, runs

OLD = Path(__file__).parent / "old_runs"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the tiny runs of `old_runs`, and the slices that they say they were trained on."""
    folder = tmp_path_factory.mktemp("home")
    dataset.write_phantoms(folder / "phantom.zip", people=4, image_size=32)
    (folder / "people.csv").write_text("case,label,age,sex\n1,AD,71,F\n2,NC,64,M\n3,AD,80,F\n4,NC,,M\n")
    for run in OLD.iterdir():
        (folder / run.name).mkdir()
        for path in run.glob("*.*"):
            (folder / run.name / path.name).write_bytes(path.read_bytes())
        for path in (folder / run.name).glob("*.json"):
            text = path.read_text().replace('"phantom.zip"', json.dumps(str(folder / "phantom.zip")))
            path.write_text(text.replace('"people.csv"', json.dumps(str(folder / "people.csv"))))
    return folder


@pytest.fixture(scope="module")
def latent(home):
    return Generator(home / "vqvae")


def refusal(argv, capsys):
    """What the command says when it refuses: one sentence, no traceback."""
    assert predict.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, named",
    [
        ("--run nowhere", "checkpoint/nowhere is no run: train one"),
        ("reconstruct --run nowhere", "checkpoint/nowhere is no run: train one"),
        ("--steps 0", "--steps: must be a whole number at least 1 and at most 100000, not 0"),
        ("--steps 2.5", "--steps: must be a whole number"),
        ("--eta 2", "--eta: must be a number at least 0 and at most 1, not 2"),
        ("--eta nan", "--eta"),
        ("--guidance inf", "--guidance"),
        ("--guidance 101", "--guidance"),
        ("--fps 0", "--fps: must be a number at most 50 and above 0, not 0"),
        ("--fps 51", "--fps"),
        ("--seed -1", "--seed"),
        ("--seed 2000000001", "--seed"),
        ("--guidance 2 --guidance-rescale 2", "--guidance-rescale"),
        ("--person --z 3", "--z has no effect on person"),
        ("--person --prior normal", "leave --prior out"),
        ("--person --voxel 1 0 1", "--voxel"),
        ("--voxel 1 2 1", "--voxel has no effect on sample"),
        ("--z sweep 3", "--z takes slice indices"),
        ("--z x", "--z: must be a whole number"),
        ("denoise --z sweep", "--z: must be a whole number"),
        ("--prior transformer --top-p 0", "--top-p"),
        ("--prior transformer --temperature -1", "--temperature"),
        ("--prior transformer --run nowhere", "checkpoint/nowhere is no run: train one"),
        ("prior normal --run nowhere", "checkpoint/nowhere is no run: train one"),
        ("prior", "kind"),
        ("prior nothing", "nothing"),
        ("paint", "there is no task paint: name one of sample, person"),
        ("--negative-label AD", "--negative-label has no effect without --guidance"),
        ("--negative-conditions age=3", "--negative-conditions has no effect without --guidance"),
        ("--guidance-rescale 0.5", "--guidance-rescale has no effect without --guidance"),
        ("--eta 1 --sampler heun", "--eta has no effect without --sampler ddim"),
        ("denoise --eta 1 --sampler heun", "--eta has no effect"),
        ("--prior histogram --steps 5", "--steps has no effect on prior"),
        ("--prior normal --guidance 2", "--guidance has no effect on prior"),
        ("--prior normal --fps 2", "--fps has no effect on prior"),
        ("--top-k 5", "--top-k has no effect on sample"),
        ("--prior histogram --temperature 0.5", "--temperature has no effect without prior transformer"),
        ("--mask a.png --prior histogram", "--mask has no effect on prior"),
        ("inpaint --sampler heun", "--sampler has no effect on inpaint"),
        ("inpaint --resample 0", "--resample"),
        ("--from 0.3", "--from has no effect on sample"),
        ("denoise --from 0", "--from: must be a number at most 1 and above 0, not 0"),
        ("denoise --box 1 1 2 2", "--box has no effect on denoise"),
        ("denoise --conditions age=3", "--conditions has no effect on denoise"),
        ("denoise --spacing karras", "--spacing has no effect on denoise"),
        ("--split train", "--split has no effect without --mask data"),
        ("--mask a.png --data b.zip", "--data has no effect without --mask data"),
        ("reconstruct --label AD", "--label has no effect on reconstruct"),
        ("reconstruct --seed 3", "--seed has no effect on reconstruct"),
        ("--between slices", "--between has no effect on sample"),
        ("interpolate --mask a.png", "--mask has no effect on interpolate"),
        ("interpolate --from 0.3", "--from has no effect without --between slices"),
        ("interpolate --between slices --conditions age=3", "--conditions has no effect without --between noises"),
        ("interpolate --count 1", "--count: must be a whole number at least 2, not 1"),
        ("--spacing trailing --steps 2000", "--spacing trailing has at most 1000 steps"),
        ("--sampler wrong", "--sampler"),
        ("anomaly --wrong 3", "anomaly does not know --wrong: `python predict.py anomaly --help` lists its flags"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(line, named, capsys):
    assert named in refusal(line.split(), capsys)


def test_what_is_said_without_a_task_is_short_for_one():
    for words, name, more in (
        ("", "sample", {"count": None, "sampler": ("ddim", "ddpm"), "fps": 12.0}),
        ("--prior diffusion --count 3", "sample", {"count": 3}),
        ("sample --person", "person", {}),
        ("--z 3 4 --prior histogram --label AD", "prior", {"kind": "histogram", "z": [3, 4], "label": "AD"}),
        ("prior normal --z sweep", "prior", {"kind": "normal", "z": room.SWEEP}),
        ("denoise", "denoise", {"sampler": "ddim", "count": 8, "start": 0.5}),
        ("inpaint --box 1 2 3 4", "inpaint", {"box": [1, 2, 3, 4], "steps": 100}),
        ("interpolate --z 7", "interpolate", {"z": 7, "count": 12, "between": "noises"}),
    ):
        found, values = predict_flags.parse(words.split())
        assert found == name and more.items() <= values.items()


def test_every_task_has_its_function_and_help_and_each_flag_reaches_it(capsys):
    """A flag that stands in the table, and that no argument of the function takes, would have no effect."""
    assert predict.WORK.keys() == predict_flags.TASKS.keys()
    for name, task in predict_flags.TASKS.items():
        values = {field: task.default_of(field) for field in task.names}
        given = predict_flags.arguments(predict.WORK[name], values)
        reached = set(given)
        for group in predict_flags.GROUPS.keys() & given.keys():
            reached |= vars(given[group]).keys()
        assert set(task.names) - {"run", "precision"} <= reached, name
        with pytest.raises(SystemExit) as end:
            predict.main([*name.split(), "--help"])
        assert end.value.code == 0 and f"predict.py {name}" in capsys.readouterr().out
    assert predict.main(["--help"]) == 0 and "interpolate" in capsys.readouterr().out


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setitem(predict.WORK, "sample", interrupted)
    for name in ("refuse_no_run", "refuse_missing"):
        monkeypatch.setattr(predict.runs, name, lambda path: None)
    assert predict.main(["--run", "nowhere"]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---- conditions ------------------------------------------------------------------------------------------------------

DATA = {
    "z": [0, 31],
    "labels": ["AD", "NC"],
    "columns": {
        "age": {"kind": "number", "mean": 70.0, "std": 10.0},
        "sex": {"kind": "category", "values": ["F", "M"]},
    },
}


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"z": [40]}, "--z must lie between 0 and 31"),
        ({"z": [-1]}, "--z must lie between 0 and 31"),
        ({"label": "MCI"}, "--label MCI: this run knows AD and NC"),
        ({"covariates": ["height=3"]}, "--conditions height: this run was told age, sex"),
        ({"covariates": ["age=old"]}, "--conditions age=old"),
        ({"covariates": ["sex=X"]}, "F, M"),
    ],
)
def test_what_the_run_does_not_know_is_refused(asked, said):
    with pytest.raises(runs.RunError, match=said):
        room.drawn_conditions(DATA, **asked)


def test_slices_are_drawn_of_what_was_asked_for():
    found = room.drawn_conditions(DATA, z=[3, 9], label="NC", covariates=["age=85", "sex=M"], count=5)
    np.testing.assert_array_equal(found["z"], [3, 9, 3, 9, 3])
    np.testing.assert_array_equal(found["label"], [1] * 5)
    np.testing.assert_array_equal(found["covariates"], [[1.5, 1.0]] * 5)
    assert {values.dtype for values in found.values()} == {np.dtype("int32"), np.dtype("float32")}
    assert len(room.drawn_conditions(DATA)["z"]) == len(room.drawn_conditions(DATA, z=[1, 2])["z"]) == 16
    assert len(room.drawn_conditions(DATA, z=[1] * 20)["z"]) == 20
    np.testing.assert_array_equal(room.drawn_conditions(DATA, count=3)["z"], [0, 16, 31])


def test_a_sweep_asks_for_every_slice_index_in_order():
    found = room.drawn_conditions({"z": [5, 185], "labels": []}, room.SWEEP)
    np.testing.assert_array_equal(found["z"], np.arange(5, 186))
    assert set(found["label"]) == {-1} and "covariates" not in found


def test_what_no_word_says_takes_turns_or_is_alike():
    found = room.drawn_conditions(DATA, count=8)
    np.testing.assert_array_equal(found["label"], [0, 1] * 4)
    np.testing.assert_array_equal(found["covariates"][:, 0], [0] * 8)
    np.testing.assert_array_equal(found["covariates"][:, 1], [0, 0, 1, 1] * 2)  # with the labels, every pair is there
    found = room.drawn_conditions(DATA, count=8, alike=True)
    assert set(found["label"]) == {0} and not found["covariates"].any()


def test_guidance_goes_away_from_the_label_and_the_covariates_that_are_named():
    known = {"z": np.int32([3, 4]), "label": np.int32([1, 1]), "covariates": np.float32([[0.5, 0.0], [0.1, 0.0]])}
    found = room.negative_conditions(DATA, known, "AD", ["sex=M"])
    np.testing.assert_array_equal(found["label"], [0, 0])
    np.testing.assert_array_equal(found["z"], [3, 4])
    np.testing.assert_array_equal(found["covariates"], np.float32([[0.5, 1.0], [0.1, 1.0]]))
    np.testing.assert_array_equal(known["covariates"], np.float32([[0.5, 0.0], [0.1, 0.0]]))  # left as they were
    assert room.negative_conditions(DATA, known) is None
    with pytest.raises(runs.RunError, match="--negative-label MCI"):
        room.negative_conditions(DATA, known, "MCI")
    with pytest.raises(runs.RunError, match="--negative-conditions height"):
        room.negative_conditions(DATA, known, None, ["height=3"])


def test_the_flags_of_sampling_reach_the_trajectory(latent):
    known = room.drawn_conditions(latent.record["data"], count=2)
    line = "--eta 0.4 --spacing karras --guidance 3 --guidance-rescale 0.2 --negative-label AD --seed 8".split()
    _, values = predict_flags.parse(line)
    sampling = predict_flags.arguments(predict.sample, values)["sampling"]
    found = sampling.options_for("ddim", latent, known)
    away = found.pop("negative")
    plain = {"seed": 8, "guidance_scale": 3.0, "guidance_rescale": 0.2, "spacing": "karras"}
    assert found == plain | {"eta": 0.4} and set(away["label"]) == {0}
    found = sampling.options_for("heun", latent, known)
    del found["negative"]
    assert found == plain


# ---- real slices -----------------------------------------------------------------------------------------------------


def of_split(home, split):
    """The slices of the one or two people of a split, as they lie in the archive: {(case, z): (image, mask)}."""
    found = dataset.read_split(dataset.open_source(str(home / "phantom.zip")), split, 32, masks=True)
    rows = zip(found["image"], found["mask"], found["case"].tolist(), found["z"].tolist(), strict=True)
    return {(case, z): (image, mask) for image, mask, case, z in rows}


@pytest.mark.parametrize(("split", "people"), [("train", 2), ("test", 1)])
def test_real_slices_come_with_what_is_true_of_them(home, latent, split, people):
    """Each is one of the split; its slice index, label, covariates and mask are those of that slice and that person."""
    images, known = room.real_slices(latent, None, split, z=[9, 11, 20], count=6)
    there, source = of_split(home, split), dataset.open_source(str(home / "phantom.zip"))
    assert len(images) == 3 * people and known.keys() == {"z", "label", "covariates", "mask"}
    assert known["z"].tolist() == sorted(known["z"].tolist()) and set(known["z"]) == {9, 11, 20}
    columns = latent.record["data"]["columns"]
    age, values = columns["age"], columns["sex"]["values"]
    told = {"1": ("AD", 71, "F"), "2": ("NC", 64, "M"), "3": ("AD", 80, "F"), "4": ("NC", None, "M")}
    seen = set()
    for row, image in enumerate(images):
        (key,) = [key for key, (other, _) in there.items() if (other == image).all()]
        assert key[1] == known["z"][row]
        seen.add(key)
        label, years, sex = told[source.case_names[key[0]].lstrip("0")]
        assert latent.record["data"]["labels"][known["label"][row]] == label
        expected = [np.nan if years is None else (years - age["mean"]) / age["std"], values.index(sex)]
        np.testing.assert_allclose(known["covariates"][row], expected, rtol=1e-5)
        np.testing.assert_array_equal(known["mask"][row], latent.tissue_fractions(there[key][1][None])[0])
    assert len(seen) == 3 * people


def test_another_label_stands_in_for_the_slices_own(latent):
    images, known = room.real_slices(latent, None, "train", z=[9], label="NC")
    same, own = room.real_slices(latent, None, "train", z=[9])
    np.testing.assert_array_equal(images, same)
    assert known["label"].tolist() == [1, 1] and sorted(own["label"].tolist()) == [0, 1]
    with pytest.raises(runs.RunError, match="--label MCI"):
        room.real_slices(latent, None, "train", label="MCI")
    with pytest.raises(runs.RunError, match="--z 99: .* has no such slices of the train people"):
        room.real_slices(latent, None, "train", z=[99])
    assert len(room.real_slices(latent, None, "test", count=5)[0]) == 5


def test_a_pair_is_of_two_people_at_the_same_place(home, latent):
    images, known = room.real_pair(latent, split="train", z=12)
    there = of_split(home, "train")
    found = [next(key for key, (other, _) in there.items() if (other == image).all()) for image in images]
    assert len({case for case, _ in found}) == 2 and [z for _, z in found] == known["z"].tolist() == [12, 12]
    assert known["label"].tolist() == [0, 1] and known["covariates"].shape == (2, 2)
    with pytest.raises(runs.RunError, match="needs two test people"):
        room.real_pair(latent, split="test")


def test_masks_of_the_data_are_those_of_one_real_person(home, latent, monkeypatch):
    """Also where that person has no slice of an index, and somebody else has."""
    read = dataset.read_split

    def without_some(*told, **more):
        found = read(*told, **more)
        kept = (found["case"] != found["case"][0]) | ~np.isin(found["z"], [4, 5])
        return {name: values[kept] for name, values in found.items()}

    monkeypatch.setattr(dataset, "read_split", without_some)
    masks, real, fractions = room.drawn_masks(latent, ["data"], np.int32([4, 17, 40]), split="train")
    monkeypatch.undo()
    there, found = of_split(home, "train"), []
    for mask, image in zip(masks, real, strict=True):
        found += [key for key, (other, true) in there.items() if (other == image).all() and (true == mask).all()]
    assert len({case for case, _ in found}) == 1 and [z for _, z in found] == [3, 17, 31]  # the nearest to 40
    np.testing.assert_array_equal(fractions, latent.tissue_fractions(masks))


def test_masks_from_files_are_repeated_as_needed(latent, tmp_path):
    for name, level in (("a", 85), ("b", 255)):
        figures.save_png(tmp_path / f"{name}.png", np.full((32, 32), level, np.uint8))
    masks, real, fractions = room.drawn_masks(latent, [tmp_path / "a.png", tmp_path / "b.png"], np.int32([1, 2, 3]))
    assert real is None and [int(mask[0, 0]) for mask in masks] == [1, 3, 1]
    assert fractions.argmax(axis=-1)[:, 0, 0].tolist() == [1, 3, 1]


def test_masks_are_refused_where_the_run_was_not_told_any(home):
    with pytest.raises(runs.RunError, match="--condition-on-mask"):
        room.drawn_masks(Generator(home / "pixels"), ["data"], np.int32([1]))


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_only_what_is_shown_is_decoded(home, tmp_path, monkeypatch, capsys):
    decoded, decode = [], Generator.decode
    monkeypatch.setattr(Generator, "decode", lambda *told: decoded.append(1) or decode(*told))
    line = ["--run", str(home / "pixels"), "--out", str(tmp_path), "--sampler", "euler", "--count", "2", "--steps", "5"]
    assert predict.main(line) == 0
    assert len(decoded) == 5  # x_t of each moment, the last of them the picture
    said = capsys.readouterr().out
    assert all(part in said for part in ("seconds per slice", "drawing", "decoding", "filming"))
    with_x_0 = iio.imread(tmp_path / "euler.gif").shape
    decoded.clear()
    assert predict.main([*line, "--show-x0"]) == 0
    assert len(decoded) == 10 and iio.imread(tmp_path / "euler.gif").shape[2] > 2 * with_x_0[2]
    monkeypatch.setattr(predict, "FRAMES", 3)
    decoded.clear()
    assert predict.main(line) == 0 and len(decoded) == 3


def test_a_picture_is_the_decoded_end_of_its_trajectory(home, tmp_path):
    """From the command line to the file: the same bytes twice, and exactly what the `Generator` draws."""
    generator = Generator(home / "pixels")
    line = f"--run {home / 'pixels'} --count 3 --z 5 9 --label NC --sampler ddim ddpm --steps 3 --seed 4 --eta 0.3"
    for name in ("a", "b"):
        assert predict.main([*line.split(), "--precision", "float32", "--out", str(tmp_path / name)]) == 0
    known = {"z": np.int32([5, 9, 5]), "label": np.int32([1, 1, 1])}
    for sampler, options in (("ddim", {"eta": 0.3}), ("ddpm", {})):
        for kind in ("png", "gif"):
            once, again = ((tmp_path / name / f"{sampler}.{kind}").read_bytes() for name in ("a", "b"))
            assert once == again
        images = generator.decode(generator.draw(generator.noise(4, 3), known, sampler, 3, seed=4, **options), known)
        picture = figures.sheet(figures.enlarge(images))
        difference = iio.imread(tmp_path / "a" / f"{sampler}.png").astype(int) - picture
        assert np.abs(difference).max() <= 1 and picture.std() > 5


def captured(monkeypatch, name="reconstruction_sheet"):
    found = {}
    monkeypatch.setattr(figures, name, lambda path, *told, **more: found.update({Path(path).stem: (*told, more)}))
    return found


def test_inpainting_draws_the_box_anew_and_nothing_else(home, tmp_path, monkeypatch):
    found = captured(monkeypatch)
    line = f"inpaint --run {home / 'pixels'} --out {tmp_path} --split train --count 2 --box 3 5 8 12 --steps 4"
    assert predict.main([*line.split(), "--resample", "2"]) == 0
    real, fake, *_ = found["inpaint"]
    inside = np.zeros((32, 32), bool)
    inside[3:11, 5:17] = True
    np.testing.assert_array_equal(fake[:, ~inside], real[:, ~inside])
    assert (fake != real)[:, inside].mean() > 0.9
    assert (tmp_path / "inpaint.gif").exists()


@pytest.mark.parametrize(
    ("box", "said"), [("30 0 4 4", "does not lie within 32x32"), ("0 0 4 4", "lies outside of what this model draws")]
)
def test_a_box_must_lie_where_the_model_draws(home, tmp_path, box, said, capsys):
    """The crop box of this run begins at 4."""
    line = f"inpaint --run {home / 'vqvae'} --out {tmp_path} --split train --count 1 --steps 1 --box {box}"
    assert said in refusal(line.split(), capsys)


def test_a_box_outside_is_refused_before_slices_are_read_or_drawn(home, tmp_path, monkeypatch, capsys):
    """`--box 0 0 0 0` of the run that comes along cost a minute in which its data was drawn."""
    monkeypatch.setattr(predict, "given_real", lambda *_: pytest.fail("slices were read"))
    for box in ("30 0 4 4", "0 0 0 0", "-1 0 4 4"):
        line = f"inpaint --run {home / 'vqvae'} --out {tmp_path} --split train --count 1 --steps 1 --box {box}"
        assert f"--box {box} does not lie within 32x32" in refusal(line.split(), capsys)


@pytest.mark.parametrize("task", [pytest.param("denoise", marks=pytest.mark.slow), "anomaly"])
def test_real_slices_are_shown_beside_what_is_made_of_them(task, home, tmp_path, monkeypatch, latent):
    found = captured(monkeypatch)
    line = f"{task} --run {home / 'vqvae'} --out {tmp_path} --split train --count 2 --z 9 --from 0.5 --steps 4 --seed 3"
    assert predict.main([*line.split(), "--sampler", "dpm_solver_pp", "--precision", "float32"]) == 0
    real, fake, z, _ = found[task]
    images, known = room.real_slices(latent, None, "train", z=[9], count=2)
    np.testing.assert_array_equal(real, images)
    np.testing.assert_array_equal(z, [9, 9])
    options = {"sampler": "dpm_solver_pp", "steps": 4, "seed": 3}
    if task == "anomaly":
        expected, _ = latent.pseudo_healthy(images, known, 0.5, **options)
    else:
        expected = latent.decode(latent.renoised(images, known, 0.5, **options)[-1][0], known)
    np.testing.assert_allclose(fake, expected, atol=1e-3)
    assert (tmp_path / f"{task}.gif").exists()


def test_all_points_between_two_slices_carry_the_noise_that_their_time_says(monkeypatch, tmp_path):
    """Two noised slices share their noise, so that an arc between these would carry more of it in the middle."""
    rng, drawn = np.random.default_rng(0), []
    eps, *ends = rng.standard_normal((3, 1, 16, 16, 4)).astype("float32")
    still = SimpleNamespace(
        record={"data": {"labels": [], "z": [0, 31]}},
        noise=lambda seed, count: eps,
        noised=lambda x_0, t, eps: np.sqrt(1 - t**2) * x_0 + t * eps,
        encode=lambda images, known: np.concatenate(ends),  # of unit variance, as latents are
        decode=lambda x, known: np.zeros((len(x), 8, 8, 1), "float32"),
        draw=lambda x_t, known, name, steps, **_: drawn.append((x_t, steps)) or x_t,
        share_of_steps=Generator.share_of_steps,
    )
    pair = np.zeros((2, 8, 8, 1), "float32"), {"z": np.array([3, 3]), "label": np.array([-1, -1])}
    monkeypatch.setattr(predict, "Generator", lambda run: still)
    monkeypatch.setattr(predict, "real_pair", lambda *_: pair)
    name, values = predict_flags.parse(["interpolate", "--between", "slices", "--out", str(tmp_path), "--count", "5"])
    predict.interpolate(tmp_path, **predict_flags.arguments(predict.interpolate, values))
    ((x_t, steps),) = drawn
    share = (x_t * eps).mean(axis=(1, 2, 3)) / (eps**2).mean()
    np.testing.assert_allclose(share, 0.5, atol=0.08)  # on an arc between the noised, 0.63 in the middle
    assert steps == 25 and iio.imread(tmp_path / "interpolate.gif").shape[0] >= 1


def test_what_lies_between_two_noises_has_one_label_and_one_slice_index(home, tmp_path, monkeypatch):
    drawn, draw = [], Generator.draw
    monkeypatch.setattr(
        Generator, "draw", lambda self, x, known, *a, **k: drawn.append((x, known)) or draw(self, x, known, *a, **k)
    )
    line = f"interpolate --run {home / 'pixels'} --out {tmp_path} --count 4 --steps 1 --z 7 --label NC --seed 2"
    assert predict.main(line.split()) == 0
    ((x_T, known),) = drawn
    assert known["z"].tolist() == [7] * 4 and known["label"].tolist() == [1] * 4
    ends = Generator(home / "pixels").noise(2, 2)
    np.testing.assert_allclose(x_T[[0, -1]], ends, rtol=1e-5, atol=1e-6)


def test_a_prior_is_told_the_labels_that_it_was_trained_with(monkeypatch, tmp_path):
    """The first stage may have been trained before there were labels."""
    for stage, labels in (("autoencoder", []), ("prior", ["AD", "NC"])):
        small_records.write_record(tmp_path, stage, data={"labels": labels})
    told = {}
    stage = SimpleNamespace(decode=lambda x, known: np.zeros((len(x), 8, 8, 1), "float32"), names_tissues=False)
    monkeypatch.setattr(predict.records, "load_first_stage", lambda run: None)
    monkeypatch.setattr(predict.records, "load", lambda run, stage: (stage, records.of(run, stage)))
    monkeypatch.setattr(predict, "FirstStage", lambda model: stage)
    monkeypatch.setattr(
        predict, "prior_latents", lambda *words, **options: told.update(known=words[3], **options) or np.zeros((2, 4))
    )
    line = "--prior transformer --label NC --count 2 --top-k 7 --temperature 0.5 --out"
    _, values = predict_flags.parse([*line.split(), str(tmp_path)])
    predict.prior(tmp_path, **predict_flags.arguments(predict.prior, values))
    np.testing.assert_array_equal(told["known"]["label"], [1, 1])
    assert told["prior"] == "prior" and told["top_k"] == 7 and told["temperature"] == 0.5


def test_what_needs_a_first_stage_is_refused_in_pixels(home, capsys):
    for words in (["reconstruct"], ["prior", "normal"]):
        assert "works in pixels" in refusal([*words, "--run", str(home / "pixels")], capsys)


def test_a_person_is_drawn_from_shared_noise_in_order_and_stored_as_a_volume(home, tmp_path, monkeypatch):
    drawn, trajectory = [], Generator.trajectory
    monkeypatch.setattr(
        Generator, "trajectory", lambda *told, **more: drawn.append(told[1:3]) or trajectory(*told, **more)
    )
    line = f"--person --run {home / 'pixels'} --out {tmp_path} --sampler ddpm --steps 1 --count 5 --voxel 1 2 3"
    assert predict.main(line.split()) == 0
    ((x_T, known),) = drawn
    alike = [np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in zip(x_T[1:], x_T[:-1], strict=True)]
    np.testing.assert_allclose(alike, samplers.COHERENCE, atol=0.03)
    np.testing.assert_array_equal(known["z"], [0, 8, 16, 23, 31])
    assert set(known["label"]) == {0}
    stored = nibabel.load(tmp_path / "person_ddpm.nii.gz")
    assert stored.shape == (32, 32, 5)
    np.testing.assert_allclose(stored.header.get_zooms(), (1.0, 2.0, 3.0 * 31 / 4))


@pytest.mark.slow
def test_no_task_writes_over_the_pictures_of_another(home, tmp_path, latent, monkeypatch):
    """`latent` is the run in latents, so that it is compiled once."""
    monkeypatch.setattr(predict, "Generator", lambda run: latent)
    written = {}
    drawn = "--sampler ddim --steps 1 --count 2"
    lines = [f"sample {drawn}", f"person {drawn}", "prior normal --count 2", "interpolate --count 2 --steps 1"]
    lines += [f"{task} --count 1 --steps 1 --split train" for task in ("denoise", "anomaly")]
    lines += ["inpaint --count 1 --steps 1 --split train", "reconstruct --split train"]
    for line in lines:
        task, out = line.split()[0], tmp_path / line.split()[0]
        assert predict.main([*line.split(), "--run", str(home / "vqvae"), "--out", str(out)]) == 0
        written[task] = {path.name for path in out.iterdir()}
    names = [name for found in written.values() for name in found]
    assert len(written) == 8 and all(written.values())
    assert len(names) == len(set(names)), written


def test_a_volume_has_the_steps_between_the_slice_indices_that_are_drawn(tmp_path):
    predict.write_person(tmp_path, "ddim", np.zeros((3, 8, 6, 1), "float32"), np.array([0, 4, 8]), 1, (1, 2, 3), 12)
    stored = nibabel.load(tmp_path / "ddim.nii.gz")
    assert stored.shape == (6, 3, 8)
    np.testing.assert_allclose(stored.header.get_zooms(), (1.0, 8.0, 3.0))


def test_dice_is_high_with_the_masks_that_slices_follow(capsys):
    found = [piece for piece in phantom.slices(1, 96, seed=1) if piece["z"] % 8 == 0]
    images = np.stack([piece["image"] for piece in found])[..., None] / np.float32(127.5) - 1
    masks = np.searchsorted(tissue_classes.LEVELS, [piece["mask"] for piece in found])
    predict.say_how_masks_are_followed(images, masks)
    lines = capsys.readouterr().out.splitlines()
    own, others = ([float(part.split()[-1]) for part in line.split(", ")] for line in lines)
    assert min(own) > 0.8 and all(mine > other + 0.1 for mine, other in zip(own, others, strict=True))
    predict.say_how_masks_are_followed(np.full_like(images[:1], -1), masks[:1], images[:1])
    drawn, real = (
        [float(part.split()[-1]) for part in line.split(", ")] for line in capsys.readouterr().out.splitlines()
    )
    assert drawn == [0, 0, 0] and min(real) > 0.7


def test_drawn_slices_are_set_beside_the_masks_and_slices_of_the_same_person(home, tmp_path, monkeypatch):
    told, shown = [], captured(monkeypatch, "tissue_sheet")
    monkeypatch.setattr(predict, "say_how_masks_are_followed", lambda *values: told.append(values))
    line = f"--run {home / 'vqvae'} --out {tmp_path} --mask data --split validate --z 4 9 --count 2 --steps 1"
    assert predict.main([*line.split(), "--sampler", "ddim"]) == 0
    ((images, masks, real),) = told
    there = of_split(home, "validate")
    for k, z in enumerate((4, 9)):
        image, mask = next(value for key, value in there.items() if key[1] == z)
        np.testing.assert_array_equal(real[k], image)
        np.testing.assert_array_equal(masks[k], mask)
    assert images.shape == (2, 32, 32, 1)
    np.testing.assert_array_equal(shown["ddim_mask"][0], images)
    np.testing.assert_array_equal(shown["ddim_mask"][1], masks)


# ---- reconstruct -----------------------------------------------------------------------------------------------------


def test_scores_of_a_first_stage_are_those_of_a_plain_computation(home, tmp_path):
    """PSNR and MAE by their definitions, from the model itself, slice by slice; Dice and background likewise."""
    line = f"reconstruct --run {home / 'vae'} --split train --out {tmp_path}"
    assert predict.main([*line.split(), "--precision", "float32"]) == 0
    said = json.loads((tmp_path / "reconstruct.json").read_text())
    model = runs.load_model(home / "vae" / "autoencoder.keras")
    rows = dataset.read_split(dataset.open_source(str(home / "phantom.zip")), "train", 32, masks=True)
    fake = np.asarray(model.reconstruct(rows["image"], rows["z"], rows["label"]))
    unit, fake = (rows["image"][..., 0] + 1) / 2, (fake[..., 0] + 1) / 2
    mean = np.stack([unit[rows["z"] == z].mean(axis=0) for z in rows["z"]])  # of the same people, here
    for name, guess in (("vae", fake), ("mean image of the slice index", mean), ("black", 0 * unit)):
        mae = np.abs(unit - guess).mean(axis=(1, 2))
        psnr = -10 * np.log10(np.square(unit - guess).mean(axis=(1, 2)))
        for score, values in (("MAE", mae), ("PSNR", psnr)):
            people = [values[rows["case"] == case].mean() for case in np.unique(rows["case"])]
            np.testing.assert_allclose(
                said["scores"][name][score], [values.mean(), np.std(people)], rtol=1e-3, atol=1e-4
            )
    np.testing.assert_allclose(said["background"], fake[unit == 0].mean(), rtol=1e-3)
    latents = model.encode(rows["image"], rows["z"], rows["label"])
    classes = np.asarray(model.decode_tissue(latents, rows["z"], rows["label"]))
    for k, name in enumerate(tissue_classes.NAMES[1:], start=1):
        both = np.sum((classes == k) & (rows["mask"] == k))
        expected = 2 * both / (np.sum(classes == k) + np.sum(rows["mask"] == k))
        np.testing.assert_allclose(said["dice"][name], expected, rtol=1e-4, atol=1e-6)
    assert said["split"] == "train" and (tmp_path / "reconstruct_tissue.png").exists()


def test_of_a_large_archive_whole_people_are_reconstructed_and_that_is_said(home, tmp_path, monkeypatch, capsys):
    source = dataset.open_source(str(home / "phantom.zip"))
    train = source.split == "train"
    slices, people = train.sum(), len(np.unique(source.case[train]))
    assert people > 1
    monkeypatch.setattr(predict, "JUDGED", slices // people)  # one of them
    assert predict.main(f"reconstruct --run {home / 'vae'} --split train --out {tmp_path}".split()) == 0
    said = capsys.readouterr().out
    assert f"of {slices} train slices, {slices // people} of whole people are judged" in said
    assert f"{slices // people} slices of 1 person" in said
