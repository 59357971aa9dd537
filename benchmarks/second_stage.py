"""How good is the second stage, and what made it so? Three commands; each prints a Markdown table.

    python benchmarks/second_stage.py ladder --run R      distance to the test people against network calls
    python benchmarks/second_stage.py ablation --run R    a diffusion model per choice, in the latents of R, equal steps
    python benchmarks/second_stage.py lesions --run R     does `predict.py anomaly` find discs that were planted?

The first two draw samples from the same noise and conditions, as `evaluate.py` does, and compare them with people of
no training in the features of the run's network; the floor is what the validation people have. Whatever they drew or
trained is kept in the folder of the run: a second call goes on where the first was interrupted.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from first_stage import gradient, show
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

import dataset
import study
import train
from conditions import real_slices, real_source
from generator import Generator
from ldm.batches import evenly
from ldm.diffusion import samplers
from ldm.drawing import charts, figures
from ldm.judging import fidelity, measures, metrics
from ldm.training import distribution, runs

CALLS = (5, 10, 20, 50, 100, 250, 1000)
USUAL = ("dpm_solver_pp", 20)  # what `evaluate.py` draws with; the others are compared with it
LESIONS = {"dark": 0.1, "bright": 1.0}  # grey levels of planted discs
RADIUS = 0.045  # of a disc, by the width of the picture: 3 of 64 pixels, 12 mm where 256 pixels are 256 mm
LEAST = {"ddpm": 20}  # with fewer calls DDPM draws noise
MOST = {"dpm_solver_pp": 100, "heun": 100}  # solvers of second order have long converged
VARIANTS = {  # flags of train.py
    "v, MSE": [],
    "L1": ["--loss", "l1"],
    "Huber": ["--loss", "huber"],
    "min-SNR weights, gamma 5": ["--min-snr-gamma", "5"],
    "attention gates": ["--gates"],
    "eps": ["--prediction", "eps"],
    "eps, linear schedule": ["--prediction", "eps", "--schedule", "linear"],
    "x_0": ["--prediction", "x_0"],
    "zero terminal SNR": ["--zero-snr"],
    "EDM": ["--prediction", "edm"],
    "rectified flow": ["--schedule", "flow", "--prediction", "flow"],
}


def open_people(flags):
    """The run's people with the features of those of no training: (`study.People`, images -> (features, z)).

    Raises:
        RunError: if there is nobody to compare with.
    """
    run = runs.folder(flags.run) if flags.run else runs.newest("diffusion", "autoencoder")
    people = study.open_people(run, flags.data)
    if "test" not in people.real:
        raise runs.RunError(f"{people.source.path} has no test people to compare with")
    describe = study.describer(people, steps=flags.feature_steps)
    compared = {split: people.real[split].described(describe) for split in people.real if split != "train"}
    return replace(people, real={**people.real, **compared}), describe


def distances(test, slices):
    """{"KID", "error", "Frechet distance"} of slices with features to the test people."""
    many = test.people >= measures.LEAST_PEOPLE
    groups = (test.case, slices.case) if many else (None, None)
    kid, error = fidelity.kernel_distance(test.features, slices.features, *groups)
    return {
        "KID": kid,
        "error": error,
        "Frechet distance": fidelity.frechet_distance(test.features, slices.features),
    }


# ---- ladder ----------------------------------------------------------------------------------------------------------


def points(flags):
    """(sampler, calls) in the order of their cost, so that an interrupted ladder has its cheap rungs."""
    found = [(name, calls) for name in flags.sampler for calls in flags.calls]
    found = [(name, calls) for name, calls in found if LEAST.get(name, 0) <= calls <= MOST.get(name, calls)]
    return sorted(found, key=lambda point: point[1])


def ladder(flags):
    """How many network calls does a good picture need?"""
    people, describe = open_people(flags)
    if not (people.run / "diffusion.keras").exists():
        raise runs.RunError(f"{people.run} has no diffusion model: run `python train.py diffusion --run {people.run}`")
    generator, test = Generator(people.run), people.real["test"]
    rungs = points(flags)
    base = USUAL if USUAL in rungs else rungs[0]
    titles = ("sampler", "network calls", "KID", f"less {base[0]}, {base[1]}", "Frechet distance", "seconds per slice")
    print(f"| {' | '.join(titles)} |")
    print("| --- | --- | --- | --- | --- | --- |")
    if "validate" in people.real:
        row = distances(test, people.real["validate"])
        kid = f"{row['KID']:.2f} ± {row['error']:.2f}"
        print(f"| floor: validation people | | {kid} | | {row['Frechet distance']:.1f} | |")

    def drawn_by(name, calls):
        slices, taken = study.draw_samples(people.run, generator, people, flags.count, name, calls, 0, people.run)
        return slices.described(describe), taken["seconds per slice"]

    curves, (usual, _) = {}, drawn_by(*base)
    for name, calls in rungs:
        slices, seconds = drawn_by(name, calls)
        row, more = distances(test, slices), ""
        if test.people >= measures.LEAST_PEOPLE:
            pair = fidelity.kernel_distance_difference(test.features, usual.features, slices.features, test.case)
            more = f"{pair[0]:.3f} ± {pair[1]:.3f}"
        curves.setdefault(name, []).append((calls, row["KID"], row["error"]))
        kid, distance = f"{row['KID']:.2f} ± {row['error']:.2f}", row["Frechet distance"]
        print(f"| {name} | {calls} | {kid} | {more} | {distance:.1f} | {seconds:.2f} |", flush=True)
        charts.ladder(flags.out, curves, "KID to the test people")


# ---- ablation --------------------------------------------------------------------------------------------------------


def on_the_same_ground(run, name):
    """A folder for one more diffusion model, with links to the first stage and the latents of `run`."""
    home = run / "ablation" / "".join(c if c.isalnum() else "_" for c in name)
    home.mkdir(parents=True, exist_ok=True)
    for made in ("autoencoder.keras", "autoencoder.json", "latents", "latents.json"):
        if not (home / made).exists():
            (home / made).symlink_to((run / made).resolve())
    return home


def ablation(flags):
    """What does each choice do to the samples? The same latents, batches and number of steps for each.

    Sharpness is the mean gradient over the brain, contrast the standard deviation of grey levels there, both of all
    slices together, by those of the test people.
    """
    epochs = max(1, flags.steps // 100)
    per_epoch = flags.steps // epochs
    if flags.steps % epochs:
        raise runs.RunError(f"--steps {flags.steps} must be less than 200, or a multiple of {epochs}")
    people, describe = open_people(flags)
    if people.in_pixels:
        raise runs.RunError(f"{people.run} works in pixels: an ablation needs latents that all variants share")
    rows, test = {}, people.real["test"]
    if "validate" in people.real:
        rows["floor: validation people"] = row_of(test, people.real["validate"])
    for name in flags.variants or VARIANTS:
        home = on_the_same_ground(people.run, f"{flags.steps} steps, {name}")
        planned = ["--run", str(home.resolve()), "--epochs", str(epochs), "--steps-per-epoch", str(per_epoch)]
        planned += ["--patience", str(epochs)]  # equal steps for all
        planned += ["--data", *flags.data] if flags.data else []
        if status := train.main(["diffusion", *planned, *VARIANTS[name]]):
            sys.exit(status)  # it has said why
        slices, _ = study.draw_samples(home, Generator(home), people, flags.count, *USUAL, 0, home)
        rows[name] = row_of(test, slices.described(describe))
        print(name, rows[name], file=sys.stderr, flush=True)
    show(rows, list(rows[name]))


def look(slices):
    """How sharp and how rich in contrast slices are: mean gradient, and spread of grey, where they are not black."""
    brain = slices.images[..., 0] > metrics.FOREGROUND
    return gradient(slices.images)[brain].mean(), slices.images[..., 0][brain].std()


def row_of(test, slices):
    """One line of the ablation's table."""
    near = fidelity.precision_recall(test.features, slices.features, measures.NEIGHBOURS)
    row = distances(test, slices)
    sharp, contrast = (fake / real for fake, real in zip(look(slices), look(test), strict=True))
    return {
        "KID": f"{row['KID']:.2f} ± {row['error']:.2f}",
        "Frechet distance": round(row["Frechet distance"], 1),
        **{key: round(float(near[key]), 2) for key in ("precision", "recall", "coverage")},
        "sharpness": round(float(sharp), 2),
        "contrast": round(float(contrast), 2),
    }


# ---- lesions ---------------------------------------------------------------------------------------------------------


def plant(images, grey, seed):
    """A soft disc of one grey level in the brain of each slice that has room for it.

    Args:
        images: (N, H, W, 1) in [0, 1].

    Returns:
        Images with discs, where they are (N, H, W) bool, and which slices have one (N,) bool.
    """
    rng, radius = np.random.default_rng(seed), RADIUS * images.shape[1]
    rows, columns = np.mgrid[: images.shape[1], : images.shape[2]]
    changed, where = images.copy(), np.zeros(images.shape[:3], bool)
    for i, image in enumerate(images[..., 0]):
        brain = ndimage.binary_fill_holes(image > metrics.FOREGROUND)
        room = np.argwhere(ndimage.distance_transform_edt(brain) > radius + 1)
        if len(room):
            top, left = room[rng.integers(len(room))]
            distance = np.hypot(rows - top, columns - left)
            share = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
            changed[i] = share * grey + (1 - share) * images[i]
            where[i] = distance <= radius
    return changed, where, where.any(axis=(1, 2))


def lesions(flags):
    """How well do maps of differences find planted discs, among the pixels of the brain?

    Beside the anomaly map: how far a pixel is from the brain's median, from the mean image of its slice index, and
    from what the first stage makes of it. Means over slices, of the area under the ROC curve and of average precision,
    which for a map that knows nothing is the disc's share of the brain, the last column.
    """
    run = runs.folder(flags.run) if flags.run else runs.newest("diffusion")
    generator = Generator(run)
    real, conditions = real_slices(generator, flags.data, count=flags.count)
    known = dataset.read_split(real_source(generator.record, flags.data), "train", real.shape[1])
    means = metrics.mean_images([(metrics.to_unit(known["image"]), known["z"])])
    mean = metrics.mean_image_prediction(means, conditions["z"])[..., None]
    rows = {}
    for kind, grey in LESIONS.items():
        changed, where, planted = plant(metrics.to_unit(real), grey, flags.seed)
        if not planted.any():
            raise runs.RunError(f"{run}: no brain in its slices has room for a disc")
        brain = np.stack([ndimage.binary_fill_holes(image > metrics.FOREGROUND) for image in changed[..., 0]])

        def score(guess, changed=changed, where=where, planted=planted, brain=brain):
            maps = np.abs(changed - guess)[..., 0]
            pairs = [(where[i][brain[i]], maps[i][brain[i]]) for i in np.flatnonzero(planted)]
            return {
                "ROC area": np.mean([roc_auc_score(*pair) for pair in pairs]).item(),
                "average precision": np.mean([average_precision_score(*pair) for pair in pairs]).item(),
                "share of the brain": np.mean([truth.mean() for truth, _ in pairs]).item(),
            }

        median = np.array([np.median(image[inside]) for image, inside in zip(changed[..., 0], brain, strict=True)])
        rows[f"{kind}: the brain's median"] = score(median[:, None, None, None])
        rows[f"{kind}: mean image of the slice index"] = score(mean)
        seen = (2.0 * changed - 1.0).astype("float32")
        if generator.autoencoder:
            through = generator.decode(generator.encode(seen, conditions), conditions)
            rows[f"{kind}: the first stage alone"] = score(metrics.to_unit(through))
        for start in flags.start:
            fake, _ = generator.pseudo_healthy(seen, conditions, start)
            rows[f"{kind}: anomaly --from {start}"] = score(metrics.to_unit(fake))
        some = np.flatnonzero(planted)[evenly(planted.sum(), 8)]
        sheet = Path(flags.out).with_stem(f"{Path(flags.out).stem}_{kind}")
        figures.reconstruction_sheet(sheet, seen[some], fake[some], conditions["z"][some], count=8, called="denoised")
        print(f"-> {sheet}", file=sys.stderr)
    show(rows, list(rows[f"{kind}: the brain's median"]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    a, b, c = (commands.add_parser(name) for name in ("ladder", "ablation", "lesions"))
    for command in (a, b, c):
        command.add_argument("--run")
        command.add_argument("--data", nargs="+")
        command.add_argument("--count", type=int, default=192, help="slices per row (default: 192)")
    for command in (a, b):
        command.add_argument("--feature-steps", type=int, default=400, help="training of features (default: 400)")
    a.add_argument("--sampler", nargs="+", default=["ddpm", "ddim", "dpm_solver_pp"], choices=tuple(samplers.SAMPLERS))
    a.add_argument("--calls", type=int, nargs="+", default=CALLS)
    a.add_argument("--out", default="ladder.png")
    b.add_argument("--steps", type=int, default=1000, help="of the optimizer, for each (default: 1000)")
    b.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), help="default: all")
    c.add_argument(
        "--from", dest="start", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="of `predict.py anomaly`"
    )
    c.add_argument(
        "--out", default="lesions.png", help="sheets at the last --from: lesions_dark.png, lesions_bright.png"
    )
    c.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    flags = p.parse_args(argv)
    if flags.command != "lesions" and flags.count < measures.LEAST:
        p.error(f"--count must be at least {measures.LEAST}")
    distribution.set_precision("auto")
    {"ladder": ladder, "ablation": ablation, "lesions": lesions}[flags.command](flags)


if __name__ == "__main__":
    try:
        main()
    except (dataset.DataError, runs.RunError) as mistake:
        sys.exit(f"second_stage.py: {mistake}")
