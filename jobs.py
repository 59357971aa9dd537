"""What the page does, as functions of values: each draws, shows how far it is, and writes the files to take away.

    slices       new slices, as `python predict.py` with the same flags
    two_labels   the same heads with one label and with another
    person       one head: a stack of slices, as `python predict.py person`
    reconstruct, vary, differences, inpaint    what is made of slices that somebody brings

A job is asked for in the words of `predict.py`: the same flags, the same limits, the same sentences about mistakes. It
gets a function `show(share, frame)` that it calls on its way: `share` of the work is done, and `frame`, uint8 (H, W),
is what is to be seen of it, or None. What `show` raises ends the job.
"""

import dataclasses
import queue
import threading
from pathlib import Path

import numpy as np
from PIL import Image

import predict_flags
from conditions import SWEEP, drawn_conditions, label_number
from dataset import DataError
from ldm.data import single, volumes
from ldm.drawing import figures
from ldm.later import Later
from ldm.training import runs

metrics = Later("ldm.judging.metrics")

FRAMES = 12  # of a film: each is decoded twice, x_t and x_0
MOST = {"sample": 16, "person": 256, "brought": 256}  # slices of one job
FILMED = 16  # most slices of which there is a film
DIFFERENCE = "|difference|"
ONE_AT_A_TIME = threading.Lock()


class Stopped(Exception):
    """Somebody asked that a job ends."""


@dataclasses.dataclass
class Result:
    """What a job has made.

    Attributes:
        picture: uint8 (H, W), or the PNG that shows it.
        files: to take away.
        said: a sentence.
        images: (N, H, W, 1) in [-1, 1]; of two labels, those of the first and then those of the second.
        z: (N,) slice indices.
    """

    picture: np.ndarray | Path
    files: list[Path]
    said: str
    images: np.ndarray
    z: np.ndarray


def asked(words):
    """Words of `predict.py` -> the groups of flags that they mean, {name: group}.

    Raises:
        RunError: for what `predict.py` refuses, and what is too much for a page.
    """
    task, values = predict_flags.parse(words)
    if (values.get("count") or 0) > MOST.get(task, values.get("count") or 0):
        raise runs.RunError(f"--count {values['count']}: a page draws {MOST[task]} at most; `predict.py` draws more")
    return predict_flags.grouped(values)


def streamed(job, stop):
    """Do a job in a thread of its own, one at a time: its reports as they come, and then what it returns.

    Args:
        job: callable (show) -> Result.
        stop: `threading.Event` that ends it.

    Yields:
        (share, frame or None); at last the Result.

    Raises:
        Stopped: if it was stopped; and whatever the job raises.
    """
    reports = queue.SimpleQueue()

    def show(share, frame=None):
        if stop.is_set():
            raise Stopped
        reports.put((share, frame))

    def work():
        try:
            with ONE_AT_A_TIME:
                reports.put(job(show))
        except BaseException as error:  # whoever waits for reports raises it
            reports.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not isinstance(report := reports.get(), Result):
            if isinstance(report, BaseException):
                raise report
            yield report
        yield report
    finally:  # also where nobody listens any more
        stop.set()
        thread.join()


class Film:
    """Frames of a denoising as they come, x_t on the left and x_0 on the right: what a `Generator` is watched by.

    Args:
        generator: decodes the states.
        known: conditions of the slices.
        show: see above.
        columns: tiles per row; None is near-square.
        walks: how many trajectories the work consists of; the first is filmed.
        through: what is done to images before they are shown.
    """

    def __init__(self, generator, known, show, columns=None, walks=1, through=lambda images: images):
        self.generator, self.known, self.show = generator, known, show
        self.columns, self.walks, self.through = columns, walks, through
        self.frames, self.done = [], 0

    def __call__(self, share, pair):
        frame = None
        if pair is not None and self.done == 0 and len(self.known["z"]) <= FILMED:
            decoded = [self.through(self.generator.decode(x, self.known)) for x in pair]
            (frame,) = figures.denoising_frames([decoded], self.columns, with_prediction=True)
            self.frames.append(frame)
        self.show((self.done + share) / self.walks, frame)
        self.done += share == 1.0

    def save(self, path):
        """Write the film, if there is one; returns [path] or []."""
        if self.frames:
            figures.save_gif(path, self.frames)
        return [path] if self.frames else []


# ---- out of noise ----------------------------------------------------------------------------------------------------


def slices(generator, words, folder, show):
    """New slices: the picture is that of `python predict.py` with the same words, byte for byte."""
    groups = asked(["sample", *words])
    wanted, sampling = groups["wanted"], groups["sampling"]
    known = drawn_conditions(generator.record["data"], wanted.z, wanted.label, wanted.conditions, wanted.count)
    (name,), count = sampling.sampler, len(known["z"])
    film = Film(generator, known, show, 8 if wanted.z == SWEEP else None)
    x_T, options = generator.noise(sampling.seed, count), sampling.options_for(name, generator, known)
    trajectory = generator.trajectory(x_T, known, name, sampling.steps, moments=FRAMES, watch=film, **options)
    images = generator.decode(trajectory[-1][0], known)
    picture, png = figures.sheet(figures.enlarge(images), film.columns), folder / f"{name}.png"
    figures.save_png(png, picture)
    files = [png, *film.save(png.with_suffix(".gif"))]
    return Result(picture, files, f"{count} slices", images, known["z"])


def two_labels(generator, words, labels, folder, show):
    """The same heads with one label and with another: the same noise, slice for slice.

    Args:
        words: of `sample`, without a label.
        labels: two names.
    """
    groups, data = asked(["sample", *words]), generator.record["data"]
    wanted, sampling = groups["wanted"], groups["sampling"]
    (name,), count = sampling.sampler, wanted.count
    numbers = [label_number(label, data["labels"]) for label in labels]
    one = drawn_conditions(data, wanted.z, labels[0], wanted.conditions, count)
    known = {key: np.concatenate([value, value]) for key, value in one.items()}
    known["label"] = np.repeat(np.int32(numbers), count)
    # The k-th slice of each label is the first place of head k, whose noise is that of slice k.
    same = {"first": np.array([(head, 0) for head in (*range(count), *range(count))]), "shared": 1.0}
    film = Film(generator, known, show, count)
    x_T, options = generator.noise(sampling.seed, 2 * count, **same), sampling.options_for(name, generator, known)
    trajectory = generator.trajectory(x_T, known, name, sampling.steps, moments=FRAMES, watch=film, **same, **options)
    images = generator.decode(trajectory[-1][0], known)
    first, second = images[:count], images[count:]
    png = folder / f"{labels[0]}_{labels[1]}.png"
    rows, difference = list(zip(labels, (first, second), strict=True)), (DIFFERENCE, second - first)
    figures.labelled_sheet(png, rows, [f"slice {z}" for z in one["z"]], difference)
    mean = np.abs(second - first).mean() / 2
    said = f"{labels[0]} above, {labels[1]} below, from the same noise: {mean:.2%} of the grey range apart"
    return Result(png, [png, *film.save(png.with_suffix(".gif"))], said, images, known["z"])


def person(generator, words, axis, folder, show):
    """One head, as `python predict.py person` with the same words: a sheet, a film through the slices, a volume.

    Args:
        axis: of the volume, along which the run's slices were cut: 0 sagittal, 1 coronal, 2 axial.
    """
    groups = asked(["person", *words])
    wanted, sampling, single_flags = groups["wanted"], groups["sampling"], groups["single"]
    data, shared = generator.record["data"], single_flags.coherence
    known = drawn_conditions(data, SWEEP, wanted.label, wanted.conditions, wanted.count, alike=True)
    (name,), count = sampling.sampler, len(known["z"])
    if count > MOST["person"]:
        raise runs.RunError(f"this run knows {count} slices, and a page draws {MOST['person']} at most: ask for fewer")
    x_T, options = generator.noise(sampling.seed, count, shared=shared), sampling.options_for(name, generator, known)
    watch = Film(generator, known, show) if count <= FILMED else lambda share, pair: show(share)
    latents = generator.draw(x_T, known, name, sampling.steps, shared=shared, watch=watch, **options)
    images = generator.decode(latents, known)
    picture, stem = figures.sheet(figures.enlarge(images), 8), folder / f"person_{name}"
    files = [folder / f"{stem.name}{end}" for end in (".png", "_stack.gif", ".nii.gz")]
    figures.save_png(files[0], picture)
    figures.save_gif(files[1], list(figures.to_uint8(figures.enlarge(images))))
    voxel = volumes.voxel_of(known["z"], single_flags.voxel, axis)
    volumes.save_volume(files[2], figures.to_uint8(images), voxel, axis, "synthetic: drawn, of nobody")
    return Result(picture, files, f"{count} slices of one head", images, known["z"])


def cuts(images, axis, voxel):
    """A stack -> its slices in three planes, each with pixels that are square in mm.

    Args:
        images: (N, H, W, 1) in [-1, 1], cut along `axis`.
        voxel: mm along the three axes.

    Returns:
        Three of (slices, H, W) uint8: sagittal, coronal, axial.
    """
    volume, found = volumes.laid(figures.to_uint8(images), axis), []
    for across in range(3):
        column, row = (size for place, size in enumerate(voxel) if place != across)
        found.append(volumes.squared(volumes.cut(volume, across), row, column))
    return found


# ---- of slices that somebody brings ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Brought:
    """Slices that somebody brings.

    Attributes:
        images: (N, H, W, 1) in [-1, 1]; of a volume in the order of its slices.
        z: (N,) int32, the slice indices of the run that they correspond to.
        axis: along which a volume was cut.
    """

    images: np.ndarray
    z: np.ndarray
    axis: int = 2

    def one(self, k, z=None):
        """The k-th slice alone, as one of another slice index where that is given."""
        return Brought(self.images[k : k + 1], self.z[k : k + 1] if z is None else np.int32([z]), self.axis)

    def known(self, generator, words):
        """Their conditions: what the words do not say is unknown, or as it is on average."""
        wanted = asked(["sample", *words])["wanted"]
        about, said = generator.record["data"], (wanted.label, wanted.conditions)
        known = drawn_conditions(about, self.z.tolist(), *said, len(self.z), alike=True)
        if wanted.label is None:
            known["label"] = np.full_like(known["label"], -1)
        return known


def opened(generator, path, axis):
    """Slices of a file that somebody brings.

    Those of a volume are where they are, if the run was trained on volumes; else they are spread over the run's slice
    indices. A picture is taken to be in the middle.

    Raises:
        DataError: for a file that is too large, damaged, or something else, by its name without folders.
    """
    data, settings = generator.record["data"], generator.record["settings"]
    try:
        images, places = single.read(path, settings["image_size"], axis, settings["center"])
    except DataError as error:
        raise DataError(str(error).replace(str(path), Path(path).name)) from error
    if len(images) > MOST["brought"]:
        raise DataError(f"{Path(path).name} has {len(images)} slices with brain, and {MOST['brought']} are the limit.")
    first, last = data["z"]
    if places is not None and data.get("kind") == "volumes":
        z = np.clip(places, first, last)
    else:
        z = np.linspace(first, last, len(images)) if len(images) > 1 else [(first + last) / 2]
    return Brought(images, np.round(z).astype("int32"), axis)


def reconstruct(generator, real, words, folder, show):
    """Through the first stage and back."""
    if generator.autoencoder is None:
        raise runs.RunError("this run works in pixels, without a first stage: there is nothing to go through")
    known = real.known(generator, words)
    show(0.0)
    fake = generator.decode(generator.encode(real.images, known), known)
    score = metrics.foreground_ssim(metrics.to_unit(real.images), metrics.to_unit(fake)).mean()
    return _beside(folder, "reconstruct", real, fake, "reconstructed", f"foreground SSIM {score:.3f}")


def vary(generator, real, words, start, folder, show):
    """Noised to the time `start`, and denoised: `python predict.py denoise`."""
    known, sampling = real.known(generator, words), asked(["sample", *words])["sampling"]
    (name,) = sampling.sampler
    film = Film(generator, known, show)
    options = sampling.options_for(name, generator, known) | {"moments": FRAMES, "watch": film}
    trajectory = generator.renoised(real.images, known, start, name, sampling.steps, **options)
    fake = generator.decode(trajectory[-1][0], known)
    return _beside(folder, "vary", real, fake, "denoised", f"noised to t = {start}, and denoised", film)


def differences(generator, real, words, start, folder, show, draws=4):
    """What does not belong, in the eyes of the model: `python predict.py anomaly`."""
    known, sampling = real.known(generator, words), asked(["sample", *words])["sampling"]
    (name,) = sampling.sampler
    film = Film(generator, known, show, walks=draws)
    options = sampling.options_for(name, generator, known) | {"moments": FRAMES, "watch": film, "draws": draws}
    fake, _ = generator.pseudo_healthy(real.images, known, start, sampler=name, steps=sampling.steps, **options)
    said = f"the mean of {draws} denoisings differs by {np.abs(real.images - fake).mean() / 2:.2%} of the grey range"
    return _beside(folder, "differences", real, fake, "denoised", said, film, DIFFERENCE)


def inpaint(generator, real, words, area, folder, show):
    """A part drawn anew, to fit the rest: `python predict.py inpaint`.

    Args:
        area: (H, W) bool, where to draw anew.
    """
    known, sampling = real.known(generator, words), asked(["sample", *words])["sampling"]
    area = area[None, :, :, None].astype("float32")
    if not area.any():
        raise runs.RunError("nothing is marked: paint over the part of the slice that is to be drawn anew")
    if not (mask := generator.touched(area)).any():
        raise runs.RunError("what is marked lies outside of what this model draws: it is black there")

    def inside(drawn):
        return area * drawn + (1 - area) * real.images

    film = Film(generator, known, show, through=inside)
    options = sampling.options_for("inpaint", generator, known) | {"moments": FRAMES, "watch": film}
    trajectory = generator.inpainted(real.images, known, mask, sampling.steps, **options)
    fake = inside(generator.decode(trajectory[-1][0], known))
    return _beside(folder, "inpaint", real, fake, "inpainted", f"{area.mean():.1%} of the slice drawn anew", film)


def _beside(folder, name, real, fake, called, said, film=None, kept=None):
    """Slices, what was made of them, and the difference, as a sheet; a film; and, of several slices, a volume.

    Args:
        kept: DIFFERENCE, if that is what the volume holds, instead of what was made.
    """
    png = folder / f"{name}.png"
    figures.reconstruction_sheet(png, real.images, fake, real.z, called=called)
    found = [png, *(film.save(png.with_suffix(".gif")) if film else [])]
    if len(fake) > 1:
        found.append(folder / f"{name}.nii.gz")
        stack = np.abs(fake - real.images) - 1 if kept == DIFFERENCE else fake
        volumes.save_volume(found[-1], figures.to_uint8(stack), (1, 1, 1), real.axis, f"synthetic: {said}")
    return Result(png, found, said, fake, real.z)


def painted(layers, size):
    """What is painted over a slice: layers (h, w, 4) uint8, of any size -> (size, size) bool."""
    area = np.zeros((size, size), bool)
    for layer in layers:
        opaque = Image.fromarray(np.where(np.asarray(layer)[..., 3] > 0, np.uint8(255), np.uint8(0)))
        area |= np.asarray(opaque.resize((size, size), Image.Resampling.BOX)) > 127
    return area
