"""Command line: pictures from a trained run.

python predict.py                            noise -> slices: a PNG and a denoising GIF by DDIM, and by DDPM
python predict.py --z sweep                  one slice per slice index, in order
python predict.py --person                   one head: a stack of slices that belong together, and a NIfTI volume
python predict.py --prior transformer        codes drawn one by one; histogram, normal: what random latents give
python predict.py interpolate                from one noise to another, on the arc between them
python predict.py denoise --from 0.5         variations: real slices, noised to t = 0.5 and denoised
python predict.py inpaint                    a part of real slices drawn anew: the middle, or --box
python predict.py anomaly --from 0.4         what the model would have drawn instead: a map of differences
python predict.py reconstruct --data ...     real slices through the first stage: sheet and scores
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

import dataset
import modules  # noqa: F401  (registers the classes that a .keras file names)
from ldm import tissue as tissue_classes
from ldm.data import masks as tissue_masks
from ldm.data import table, volumes
from ldm.diffusion import guidance, samplers, schedules
from ldm.drawing import figures
from ldm.judging import anatomy, metrics
from ldm.training import distribution, runs

STEPS = {"ddim": 50, "ddpm": 250, "dpm_solver_pp": 20, "euler": 50, "heun": 41}  # network calls, unless --steps says
BATCH = 32  # slices that are drawn at a time
FRAMES = 40  # most frames of a GIF
ANOMALY_DRAWS = 4  # noises that a map of differences averages over
TASKS = {}  # name -> function (flags, run); see `task`


def task(function):
    """Register one of the things that this command does, under its name."""
    TASKS[function.__name__] = function
    return function


def parser():
    p = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("task", nargs="?", default="sample", choices=tuple(TASKS))
    p.add_argument("--run", help="name of the run (default: the one that was trained last)")
    p.add_argument("--out", default="samples", help="folder for the pictures (default: samples)")
    p.add_argument("--precision", default="auto", choices=("auto", "float32", "mixed_bfloat16"))

    s = p.add_argument_group("sample")
    s.add_argument(
        "--prior",
        default="diffusion",
        choices=("diffusion", "transformer", "histogram", "normal"),
        help="where latents come from: the diffusion model; the transformer over codes; each place by itself, out of "
        "the training latents of the same slice index; N(0, I)",
    )
    s.add_argument("--sampler", nargs="+", default=["ddim", "ddpm"], choices=tuple(samplers.SAMPLERS))
    s.add_argument("--steps", type=int, help=f"network calls (default: {STEPS})")
    s.add_argument("--eta", type=float, default=0.0, help="DDIM's noise: 0 is deterministic, 1 is DDPM-like")
    s.add_argument("--person", action="store_true", help="one person: all slices from the same noise, in order")
    s.add_argument("--voxel", type=float, nargs=3, default=[1.0, 1.0, 1.0], help="person: mm, for the volume's affine")
    s.add_argument("--spacing", default="uniform", choices=samplers.SPACINGS, help="of a sampler's times")
    s.add_argument("--guidance", type=float, default=1.0, help="more than 1 exaggerates what the model is told")
    s.add_argument("--guidance-rescale", type=float, default=0.0, help="share of the added contrast to take back")
    s.add_argument("--negative-label", help="guide away from this label, not from an unconditional slice")
    s.add_argument(
        "--negative-conditions",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="guide away from these, not from an unconditional slice",
    )
    s.add_argument("--temperature", type=float, default=1.0, help="of the transformer; 0: always the likeliest code")
    s.add_argument("--top-k", type=int, default=0, help="of the transformer: draw from the k likeliest codes")
    s.add_argument("--top-p", type=float, default=1.0, help="of the transformer: draw from the likeliest share p")
    s.add_argument("--count", type=int, help="slices to draw (default: 16; with --z sweep, one per slice index)")
    s.add_argument("--z", nargs="+", help="slice indices, repeated as needed, or 'sweep' (default: spread over all)")
    s.add_argument("--label", help="a label of the training data, by name (default: labels in turn, if there are any)")
    s.add_argument(
        "--conditions",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="what else the run was told of people: age=70",
    )
    s.add_argument(
        "--mask",
        nargs="+",
        metavar="FILE",
        help="tissue masks to draw slices of, PNGs; or 'data': of the --split people",
    )
    s.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    s.add_argument("--fps", type=float, default=12, help="frames per second of the GIF")
    s.add_argument("--show-x0", action="store_true", help="put the predicted x_0 beside x_t in the GIF")

    e = p.add_argument_group("interpolate, denoise, anomaly (they use the first --sampler), inpaint (has its own)")
    e.add_argument("--from", dest="start", type=float, default=0.5, help="t to which real slices are noised")
    e.add_argument(
        "--box",
        type=int,
        nargs=4,
        metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"),
        help="inpaint: pixels (default: the middle)",
    )
    e.add_argument(
        "--between", default="noises", choices=("noises", "slices"), help="interpolate: two noises, or two real slices"
    )
    e.add_argument("--resample", type=int, default=5, help="inpaint: times that each noise level is gone through")

    r = p.add_argument_group(
        "real slices, for reconstruct, denoise, inpaint, anomaly, interpolate --between slices, --mask data"
    )
    r.add_argument("--data", nargs="+", help="default: the data that the run was trained on")
    r.add_argument("--split", default="test", choices=dataset.SPLITS)
    return p


# ---- sample ----------------------------------------------------------------------------------------------------------


@task
def sample(flags, run):
    """Draw slices with each sampler that is asked for; write a PNG and a GIF for each."""
    generator = Generator(run)
    conditions = choose_conditions(flags, generator.about["data"])
    count = len(conditions["z"])
    conditions |= choose_covariates(flags, generator.about, count)
    tissue, real, shares = choose_masks(flags, generator, conditions["z"])
    conditions |= shares
    x_T = generator.noise([flags.seed], [0] * count if flags.person else range(count))
    columns = 8 if flags.z == ["sweep"] else None
    for name in flags.sampler:
        steps = flags.steps or STEPS[name]
        start = time.time()
        trajectory = generator.draw(name, x_T, conditions, steps, flags)
        latents = trajectory[-1][0]
        trajectory = [[generator.decode(x, conditions) for x in pair] for pair in trajectory]
        seconds = (time.time() - start) / count
        out = Path(flags.out)
        figures.save_png(out / f"{name}.png", figures.sheet(figures.enlarge(trajectory[-1][0]), columns))
        if shares:
            figures.tissue_sheet(out / f"{name}_mask.png", trajectory[-1][0], tissue, conditions["z"])
            say_how_masks_are_followed(trajectory[-1][0], tissue, real)
        frames = figures.denoising_frames(trajectory, columns, with_prediction=flags.show_x0)
        figures.save_gif(out / f"{name}.gif", frames, flags.fps)
        print(
            f"{name}: {count} slices, {steps} network calls each, {seconds:.2f} seconds per slice -> "
            f"{out / name}.png, {out / name}.gif"
        )
        if flags.z == ["sweep"]:
            neighbours = metrics.neighbour_correlation(metrics.to_unit(trajectory[-1][0]))
            print(f"neighbouring slices correlate by {neighbours:.3f}")
        if flags.person:
            axis = generator.about["settings"].get("axis", 2)
            write_person(out, name, trajectory[-1][0], conditions["z"], axis, flags)
        if generator.autoencoder:
            draw_tissue(generator.autoencoder, trajectory[-1][0], latents, conditions, out / f"{name}_tissue.png")


def say_how_masks_are_followed(images, tissue, real=None):
    """Dice of the tissue in drawn slices (N, H, W, 1) with their masks (N, H, W), between two that it is read against:
    other slices' masks, which it must beat, and real slices (N, H, W, 1) with the same masks, the best it can be."""
    compared = {"what was drawn with its mask": (images, tissue)}
    if len(tissue) > 1:
        compared["what was drawn with another slice's mask"] = (images, np.roll(tissue, len(tissue) // 2, axis=0))
    if real is not None:
        compared["the real slices with these masks"] = (real, tissue)
    for what, (pictures, masks) in compared.items():
        values = metrics.dice(masks, anatomy.tissues(metrics.to_unit(pictures)))
        named = zip(tissue_classes.NAMES[1:], values, strict=True)
        print(f"Dice of {what}: " + ", ".join(f"{name} {value:.2f}" for name, value in named))


def write_person(out, name, images, z, axis, flags):
    """The stack as a film through the slice indices, and as a volume, cut along `axis`, with the steps between them."""
    figures.save_gif(out / f"{name}_stack.gif", list(figures.to_uint8(figures.enlarge(images))), flags.fps)
    voxel = list(flags.voxel)
    voxel[axis] *= float(z[-1] - z[0]) / max(1, len(z) - 1) or 1.0  # --count may leave slice indices out
    volumes.save_volume(out / f"{name}.nii.gz", figures.to_uint8(images), voxel, axis)
    print(f"-> {out / name}_stack.gif, {out / name}.nii.gz: {len(images)} slices, voxels of {voxel} mm")


class Generator:
    """A run's diffusion model between pictures and noise: encode, draw, decode, each compiled once.

    Raises:
        RunError: if a model is not there yet.
    """

    def __init__(self, run):
        self.model = runs.load_model(run / "diffusion.keras")
        self.about = runs.load_json(run / "diffusion.json")
        self.denoise = tf.function(self.model.denoise, reduce_retracing=True)
        self.autoencoder = None if self.about["settings"]["first_stage"] == "none" else runs.load_first_stage(run)
        if self.autoencoder:
            self._encode = tf.function(self.autoencoder.encode, reduce_retracing=True)
            self._decode = tf.function(self.autoencoder.decode, reduce_retracing=True)

    def encode(self, images, conditions):
        """Images (N, H, W, 1) in [-1, 1] -> what the model denoises."""
        return self._encode(images, conditions["z"], conditions["label"]).numpy() if self.autoencoder else images

    def shares(self, tissue):
        """Tissue masks (N, H, W) as the network is told them, where it is told any."""
        window = self.autoencoder.crop_box if self.autoencoder else None
        return tissue_masks.tissue_fractions(tissue, self.model.data_shape[:2], window).numpy()

    def decode(self, x, conditions):
        """The inverse."""
        return to_images(x, self._decode if self.autoencoder else None, conditions)

    def noise(self, seed, numbers):
        return np.stack([samplers.initial_noise(*seed, i, self.model.data_shape) for i in numbers])

    def noised(self, x_0, t, eps):
        """x_t of clean data and noise."""
        alpha, sigma = (float(value) for value in self.model.schedule(t))
        return (alpha * x_0 + sigma * eps).astype("float32")

    def draw(self, name, x_T, conditions, steps, flags, **more):
        """Run a sampler, BATCH slices at a time.

        Args:
            name: in `samplers.SAMPLERS`, or "inpaint".
            more: options of the sampler; arrays are cut into batches with the slices.

        Returns:
            List of (x_t, x_0), each (count, h, w, C): the steps that the trajectory shows, the last among them.
        """
        sampler = {**samplers.SAMPLERS, "inpaint": samplers.inpaint}[name]
        options = {} if name == "inpaint" else {"spacing": flags.spacing}
        if name == "ddim":
            options["eta"] = flags.eta
        shown = set(np.linspace(0, steps - 1, min(steps, FRAMES)).round().astype(int).tolist())
        batches = []
        with tqdm(total=steps * -(-len(x_T) // BATCH), desc=name, unit="call") as bar:
            for start in range(0, len(x_T), BATCH):
                part = slice(start, start + BATCH)
                told = {key: tf.constant(value[part]) for key, value in conditions.items()}
                if name in ("ddim", "ddpm", "inpaint"):
                    numbers = range(start, min(start + BATCH, len(x_T)))
                    options["seed"] = [(flags.seed, 0 if flags.person else i, 1) for i in numbers]
                cut = {key: value[part] if isinstance(value, np.ndarray) else value for key, value in more.items()}
                steered = self.steered(told, flags)
                trajectory = []
                for i, pair in enumerate(
                    sampler(steered, x_T=x_T[part], schedule=self.model.schedule, steps=steps, **options, **cut)
                ):
                    bar.update()
                    if i in shown:
                        trajectory.append([np.asarray(x) for x in pair])
                batches.append(trajectory)
        return [[np.concatenate(x) for x in zip(*moment, strict=True)] for moment in zip(*batches, strict=True)]

    def steered(self, told, flags):
        """`denoise(x_t, t)` with the conditions and the guidance that the flags ask for."""
        away = None
        if flags.negative_label is not None or flags.negative_conditions:
            away = dict(told)
        if flags.negative_label is not None:
            negative = label_index(flags, "negative_label", self.about["data"])
            away["label"] = tf.fill(told["label"].shape, negative)
        if flags.negative_conditions:
            covariates = told["covariates"].numpy()
            for k, value in named_covariates(flags, "negative_conditions", self.about).items():
                covariates[:, k] = value
            away["covariates"] = tf.constant(covariates)
        limit = 1.0 if self.model.clip_x_0 else None
        return guidance.guided(self.denoise, told, flags.guidance, flags.guidance_rescale, away, limit)


def draw_tissue(autoencoder, images, latents, conditions, path):
    """Write the tissue maps beside the pictures, for a first stage that names tissues."""
    if autoencoder.tissues:
        tissue = to_images(latents, tf.function(autoencoder.decode_tissue, reduce_retracing=True), conditions)
        figures.tissue_sheet(path, images, tissue, conditions["z"])
        print(f"-> {path}")


def sample_prior(flags, run):
    """Decode latents that know nothing of each other: what the first stage alone makes of a slice index."""
    refuse_pixels(run, f"--prior {flags.prior} draws latents")
    autoencoder = runs.load_first_stage(run)
    told = "prior" if flags.prior == "transformer" else "autoencoder"  # they may have been told different labels
    prior = runs.load_model(run / "prior.keras") if told == "prior" else None
    conditions = choose_conditions(flags, runs.load_json(run / f"{told}.json")["data"])
    count = len(conditions["z"])
    if flags.prior == "normal":
        latents = np.stack([samplers.initial_noise(flags.seed, i, autoencoder.latent_shape) for i in range(count)])
    elif flags.prior == "transformer":
        if flags.top_k > prior.num_codes:
            raise runs.RunError(f"--top-k {flags.top_k}: there are {prior.num_codes} codes; 0 takes all of them")
        options = {"temperature": flags.temperature, "top_k": flags.top_k, "top_p": flags.top_p}
        codes = prior.sample(conditions["z"], conditions["label"], seed=flags.seed, **options)
        latents = np.asarray(autoencoder.latents_of(codes))
    else:
        latents = histogram_latents(run, conditions["z"], flags.seed)
    images = to_images(latents, tf.function(autoencoder.decode, reduce_retracing=True), conditions)
    path = Path(flags.out) / f"{flags.prior}.png"
    figures.save_png(path, figures.sheet(figures.enlarge(images), 8 if flags.z == ["sweep"] else None))
    print(f"{flags.prior}: {count} slices -> {path}")
    draw_tissue(autoencoder, images, latents, conditions, path.with_name(f"{flags.prior}_tissue.png"))


def refuse_pixels(run, what):
    """Raises:
    RunError: if the run has no first stage.
    """
    if (runs.load_json(run / "diffusion.json") or {}).get("settings", {}).get("first_stage") == "none":
        raise runs.RunError(f"{what}, and {run} works in pixels, without one: leave it out, or name another --run")


def histogram_latents(run, z, seed):
    """Latents (N, h, w, C): each place drawn by itself from all training latents of the same slice index.

    Once decoded, and so quantised, these are draws from the histogram of codes per place and slice index.

    Raises:
        RunError: if the training latents are not there yet.
    """
    path = run / "latents" / "train.npz"
    if not path.exists():
        raise runs.RunError(f"--prior histogram needs {path}: run `python train.py latents --run {run.name}` first")
    with np.load(path) as file:
        stored, stored_z = file["latents"], file["z"]  # (views, slices, h, w, C), (slices,)
    result = []
    for i, index in enumerate(z):
        distance = np.abs(stored_z - index)
        rows = np.flatnonzero(distance == distance.min())
        random = np.random.default_rng([seed, i])
        height, width = np.indices(stored.shape[2:4])
        view = random.integers(len(stored), size=height.shape)
        result.append(stored[view, random.choice(rows, height.shape), height, width])
    return np.stack(result).astype("float32")


def choose_conditions(flags, data):
    """{"z", "label"}, int32 (count,) each, from the flags and from what the run was trained on.

    Raises:
        RunError: for slice indices or labels that the run does not know.
    """
    first, last = data["z"]
    if flags.person or flags.task == "interpolate":  # all that is drawn has one label
        flags.label = flags.label or (data["labels"] or [None])[0]
    if flags.person:
        flags.z = ["sweep"]
    if flags.z == ["sweep"]:
        z = np.linspace(first, last, flags.count or last - first + 1)
    elif flags.z:
        z = np.resize(slice_indices(flags.z), flags.count or max(16, len(flags.z)))
        if z.min() < first or z.max() > last:
            raise runs.RunError(f"--z must lie between {first} and {last}, the slices that this run was trained on")
    else:
        z = np.linspace(first, last, flags.count or 16)
    names = data["labels"]
    if flags.negative_label is not None:
        label_index(flags, "negative_label", data)
    if flags.label is None:
        label = np.arange(len(z)) % len(names) if names else np.full(len(z), -1)
    else:
        label = np.full(len(z), label_index(flags, "label", data))
    return {"z": np.round(z).astype("int32"), "label": label.astype("int32")}


def choose_covariates(flags, about, count):
    """{"covariates": (count, K) float32} of a run that was told columns of the table, else {}.

    What no flag says is what people are like on average: the mean of a number, the values of a category in turn.

    Raises:
        RunError: for columns or values that the run does not know.
    """
    columns, said = about["data"].get("columns", {}), named_covariates(flags, "conditions", about)
    named_covariates(flags, "negative_conditions", about)  # refused here, before anything is drawn
    covariates = np.zeros((count, len(columns)), "float32")
    period = max(1, len(about["data"]["labels"]))  # labels run through their values, and the first category more slowly
    for k, column in enumerate(columns.values()):
        if k in said:
            covariates[:, k] = said[k]
        elif "values" in column and not flags.person:
            covariates[:, k] = np.arange(count) // period % len(column["values"])
            period *= len(column["values"])
    return {"covariates": covariates} if columns else {}


def named_covariates(flags, flag, about):
    """{k: value of the k-th column, as the network is told it} of a flag that takes words like age=70.

    Raises:
        RunError: for columns or values that the run does not know.
    """
    columns, found = about["data"].get("columns", {}), {}
    for word in getattr(flags, flag):
        name, _, text = word.partition("=")
        spelt = f"--{flag.replace('_', '-')}"
        if name not in columns:
            raise runs.RunError(f"{spelt} {name}: this run was told {', '.join(columns) or 'no columns'}")
        try:
            found[list(columns).index(name)] = table.encode(text, columns[name])
        except ValueError as error:
            raise runs.RunError(f"{spelt} {word}: {error}") from error
    return found


def choose_masks(flags, generator, z):
    """The tissue that --mask asks for: classes (count, H, W); the real slices (count, H, W, 1) that have it, or None;
    and {"mask"} as the network is told it, {} without any.

    Raises:
        RunError: if the run was not told masks, or the data has none.
    """
    settings, real = generator.about["settings"], None
    if not flags.mask:
        return None, None, {}
    if not settings["diffusion"].get("condition_on_mask"):
        raise runs.RunError(
            "--mask: this run was not told masks: train one with `train.py diffusion --condition-on-mask`"
        )
    if flags.mask == ["data"]:
        source = dataset.open_recorded(generator.about, flags.data)
        found = dataset.read_split(source, flags.split, settings["image_size"], masks=True)
        rows = np.flatnonzero((found["mask"] >= 0).all(axis=(1, 2)))
        if not len(rows):
            raise runs.RunError(f"--mask data: {source.path} has no masks of the {flags.split} people: name PNG files")
        rows = rows[found["case"][rows] == found["case"][rows[0]]]  # one person
        rows = [rows[np.abs(found["z"][rows] - index).argmin()] for index in z]
        tissue, real = found["mask"][rows], found["image"][rows]
    else:
        masks = [dataset.read_mask(path, settings["image_size"]) for path in flags.mask]
        tissue = np.stack([masks[i % len(masks)] for i in range(len(z))])
    return tissue, real, {"mask": generator.shares(tissue)}


def slice_indices(words):
    """The numbers that --z names.

    Raises:
        RunError: for a word that is none.
    """
    try:
        return [int(word) for word in words]
    except ValueError as error:
        said = " ".join(words)
        raise runs.RunError(f"--z takes slice indices, or 'sweep' where slices are drawn, not {said}") from error


def label_index(flags, flag, data):
    """The number of a label that a flag names, among those of the training data.

    Raises:
        RunError: if the run does not know it.
    """
    name, names = getattr(flags, flag), data["labels"]
    if name not in names:
        known = f"this run knows {' and '.join(names) or 'no labels'}"
        raise runs.RunError(f"--{flag.replace('_', '-')} {name}: {known}")
    return names.index(name)


def to_images(x, decode, conditions):
    """Latents, or pixels, (N, h, w, C) -> images (N, H, W, 1) in [-1, 1], or whatever else `decode` makes of them."""
    if decode is None:
        return np.clip(x, -1, 1)
    parts = [slice(start, start + BATCH) for start in range(0, len(x), BATCH)]
    told = [conditions[key] for key in ("z", "label")]
    return np.concatenate([decode(x[part], *(value[part] for value in told)).numpy() for part in parts])


# ---- from real slices ------------------------------------------------------------------------------------------------


@task
def interpolate(flags, run):
    """Slices on the arc between two noises, or two real slices: one picture becomes another, through pictures."""
    generator, count = Generator(run), flags.count or 12
    ends = real_pair(generator, flags) if flags.between == "slices" else None
    flags.count, flags.z = count, (flags.z or ["sweep"])
    conditions = choose_conditions(flags, generator.about["data"])
    conditions |= choose_covariates(flags, generator.about, len(conditions["z"]))
    middle = len(conditions["z"]) // 2  # without --z: the middle of the sweep, for all
    for values in conditions.values():
        values[:] = values[middle if flags.z == ["sweep"] else 0]
    name, options = flags.sampler[0], {}
    steps = flags.steps or STEPS[name]
    if ends is None:
        x_t = guidance.spherical(*generator.noise([flags.seed], (0, 1)), count)
    else:  # all noised by the same noise, to a time at which the network decides what lies between them
        x_0 = guidance.spherical(*generator.encode(*ends), count)
        x_t = generator.noised(x_0, flags.start, generator.noise([flags.seed], (0,)))
        steps, options = max(1, round(steps * flags.start)), {"start": flags.start}
        conditions = {key: np.repeat(value[:1], count, axis=0) for key, value in ends[1].items()}
    images = generator.decode(generator.draw(name, x_t, conditions, steps, flags, **options)[-1][0], conditions)
    if ends is not None:
        images = np.concatenate([ends[0][:1], images, ends[0][1:]])
    out = Path(flags.out)
    figures.save_png(out / "interpolate.png", figures.sheet(figures.enlarge(images)))
    figures.save_gif(out / "interpolate.gif", list(figures.to_uint8(figures.enlarge(images))), flags.fps)
    print(f"interpolate: {count} slices -> {out / 'interpolate.png'}, {out / 'interpolate.gif'}")


@task
def denoise(flags, run):
    """Variations of real slices: noised to a time t, and denoised."""
    generator, real, conditions = with_real_slices(flags, run)
    trajectory = renoised(generator, real, conditions, flags)
    fake = generator.decode(trajectory[-1][0], conditions)
    path = Path(flags.out) / "denoise.png"
    write_trajectory(generator, trajectory, conditions, flags, "denoise")
    figures.reconstruction_sheet(path, real, fake, conditions["z"], count=len(real), called="denoised")
    print(f"denoise: {len(real)} slices of the {flags.split} people, noised to t = {flags.start} -> {path}")


@task
def anomaly(flags, run):
    """What does not belong: the difference to what the model makes of a noised slice, averaged over noises."""
    generator, real, conditions = with_real_slices(flags, run)
    fake, trajectory = pseudo_healthy(generator, real, conditions, flags)
    path = Path(flags.out) / "anomaly.png"
    write_trajectory(generator, trajectory, conditions, flags, "anomaly")
    figures.reconstruction_sheet(path, real, fake, conditions["z"], count=len(real), called="denoised")
    score = np.abs(metrics.to_unit(real) - metrics.to_unit(fake)).mean(axis=(1, 2, 3))
    print(f"anomaly: mean difference {score.mean():.4f}, largest {score.max():.4f} -> {path}")


@task
def inpaint(flags, run):
    """A part of real slices drawn anew, to fit the rest."""
    generator, real, conditions = with_real_slices(flags, run)
    size, (height, width, _) = real.shape[1], generator.model.data_shape
    top, left, tall, wide = flags.box or (size * 3 // 8, size * 3 // 8, size // 4, size // 4)
    if min(top, left) < 0 or min(tall, wide) < 1 or max(top + tall, left + wide) > size:
        raise runs.RunError(f"--box {top} {left} {tall} {wide} does not lie within {size}x{size} pixels")
    box = np.zeros((1, size, size, 1), "float32")
    box[:, top : top + tall, left : left + wide] = 1.0
    seen = generator.autoencoder.crop(box) if generator.autoencoder else box
    mask = (tf.image.resize(seen, (height, width), "area").numpy() > 0).astype("float32")  # all that the box touches
    if not mask.any():
        raise runs.RunError(
            f"--box {top} {left} {tall} {wide} lies outside of what this model draws: it is black there"
        )
    known = generator.encode(real, conditions)
    name, steps = "inpaint", flags.steps or 100
    x_T = generator.noise([flags.seed], range(len(real)))
    options = {"known": known, "mask": np.repeat(mask, len(real), axis=0), "resample": min(flags.resample, steps)}
    steps -= steps % options["resample"]
    trajectory = generator.draw(name, x_T, conditions, steps, flags, **options)
    trajectory = [[box * generator.decode(x, conditions) + (1 - box) * real for x in pair] for pair in trajectory]
    out = Path(flags.out)
    count = len(real)
    figures.reconstruction_sheet(
        out / "inpaint.png", real, trajectory[-1][0], conditions["z"], count, called="inpainted"
    )
    figures.save_gif(out / "inpaint.gif", figures.denoising_frames(trajectory, None), flags.fps)
    print(f"inpaint: {count} slices, {steps} network calls each -> {out / 'inpaint.png'}, {out / 'inpaint.gif'}")


def with_real_slices(flags, run):
    """The run's generator, and real slices (N, H, W, 1) in [-1, 1] with their conditions, spread over the split.

    They are of the slice indices that --z names, if any; --label stands in for their own.

    Raises:
        RunError: for an index or a label that is not there.
    """
    generator = Generator(run)
    settings = generator.about["settings"]
    source = real_source(generator, flags)
    with_masks = bool(settings["diffusion"].get("condition_on_mask") and source.masks)
    whole = dataset.read_split(source, flags.split, settings["image_size"], masks=with_masks)
    rows = np.flatnonzero(np.isin(whole["z"], slice_indices(flags.z))) if flags.z else np.arange(len(whole["z"]))
    if not len(rows):
        raise runs.RunError(f"--z {' '.join(flags.z)}: {source.path} has no such slices of the {flags.split} people")
    some = evenly(rows[np.argsort(whole["z"][rows], kind="stable")], flags.count or 8)
    chosen = {key: value[some] for key, value in whole.items()}
    conditions = {"z": chosen["z"], "label": said_label(flags, generator, chosen["label"])}
    if columns := generator.about["data"].get("columns"):
        conditions["covariates"] = dataset.covariates_of(source, chosen["case"], columns)
    if with_masks:
        conditions["mask"] = generator.shares(chosen["mask"])
    return generator, chosen["image"], conditions


def real_source(generator, flags):
    """The real slices that the flags name, labelled as the run numbers labels, unless --label stands in for theirs.

    Raises:
        DataError: for a label that the run does not know.
    """
    source = dataset.open_recorded(generator.about, flags.data)
    return source.with_labels_of(generator.about["data"]["labels"]) if flags.label is None else source


def said_label(flags, generator, label):
    """Labels (N,) int32 of real slices, or --label in their stead."""
    if flags.label is None:
        return label
    return np.full_like(label, label_index(flags, "label", generator.about["data"]))


def evenly(rows, count):
    """At most `count` of the rows, in their order, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def real_pair(generator, flags):
    """Slices of two people, of the slice index that --z says or the middle one, and what is told of the first.

    Raises:
        RunError: if there are not two people.
    """
    source = real_source(generator, flags)
    found = dataset.read_split(source, flags.split, generator.about["settings"]["image_size"])
    people = np.unique(found["case"])[:2]
    if len(people) < 2:
        raise runs.RunError(f"interpolate --between slices needs two {flags.split} people, and {source.path} has fewer")
    index = slice_indices(flags.z)[0] if flags.z else np.median(found["z"])
    rows = [np.where(found["case"] == case, np.abs(found["z"] - index), np.inf).argmin() for case in people]
    told = {"z": found["z"][rows], "label": said_label(flags, generator, found["label"][rows])}
    if columns := generator.about["data"].get("columns"):
        told["covariates"] = dataset.covariates_of(source, found["case"][rows], columns)
    return found["image"][rows], told


def pseudo_healthy(generator, real, conditions, flags):
    """What the model makes of slices noised to `flags.start`: the mean over noises, and the trajectory of the first."""
    trajectory = renoised(generator, real, conditions, flags)
    ends = [
        trajectory[-1][0],
        *(renoised(generator, real, conditions, flags, i)[-1][0] for i in range(1, ANOMALY_DRAWS)),
    ]
    return np.mean([generator.decode(x, conditions) for x in ends], axis=0), trajectory


def renoised(generator, real, conditions, flags, draw=0):
    """The trajectory of real slices that are noised to the time `flags.start` and denoised."""
    eps = generator.noise([flags.seed], range(draw * len(real), (draw + 1) * len(real)))
    x_t = generator.noised(generator.encode(real, conditions), flags.start, eps)
    name = flags.sampler[0]
    steps = max(1, round((flags.steps or STEPS[name]) * flags.start))
    return generator.draw(name, x_t, conditions, steps, flags, start=flags.start)


def write_trajectory(generator, trajectory, conditions, flags, title):
    frames = [[generator.decode(x, conditions) for x in pair] for pair in trajectory]
    figures.save_gif(Path(flags.out) / f"{title}.gif", figures.denoising_frames(frames, None), flags.fps)


# ---- reconstruct -----------------------------------------------------------------------------------------------------


@task
def reconstruct(flags, run):
    """Real slices through the first stage, beside the two predictors that know nothing of the slice."""
    refuse_pixels(run, "reconstruct goes through the first stage")
    autoencoder = runs.load_model(run / "autoencoder.keras")
    about = runs.load_json(run / "autoencoder.json")
    settings = about["settings"]
    source = dataset.open_recorded(about, flags.data)
    if autoencoder.num_labels:
        source = source.with_labels_of(about["data"]["labels"])

    def slices(split, masks=False):
        return dataset.make_dataset(source, split, autoencoder.image_size, BATCH, training=False, masks=masks)

    with_tissue = bool(autoencoder.tissues and source.masks)
    chosen = slices(flags.split, with_tissue)
    mean = metrics.mean_images((metrics.to_unit(batch["image"]), batch["z"].numpy()) for batch in slices("train"))
    found = {name: [] for name in ("real", "fake", "z", "case", "mask", "tissue")}
    through = tf.function(autoencoder.reconstruct, reduce_retracing=True)
    name_tissue = tf.function(
        lambda *told: autoencoder.decode_tissue(autoencoder.encode(*told), *told[1:]), reduce_retracing=True
    )
    for batch in tqdm(chosen, desc="reconstruct", unit="batch"):
        told = (batch["image"], batch["z"], batch["label"])
        found["real"].append(batch["image"].numpy())
        found["fake"].append(through(*told).numpy())
        for name in ("z", "case", *(["mask"] if with_tissue else [])):
            found[name].append(batch[name].numpy())
        if autoencoder.tissues:
            found["tissue"].append(name_tissue(*told).numpy())
    found = {name: np.concatenate(parts) for name, parts in found.items() if parts}
    real, fake, z, case = (found[name] for name in ("real", "fake", "z", "case"))

    rows = {
        settings["first_stage"]: metrics.to_unit(fake),
        "mean image per slice index": metrics.mean_image_prediction(mean, z),
        "black": np.zeros_like(real),
    }
    scores = {
        name: metrics.over_people(metrics.all_scores(metrics.to_unit(real), picture), case)
        for name, picture in rows.items()
    }
    show_scores(scores, flags.split, len(np.unique(case)), len(real), getattr(autoencoder, "bits_per_slice", None))
    background = float(metrics.to_unit(fake)[real == -1].mean())
    print(f"background: {background:.4f} on average where the real slice is black (0)")
    out = Path(flags.out)
    some = evenly(np.argsort(z, kind="stable"), 8)
    figures.reconstruction_sheet(out / "reconstruct.png", real[some], fake[some], z[some])
    facts = {"run": str(run), "data": source.path, "split": flags.split, "scores": scores, "background": background}
    if autoencoder.tissues:
        masks = found["mask"][some] if with_tissue else None
        figures.tissue_sheet(
            out / "reconstruct_tissue.png", fake[some], found["tissue"][some], z[some], real_tissue=masks
        )
        if with_tissue:
            facts["dice"] = dict(
                zip(tissue_classes.NAMES[1:], metrics.dice(found["mask"], found["tissue"]), strict=True)
            )
            print("Dice: " + ", ".join(f"{name} {value:.3f}" for name, value in facts["dice"].items()))
    runs.save_json(out / "reconstruct.json", facts)
    print(f"-> {out / 'reconstruct.png'}, {out / 'reconstruct.json'}")


def show_scores(scores, split, people, count, rate):
    """Print the table."""
    print(f"\n{split}: {count} slices of {people} people; SSIM: 11x11 Gaussian, sigma 1.5, range [0, 1], zero padding;")
    print("foreground: the same map where the real slice is brighter than 0.05; +- is the deviation over people")
    if rate:
        print(f"rate: {rate:.0f} bits per slice")
    names = list(next(iter(scores.values())))
    print(" " * 28 + "".join(f"{name:>20}" for name in names))
    for row, values in scores.items():
        print(f"{row:28}" + "".join(f"{m:>13.3f} +- {s:5.3f}"[-20:].rjust(20) for m, s in values.values()))


# ---- the command -----------------------------------------------------------------------------------------------------


def check(flags):
    """Refuse numbers that cannot be, before anything is loaded."""
    for name, least in (("steps", 1), ("count", 1), ("seed", 0)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise runs.RunError(f"--{name} must be at least {least}, not {value}")
    if flags.seed > runs.LAST_SEED:
        raise runs.RunError(f"--seed must be at most {runs.LAST_SEED}, not {flags.seed}")
    for name in ("eta", "guidance_rescale", "top_p"):
        if not 0 <= getattr(flags, name) <= 1:
            raise runs.RunError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {getattr(flags, name)}")
    for name in ("negative_label", "negative_conditions", "guidance_rescale"):
        if getattr(flags, name) and flags.guidance == 1.0:
            raise runs.RunError(f"--{name.replace('_', '-')} has no effect without --guidance: give it more than 1")
    for name in ("temperature", "top_k"):
        if getattr(flags, name) < 0:
            raise runs.RunError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(flags, name)}")
    if flags.person and (flags.z or flags.prior != "diffusion"):
        raise runs.RunError("--person sweeps all slice indices of the diffusion model: leave --z and --prior out")
    if min(flags.voxel) <= 0:
        raise runs.RunError(f"--voxel takes three sizes in mm, above 0, not {flags.voxel}")
    if not 0 < flags.start <= 1:
        raise runs.RunError(f"--from is a time above 0 and at most 1, which is noise, not {flags.start}")
    if flags.resample < 1:
        raise runs.RunError(f"--resample must be at least 1, not {flags.resample}")
    if flags.task == "interpolate" and flags.count == 1:
        raise runs.RunError("interpolate goes from one slice to another: give --count 2 or more")
    if flags.spacing == "trailing" and (flags.steps or 0) > schedules.TABLE_LENGTH:
        raise runs.RunError(f"--spacing trailing has at most {schedules.TABLE_LENGTH} steps, not {flags.steps}")
    between_slices = flags.task == "interpolate" and flags.between == "slices"
    refuse_idle_flags(flags, between_slices)
    if (between_slices or flags.task in ("denoise", "anomaly")) and flags.start < 1 and flags.spacing != "uniform":
        raise runs.RunError(f"--spacing {flags.spacing} goes from noise alone: leave it out with --from")
    if flags.top_p == 0:
        raise runs.RunError("--top-p 0 leaves no code to draw: give more, or --temperature 0 for the likeliest one")
    if not 0 < flags.fps <= figures.MOST_FPS:
        raise runs.RunError(f"--fps must be more than 0 and at most {figures.MOST_FPS}, not {flags.fps}")


def refuse_idle_flags(flags, between_slices):
    """Raises:
    RunError: for a flag that would have no effect on what is asked for.
    """
    made_up = flags.task == "sample" or flags.task == "interpolate" and not between_slices  # no real slice is shown
    network = flags.task != "reconstruct" and flags.prior == "diffusion"
    free = network and flags.task != "inpaint"
    real = not made_up or flags.mask == ["data"]
    used = {
        "prior": flags.task == "sample",
        **dict.fromkeys(("steps", "guidance"), network),
        **dict.fromkeys(("sampler", "spacing"), free),
        "eta": free and "ddim" in flags.sampler,
        **dict.fromkeys(("temperature", "top_k", "top_p"), flags.prior == "transformer"),
        **dict.fromkeys(("person", "mask", "show_x0"), flags.task == "sample" and network),
        "voxel": flags.person,
        "conditions": made_up and network,
        **dict.fromkeys(("z", "label"), flags.task != "reconstruct"),
        "start": between_slices or flags.task in ("denoise", "anomaly"),
        **dict.fromkeys(("box", "resample"), flags.task == "inpaint"),
        "between": flags.task == "interpolate",
        **dict.fromkeys(("data", "split"), real),
    }
    defaults = parser()
    for flag, has_effect in used.items():
        if not has_effect and getattr(flags, flag) != defaults.get_default(flag):
            name = "from" if flag == "start" else flag.replace("_", "-")
            raise runs.RunError(f"--{name} has no effect on what is asked for here: leave it out")


def main(argv=None):
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 interrupted."""
    flags = parser().parse_args(argv)
    try:
        check(flags)
        work = sample_prior if flags.task == "sample" and flags.prior != "diffusion" else TASKS[flags.task]
        stage = "autoencoder" if work in (sample_prior, reconstruct) else "diffusion"
        run = runs.folder(flags.run) if flags.run else runs.newest(stage)
        print(f"{run}: {distribution.set_precision(flags.precision)}")
        keras.utils.set_random_seed(flags.seed)
        work(flags, run)
        return 0
    except (dataset.DataError, runs.RunError) as mistake:
        print(f"predict.py: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
