"""What an evaluation knows of a run, and what it measures. `evaluate.py` puts it on paper.

    known = make(run)           its people, its samples, their features: each made once, and never changed
    found = measure(known)      {section: Measured}: numbers for report.json, and what its figures show

A new measure is a function of `ldm.judging.measures`, a line of MEASURES, and a section of `ldm.drawing.pages`.
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows does not say it
    resource = None

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import dataset
import features
import modules  # noqa: F401  (registers the classes that a .keras file names)
from generator import Generator
from ldm import batches, files, tissue
from ldm.data import latents, phantom, repeats
from ldm.diffusion import samplers
from ldm.judging import audit, measures, metrics, planes
from ldm.judging.measures import Measured, Slices
from ldm.training import records

AS_DRAWN = "give a zip of slices that are named as `predict.py archive` names them"
OF_SAMPLES = {  # what is said of data that somebody trains on: what of slices that somebody drew
    "--data": "--samples",
    dataset.names.OFFER: AS_DRAWN,
    "say `--person REGEX`": AS_DRAWN,
    dataset.people.TWO: "and of a single one nothing can be said: add others",
}
MOST = 4_000  # slices of a split that are looked at in full size: 1 GB at 256 pixels


@dataclass(frozen=True)
class People:
    """Whom a run is read against.

    Attributes:
        run: its folder.
        records: {stage: what it wrote down}, of the stages that there are, in their order.
        source: the `dataset.Source`.
        some: the source, or whole people of it, if it is so large that they would not fit into memory.
        real: {split: Slices} of `some`, of the splits that are not empty; "train" is there always.
    """

    run: Path
    records: Mapping[str, dict]
    source: dataset.Source
    some: dataset.Source
    real: Mapping[str, Slices]

    @property
    def record(self):
        """What the newest stage wrote down."""
        return list(self.records.values())[-1]

    @property
    def in_pixels(self):
        return self.record["settings"]["first_stage"] == "none"


@dataclass(frozen=True)
class Study:
    """What one evaluation knows. `make` makes it; nobody writes into it.

    Attributes:
        people: whom the run is read against; with features where there are samples.
        decoded: test people as the first stage gives them back; None in pixels, and where there are no test people.
        bits: per slice of the first stage; None where its latents are continuous.
        samples: what the diffusion model draws; None where there is none yet, or no measure needs them.
        bad: {name: Slices} of generators that must lose.
        networks: how many of the run's own have given the features, one after another; 0: they are Inception's.
        features: names of what has given them, which another study has only if it was the very same; None without.
        saw_masks: whether the samples were drawn inside tissue masks of training people.
        drawing: what it takes to draw a slice, {name: number}.
        seed: of noise, conditions, pairs and embedding.
        noisy: {deviation of noise: some test people decoded from latents with that noise}; empty where not needed.
        plane: of the slices, where it was told; None: see `plane_of`.
        everybody: {split: Slices of at most 128 pixels a side} of all people, where `people.real` has not all of them.
    """

    people: People
    decoded: Slices | None
    bits: float | None
    samples: Slices | None = None
    bad: Mapping[str, Slices] = field(default_factory=dict)
    networks: int = 1
    features: list[str] | None = None
    saw_masks: bool = False
    drawing: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    noisy: Mapping[float, Slices] = field(default_factory=dict)
    plane: str | None = None
    everybody: Mapping[str, Slices] = field(default_factory=dict)


# ---- what an evaluation knows ----------------------------------------------------------------------------------------


def open_people(run, data=None):
    """The people of a run, split by split.

    Args:
        run: folder.
        data: other slices than those that the run was trained on, as `dataset.open_source` takes them.

    Raises:
        RunError: if the folder is no run.
        DataError: if there are no training people, or the data is no good.
    """
    by_stage = records.all_of(run)
    record = list(by_stage.values())[-1]
    source = dataset.open_recorded(record, data).with_labels_of(record["data"]["labels"])
    source.select("train")  # refuses if there is nobody: they are what everything is read against
    some, real = source.of_some(MOST), {}
    for split in dataset.SPLITS:
        if np.any(source.split == split):
            found = dataset.read_split(some, split, record["settings"]["image_size"], cache_bytes=0)
            real[split] = Slices(metrics.to_unit(found.pop("image")), found["z"], found["label"], found["case"])
    return People(run, by_stage, source, some, real)


def everybody(people, describe=None):
    """{split: Slices} of all people of a source of which `people.real` has not all; otherwise empty.

    They are shrunk to the size at which copies are searched for. The training slices have features, if `describe` is
    given, that makes them (see `describer`).
    """
    if people.some is people.source:
        return {}
    found, size = {}, people.record["settings"]["image_size"]
    for split in people.real:
        parts = []
        for batch in dataset.make_dataset(people.source, split, size, 64, False, cache_bytes=0).as_numpy_iterator():
            part = Slices(metrics.to_unit(batch["image"]), batch["z"], batch["label"], batch["case"])
            if describe is not None and split == "train":
                part = part.described(describe)
            parts.append(replace(part, images=audit.shrunk(part.images)))
        found[split] = measures.together(*parts)
    return found


def describer(people, kind="own", steps=features.STEPS, networks=1):
    """What makes features of images: the run's own networks (trained if need be), or Inception.

    Args:
        people: of the run.
        kind: "own" or "inception".
        steps: of the training of own features.
        networks: of the run, how many.

    Returns:
        Function of images (N, H, W, 1) in [0, 1] -> features (N, D), slice indices (N,) or None.
    """
    if kind == "inception":
        return features.inception()
    size = people.real["train"].images.shape[1]
    with tqdm(total=networks * steps, desc="features", unit="step", delay=1, leave=False, disable=None) as bar:
        return features.of_run(people.run, people.some, size, steps, bar.update, networks)


def conditions_of(generator, people, count, seed):
    """Conditions of samples, those of training people: index, label, and what the model has learned.

    Returns:
        Conditions, and the number of the head that each sample is of (count,): see `measures.rows_of_heads`.
    """
    train = people.real["train"]
    rows, heads = measures.rows_of_heads(train, count, seed)
    conditions = {"z": train.z[rows], "label": train.label[rows]}
    if columns := generator.record["data"].get("columns"):
        conditions["covariates"] = dataset.covariates_of(people.source, train.case[rows], columns)
    if uses_masks(generator):
        masks = dataset.read_split(people.some, "train", train.images.shape[1], masks=True)["mask"]
        conditions["mask"] = batches.in_batches(generator.tissue_fractions, masks)[rows]
    return conditions, heads


def uses_masks(generator):
    return bool(generator.record["settings"]["diffusion"].get("condition_on_mask"))


def draw_samples(run, generator, people, count, sampler, steps, seed, out):
    """Heads of a diffusion model, slice by slice, under conditions as training people have them.

    Slices of one head share noise. They are written when there are a tenth more of them, and whoever is interrupted
    goes on from there.

    Args:
        run: the generator's folder.
        generator: a `Generator`.
        people: whose conditions are used; the run may be another one on the same people.
        count, sampler, steps, seed: of the samples, see `Generator.draw`.
        out: folder; they are kept in `evaluation/` there.

    Returns:
        Slices, and {name: number} of what it takes to draw one.
    """
    conditions, heads = conditions_of(generator, people, count, seed)
    places = np.stack([heads, np.arange(count) - np.searchsorted(heads, heads)], axis=1)  # head, and place in it
    models = [run / f"{stage}.keras" for stage in ("autoencoder", "diffusion")]  # in pixels there is no first one
    made_by = [path.stat().st_mtime_ns for path in models if path.exists()]
    alike = samplers.correlations(4, samplers.COHERENCE)[0].tolist()  # samples of other noises are others
    key = hashlib.sha256(repr((made_by, sampler, steps, seed, alike, places.tolist())).encode())
    for name in sorted(conditions):
        key.update(np.ascontiguousarray(conditions[name]))
    store = out / "evaluation" / f"samples_{key.hexdigest()[:12]}.npz"
    images, seconds = np.empty((0, *people.real["train"].images.shape[1:]), "uint8"), 0.0
    if store.exists():
        with latents.opened(store) as file:
            shape, (images, seconds) = images.shape[1:], (file["images"], float(file["seconds"]))
            if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) > count or not seconds >= 0:
                raise ValueError(f"its images are of shape {images.shape} and type {images.dtype}")
    kept = len(images)
    with tqdm(total=count, initial=len(images), desc="samples", unit="slice", leave=False, disable=None) as bar:
        for part in batches.parts(count - len(images)):
            began, first, number = time.time(), len(images), part.stop - part.start
            known = {name: values[first : first + number] for name, values in conditions.items()}
            noise = {"first": places[first : first + number], "shared": samplers.COHERENCE}
            x_T = generator.noise(seed, number, **noise)
            x = generator.draw(x_T, known, sampler, steps, seed=seed, **noise)
            new = np.round(255 * metrics.to_unit(generator.decode(x, known))).astype("uint8")
            images, seconds = np.concatenate([images, new]), seconds + time.time() - began
            bar.update(number)
            if len(images) >= 1.1 * kept or len(images) == count:  # so that many are not written many times
                arrays, kept = {"images": images, "seconds": seconds}, len(images)
                files.write_by(store, lambda path, arrays=arrays: np.savez(path, **arrays))
    taken = {
        "parameters": generator.model.count_params(),
        "first stage's parameters": generator.autoencoder.count_params() if generator.autoencoder else 0,
        "network calls per slice": steps,
        "seconds per slice": seconds / count,
    }
    return Slices(images.astype("float32") / 255, conditions["z"], conditions["label"], heads), taken


def read_samples(people, archive, count):
    """Slices that somebody else drew, as samples: so that any generator is read against the same people.

    Args:
        people: of a run, whose picture size, slice indices and labels the slices must have.
        archive: what `dataset.open_source` reads, read as the run's own data is; who is a person there is a head here.
        count: at most so many are taken, head after head, in random order.

    Raises:
        DataError: if there are no such slices, or the run's people have none of that index.
    """
    size, labels = people.record["settings"]["image_size"], people.record["data"]["labels"]
    parts, known = [], np.unique(people.real["train"].z)
    try:
        source = dataset.open_recorded(people.record, archive).with_labels_of(labels)  # along the run's axis, centred
    except dataset.DataError as error:
        said = str(error)
        for of_data, of_samples in OF_SAMPLES.items():
            said = said.replace(of_data, of_samples)
        raise dataset.DataError(said) from error
    if strange := sorted(set(source.z.tolist()) - set(known.tolist())):
        raise dataset.DataError(
            f"--samples {archive}: it has slices of index {strange[0]}, and the people of the run from {known[0]} to "
            f"{known[-1]}; {AS_DRAWN}."
        )
    source = source.of_some(2 * count)  # of each split: no more than is needed is read
    for split in dataset.SPLITS:
        if np.any(source.split == split):
            found = dataset.read_split(source, split, size, cache_bytes=0)
            label = found["label"] if labels else np.full_like(found["label"], -1)
            parts.append(Slices(metrics.to_unit(found["image"]), found["z"], label, found["case"]))
    samples = measures.together(*parts)
    heads, head = np.unique(samples.case, return_inverse=True)
    place = np.random.default_rng(0).permutation(len(heads))  # names may be sorted by label
    return samples.take(np.argsort(place[head], kind="stable")[:count])


def make(
    run,
    data=None,
    *,
    drawn=None,
    count=1000,
    sampler="dpm_solver_pp",
    steps=20,
    kind="own",
    feature_steps=features.STEPS,
    seed=0,
    out=None,
    needs=("decoded", "samples", "features", "bad", "noisy", "everybody"),
    plane=None,
):
    """All that an evaluation of a run knows; the precision policy must have been set before.

    Args:
        run: folder.
        data: see `open_people`.
        drawn: archive of slices that somebody else drew, see `read_samples`: they are the samples, and of the run's
            own stages nothing is loaded.
        count, sampler, steps: of the samples.
        kind, feature_steps: of the features, see `describer`.
        seed: of noise and conditions.
        out: folder in which samples are kept; None is that of the run.
        needs: what is made, see `Measure`; the other fields stay empty.
        plane: of the slices, where it is known, see `plane_of`.

    Returns:
        A `Study`; without samples and features where there is no diffusion model yet.

    Raises:
        RunError, DataError: see `open_people`; or if a stage of the run is unfinished.
    """
    people = open_people(run, data)
    generator = Generator(run) if drawn is None and (run / "diffusion.keras").exists() else None
    first_stage, decoded, test = None, None, people.real.get("test")
    if not (people.in_pixels or drawn):
        first_stage = generator.autoencoder if generator else records.load_first_stage(run)
    if first_stage is not None and test is not None and "decoded" in needs:
        through = tf.function(first_stage.reconstruct, reduce_retracing=True, autograph=False)
        fake = batches.in_batches(through, 2 * test.images - 1, test.z, test.label)
        decoded = replace(test, images=metrics.to_unit(fake))
    noisy = {}
    if first_stage is not None and test is not None and "noisy" in needs:
        indices = np.unique(test.z)
        noisy = with_noise(first_stage, test.at(indices[batches.evenly(len(indices), measures.INDICES)]), seed)
    bits = getattr(first_stage, "bits_per_slice", None)
    sampled = (generator is not None or drawn is not None) and "samples" in needs
    described_later = sampled and "features" in needs
    of_all = everybody(people) if "everybody" in needs and not described_later else {}
    common = {"seed": seed, "noisy": noisy, "plane": plane, "everybody": of_all}
    if not sampled:
        return Study(people, decoded, bits, **common)
    if drawn is not None:
        samples = read_samples(people, drawn, count)
    else:
        with timed("drawing samples"):
            samples, taken = draw_samples(run, generator, people, count, sampler, steps, seed, out or run)
        common |= {"saw_masks": uses_masks(generator), "drawing": taken}
    known = Study(people, decoded, bits, samples, **common)
    if "bad" in needs and test is not None and len(samples) >= measures.LEAST:
        known = replace(known, bad=measures.bad_generators(people.real["train"], samples, seed))
    if "features" not in needs:
        return known
    with timed("features"):
        networks = features.SEEDS if kind == "own" else 0
        describe = describer(people, kind, feature_steps, networks)
        of_all = everybody(people, describe) if "everybody" in needs else {}
        known = replace(described(known, describe, networks), everybody=of_all)
        return replace(known, features=features.names_of(run, networks) or [kind])


def with_noise(first_stage, slices, seed):
    """Slices decoded from latents with noise, {deviation: Slices}: what a denoiser makes that errs as much."""
    encode, decode = (
        tf.function(method, reduce_retracing=True, autograph=False)
        for method in (first_stage.encode, first_stage.decode)
    )
    latents_of, found = batches.in_batches(encode, 2 * slices.images - 1, slices.z, slices.label), {}
    noise = np.random.default_rng(seed).standard_normal(latents_of.shape).astype("float32")
    for deviation in measures.NOISY:
        images = batches.in_batches(decode, latents_of + np.float32(deviation) * noise, slices.z, slices.label)
        found[deviation] = replace(slices, images=metrics.to_unit(images), features=None)
    return found


def described(known, describe, networks=1):
    """The same study with features of all its slices; `describe` is a function of images, see `describer`."""

    def each(sets):
        return {name: slices.described(describe) for name, slices in sets.items()}

    return replace(
        known,
        people=replace(known.people, real=each(known.people.real)),
        decoded=known.decoded and known.decoded.described(describe),
        samples=known.samples.described(describe),
        bad=each(known.bad),
        networks=networks,
    )


@contextlib.contextmanager
def timed(name):
    """Say on one line how many minutes something took. What moves while it lasts is shown on a terminal only."""
    began = time.time()
    yield
    print(f"{name}: {(time.time() - began) / 60:.1f} minutes", flush=True)


# ---- measures --------------------------------------------------------------------------------------------------------


def cost(drawing, began):
    """What it takes to draw a slice, and what this evaluation took since `began`, in seconds since 1970."""
    taken = {"minutes of this evaluation": (time.time() - began) / 60}
    if resource:
        unit = 1024 if sys.platform != "darwin" else 1
        taken = {"peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20} | taken
    return Measured({"cost": {**drawing, **taken}}, {})


def phantoms():
    """A few brains whose tissue is known exactly: images (N, 128, 128) in [0, 1], classes (N, 128, 128)."""
    found = [piece for piece in phantom.slices(3, 128, seed=1) if piece["z"] % 4 == 0]
    classes = np.searchsorted(tissue.LEVELS, [piece["mask"] for piece in found])
    return np.stack([piece["image"] for piece in found]).astype("float32") / 255, classes


def plane_of(people, told=None):
    """The plane of the slices, one of `planes.PLANES`, and how it is known: told, of volumes' headers, or guessed."""
    if told is not None:
        return told, "as --plane says"
    if (axis := getattr(people.source.store, "axis", None)) is not None:
        return planes.PLANES[axis], "as the volumes' headers say"
    return planes.guess(people.real["train"].images), "as it seems by their symmetry (--plane says otherwise)"


def all_people(s):
    """{split: Slices} of all people there are, perhaps of fewer pixels."""
    return s.everybody or s.people.real


def not_trained_on(s):
    """Test and validation people as one set of slices; None where there are no test people."""
    sets = [all_people(s)[split] for split in ("test", "validate") if split in s.people.real]
    return measures.together(*sets) if "test" in s.people.real else None


def masks_of(s):
    """Slices with tissue masks: drawn ones with those they were drawn from, real ones, and test people's; or None."""
    if not s.saw_masks or "test" not in s.people.real:
        return None
    train, test = (
        dataset.read_split(s.people.some, split, s.samples.images.shape[1], masks=True) for split in ("train", "test")
    )
    rows, _ = measures.rows_of_heads(s.people.real["train"], len(s.samples), s.seed)

    def known(images, classes):  # slices without a mask are -1 throughout
        there = (classes >= 0).all(axis=(1, 2))
        return images[there], classes[there]

    return {
        "drawn slices": known(s.samples.images, train["mask"][rows]),
        "real slices": known(s.people.real["train"].images, train["mask"]),
        "tested": known(s.people.real["test"].images, test["mask"]),
    }


def seen_by(records):
    """Whom each stage was trained on, and whom it was validated on: [(stage, names)]."""
    splits = ("train", "validate")
    return [(stage, record["data"]["splits"][s]["cases"]) for stage, record in records.items() for s in splits]


def _compared(s):
    """Samples, and the people they are compared with: training people, test people or None."""
    return s.samples, s.people.real["train"], s.people.real.get("test")


class Measure(NamedTuple):
    """How a section of the report is measured.

    Attributes:
        take: function of the study.
        needs: what of the study it takes, beside people: of "decoded", "samples", "features", "bad", "noisy" and
            "everybody".
        wants: the same, of what it can do without.
    """

    take: Callable[[Study], Measured]
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()


MEASURES = {  # which values of a study each measure takes
    "reconstruction": Measure(
        lambda s: measures.reconstruction(
            *_compared(s)[1:], s.decoded, s.bits, s.people.in_pixels, s.people.source.case_names
        ),
        ("decoded",),
    ),
    "distribution": Measure(
        lambda s: measures.distribution(
            s.samples,
            s.people.real.get("test"),
            s.people.real.get("validate"),
            s.bad,
            s.seed,
            by_own_network=s.networks > 0,
            saw_masks=s.saw_masks,
            networks=max(s.networks, 1),
            case_names=s.people.source.case_names,
        ),
        ("samples", "features", "bad"),
    ),
    "anatomy": Measure(
        lambda s: measures.anatomy(*_compared(s), s.people.source.label_names, phantoms(), plane_of(s.people, s.plane)),
        ("samples",),  # with features, if another section needs them, also how well the slice index is told
    ),
    "texture": Measure(
        lambda s: measures.texture(*_compared(s), s.people.real.get("validate"), s.decoded),
        wants=("decoded", "samples"),
    ),
    "scales": Measure(
        lambda s: measures.scales(*_compared(s), s.people.real.get("validate"), s.decoded, s.bad),
        wants=("decoded", "samples", "bad"),
    ),
    "power": Measure(
        lambda s: measures.power(
            s.people.real["train"],
            s.people.real.get("test"),
            s.people.real.get("validate"),
            s.noisy,
            s.people.source.label_names,
        ),
        wants=("noisy",),
    ),
    "use": Measure(
        lambda s: measures.use(
            s.samples, all_people(s)["train"], not_trained_on(s), s.people.source.label_names, masks_of(s)
        ),
        ("samples", "everybody"),
    ),
    "copies": Measure(
        lambda s: measures.copies(
            s.samples, all_people(s)["train"], s.people.real.get("test"), s.decoded, s.people.source.case_names
        ),
        ("decoded", "samples", "features", "everybody"),
    ),
    "embedding": Measure(
        lambda s: measures.embedding(s.samples, s.people.real, s.people.source.label_names, s.seed),
        ("samples", "features"),
    ),
    "leaks": Measure(
        lambda s: measures.leaks(
            all_people(s),
            s.people.source.case_names,
            seen_by(s.people.records),
            s.people.source.kind,
            s.people.source.person == "each",
            repeats.across_splits(s.people.source),
        ),
        wants=("everybody",),
    ),
}


def needs(names, wanted=True):
    """What `make` must make for some of the report's sections, in MEASURES or not; with what they want, or without."""
    chosen = [MEASURES[name] for name in names if name in MEASURES]
    asked = {need for measure in chosen for need in (*measure.needs, *(measure.wants if wanted else ()))}
    return asked | ({"samples"} if "samples" in names else set())


def measure(known, names=tuple(MEASURES)):
    """What a study says, {name: Measured}: of all measures, or of some, in any order.

    Those that need samples are left out where there is no diffusion model yet.
    """
    found = {}
    for name in names:
        if known.samples is not None or "samples" not in MEASURES[name].needs:
            with timed(name):
                found[name] = MEASURES[name].take(known)
    return found
