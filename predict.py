"""Command line: pictures from a trained run.

python predict.py                            noise -> slices: a PNG and a denoising GIF by DDIM, and by DDPM
python predict.py --z sweep                  one slice per slice index, in order
python predict.py person                     one head: a stack of slices that belong together, and a NIfTI volume
python predict.py prior transformer          codes drawn one by one; or histogram, normal: what random latents give
python predict.py interpolate                from one noise to another, on the arc between them
python predict.py denoise --from 0.5         variations: real slices, noised to t = 0.5 and denoised
python predict.py anomaly --from 0.4         what the model would have drawn instead: a map of differences
python predict.py inpaint                    a part of real slices drawn anew: the middle, or --box
python predict.py archive --count 5000       a data set of drawn people, zipped, that `train.py --data` reads
python predict.py reconstruct --data ...     real slices through the first stage: sheet and scores

Without a task slices are drawn: the task `sample`. `--person` and `--prior X` are short for `person` and `prior X`.
`python predict.py TASK --help` lists the flags of a task.
"""

import dataclasses
import sys
import time

import command

if __name__ == "__main__":
    command.from_the_start("predict.py")

import numpy as np
from tqdm import tqdm

import dataset
import predict_flags
from conditions import SWEEP, drawn_conditions, drawn_masks, real_pair, real_slices
from generator import FirstStage, Generator, prior_latents
from ldm import batches, files, tissue
from ldm.data import volumes
from ldm.data.people import counted
from ldm.diffusion import guidance, samplers
from ldm.drawing import figures
from ldm.later import Later, keras
from ldm.training import distribution, records, runs

synthetic = Later("synthetic")  # it imports SciPy, and so do these
anatomy, metrics = Later("ldm.judging.anatomy"), Later("ldm.judging.metrics")

FRAMES = 40  # most frames of a GIF
JUDGED = 1000  # about the most slices whose reconstructions are scored: they take 2 GiB

# ---- sample ----------------------------------------------------------------------------------------------------------


def sample(run, wanted, sampling, real, pictures):
    """Slices by each sampler that is asked for: a PNG, and a GIF of how they come out of noise."""
    generator = Generator(run)
    known = drawn_conditions(generator.record["data"], wanted.z, wanted.label, wanted.conditions, wanted.count)
    for _ in drawn(generator, known, wanted.mask, sampling, real, pictures, in_order=wanted.z == SWEEP):
        pass


def person(run, wanted, sampling, real, pictures, coherence, voxel):
    """One head: all slice indices in order, from noise that they share, as pictures, a film through them, a volume."""
    generator = Generator(run)
    data, axis = generator.record["data"], generator.record["settings"].get("axis", 2)
    known = drawn_conditions(data, SWEEP, wanted.label, wanted.conditions, wanted.count, alike=True)
    for name, images in drawn(generator, known, wanted.mask, sampling, real, pictures, in_order=True, shared=coherence):
        write_person(pictures.out, name, images, known["z"], axis, voxel, pictures.fps)


def drawn(generator, known, mask, sampling, real, pictures, in_order, shared=None):
    """Draw slices with each sampler, and write pictures of them.

    Args:
        generator: of the run.
        known: conditions of the slices, without masks.
        mask, sampling, real, pictures: flags.
        in_order: whether their slice indices follow each other.
        shared: share of its noise that each slice has from the one before, as slices of one head; None: of many heads.

    Yields:
        (name of the files, images (N, H, W, 1) in [-1, 1]): that of the sampler; of a person, "person_" before it, so
        that no task writes over another's pictures.
    """
    count, tissues, models = len(known["z"]), None, None
    if mask:
        tissues, models, fractions = drawn_masks(generator, list(mask), known["z"], real.data, real.split)
        known = known | {"mask": fractions}
    x_T, columns = generator.noise(sampling.seed, count, shared=shared), 8 if in_order else None
    for name in sampling.sampler:
        clock = Clock()
        options = sampling.options_for(name, generator, known) | {"shared": shared, "title": name}
        stem = name if shared is None else f"person_{name}"
        trajectory = generator.trajectory(x_T, known, name, sampling.steps, moments=FRAMES, **options)
        clock.ends("drawing")
        images = generator.decode(trajectory[-1][0], known)
        clock.ends("decoding")
        png, gif = (pictures.out / f"{stem}.{kind}" for kind in ("png", "gif"))
        figures.save_png(png, figures.sheet(figures.enlarge(images), columns))
        save_trajectory(gif, generator, trajectory, known, pictures, columns, last=images)
        clock.ends("filming")
        calls = network_calls(sampling, sampling.steps or samplers.named(name).calls)
        print(f"{name}: {count} slices, {calls} network calls each -> {png}, {gif}")
        print(f"{name}: {clock.seconds['drawing'] / count:.2f} seconds per slice; {clock}")
        if mask:
            figures.tissue_sheet(pictures.out / f"{stem}_mask.png", images, tissues, known["z"])
            say_how_masks_are_followed(images, tissues, models)
        write_tissue(generator, pictures.out / f"{stem}_tissue.png", images, trajectory[-1][0], known)
        if in_order:
            alike = metrics.neighbour_correlation(metrics.to_unit(images))
            print(f"{name}: neighbouring slices correlate by {alike:.3f}")
        yield stem, images


def network_calls(sampling, calls):
    """Network calls for each slice, given the calls of `denoise`: guided, each of these is two of the network."""
    return calls if sampling.guidance == 1.0 else 2 * calls


class Clock:
    """Seconds of the parts of a piece of work, one after the other."""

    def __init__(self):
        self.seconds, self.began = {}, time.perf_counter()

    def ends(self, part):
        now = time.perf_counter()
        self.seconds[part], self.began = now - self.began, now

    def __str__(self):
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())


def save_trajectory(
    path, generator, trajectory, known, pictures, columns=None, last=None, through=lambda images: images
):
    """Write a trajectory as a GIF; of what is decoded, only what is shown.

    Args:
        path: file to write.
        generator: decodes the states.
        trajectory: list of (x_t, x_0), (N, h, w, C) each.
        known: conditions of the slices.
        pictures: fps, and whether x_0 is shown.
        columns: tiles per row; None is near-square.
        last: the last x_t as images (N, H, W, 1), where they are decoded already.
        through: what is done to images before they are shown.
    """

    def decoded(x):
        return through(generator.decode(x, known))

    def frames():
        for moment, (x_t, x_0) in enumerate(trajectory, start=1):
            done = last is not None and moment == len(trajectory)
            yield last if done else decoded(x_t), decoded(x_0) if pictures.show_x0 else None

    shown = figures.denoising_frames(frames(), columns, with_prediction=pictures.show_x0)
    figures.save_gif(path, shown, pictures.fps)


def write_tissue(first_stage, path, images, latents, known):
    """Write the tissue maps beside the pictures, for a first stage that names tissues."""
    if first_stage.names_tissues:
        figures.tissue_sheet(path, images, first_stage.decode_tissue(latents, known), known["z"])
        print(f"-> {path}")


def say_how_masks_are_followed(images, masks, real=None):
    """Print how well drawn slices follow their masks, as the Dice of each tissue, between two yardsticks.

    The tissue of the drawn slices must agree better with their own masks than with other slices' masks; and it cannot
    be expected to agree better than that of real slices with the same masks.

    Args:
        images: drawn slices (N, H, W, 1) in [-1, 1].
        masks: their masks, classes (N, H, W).
        real: real slices with the same masks, or None.
    """
    compared = {"what was drawn with its mask": (images, masks)}
    if len(masks) > 1:
        compared["what was drawn with another slice's mask"] = (images, np.roll(masks, len(masks) // 2, axis=0))
    if real is not None:
        compared["the real slices with these masks"] = (real, masks)
    for what, (shown, classes) in compared.items():
        values = metrics.dice(classes, anatomy.tissues(metrics.to_unit(shown)))
        named = zip(tissue.NAMES[1:], values, strict=True)
        print(f"Dice of {what}: " + ", ".join(f"{name} {value:.2f}" for name, value in named))


def write_person(out, name, images, z, axis, voxel, fps):
    """Write a stack as a film through the slice indices, and as a volume.

    Args:
        out: folder.
        name: of the files.
        images: the stack, (N, H, W, 1) in [-1, 1].
        z: their slice indices, ascending.
        axis: of the volume, along which the slices were cut.
        voxel: mm along the three axes, from one slice index to the next; --count may leave slice indices out.
        fps: frames per second.
    """
    figures.save_gif(out / f"{name}_stack.gif", list(figures.to_uint8(figures.enlarge(images))), fps)
    voxel = volumes.voxel_of(z, voxel, axis)
    volumes.save_volume(out / f"{name}.nii.gz", figures.to_uint8(images), voxel, axis)
    print(f"-> {out / name}_stack.gif, {out / name}.nii.gz: {len(images)} slices, voxels of {voxel} mm")


# ---- prior -----------------------------------------------------------------------------------------------------------


def prior(run, kind, wanted, sampling, pictures, temperature, top_k, top_p):
    """Latents that a simpler model than diffusion draws: what the first stage alone makes of a slice index."""
    refuse_pixels(run, f"prior {kind} draws latents")
    first_stage = FirstStage(records.load_first_stage(run))
    record, options = records.of(run, "autoencoder"), {}
    if kind == "transformer":  # it may have been trained with other labels than the first stage
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        options["prior"], record = records.load(run, "prior")
    known = drawn_conditions(record["data"], wanted.z, wanted.label, count=wanted.count)
    latents = prior_latents(kind, run, first_stage, known, sampling.seed, **options)
    images = first_stage.decode(latents, known)
    path = pictures.out / f"{kind}.png"
    figures.save_png(path, figures.sheet(figures.enlarge(images), 8 if wanted.z == SWEEP else None))
    print(f"{kind}: {len(images)} slices -> {path}")
    write_tissue(first_stage, path.with_name(f"{kind}_tissue.png"), images, latents, known)


def refuse_pixels(run, what):
    """Refuse a task that needs a first stage.

    Raises:
        RunError: if the run has none.
    """
    if (record := records.read(run, "diffusion")) and record["settings"]["first_stage"] == "none":
        raise runs.RunError(f"{what}, and {run} works in pixels, without one: leave it out, or name another --run")


# ---- from real slices ------------------------------------------------------------------------------------------------


def interpolate(run, wanted, sampling, real, pictures, between, start):
    """Slices on the arc between two noises, or two real slices: one picture becomes another, through pictures."""
    generator, count, more, ends = Generator(run), wanted.count, {}, ()
    name, steps, data = sampling.sampler, sampling.steps, generator.record["data"]
    if between == "noises":
        z = SWEEP if wanted.z is None else [wanted.z]
        known, row = drawn_conditions(data, z, wanted.label, wanted.conditions, count, alike=True), count // 2
        x_t = guidance.spherical(*generator.noise(sampling.seed, 2), count)
    else:  # all noised by the same noise, to a time at which the network decides what lies between them
        ends, known = real_pair(generator, real.data, real.split, wanted.z, wanted.label)
        row, steps, more = 0, generator.share_of_steps(name, steps, start), {"start": start}
        x_0 = guidance.spherical(*generator.encode(ends, known), count)
        x_t = generator.noised(x_0, start, generator.noise(sampling.seed, 1))
    known = {key: np.repeat(value[row : row + 1], count, axis=0) for key, value in known.items()}
    options = sampling.options_for(name, generator, known) | more
    images = generator.decode(generator.draw(x_t, known, name, steps, title="interpolate", **options), known)
    images = np.concatenate([ends[:1], images, ends[1:]]) if len(ends) else images
    png, gif = (pictures.out / f"interpolate.{kind}" for kind in ("png", "gif"))
    figures.save_png(png, figures.sheet(figures.enlarge(images)))
    figures.save_gif(gif, list(figures.to_uint8(figures.enlarge(images))), pictures.fps)
    print(f"interpolate: {count} slices -> {png}, {gif}")


def given_real(run, wanted, real):
    """The run's generator, real slices (N, H, W, 1) in [-1, 1], and their conditions."""
    generator = Generator(run)
    return generator, *real_slices(generator, real.data, real.split, wanted.z, wanted.label, wanted.count)


def denoise(run, wanted, sampling, real, pictures, start):
    """Variations of real slices: noised to a time t, and denoised."""
    generator, images, known = given_real(run, wanted, real)
    name, path = sampling.sampler, pictures.out / "denoise.png"
    options = sampling.options_for(name, generator, known) | {"title": name, "moments": FRAMES}
    trajectory = generator.renoised(images, known, start, name, sampling.steps, **options)
    fake = generator.decode(trajectory[-1][0], known)
    save_trajectory(path.with_suffix(".gif"), generator, trajectory, known, pictures, last=fake)
    figures.reconstruction_sheet(path, images, fake, known["z"], count=len(images), called="denoised")
    print(f"denoise: {len(images)} slices of the {real.split} people, noised to t = {start} -> {path}")


def anomaly(run, wanted, sampling, real, pictures, start):
    """What does not belong: the difference to what the model makes of a noised slice, averaged over noises."""
    generator, images, known = given_real(run, wanted, real)
    name, path = sampling.sampler, pictures.out / "anomaly.png"
    options = sampling.options_for(name, generator, known) | {"title": name, "moments": FRAMES}
    fake, trajectory = generator.pseudo_healthy(images, known, start, sampler=name, steps=sampling.steps, **options)
    save_trajectory(path.with_suffix(".gif"), generator, trajectory, known, pictures)
    figures.reconstruction_sheet(path, images, fake, known["z"], count=len(images), called="denoised")
    score = np.abs(metrics.to_unit(images) - metrics.to_unit(fake)).mean(axis=(1, 2, 3))
    print(f"anomaly: mean difference {score.mean():.4f}, largest {score.max():.4f} -> {path}")


def inpaint(run, wanted, sampling, real, pictures, box, resample):
    """A part of real slices drawn anew, to fit the rest."""
    size, path = records.of(run, "diffusion")["settings"]["image_size"], pictures.out / "inpaint.png"
    box = box or (size * 3 // 8, size * 3 // 8, size // 4, size // 4)
    (top, left, tall, wide), named = box, f"--box {' '.join(map(str, box))}"
    if min(top, left) < 0 or min(tall, wide) < 1 or max(top + tall, left + wide) > size:
        raise runs.RunError(f"{named} does not lie within {size}x{size} pixels")
    generator, images, known = given_real(run, wanted, real)
    area = np.zeros((1, size, size, 1), "float32")
    area[:, top : top + tall, left : left + wide] = 1.0
    mask = generator.touched(area)
    if not mask.any():
        raise runs.RunError(f"{named} lies outside of what this model draws: it is black there")
    options = sampling.options_for("inpaint", generator, known) | {"title": "inpaint", "moments": FRAMES}
    trajectory = generator.inpainted(images, known, mask, sampling.steps, resample, **options)

    def inside(drawn):
        return area * drawn + (1 - area) * images

    fake = inside(generator.decode(trajectory[-1][0], known))
    figures.reconstruction_sheet(path, images, fake, known["z"], count=len(images), called="inpainted")
    gif = path.with_suffix(".gif")
    save_trajectory(gif, generator, trajectory, known, pictures, last=fake, through=inside)
    calls = samplers.inpainting_calls(sampling.steps, min(resample, sampling.steps))
    print(f"inpaint: {len(images)} slices, {network_calls(sampling, calls)} network calls each -> {path}, {gif}")


# ---- a data set ------------------------------------------------------------------------------------------------------


def archive(run, wanted, sampling, pictures, coherence, voxel, reject_copies):
    """A data set of drawn people: a zip of slices, or a folder of volumes; see `synthetic`."""
    generator, out = Generator(run), pictures.out
    steps = sampling.steps or samplers.named(sampling.sampler).calls
    made_with = {
        "count": wanted.count,
        "label": wanted.label,
        "conditions": list(wanted.conditions),
        **dataclasses.asdict(sampling),
        "steps": steps,
        "coherence": coherence,
        "voxel": None if out.suffix == ".zip" else voxel,
        "reject_copies": reject_copies,
    }

    def draw(known, number):
        x_T = generator.noise(sampling.seed, len(known["z"]), number, shared=coherence)
        options = sampling.options_for(sampling.sampler, generator, known) | {"first": number, "shared": coherence}
        return generator.draw(x_T, known, sampling.sampler, steps, **options)

    written = synthetic.write(generator, run, out, made_with, draw)
    anew = f", {sum(map(len, written['drawn anew as copies'].values()))} drawn anew as copies" if reject_copies else ""
    print(f"archive: {written['people']} people, {written['slices']} slices{anew} -> {out}")
    table = f" --labels {out / 'labels.csv'}" if out.suffix != ".zip" and (out / "labels.csv").exists() else ""
    print(f"next: python train.py --data {out}{table} --dry-run")


# ---- reconstruct -----------------------------------------------------------------------------------------------------


def reconstruct(run, real, pictures):
    """Real slices through the first stage, beside the two predictors that know nothing of the slice."""
    refuse_pixels(run, "reconstruct goes through the first stage")
    autoencoder, record = records.load(run, "autoencoder")
    first_stage, source = FirstStage(autoencoder), dataset.open_recorded(record, real.data)
    if autoencoder.num_labels:
        source = source.with_labels_of(record["data"]["labels"])
    masked = bool(first_stage.names_tissues and source.masks)
    judged = source.of_some(JUDGED)
    found = dataset.read_split(judged, real.split, autoencoder.image_size, masks=masked)
    if judged is not source:
        print(
            f"of {np.sum(source.split == real.split)} {real.split} slices, {len(found['z'])} of whole people are judged"
        )
    latents = first_stage.encode(found["image"], found)
    fake = first_stage.decode(latents, found)
    train = dataset.make_dataset(source, "train", autoencoder.image_size, batches.SIZE, training=False)
    train = tqdm(train, desc="mean image", unit="batch", delay=1, disable=None)
    mean = metrics.mean_images((metrics.to_unit(batch["image"]), batch["z"].numpy()) for batch in train)
    called, real_unit, fake_unit = record["settings"]["first_stage"], *map(metrics.to_unit, (found["image"], fake))
    scores = metrics.beside_trivial(real_unit, fake_unit, mean, found["z"], called)
    scores = {name: metrics.over_people(values, found["case"]) for name, values in scores.items()}
    people, count = len(np.unique(found["case"])), len(fake)
    show_scores(scores, real.split, people, count, getattr(autoencoder, "bits_per_slice", None))
    if source.person == "each":
        print("note: every slice counts as a person (--person each): people may be in two splits, scores too good")
    background = float(fake_unit[found["image"] == -1].mean())
    print(f"background: {background:.4f} on average where the real slice is black (0)")
    some = np.argsort(found["z"], kind="stable")[batches.evenly(count, 8)]
    figures.reconstruction_sheet(pictures.out / "reconstruct.png", found["image"][some], fake[some], found["z"][some])
    facts = {"run": str(run), "data": source.path, "split": real.split, "scores": scores, "background": background}
    if first_stage.names_tissues:
        classes = first_stage.decode_tissue(latents, found)
        true = found["mask"][some] if masked else None
        path = pictures.out / "reconstruct_tissue.png"
        figures.tissue_sheet(path, fake[some], classes[some], found["z"][some], real_tissue=true)
        if masked:
            facts["dice"] = dict(zip(tissue.NAMES[1:], metrics.dice(found["mask"], classes), strict=True))
            print("Dice: " + ", ".join(f"{name} {value:.3f}" for name, value in facts["dice"].items()))
    runs.save_json(pictures.out / "reconstruct.json", facts)
    print(f"-> {pictures.out / 'reconstruct.png'}, {pictures.out / 'reconstruct.json'}")


def show_scores(scores, split, people, count, rate):
    """Print the table."""
    print(
        f"\n{split}: {count} slices of {counted(people)}; SSIM: 11x11 Gaussian, sigma 1.5, range [0, 1], zero padding;"
    )
    print("foreground: the same map where the real slice is brighter than 0.05; +- is the deviation over people")
    if rate:
        print(f"rate: {rate:.0f} bits per slice")
    names = list(next(iter(scores.values())))
    print(" " * 28 + "".join(f"{name:>20}" for name in names))
    for row, values in scores.items():
        print(f"{row:28}" + "".join(f"{m:>13.3f} +- {s:5.3f}"[-20:].rjust(20) for m, s in values.values()))


# ---- the command -----------------------------------------------------------------------------------------------------


TASKS = (sample, person, prior, interpolate, denoise, anomaly, inpaint, archive, reconstruct)
WORK = {work.__name__: work for work in TASKS}


def main(argv=None):
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 or 143 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    return command.run("predict.py", lambda: do(argv), (dataset.DataError, runs.RunError))


def do(argv):
    """Do what the words say; returns the exit status."""
    name, values = predict_flags.parse(argv)
    stage, work = predict_flags.TASKS[name].stage, WORK[name]
    run = runs.folder(values["run"]) if values["run"] is not None else runs.newest(stage)
    files.check_folder(values["out"].parent if name == "archive" else values["out"])
    asked = predict_flags.arguments(work, values)
    runs.refuse_no_run(run)
    needed = {"autoencoder", stage, "prior" if asked.get("kind") == "transformer" else stage}
    records.refuse_damaged(run, *sorted(needed))  # before TensorFlow is imported, which takes seconds
    if stage == "diffusion":
        runs.refuse_missing(run / "diffusion.keras")
        if wanted := asked.get("wanted"):
            known = records.of(run, "diffusion")["data"]
            drawn_conditions(known, wanted.z, wanted.label, wanted.conditions, wanted.count)
    dataset.refuse_absent(values.get("data") or ())
    command.load("predict.py", "modules")  # with TensorFlow; it registers the classes that a .keras file names
    print(f"{run}{records.unfinished(run, stage)}: {distribution.set_precision(values['precision'])}")
    keras.utils.set_random_seed(values.get("seed", 0))
    work(run, **asked)
    return 0


if __name__ == "__main__":
    command.leave(main())
