"""Command line: can the pictures of a run be trusted? One report: faithful, diverse, plausible, and nobody's copy.

    python evaluate.py --run R                    -> report.html, report.json, model_card.md in the run's folder
    python evaluate.py --run R --fail-above 0.02  exit status 3 if more than 2 % of the samples are copies

Every number stands beside what it must be read against: the distance of real people to other real people (the floor),
and what bad generators get. What cannot be said (no test people, no labels, few samples) is said to be so.
"""

import argparse
import hashlib
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

import numpy as np
import tensorflow as tf
from scipy import ndimage
from tqdm import tqdm

import dataset
import features
import modules  # noqa: F401  (registers the classes that a .keras file names)
from ldm import tissue
from ldm.data import masks as tissue_masks
from ldm.data import phantom
from ldm.diffusion import samplers
from ldm.drawing import charts, figures, report
from ldm.judging import anatomy, audit, fidelity, metrics
from ldm.training import distribution, runs

BATCH = 32
LEAST_PEOPLE = 4  # below which a distance's error cannot be told from person to person
LEAST = 50  # samples below which no distance is given: its own error would exceed it
NEIGHBOURS = 5  # of precision, recall, density, coverage
EMBEDDED = 1000  # points of each kind in the UMAP


def parser():
    p = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", help="name of the run (default: the one that was trained last)")
    p.add_argument("--data", nargs="+", help="real slices (default: the data that the run was trained on)")
    p.add_argument("--count", type=int, default=1000, help="slices to draw (default: 1000)")
    p.add_argument("--sampler", default="dpm_solver_pp", choices=tuple(samplers.SAMPLERS))
    p.add_argument("--steps", type=int, default=20, help="network calls per slice (default: 20)")
    p.add_argument(
        "--features", default="own", choices=("own", "inception"), help="own: learned on the training slices"
    )
    p.add_argument("--feature-steps", type=int, default=400, help="training of own features (default: 400)")
    p.add_argument("--fail-above", type=float, metavar="RATE", help="exit status 3 if a larger share is copies")
    p.add_argument("--out", help="folder of the report (default: the run's folder)")
    p.add_argument("--seed", type=int, default=0, help="of noise and conditions")
    p.add_argument("--precision", default="auto", choices=("auto", "float32", "mixed_bfloat16"))
    return p


@dataclass
class Slices:
    """A set of slices: images (N, H, W, 1) in [0, 1], z, label (-1 = unknown) and case (N,), features (N, D)."""

    images: np.ndarray
    z: np.ndarray
    label: np.ndarray
    case: np.ndarray
    features: np.ndarray | None = None
    guessed_z: np.ndarray | None = None

    def __len__(self):
        return len(self.z)

    def take(self, rows):
        parts = {name: None if value is None else value[rows] for name, value in vars(self).items()}
        return Slices(**parts)

    def spread(self, count):
        """`count` of them, evenly spread over the slice indices: so sets are compared at the same ones."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return self.take(np.argsort(self.z, kind="stable")[places])


@dataclass
class Study:
    """What one evaluation knows: the run, its people, its samples, and the report as it grows."""

    run: Path
    out: Path
    flags: argparse.Namespace
    about: dict  # the newest stage's record
    source: dataset.Source
    real: dict  # split -> Slices; without those that are empty
    first_stage: object = None
    samples: Slices | None = None
    decoded_test: np.ndarray | None = None  # test people as the first stage gives them back, (N, H, W, 1) in [0, 1]
    sections: list = None
    facts: dict = None

    def picture(self, name):
        """Where a figure of the report goes."""
        return self.out / "evaluation" / f"{name}.png"

    def add(self, section, **facts):
        """Put a section into the report, and its numbers into report.json."""
        self.sections.append(section)
        self.facts |= facts


# ---- what is compared ------------------------------------------------------------------------------------------------


def read_split(source, split, size):
    """All slices of a split, or None if it has none."""
    if not np.any(source.split == split):
        return None
    found = dataset.read_split(source, split, size)
    return Slices(metrics.to_unit(found["image"]), found["z"], found["label"], found["case"])


def open_study(flags):
    """Everything that is there to be evaluated.

    Raises:
        RunError: if there is nothing, or the run is unfinished.
    """
    run = runs.folder(flags.run) if flags.run else runs.newest("diffusion", "autoencoder")
    abouts = [found for stage in runs.STAGES if (found := runs.load_json(run / f"{stage}.json"))]
    if not abouts:
        raise runs.RunError(f"{run} is no run: train one with `python train.py --run {run.name}`")
    about = abouts[-1]
    settings = about["settings"]
    source = dataset.open_recorded(about, flags.data).with_labels_of(about["data"]["labels"])
    source.select("train")  # what everything is read against
    real = {split: read_split(source, split, settings["image_size"]) for split in dataset.SPLITS}
    real = {split: slices for split, slices in real.items() if slices is not None}
    out = Path(flags.out) if flags.out else run
    first_stage = None if settings["first_stage"] == "none" else runs.load_first_stage(run)
    return Study(run, out, flags, about, source, real, first_stage, sections=[], facts={})


def draw_samples(study):
    """Slices of the diffusion model, told what training slices are told: slice index and label, columns, masks.

    They are written as they come: whoever is interrupted goes on where it was.
    """
    flags, path = study.flags, study.run / "diffusion.keras"
    if not path.exists():
        return None
    model, train = runs.load_model(path), study.real["train"]
    told = np.random.default_rng(flags.seed).permutation(np.resize(np.arange(len(train)), flags.count))
    conditions = {"z": train.z[told], "label": train.label[told]}
    about = runs.load_json(study.run / "diffusion.json")
    if columns := about["data"].get("columns"):
        conditions["covariates"] = dataset.covariates_of(study.source, train.case[told], columns)
    if about["settings"]["diffusion"].get("condition_on_mask"):
        conditions["mask"] = training_masks(study, model.data_shape[:2])[told]
    key = hashlib.sha256(repr((path.stat().st_mtime_ns, flags.sampler, flags.steps, flags.seed, flags.count)).encode())
    for name in sorted(conditions):
        key.update(np.ascontiguousarray(conditions[name]))
    store = study.out / "evaluation" / f"samples_{key.hexdigest()[:12]}.npz"
    images = np.empty((0, *study.real["train"].images.shape[1:]), "uint8")
    seconds = 0.0
    if store.exists():
        with np.load(store) as file:
            images, seconds = file["images"], float(file["seconds"])
    denoise = tf.function(model.denoise, reduce_retracing=True)
    decode = study.first_stage and tf.function(study.first_stage.decode, reduce_retracing=True)
    with tqdm(total=flags.count, initial=len(images), desc="samples", unit="slice") as bar:
        while len(images) < flags.count:
            began, part = time.time(), slice(len(images), min(len(images) + BATCH, flags.count))
            told = {name: tf.constant(values[part]) for name, values in conditions.items()}
            x_T = [samplers.initial_noise(flags.seed, i, model.data_shape) for i in range(part.start, part.stop)]
            x = draw(denoise, model.schedule, flags, np.stack(x_T), told, flags.seed + part.start)
            new = metrics.to_unit(x if decode is None else decode(x, told["z"], told["label"]))
            images = np.concatenate([images, np.round(255 * new).astype("uint8")])
            seconds += time.time() - began
            runs.write(store, lambda path: np.savez(path, images=images, seconds=seconds))  # noqa: B023
            bar.update(len(new))
    study.facts["cost"] = {
        "parameters": model.count_params(),
        "first stage's parameters": study.first_stage.count_params() if study.first_stage else 0,
        "network calls per slice": flags.steps,
        "seconds per slice": seconds / flags.count,
    }
    return Slices(images.astype("float32") / 255, conditions["z"], conditions["label"], np.arange(flags.count))


def training_masks(study, shape):
    """The training people's tissue as a network is told it, (N, h, w, 4)."""
    size = study.real["train"].images.shape[1]
    window = study.first_stage and study.first_stage.crop_box
    masks = dataset.read_split(study.source, "train", size, masks=True)["mask"]
    parts = [tissue_masks.tissue_fractions(masks[i : i + BATCH], shape, window) for i in range(0, len(masks), BATCH)]
    return np.concatenate(parts)


def draw(denoise, schedule, flags, x_T, told, seed):
    """The end of a sampler's trajectory; samplers that add noise need another seed for each batch."""
    options = {} if flags.sampler in ("dpm_solver_pp", "heun", "euler") else {"seed": seed}
    for x_t, _ in samplers.SAMPLERS[flags.sampler](
        lambda x, t: denoise(x, t, told), x_T, schedule, flags.steps, **options
    ):
        last = x_t
    return last


# ---- features --------------------------------------------------------------------------------------------------------


def describe_all(study):
    """Give all slices their features: of the run's own network, or of Inception."""
    own = study.flags.features == "own"
    describe = own_features(study) if own else features.inception(BATCH)
    for slices in [*study.real.values(), *([study.samples] if study.samples else [])]:
        slices.features, slices.guessed_z = describe(slices.images)
    return describe


def own_features(study):
    size, steps = study.real["train"].images.shape[1], study.flags.feature_steps
    with tqdm(total=steps, desc="features", unit="step", delay=1) as bar:
        return features.of_run(study.run, study.source, size, steps, bar.update)


# ---- sections of the report ------------------------------------------------------------------------------------------


def number(value, digits=3):
    return report.number(value, digits)


def reconstruction(study):
    """Test people through the first stage, beside predictors that know nothing of the slice."""
    test = study.real.get("test")
    if study.first_stage is None:
        return study.add(report.Section("Reconstruction", ["This model works in pixels: there is no first stage."]))
    if test is None:
        text = "There are no test people: how faithful the first stage is to people it has not seen cannot be said."
        return study.add(report.Section("Reconstruction", warnings=[text]))
    step = tf.function(study.first_stage.reconstruct, reduce_retracing=True)
    parts = [slice(i, i + BATCH) for i in range(0, len(test), BATCH)]
    fake = metrics.to_unit(np.concatenate([step(2 * test.images[p] - 1, test.z[p], test.label[p]) for p in parts]))
    train, study.decoded_test = study.real["train"], fake
    mean = metrics.mean_image_prediction(metrics.mean_images([(train.images, train.z)]), test.z)[..., None]
    guesses = {"first stage": fake, "mean image of the slice index": mean, "black": np.zeros_like(fake)}
    values = {name: metrics.all_scores(test.images, guess) for name, guess in guesses.items()}
    facts = {name: metrics.over_people(value, test.case) for name, value in values.items()}
    columns = list(facts["first stage"])
    rows = [[name, *(f"{number(m)} ± {number(s)}" for m, s in row.values())] for name, row in facts.items()]
    bits = getattr(study.first_stage, "bits_per_slice", None)
    sheet, curve = study.picture("reconstruction"), study.picture("reconstruction_by_slice")
    some = np.linspace(0, len(test) - 1, 8).round().astype(int)
    figures.reconstruction_sheet(sheet, 2 * test.images[some] - 1, 2 * fake[some] - 1, test.z[some])
    series = {name: (test.z, value["foreground SSIM"]) for name, value in values.items() if name != "black"}
    charts.by_slice_index(curve, series, "foreground SSIM")
    text = [
        f"{len(test)} slices of {len(np.unique(test.case))} test people; mean ± deviation over people. "
        "SSIM: 11x11 Gaussian, sigma 1.5, range [0, 1], zero padding. Foreground: the same map where the real slice is "
        "brighter than 0.05. MS-SSIM: the published weights of up to five scales.",
        f"Rate: {bits:,.0f} bits per slice." if bits else "The latents are continuous: no rate.",
    ]
    study.add(
        report.Section(
            "Reconstruction",
            text,
            [report.Table(["", *columns], rows)],
            [(sheet, "real, reconstructed, difference"), (curve, "by slice index")],
        ),
        reconstruction=facts,
        bits_per_slice=bits,
    )


def bad_generators(study, describe):
    """Two that must lose: mean images with noise, and blurred training slices."""
    train = study.real["train"].spread(len(study.samples))
    random = np.random.default_rng(study.flags.seed)
    mean = metrics.mean_image_prediction(metrics.mean_images([(train.images, train.z)]), train.z)[..., None]
    noisy = np.where(mean > 0.02, np.clip(mean + 0.05 * random.standard_normal(mean.shape), 0, 1), 0)
    sigma = train.images.shape[1] / 64
    blurred = ndimage.gaussian_filter(train.images, (0, sigma, sigma, 0))
    made = {"mean images with noise": noisy, "blurred training slices": blurred}
    result = {}
    for name, images in made.items():
        slices = replace(train, images=images.astype("float32"))
        slices.features, slices.guessed_z = describe(slices.images)
        result[name] = slices
    return result


def distribution_section(study, describe):
    """KID, Frechet distance, precision and recall to the test people, beside the floor and the bad generators."""
    title, test, floor = "Distribution", study.real.get("test"), study.real.get("validate")
    if test is None or len(study.samples) < LEAST:
        reason = (
            "There are no test people: the distance to people that nobody trained on cannot be said."
            if test is None
            else f"{len(study.samples)} samples are too few for a distance: at least {LEAST} are needed (--count)."
        )
        return study.add(report.Section(title, warnings=[reason]))
    sets = {"floor: validation people": floor} if floor is not None else {}
    sets |= {"samples": study.samples, **bad_generators(study, describe)}
    count = min(len(test), *(len(slices) for slices in sets.values()))
    reference, facts = test.spread(count), {}
    few = min(len(np.unique(slices.case)) for slices in (reference, *sets.values())) < LEAST_PEOPLE
    for name, slices in sets.items():
        some = slices.spread(count)
        groups = (None, None) if few else (reference.case, some.case)
        kid, error = fidelity.kernel_distance(reference.features, some.features, *groups)
        facts[name] = {
            "KID": kid,
            "KID's standard error": error,
            "Frechet distance": fidelity.frechet_distance(reference.features, some.features),
            **fidelity.precision_recall(reference.features, some.features, NEIGHBOURS),
        }
    for name, slices in {"real people": test, "samples": study.samples}.items():
        facts.setdefault(name, {})["MS-SSIM of pairs"] = diversity(slices, study.flags.seed)
    columns = [*facts["samples"]]
    rows = [[name, *(number(row.get(column)) for column in columns)] for name, row in facts.items()]
    chart = study.picture("distribution")
    ranked = {name: (row["KID"], row["KID's standard error"]) for name, row in facts.items() if "KID" in row}
    charts.ranking(chart, ranked, "KID to the test people (less is better)")
    what = "Inception-v3" if study.flags.features == "inception" else "a network trained on this training split"
    text = [
        f"{count} slices of each kind against as many of {len(np.unique(test.case))} test people, in the features of "
        f"{what}. KID is unbiased (around 0 for equal distributions); its standard error leaves out one person at a "
        "time. The Frechet distance depends on the number of slices: compare it within the table only. "
        f"Precision to coverage: {NEIGHBOURS} neighbours. MS-SSIM of pairs: different people, same slice index; "
        "samples that are more alike than real people lack diversity.",
    ]
    warnings = [] if floor is not None else ["There are no validation people: the floor is missing."]
    if few:
        warnings.append("There are too few people for an error from person to person: that of KID counts slices.")
    model = (runs.load_json(study.run / "diffusion.json") or {}).get("settings", {}).get("diffusion", {})
    if model.get("condition_on_mask"):
        warnings.append(
            "The samples were told tissue masks of training people: they have their outlines, here and below."
        )
    warnings += rank_warnings(facts)
    study.add(
        report.Section(title, text, [report.Table(["", *columns], rows)], [(chart, "KID")], warnings),
        distribution=facts,
    )


def diversity(slices, seed):
    """Mean MS-SSIM of pairs of different people at the same slice index; None where there is no such pair."""
    if not any(len(np.unique(slices.case[slices.z == index])) > 1 for index in np.unique(slices.z)):
        return None
    return fidelity.diversity(slices.images, slices.z, metrics.ms_ssim, slices.case, seed=seed)[0]


def rank_warnings(facts):
    """A sentence for each order of KID that makes the others meaningless."""
    kid = {name: row["KID"] for name, row in facts.items() if "KID" in row}
    floor = kid.pop("floor: validation people", None)
    model = kid.pop("samples")
    said = [f"The model is no better than: {name}." for name, value in kid.items() if model >= value]
    if floor is not None and model < floor:
        said.append("The samples are nearer to the test people than the validation people are: suspect a leak.")
    return said


def anatomy_section(study):
    """Tissue, ventricles, symmetry: of samples and of real people, and whether conditions hold."""
    train, test, samples = study.real["train"], study.real.get("test"), study.samples
    measured = {"training people": (train, anatomy.measure(train.images))}
    if test is not None:
        measured["test people"] = (test, anatomy.measure(test.images))
    measured["samples"] = (samples, anatomy.measure(samples.images))
    names = list(measured["samples"][1])
    rows = {
        name: [f"{number(np.nanmean(v[name]))} ± {number(np.nanstd(v[name]))}" for _, v in measured.values()]
        for name in names
    }
    facts, columns = {}, ["", *measured]
    for kind in ("test people", "samples"):
        if kind in measured:
            slices, values = measured[kind]
            facts[kind] = anatomy.difference(measured["training people"][1], train.z, values, slices.z)
            columns.append(f"{kind}: distance")
            for name in names:
                rows[name].append(number(facts[kind].get(name)))
    charted = {kind: (slices.z, values["ventricle_area"]) for kind, (slices, values) in measured.items()}
    curve, greys = study.picture("ventricles"), study.picture("grey_levels")
    charts.by_slice_index(curve, charted, "ventricle area / brain area")
    reference = test if test is not None else train
    charts.histograms(greys, anatomy.histograms(reference.images), anatomy.histograms(samples.images))
    dice = segmenter_dice()
    text = [
        "Distance: Wasserstein-1 to the training people per slice index, in standard deviations of theirs; that of the "
        "test people is the floor. Tissue is told by intensity, slice by slice. On phantom brains, whose tissue is "
        "known exactly, this segmenter's Dice is " + ", ".join(f"{k} {number(v)}" for k, v in dice.items()) + ".",
    ]
    error, warnings = {}, []
    for kind, (slices, _) in measured.items():
        if slices.guessed_z is not None and kind != "training people":
            error[kind] = float(np.abs(slices.guessed_z - slices.z).mean())
    if error:
        said = ", ".join(f"{number(value, 2)} for {kind}" for kind, value in error.items())
        text.append(f"Slice index told from the picture, mean error in slices: {said}.")
    effects = label_effects(study, measured, text, warnings)
    figures_ = [(curve, "ventricle area by slice index"), (greys, "grey levels inside the brain")]
    tables = [report.Table(columns, [[name.replace("_", " "), *cells] for name, cells in rows.items()])]
    study.add(
        report.Section("Anatomy", text, tables, figures_, warnings),
        anatomy={"distance": facts, "dice": dice, "slice index error": error, "label effect": effects},
    )


def label_effects(study, measured, text, warnings):
    """{kind: Cohen's d of the ventricle area between the first two labels, its interval, the ratio of the means}."""
    names = study.source.label_names
    if len(names) < 2:
        warnings.append("The data has no labels: whether the label shows in the anatomy cannot be said.")
        return {}
    effects = {}
    for kind, (slices, values) in measured.items():
        chosen = np.isin(slices.label, (0, 1))
        area, label = values["ventricle_area"][chosen], slices.label[chosen]
        try:
            d, interval = anatomy.effect_size(area, label, slices.case[chosen], names)
            ratio = float(area[label == 0].mean() / max(area[label == 1].mean(), 1e-9))
            effects[kind] = {"d": d, "interval": list(interval), "ratio": ratio}
        except ValueError as error:
            warnings.append(f"Label effect of {kind}: {error}")
    said = "; ".join(
        f"{kind} {number(e['d'], 2)} [{', '.join(number(end, 2) for end in e['interval'])}], {number(e['ratio'], 2)}"
        for kind, e in effects.items()
    )
    text.append(
        f"Ventricle area, {names[0]} against {names[1]}: Cohen's d with 95 % interval, and ratio of the means: {said}. "
        "Compare the ratios: d of people is of their means over all their slices, and a sample has one slice, so its "
        "d is smaller for the same effect."
    )
    return effects


def segmenter_dice():
    """Dice of the segmenter on phantoms, whose tissue is known exactly."""
    found = [piece for piece in phantom.slices(3, 128, seed=1) if piece["z"] % 4 == 0]
    truth = np.searchsorted(tissue.LEVELS, [piece["mask"] for piece in found])
    named = anatomy.tissues(np.stack([piece["image"] for piece in found]).astype("float32") / 255)
    return dict(zip(tissue.NAMES[1:], metrics.dice(truth, named), strict=True))


def copies(study, describe):
    """For every sample its nearest training slice, against what test people's slices have."""
    title, test, train, samples = "Copies", study.real.get("test"), study.real["train"], study.samples
    if test is None:
        text = "There are no test people: how near a slice of somebody new comes to the training slices is unknown."
        return study.add(report.Section(title, warnings=[text]))
    # What a decoder loses brings everything nearer together: the fair baseline went through the same decoder.
    honest = test.images if study.decoded_test is None else study.decoded_test
    small = [half(images) for images in (samples.images, honest, train.images)]

    def progress(items, name):
        return tqdm(items, desc=name, unit="batch")

    found = audit.nearest(small[0], small[2], progress=lambda items: progress(items, "copies"))
    usual = audit.nearest(small[1], small[2], progress=lambda items: progress(items, "copies, test people"))
    near = audit.nearest_features(samples.features, train.features)
    near_usual = audit.nearest_features(describe(honest)[0], train.features)
    facts = {
        "pixels": audit.copy_rate(found.distance, usual.distance, groups=test.case),
        "features": audit.copy_rate(near.distance, near_usual.distance, groups=test.case),
    }
    columns = ["", "threshold", "share closer", "95 % interval", "expected by chance"]
    rows = [
        [
            name,
            number(row["threshold"]),
            f"{row['rate']:.1%}",
            f"{row['interval'][0]:.1%} to {row['interval'][1]:.1%}",
            f"{row['expected']:.1%}",
        ]
        for name, row in facts.items()
    ]
    people = audit.by_person(found.index, found.distance, facts["pixels"]["threshold"], train.case)
    names = study.source.case_names
    facts["people"] = {names[case]: count for case, count in people.items() if count}
    chart, sheet = study.picture("copies"), study.picture("closest_pairs")
    charts.distances(chart, found.distance, usual.distance, facts["pixels"]["threshold"], "1 - correlation")
    closest = np.argsort(found.distance)[:8]
    partners = train.images[found.index[closest]]
    partners = np.where(found.mirrored[closest][:, None, None, None], partners[:, :, ::-1], partners)
    captions = [f"{found.distance[i]:.3f}, {names[int(train.case[found.index[i]])]}" for i in closest]
    figures.pairs_sheet(sheet, 2 * samples.images[closest] - 1, 2 * partners - 1, captions)
    worst = ", ".join(f"{name} ({count})" for name, count in sorted(facts["people"].items(), key=lambda x: -x[1])[:5])
    text = [
        "Nearest training slice after a small shift, turn and scaling, mirrored or not, whatever brightness and "
        "contrast. Threshold: the 1st percentile of what slices of test people have, decoded as the samples are; about "
        "1 % of honest slices lie below it.",
        f"Training people with samples below it: {worst or 'nobody'}.",
    ]
    few = len(np.unique(test.case)) < 10
    warnings = ["The threshold rests on few test people; the interval counts people, and is wide."] if few else []
    study.add(
        report.Section(
            title,
            text,
            [report.Table(columns, rows)],
            [(chart, "distance to the nearest training slice"), (sheet, "the closest pairs")],
            warnings,
        ),
        copies=facts,
    )


def half(images, most=128):
    """Averaged down to at most 128 pixels a side: copies show at that size."""
    factor = max(images.shape[1] // most, 1)
    rows, height, width, _ = images.shape
    return images.reshape(rows, height // factor, factor, width // factor, factor).mean(axis=(2, 4))


def leaks(study):
    """Whether people or pictures are in two splits, or a stage saw people that the data now calls test people."""
    warnings, splits = [], study.source.manifest()["splits"]
    if study.source.kind == "class folders":
        warnings.append(
            "A person is what stands before the slice number in a file's name. In ADNI's archive that is a scan: who "
            "was scanned several times may be in several splits, and scores on the test people are then too good."
        )
    test = set(splits["test"]["cases"])
    for stage in runs.STAGES:
        stored = runs.load_json(study.run / f"{stage}.json")
        for split in ("train", "validate") if stored else ():
            if shared := sorted(test & set(stored["data"]["splits"][split]["cases"])):
                warnings.append(f"The {stage} stage saw {len(shared)} of the test people, {shared[0]} among them.")
    pairs, names = {}, study.source.case_names
    splits = list(study.real)
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            a, b = study.real[one], study.real[other]
            found = audit.near_identical(half(a.images), half(b.images))
            pairs[f"{one}, {other}"] = len(found)
            for row, column in found[:3]:
                warnings.append(
                    f"Nearly the same slice: {names[int(a.case[row])]}, slice {a.z[row]} ({one}), and "
                    f"{names[int(b.case[column])]}, slice {b.z[column]} ({other})."
                )
    misfiled = find_misfiled(study)
    for (case, z), (other, other_z) in misfiled:
        warnings.append(
            f"Test person {case}, slice {z}, is as like training person {other}, slice {other_z}, as neighbouring "
            "slices of one person are: is one of them filed under the wrong person?"
        )
    text = [
        "People in two splits are refused when the data is opened. Slices were compared across splits by hash; and "
        "those of test people by how near they are to training slices, against how near neighbouring slices of one "
        "person are to each other.",
    ]
    if not warnings:
        text.append("Nothing was found.")
    study.add(
        report.Section("Leaks", text, warnings=warnings),
        leaks={"near-identical pairs": pairs, "misfiled": misfiled, "said": warnings},
    )


def find_misfiled(study):
    """Test slices that are as near to a training slice as neighbours of one person are: ((person, z), (person, z))."""
    test, train, names = study.real.get("test"), study.real["train"], study.source.case_names
    if test is None or len(np.unique(test.z)) < 2:
        return []
    images, even = half(test.images), test.z % 2 == 0
    if even.all() or not even.any():
        return []
    own = audit.nearest(images[even], images[~even])
    same = test.case[even] == test.case[~even][own.index]
    found = audit.nearest(images, half(train.images))
    rows = np.flatnonzero(found.distance < np.percentile(own.distance[same], 90)) if same.any() else []
    pairs = [((test, row), (train, found.index[row])) for row in rows]
    return [tuple((names[int(who.case[row])], int(who.z[row])) for who, row in pair) for pair in pairs]


def embedding(study):
    """UMAP of real and generated slices."""
    import umap  # takes seconds to import

    kinds = {**study.real, "samples": study.samples}
    some = {kind: slices.spread(EMBEDDED) for kind, slices in kinds.items()}
    features = np.concatenate([slices.features for slices in some.values()])
    neighbours = min(15, len(features) - 1)
    points = umap.UMAP(n_neighbors=neighbours, random_state=study.flags.seed, n_jobs=1).fit_transform(features)
    kind = np.concatenate([[name] * len(slices) for name, slices in some.items()])
    z = np.concatenate([slices.z for slices in some.values()])
    label = np.concatenate([slices.label for slices in some.values()])
    drawn = [(study.picture("umap_kind"), "real and generated")]
    charts.embedding(drawn[0][0], points, kind, "real and generated")
    drawn.append((study.picture("umap_slice"), "slice index"))
    charts.embedding(drawn[1][0], points, z, "slice index", continuous=True)
    if study.source.label_names:
        names = np.array([*study.source.label_names, "unknown"])
        drawn.append((study.picture("umap_label"), "label"))
        charts.embedding(drawn[2][0], points, names[label], "label")
    text = ["UMAP of the features. Distances between far groups mean nothing; look for samples where no real ones are."]
    study.add(report.Section("Embedding", text, figures=drawn))


def cost(study, began):
    """What it takes to draw a slice."""
    facts = study.facts.setdefault("cost", {})
    unit = 1024 if sys.platform != "darwin" else 1
    facts["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    facts["minutes of this evaluation"] = (time.time() - began) / 60
    rows = [[name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"] for name, value in facts.items()]
    study.add(report.Section("Cost", tables=[report.Table(["", ""], rows)]))


# ---- the command -----------------------------------------------------------------------------------------------------


def show(study):
    """The one table that is printed: the numbers that decide."""
    facts = study.facts
    lines = []
    if "reconstruction" in facts:
        row = facts["reconstruction"]["first stage"]
        lines += [(f"reconstruction, {name}", *row[name]) for name in ("SSIM", "foreground SSIM", "PSNR")]
    for name, row in facts.get("distribution", {}).items():
        if "KID" in row:
            lines.append((f"KID, {name}", row["KID"], row["KID's standard error"]))
    for name in ("precision", "recall"):
        if "distribution" in facts:
            lines.append((name, facts["distribution"]["samples"][name], None))
    for kind, row in facts.get("copies", {}).items():
        if "rate" in row:
            lines.append((f"copies, {kind}", row["rate"], None))
    print()
    for name, value, spread in lines:
        print(f"{name:45}{number(value, 4):>10}" + (f" ± {number(spread, 4)}" if spread is not None else ""))
    for section in study.sections:
        for warning in section.warnings:
            print(f"note: {warning}")


def card(study):
    """What the model card says."""
    manifest = study.about["data"]
    copied = study.facts.get("copies", {}).get("pixels", {}).get("rate")
    numbers = {name: study.facts[name] for name in ("reconstruction", "distribution", "cost") if name in study.facts}
    return {
        "title": f"Model card of {study.run.name}",
        "summary": "A generator of brain-MRI slices: latent diffusion. The report beside this card has the figures.",
        "data": {key: manifest[key] for key in ("source", "kind", "images", "labels", "sha256")},
        "people": {split: part["people"] for split, part in manifest["splits"].items()},
        "settings": {key: value for key, value in study.about["settings"].items() if key != "data"},
        "seeds": {"training": study.about["settings"]["seed"], "evaluation": study.flags.seed},
        "versions": study.about["versions"],
        "numbers": {**numbers, "share of copies": copied},
        "Warnings": [warning for section in study.sections for warning in section.warnings],
    }


def check(flags):
    """Refuse numbers that cannot be, before anything is loaded."""
    for name, least in (("count", 1), ("steps", 1), ("feature_steps", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            raise runs.RunError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(flags, name)}")
    if flags.seed > runs.LAST_SEED:
        raise runs.RunError(f"--seed must be at most {runs.LAST_SEED}, not {flags.seed}")
    if flags.fail_above is not None and not 0 <= flags.fail_above < 1:
        raise runs.RunError(f"--fail-above is a share between 0 and 1, not {flags.fail_above}")


def work(flags):
    """Do what the flags say; returns the exit status."""
    began = time.time()
    study = open_study(flags)
    print(f"{study.run}: {distribution.set_precision(flags.precision)}")
    reconstruction(study)
    study.samples = draw_samples(study)
    if study.samples is None:
        text = f"There is no diffusion model yet: `python train.py diffusion --run {study.run.name}` makes one."
        study.add(report.Section("Samples", warnings=[text]))
    else:
        sheet = study.picture("samples")
        figures.save_png(sheet, figures.sheet(figures.enlarge(2 * study.samples.spread(32).images - 1), 8))
        about = f"{len(study.samples)} slices by {flags.sampler}, {flags.steps} network calls each, seed {flags.seed}."
        study.add(report.Section("Samples", [about], figures=[(sheet, "some of the samples")]))
        describe = describe_all(study)
        distribution_section(study, describe)
        anatomy_section(study)
        copies(study, describe)
        embedding(study)
    leaks(study)
    cost(study, began)
    title = f"Can the pictures of {study.run.name} be trusted?"
    report.write_html(study.out / "report.html", title, study.sections, {"run": study.run.name, **runs.versions()})
    runs.save_json(study.out / "report.json", study.facts)
    report.write_model_card(study.out / "model_card.md", card(study))
    show(study)
    print(f"-> {study.out / 'report.html'}, report.json, model_card.md")
    return audit_status(study.facts, flags.fail_above)


def audit_status(facts, limit):
    """3 if more samples are copies than the limit allows, else 0.

    Raises:
        RunError: if a limit was given and nothing could be counted.
    """
    if limit is None:
        return 0
    if "copies" not in facts:
        raise runs.RunError("--fail-above: copies could not be counted, the report says why")
    rate = max(facts["copies"][kind]["rate"] for kind in ("pixels", "features"))
    if rate > limit:
        print(f"evaluate.py: {rate:.1%} of the samples are nearer to a training slice than --fail-above allows")
        return 3
    return 0


def main(argv=None):
    """Run the command line; exit status: 0 done, 2 a user's mistake, 3 too many copies, 130 interrupted."""
    flags = parser().parse_args(argv)
    try:
        check(flags)
        return work(flags)
    except (dataset.DataError, runs.RunError) as mistake:
        print(f"evaluate.py: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
