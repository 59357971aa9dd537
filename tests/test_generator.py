"""generator.py: what reaches the network, what comes out, and that neither depends on how slices are put into batches.

Most tests draw with a model whose answer is a formula; the tiny runs of `tests/old_runs` stand for real ones.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

import generator as room
from generator import Generator
from ldm import batches
from ldm.diffusion import samplers, schedules
from ldm.training import runs

OLD = Path(__file__).parent / "old_runs"
SHAPE = (4, 4, 2)


def said(x_t, z):
    """What the model of `stub` says of slices: contrast and brightness by their slice index."""
    return x_t * (0.3 + 0.02 * z) + 0.1 * z


def stub(denoise=None, clip_x_0=False):
    """A model whose x_0 is `said(x_t, z)` with conditions, and x_t / 5 - 1 without."""

    def formula(x_t, t, conditions):
        if conditions is None:
            return x_t / 5.0 - 1.0
        return said(x_t, tf.cast(conditions["z"], tf.float32)[:, None, None, None])

    def threshold(x_0, t):
        return tf.clip_by_value(x_0, -1.0, 1.0) if clip_x_0 else x_0

    known = {"schedule": schedules.cosine, "data_shape": SHAPE, "threshold": threshold}
    return SimpleNamespace(denoise=denoise or formula, **known)


def known(count):
    return {"z": np.arange(3, 3 + count, dtype="int32"), "label": np.arange(count, dtype="int32") % 2}


@pytest.fixture
def made():
    return Generator.of(stub())


@pytest.fixture(scope="module")
def latent():
    return Generator(OLD / "vqvae")


@pytest.fixture(scope="module")
def pixels():
    return Generator(OLD / "pixels")


def all_conditions(count):
    """Conditions of the run in `old_runs/vqvae`, which was told everything."""
    random = np.random.default_rng(5)
    fractions = random.dirichlet(np.ones(4), (count, 6, 6)).astype("float32")
    people = np.stack([random.normal(size=count), np.arange(count) % 2], axis=1)  # age and sex
    return known(count) | {"covariates": people.astype("float32"), "mask": fractions}


def in_parts_of(size, monkeypatch):
    whole = batches.parts
    monkeypatch.setattr(batches, "parts", lambda count, *_: whole(count, size))


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_number_alone(made):
    four = made.noise(seed=3, count=4)
    assert four.shape == (4, *SHAPE) and four.dtype == np.float32
    np.testing.assert_array_equal(made.noise(3, 2, first=2), four[2:])
    np.testing.assert_array_equal(made.noise(3, 3, first=1, shared=True), np.stack([four[1]] * 3))
    others = made.noise(seed=4, count=4)
    different = [*four, *others]
    assert len(np.unique([x.ravel()[0] for x in different])) == 8
    many = made.noise(0, 500)
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_noised_is_the_forward_process(made):
    """alpha and sigma of t = 0.3 are 0.89 and 0.46: they cannot be taken for each other."""
    x_0, eps = np.random.default_rng(0).normal(size=(2, 3, *SHAPE)).astype("float32")
    alpha, sigma = np.cos(np.pi / 2 * 0.308 / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008), None
    sigma = np.sqrt(1 - alpha**2)
    np.testing.assert_allclose(made.noised(x_0, 0.3, eps), alpha * x_0 + sigma * eps, atol=1e-5)


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {}),
        ("ddim", {}),
        ("ddim", {"eta": 0.7}),
        ("ddim", {"start": 0.4}),
        ("dpm_solver_pp", {"spacing": "karras"}),
        ("heun", {"spacing": "trailing"}),
    ],
)
def test_drawing_is_the_sampler_with_its_options_and_a_seed_for_each_slice(made, sampler, options):
    x_T, conditions = made.noise(1, 3), known(3)
    own = {"seed": [(9, i, 1) for i in range(3)]} if sampler in ("ddpm", "ddim") else {}

    def denoise(x_t, t):
        return made.model.denoise(x_t, t, conditions)

    *_, (end, last_x_0) = samplers.SAMPLERS[sampler](denoise, x_T, schedules.cosine, 5, **options, **own)
    np.testing.assert_allclose(made.draw(x_T, conditions, sampler, 5, seed=9, **options), end, atol=1e-5)
    ((x_t, x_0),) = made.trajectory(x_T, conditions, sampler, 5, seed=9, **options)
    np.testing.assert_allclose(x_t, end, atol=1e-5)
    np.testing.assert_allclose(x_0, last_x_0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("negative", [False, True])
def test_guidance_reaches_the_network(made, scale, rescale, negative):
    """With one step the sample is x_0, which is a formula: away + scale (towards - away), its contrast taken back."""
    x_T, conditions = made.noise(1, 3), known(3)
    other = {"z": np.int32([20, 30, 40]), "label": conditions["label"]} if negative else None
    options = {"guidance_scale": scale, "guidance_rescale": rescale, "negative": other}
    found = made.draw(x_T, conditions, "ddim", 1, **options)
    away = said(x_T, other["z"][:, None, None, None]) if negative else x_T / 5 - 1
    towards = said(x_T, conditions["z"][:, None, None, None])
    x_0 = away + scale * (towards - away)
    ratio = towards.std(axis=(1, 2, 3), keepdims=True) / x_0.std(axis=(1, 2, 3), keepdims=True)
    expected = towards if scale == 1.0 else x_0 * (rescale * ratio + 1 - rescale)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_guided_pixels_stay_within_their_range():
    conditions, options = known(3), {"guidance_scale": 9.0}
    for clip_x_0 in (True, False):
        made = Generator.of(stub(clip_x_0=clip_x_0))
        drawn = made.draw(made.noise(0, 3), conditions, "ddim", 2, **options)
        assert (np.abs(drawn).max() <= 1.0) == clip_x_0


@pytest.mark.parametrize("sampler", ["ddpm", pytest.param("dpm_solver_pp", marks=pytest.mark.slow)])
def test_the_size_of_a_batch_does_not_matter(latent, sampler, monkeypatch):
    """Conditions, masks, negative conditions and seeds are cut with their slices, on the way there and back."""
    conditions, x_T = all_conditions(5), latent.noise(0, 5)
    other = {**conditions, "label": 1 - conditions["label"]}
    options = {"seed": 4, "guidance_scale": 1.5, "negative": other}
    found = []
    for size in (32, 2):
        with monkeypatch.context() as patch:
            in_parts_of(size, patch)
            drawn = latent.draw(x_T, conditions, sampler, 3, **options)
            images = latent.decode(drawn, conditions)
            found.append([drawn, images, latent.encode(images, conditions)])
    for whole, cut in zip(*found, strict=True):
        assert len(whole) == len(cut) == 5 and whole.std() > 0.01
        np.testing.assert_allclose(cut, whole, atol=2e-4)


def test_every_condition_reaches_the_network_with_its_slice(monkeypatch):
    """A model that says all that it is told in one number, while slices go through it in twos."""

    def denoise(x_t, t, conditions):
        assert conditions.keys() == {"z", "label", "covariates", "mask"}
        numbers = tf.cast(conditions["z"] + 100 * conditions["label"], tf.float32)
        numbers += tf.linalg.matvec(conditions["covariates"], [0.3, 0.7])
        return 0.0 * x_t + (numbers + 0.1 * tf.reduce_sum(conditions["mask"][..., 3], (1, 2)))[:, None, None, None]

    in_parts_of(2, monkeypatch)
    made, conditions = Generator.of(stub(denoise)), all_conditions(5)
    expected = conditions["z"] + 100 * conditions["label"] + conditions["covariates"] @ [0.3, 0.7]
    expected += 0.1 * conditions["mask"][..., 3].sum(axis=(1, 2))
    found = made.draw(made.noise(0, 5), conditions, "ddim", 2)
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None, None], found.shape), rtol=1e-5)


def test_same_seed_same_bytes(pixels):
    conditions, x_T = known(3), pixels.noise(2, 3)
    first, again, other = (pixels.draw(x_T, conditions, "ddpm", 3, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    np.testing.assert_array_equal(
        pixels.draw(x_T, conditions, "ddim", 3, seed=5), pixels.draw(x_T, conditions, "ddim", 3)
    )


def test_slices_of_one_head_share_all_noise(made):
    conditions = {"z": np.int32([4, 4, 4]), "label": np.int32([0, 0, 0])}
    x_T = made.noise(0, 3, shared=True)
    apart, together = (made.draw(x_T, conditions, "ddpm", 4, shared=shared) for shared in (False, True))
    np.testing.assert_array_equal(together[1:], together[:-1])
    assert np.abs(apart[1] - apart[0]).max() > 0.01
    np.testing.assert_array_equal(together[0], apart[0])


@pytest.mark.parametrize("kept", [0.9, 0.5])
def test_noise_of_slices_of_one_head_correlates_by_their_distance(kept):
    """By 1 / (1 + distance^2 (1 / kept - 1)), each with unit variance; the same however many there are."""
    noise = Generator.of(SimpleNamespace(data_shape=(60, 60, 2), threshold=None, denoise=None)).noise(
        0, 9, 4, shared=kept
    )
    for i, j in ((0, 1), (3, 5), (0, 8)):
        assert np.mean(noise[i] * noise[j]) == pytest.approx(1 / (1 + (j - i) ** 2 * (1 / kept - 1)), abs=0.04)
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 1.0, atol=0.04)
    made = Generator.of(stub())
    np.testing.assert_array_equal(made.noise(0, 9, 4, shared=kept)[:5], made.noise(0, 5, 4, shared=kept))
    np.testing.assert_array_equal(made.noise(0, 5, 4, shared=kept)[0], made.noise(0, 1, 4)[0])
    two = np.array([(4, 1), (4, 2), (7, 0)])  # two slices of one head, one of another
    expected = [*made.noise(0, 3, 4, shared=kept)[1:], *made.noise(0, 1, 7, shared=kept)]
    np.testing.assert_array_equal(made.noise(0, 3, two, shared=kept), expected)


def test_noise_added_on_the_way_is_shared_likewise():
    """A network that says 0 whatever it sees: what DDPM ends with, short of the last step, is a sum of its noises."""
    made = Generator.of(SimpleNamespace(**{**vars(stub()), "denoise": lambda x_t, t, conditions: 0.0 * x_t}))
    made.model.data_shape = (40, 40, 2)
    conditions, x_T = {"z": np.zeros(6, "int32"), "label": np.zeros(6, "int32")}, np.zeros((6, 40, 40, 2), "float32")
    states = made.trajectory(x_T, conditions, "ddpm", 4, moments=4, shared=0.8)
    noise = states[2][0] / states[2][0].std()
    for i, j in ((0, 1), (2, 5)):
        assert np.mean(noise[i] * noise[j]) == pytest.approx(1 / (1 + (j - i) ** 2 / 4), abs=0.06)


def test_the_number_of_the_first_slice_moves_the_noise_on(made):
    """Slices 3 and 4 of five are the same, drawn with the others or by themselves."""
    conditions = {name: np.repeat(values, 5) for name, values in known(1).items()}
    five = made.draw(made.noise(0, 5), conditions, "ddpm", 3, seed=7)
    some = {name: values[:2] for name, values in conditions.items()}
    two = made.draw(made.noise(0, 2, first=3), some, "ddpm", 3, seed=7, first=3)
    np.testing.assert_allclose(two, five[3:], atol=1e-6)


def test_noise_on_the_way_is_not_that_at_the_start():
    """With eta = 1 and a denoiser that sees nothing, x_s = alpha_s 0 + sigma_s z: z must have nothing of x_T in it."""
    made = Generator.of(stub(lambda x_t, t, conditions: 0.0 * x_t))
    conditions = {"z": np.zeros(400, "int32"), "label": np.zeros(400, "int32")}
    x_T = made.noise(0, 400)
    first, *_ = made.trajectory(x_T, conditions, "ddim", 2, moments=2, eta=1.0, seed=0)
    assert abs(np.corrcoef(first[0].ravel(), x_T.ravel())[0, 1]) < 0.05


def test_moments_are_kept_evenly_the_last_among_them(made):
    x_T, conditions = made.noise(0, 2), known(2)
    whole = made.trajectory(x_T, conditions, "ddim", 7, moments=99)
    assert len(whole) == 7
    for moments, kept in ((4, [0, 2, 4, 6]), (2, [0, 6]), (1, [6])):
        some = made.trajectory(x_T, conditions, "ddim", 7, moments=moments)
        assert len(some) == moments
        for pair, k in zip(some, kept, strict=True):
            np.testing.assert_array_equal(pair, whole[k])


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_sampler_takes_its_usual_number_of_calls(made, sampler):
    x_T, conditions = made.noise(0, 1), known(1)
    assert len(made.trajectory(x_T, conditions, sampler, moments=999)) == samplers.SAMPLERS[sampler].calls


@pytest.mark.parametrize(
    ("sampler", "option"),
    [("ddpm", {"eta": 1.0}), ("heun", {"eta": 0.0}), ("ddim", {"resample": 2}), ("euler", {"x": 1})],
)
def test_what_a_sampler_does_not_take_is_refused(made, sampler, option):
    with pytest.raises(ValueError, match=f"{sampler} does not take {next(iter(option))}"):
        made.draw(made.noise(0, 1), known(1), sampler, 2, **option)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pixels_are_their_own_latents(pixels):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 1)).astype("float32")
    np.testing.assert_array_equal(pixels.decode(pixels.encode(images, known(3)), known(3)), images)
    np.testing.assert_array_equal(pixels.decode(3 * images, known(3)), np.clip(3 * images, -1, 1))
    assert pixels.data_shape == (32, 32, 1) and not pixels.names_tissues


def test_a_first_stage_encodes_and_decodes_as_its_model_does(latent):
    images, conditions = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 1)).astype("float32"), known(3)
    expected = latent.autoencoder.encode(images, conditions["z"], conditions["label"])
    found = latent.encode(images, conditions)
    assert found.shape == (3, *latent.data_shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    decoded = latent.autoencoder.decode(found, conditions["z"], conditions["label"])
    np.testing.assert_allclose(latent.decode(found, conditions), decoded, atol=1e-5)


def test_tissues_are_decoded_where_the_first_stage_names_them():
    first_stage = room.FirstStage(runs.load_model(OLD / "vae" / "autoencoder.keras"))
    answers = np.load(OLD / "vae" / "answers.npz")
    conditions = {"z": answers["z"], "label": answers["label"]}
    assert first_stage.names_tissues
    np.testing.assert_array_equal(first_stage.decode_tissue(answers["latents"], conditions), answers["tissue"])


def test_the_network_is_told_the_tissue_that_its_latents_show(latent):
    """The crop box of this run is the 24 pixels from 4 on, six latents of four pixels a side."""
    tissue = np.zeros((1, 32, 32), "int32")
    tissue[0, 8:12, 12:14] = 3  # the second row of latents, the left half of the third column
    fractions = latent.tissue_fractions(tissue)
    assert fractions.shape == (1, 6, 6, 4)
    expected = np.zeros((6, 6))
    expected[1, 2] = 0.5
    np.testing.assert_allclose(fractions[0, :, :, 3], expected)
    np.testing.assert_allclose(fractions.sum(axis=-1), 1.0)


def test_a_latent_is_touched_by_any_pixel_of_it(latent, pixels):
    area = np.zeros((1, 32, 32, 1), "float32")
    area[:, 20:25, 24] = 1.0  # one pixel more than the fifth row of latents
    expected = np.zeros((6, 6))
    expected[4:6, 5] = 1.0
    np.testing.assert_array_equal(latent.touched(area)[0, :, :, 0], expected)
    np.testing.assert_array_equal(pixels.touched(area), area)


# ---- from pictures ---------------------------------------------------------------------------------------------------


def recording():
    """A generator in "pixels" of SHAPE, and the (x_t, t) that its network has been shown."""
    shown = []

    def denoise(x_t, t, conditions):
        tf.py_function(lambda x, t: shown.append((x.numpy(), float(t[0]))), [x_t, t], [])
        return 0.5 * x_t

    return Generator.of(stub(denoise)), shown


def test_pictures_are_noised_to_the_start_and_denoised_from_there():
    made, shown = recording()
    images = np.random.default_rng(0).uniform(-1, 1, (2, *SHAPE)).astype("float32")
    trajectory = made.renoised(images, known(2), 0.3, "ddim", steps=10, seed=6, first=4, moments=99)
    assert len(trajectory) == len(shown) == 3  # its share of the ten
    alpha, sigma = (float(value) for value in schedules.cosine(0.3))
    np.testing.assert_allclose(shown[0][0], alpha * images + sigma * made.noise(6, 2, first=4), atol=1e-5)
    np.testing.assert_allclose([t for _, t in shown], [0.3, 0.2, 0.1], atol=1e-6)
    assert made.share_of_steps("ddim", None, 0.5) == 25 and made.share_of_steps("ddim", 2, 0.01) == 1


def test_what_is_pseudo_healthy_is_the_mean_over_noises_of_their_own():
    made, shown = recording()
    images = np.zeros((3, *SHAPE), "float32")
    found, trajectory = made.pseudo_healthy(images, known(3), 0.5, draws=4, moments=99, sampler="ddim", steps=4, seed=2)
    assert len(shown) == 8 and len(trajectory) == 2
    starts = np.concatenate([x for x, t in shown if t == 0.5])
    np.testing.assert_allclose(starts, float(schedules.cosine(0.5)[1]) * made.noise(2, 12), atol=1e-5)
    ends = [made.renoised(images, known(3), 0.5, "ddim", 4, seed=2, first=first)[-1][0] for first in (0, 3, 6, 9)]
    np.testing.assert_allclose(found, np.mean(np.clip(ends, -1, 1), axis=0), atol=1e-6)
    np.testing.assert_allclose(trajectory[-1][0], ends[0], atol=1e-6)


def test_noise_that_is_added_on_the_way_differs_between_the_draws_as_well():
    made, _ = recording()
    images = np.zeros((2, *SHAPE), "float32")
    start = made.noised(images, 0.5, made.noise(0, 2))
    options = {"seed": 0, "start": 0.5}
    first, second = (made.draw(start, known(2), "ddpm", 3, first=first, **options) for first in (0, 2))
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_allclose(
        made.renoised(images, known(2), 0.5, "ddpm", 6, first=2)[-1][0],
        made.draw(made.noised(images, 0.5, made.noise(0, 2, first=2)), known(2), "ddpm", 3, first=2, **options),
        atol=1e-6,
    )


@pytest.mark.parametrize(("steps", "resample", "calls"), [(9, 4, 8), (3, 5, 3), (None, 5, 100)])
def test_inpainting_keeps_what_is_known(steps, resample, calls, monkeypatch):
    """Calls that `resample` does not divide are left out; rows keep to their own pictures, in whatever batches."""
    in_parts_of(2, monkeypatch)
    made, shown = recording()
    images = np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)).astype("float32")
    mask = np.zeros((1, 4, 4, 1), "float32")
    mask[:, 1:3, 2] = 1.0
    trajectory = made.inpainted(images, known(3), mask, steps, resample, moments=999)
    assert len(trajectory) == calls and len(shown) == 2 * calls  # two batches
    end, kept = trajectory[-1][0], np.broadcast_to(mask == 0, images.shape)
    np.testing.assert_allclose(end[kept], images[kept], atol=1e-6)
    assert np.abs(end - images)[~kept].min() > 1e-6


@pytest.mark.parametrize(("options", "calls"), [({}, 5), ({"resample": 3}, 6), ({"resample": 7}, 7)])
def test_the_moments_of_inpainting_are_those_of_the_calls_that_are_made(made, options, calls):
    """Asked for 7 calls, and not through `inpainted`: whole rounds of `resample` are made, and their end is kept."""
    x_T, picture = made.noise(0, 2), np.zeros((2, *SHAPE), "float32")
    more = {"known": picture, "mask": np.ones((2, 4, 4, 1), "float32"), **options}
    whole = made.trajectory(x_T, known(2), "inpaint", 7, moments=99, **more)
    assert len(whole) == calls
    (last,) = made.trajectory(x_T, known(2), "inpaint", 7, **more)
    np.testing.assert_array_equal(last, whole[-1])


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_histogram_latents_are_those_of_the_same_place_and_slice_index(tmp_path):
    with pytest.raises(runs.RunError, match="python train.py latents"):
        room.histogram_latents(tmp_path, [5], 0)
    stored = np.arange(2 * 4 * 2 * 3, dtype="float16").reshape(2, 4, 2, 3, 1)  # every latent is another number
    (tmp_path / "latents").mkdir()
    np.savez(tmp_path / "latents" / "train.npz", latents=stored, z=np.array([5, 5, 9, 9]))
    drawn = room.histogram_latents(tmp_path, np.array([5] * 400 + [8]), seed=1)  # of 8 there is none: 9 is nearest
    assert drawn.shape == (401, 2, 3, 1) and drawn.dtype == np.float32
    for place in np.ndindex(2, 3):
        assert set(drawn[(slice(0, 400), *place, 0)]) == set(stored[(slice(None), slice(0, 2), *place, 0)].ravel())
        assert drawn[(400, *place, 0)] in stored[(slice(None), slice(2, 4), *place, 0)]
    np.testing.assert_array_equal(room.histogram_latents(tmp_path, [5], seed=1)[0], drawn[0])
    assert len(np.unique(drawn[:400].reshape(400, 6), axis=0)) > 300  # each place by itself


def test_latents_of_the_transformer_are_those_of_its_codes(latent):
    prior, conditions = runs.load_model(OLD / "vqvae" / "prior.keras"), known(2)
    options = {"temperature": 0.7, "top_k": 3, "top_p": 0.9}
    found = room.prior_latents("transformer", None, latent, conditions, seed=3, prior=prior, **options)
    codes = prior.sample(conditions["z"], conditions["label"], seed=3, **options)
    np.testing.assert_allclose(found, latent.autoencoder.latents_of(codes), atol=1e-6)
    assert found.shape == (2, *latent.data_shape)
    with pytest.raises(runs.RunError, match="--top-k 99: there are 16 codes"):
        room.prior_latents("transformer", None, latent, conditions, prior=prior, top_k=99)
    for shape, codes in (((2, 2), prior.num_codes), (prior.code_shape, prior.num_codes + 1)):
        with pytest.raises(runs.RunError, match="prior.keras draws codes of another first stage"):
            room.prior_latents(
                "transformer",
                OLD / "vqvae",
                latent,
                conditions,
                prior=SimpleNamespace(code_shape=shape, num_codes=codes),
            )
    np.testing.assert_array_equal(room.prior_latents("normal", None, latent, conditions, 3), latent.noise(3, 2))


def test_a_run_is_known_by_its_record(latent, tmp_path):
    assert latent.record["settings"]["image_size"] == 32 and latent.record["data"]["labels"] == ["AD", "NC"]
    with pytest.raises(runs.RunError, match="python train.py diffusion"):
        Generator(tmp_path)
    (tmp_path / "diffusion.keras").write_bytes((OLD / "vqvae" / "diffusion.keras").read_bytes())
    with pytest.raises(runs.RunError, match=r"diffusion\.json is not there: run `python train.py diffusion"):
        Generator(tmp_path)
    (tmp_path / "diffusion.json").write_bytes((OLD / "vqvae" / "diffusion.json").read_bytes())
    with pytest.raises(runs.RunError, match="python train.py autoencoder"):
        Generator(tmp_path)
