"""The command lines: a user's mistake costs one sentence and exit status 2, before any long work, and loses nothing."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import tensorflow as tf

import predict
from ldm.data import phantom


def refusal(main, argv, capsys):
    """What `main` says when it refuses: one sentence, no traceback."""
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--run", "nowhere"], "python train.py diffusion"),
        (["reconstruct", "--run", "nowhere"], "python train.py autoencoder"),
        (["--steps", "0"], "--steps"),
        (["--eta", "2"], "--eta"),
        (["--fps", "0"], "--fps"),
        (["--guidance-rescale", "2"], "--guidance-rescale"),
        (["--person", "--z", "3"], "--person sweeps"),
        (["--voxel", "1", "0", "1"], "--voxel"),
        (["--top-p", "-1"], "--top-p"),
        (["--temperature", "-1"], "--temperature"),
        (["--negative-label", "AD"], "--negative-label has no effect without --guidance"),
        (["--prior", "transformer", "--run", "nowhere"], "python train.py autoencoder"),
        (["--prior", "normal", "--run", "nowhere"], "python train.py autoencoder"),
        (["--guidance-rescale", "0.5"], "--guidance-rescale has no effect without --guidance"),
        (["--eta", "1", "--sampler", "heun"], "--eta has no effect"),
        (["--prior", "histogram", "--steps", "5"], "--steps has no effect"),
        (["--prior", "normal", "--guidance", "2"], "--guidance has no effect"),
        (["--top-k", "5"], "--top-k has no effect"),
        (["--prior", "histogram", "--temperature", "0.5"], "--temperature has no effect"),
        (["inpaint", "--sampler", "heun"], "--sampler has no effect"),
        (["--from", "0.3"], "--from has no effect"),
        (["denoise", "--box", "1", "1", "2", "2"], "--box has no effect"),
        (["--split", "train"], "--split has no effect"),
        (["reconstruct", "--label", "AD"], "--label has no effect"),
        (["interpolate", "--count", "1"], "--count 2"),
        (["--spacing", "trailing", "--steps", "2000"], "--spacing trailing"),
    ],
)
def test_predict_refuses_in_one_sentence(argv, named, capsys):
    assert named in refusal(predict.main, argv, capsys)


@pytest.mark.parametrize(
    "z, label, said",
    [(["40"], None, "between 0 and 31"), (["x"], None, "--z takes"), (None, "MCI", "AD and NC")],
)
def test_predict_knows_what_the_run_was_trained_on(z, label, said):
    argv = (["--z", *z] if z else []) + (["--label", label] if label else [])
    with pytest.raises(predict.runs.RunError, match=said):
        predict.choose_conditions(predict.parser().parse_args(argv), {"z": [0, 31], "labels": ["AD", "NC"]})


def test_guidance_goes_away_from_the_label_and_the_facts_that_are_named(monkeypatch):
    found = {}
    monkeypatch.setattr(predict.guidance, "guided", lambda *arguments: found.update(negative=arguments[4]))
    words = ["--guidance", "2", "--negative-label", "AD", "--negative-conditions", "sex=M"]

    class Of:
        about, model, denoise = ABOUT, SimpleNamespace(clip_x_0=False), None

    told = {name: tf.constant(values) for name, values in (("label", [1, 1]), ("z", [3, 4]))}
    told["covariates"] = tf.constant([[0.5, 0.0], [0.1, 0.0]])
    predict.Generator.steered(Of, told, predict.parser().parse_args(words))
    np.testing.assert_array_equal(found["negative"]["label"], [0, 0])
    np.testing.assert_array_equal(found["negative"]["z"], [3, 4])
    np.testing.assert_array_equal(found["negative"]["covariates"], np.float32([[0.5, 1.0], [0.1, 1.0]]))
    np.testing.assert_array_equal(told["covariates"], np.float32([[0.5, 0.0], [0.1, 0.0]]))


def test_a_prior_is_told_the_labels_that_it_was_trained_with(monkeypatch, tmp_path):
    """The first stage may have been trained before there were labels."""
    for stage, labels in (("autoencoder", []), ("prior", ["AD", "NC"])):
        (tmp_path / f"{stage}.json").write_text(json.dumps({"data": {"labels": labels, "z": [0, 3]}}))
    told, codes = {}, np.zeros((2, 4, 4), "int32")
    prior = SimpleNamespace(num_codes=8, sample=lambda z, label, **_: told.update(label=label) or codes)
    first = SimpleNamespace(latents_of=lambda codes: codes, tissues=0)
    first.decode = lambda x, z, label: tf.zeros((len(z), 8, 8, 1))
    monkeypatch.setattr(predict.runs, "load_model", lambda path: prior)
    monkeypatch.setattr(predict.runs, "load_first_stage", lambda run: first)
    words = ["--prior", "transformer", "--label", "NC", "--count", "2", "--out", str(tmp_path)]
    predict.sample_prior(predict.parser().parse_args(words), tmp_path)
    np.testing.assert_array_equal(told["label"], [1, 1])


def test_what_draws_one_thing_gives_it_one_label():
    flags = predict.parser().parse_args(["interpolate", "--count", "12"])
    assert set(predict.choose_conditions(flags, {"labels": ["AD", "NC"], "z": [0, 9]})["label"]) == {0}


def test_a_person_has_all_slice_indices():
    flags = predict.parser().parse_args(["--person"])
    z = predict.choose_conditions(flags, {"labels": [], "z": [5, 185]})["z"]
    np.testing.assert_array_equal(z, np.arange(5, 186))


def test_a_volume_has_the_steps_between_the_slice_indices_that_are_drawn(tmp_path):
    flags = predict.parser().parse_args(["--person", "--voxel", "1", "2", "3", "--out", str(tmp_path)])
    predict.write_person(tmp_path, "ddim", np.zeros((3, 8, 6, 1), "float32"), np.array([0, 4, 8]), 1, flags)
    stored = nibabel.load(tmp_path / "ddim.nii.gz")
    assert stored.shape == (6, 3, 8)
    np.testing.assert_allclose(stored.header.get_zooms(), (1.0, 8.0, 3.0))


def test_all_points_between_two_slices_carry_the_noise_that_their_time_says(monkeypatch, tmp_path):
    """Two noised slices share their noise, so that an arc between these would carry more of it in the middle."""
    rng, drawn = np.random.default_rng(0), []
    eps, *ends = rng.standard_normal((3, 1, 16, 16, 4)).astype("float32")
    ends = np.concatenate(ends)  # of unit variance, as latents are

    class Still:
        about = {"data": {"labels": [], "z": [0, 31]}}
        noise = staticmethod(lambda seed, numbers: eps)
        noised = staticmethod(lambda x_0, t, eps: np.sqrt(1 - t**2) * x_0 + t * eps)

        def draw(self, name, x_t, conditions, steps, flags, start):
            drawn.append(x_t)
            return [(x_t, x_t)]

        def decode(self, x, conditions):
            return np.zeros((len(x), 8, 8, 1), "float32")

    still, told = Still(), {"z": np.array([3, 3]), "label": np.array([-1, -1])}
    pictures = np.zeros((2, 8, 8, 1), "float32")
    still.encode = lambda images, told: ends
    monkeypatch.setattr(predict, "Generator", lambda run: still)
    monkeypatch.setattr(predict, "real_pair", lambda generator, flags: (pictures, told))
    argv = ["interpolate", "--between", "slices", "--out", str(tmp_path), "--sampler", "ddim", "--count", "5"]
    predict.interpolate(predict.parser().parse_args(argv), tmp_path)
    share = (drawn[0] * eps).mean(axis=(1, 2, 3)) / (eps**2).mean()
    np.testing.assert_allclose(share, 0.5, atol=0.08)  # on an arc between the noised, 0.63 in the middle


def test_a_sweep_asks_for_every_slice_index_in_order():
    flags = predict.parser().parse_args(["--z", "sweep", "--label", "NC"])
    conditions = predict.choose_conditions(flags, {"z": [0, 31], "labels": ["AD", "NC"]})
    assert conditions["z"].tolist() == list(range(32)) and set(conditions["label"].tolist()) == {1}


def test_histogram_latents_are_those_of_the_same_place_and_slice_index(tmp_path):
    with pytest.raises(predict.runs.RunError, match="python train.py latents"):
        predict.histogram_latents(tmp_path, [5], 0)
    stored = np.arange(2 * 4 * 2 * 3, dtype="float16").reshape(2, 4, 2, 3, 1)  # every latent is another number
    (tmp_path / "latents").mkdir()
    np.savez(tmp_path / "latents" / "train.npz", latents=stored, z=np.array([5, 5, 9, 9]))
    drawn = predict.histogram_latents(tmp_path, np.array([5] * 400 + [8]), seed=1)  # of 8 there is none: 9 is nearest
    assert drawn.shape == (401, 2, 3, 1) and drawn.dtype == np.float32
    for place in np.ndindex(2, 3):
        assert set(drawn[(slice(0, 400), *place, 0)]) == set(stored[(slice(None), slice(0, 2), *place, 0)].ravel())
        assert drawn[(400, *place, 0)] in stored[(slice(None), slice(2, 4), *place, 0)]
    np.testing.assert_array_equal(predict.histogram_latents(tmp_path, [5], seed=1)[0], drawn[0])
    assert len(np.unique(drawn[:400].reshape(400, 6), axis=0)) > 300  # each place by itself


def test_dice_is_high_with_the_masks_that_slices_follow(capsys):
    found = [piece for piece in phantom.slices(1, 96, seed=1) if piece["z"] % 8 == 0]
    images = np.stack([piece["image"] for piece in found])[..., None] / np.float32(127.5) - 1
    tissue = np.searchsorted((0, 85, 170, 255), [piece["mask"] for piece in found])
    predict.say_how_masks_are_followed(images, tissue)
    lines = capsys.readouterr().out.splitlines()
    own, others = ([float(part.split()[-1]) for part in line.split(", ")] for line in lines)
    assert min(own) > 0.8 and all(mine > other + 0.1 for mine, other in zip(own, others, strict=True))
    predict.say_how_masks_are_followed(np.full_like(images[:1], -1), tissue[:1], images[:1])
    drawn, real = (
        [float(part.split()[-1]) for part in line.split(", ")] for line in capsys.readouterr().out.splitlines()
    )
    assert drawn == [0, 0, 0] and min(real) > 0.7


# ---- what predict.py is told of people -------------------------------------------------------------------------------

ABOUT = {
    "data": {
        "labels": ["AD", "NC"],
        "columns": {
            "age": {"kind": "number", "mean": 70.0, "std": 10.0},
            "sex": {"kind": "category", "values": ["F", "M"]},
        },
    }
}


@pytest.mark.parametrize(
    "words, age, sex",
    [
        ("", [0] * 8, [0, 0, 1, 1, 0, 0, 1, 1]),  # with the labels in turn, every pair is there
        ("--conditions age=85 sex=M", [1.5] * 8, [1] * 8),
        ("--person", [0] * 8, [0] * 8),
    ],
)
def test_facts_of_what_is_drawn(words, age, sex):
    facts = predict.choose_covariates(predict.parser().parse_args(words.split()), ABOUT, 8)["covariates"]
    np.testing.assert_array_equal(facts, np.stack([age, sex], axis=1))


@pytest.mark.parametrize("word, named", [("height=3", "age, sex"), ("age=old", "age=old"), ("sex=X", "F, M")])
def test_facts_that_the_run_does_not_know_are_refused(word, named):
    flags = predict.parser().parse_args(["--conditions", word])
    with pytest.raises(predict.runs.RunError, match=named):
        predict.choose_covariates(flags, ABOUT, 2)


@pytest.mark.parametrize(
    "words",
    ["--mask a.png --prior histogram", "denoise --conditions age=3", "--between slices", "interpolate --mask a.png"],
)
def test_flags_without_effect_are_refused(words):
    with pytest.raises(predict.runs.RunError, match="has no effect"):
        predict.check(predict.parser().parse_args(words.split()))


def test_anomaly_averages_over_noises_of_its_own():
    told, numbers = SimpleNamespace(seed=7, start=0.5, sampler=["ddim"], steps=10), []

    def noise(seed, which):
        numbers.extend(which)
        return np.stack([np.full((2, 2, 1), float(i)) for i in which])

    generator = SimpleNamespace(
        noise=noise,
        encode=lambda real, conditions: real,
        noised=lambda x_0, t, eps: x_0 + t * eps,
        draw=lambda name, x_t, conditions, steps, flags, start: [(x_t, x_t)] * steps,
        decode=lambda x, conditions: x,
    )
    real = np.zeros((3, 2, 2, 1))
    found, trajectory = predict.pseudo_healthy(generator, real, {}, told)
    assert numbers == list(range(3 * predict.ANOMALY_DRAWS))  # no noise twice
    for i in range(3):
        np.testing.assert_allclose(found[i], 0.5 * np.mean([i + 3 * k for k in range(predict.ANOMALY_DRAWS)]))
    np.testing.assert_allclose(trajectory[-1][0][2], 0.5 * 2)  # of the first noises
    assert len(trajectory) == 5  # half of the way, half of the calls
