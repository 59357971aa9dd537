"""A data set of drawn people, to be given away: whole stacks of slices, of which nobody is the original.

    synthetic.zip      single slices in the OASIS course layout, which `train.py --data` reads: PNGs by split, their
                       tissue masks if the run names tissues, a table `labels.csv`, and `provenance.json`
    any other name     a folder of NIfTI volumes, `train/case_00001.nii.gz`, with the same table and provenance

The slices of a person share a part of their noise, as `predict.py person` draws them. Each person is a file of its own
until all are there, so memory holds one person at a time, and the same command goes on where it was interrupted.
"""

import csv
import hashlib
import io
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import dataset
from conditions import SWEEP, drawn_conditions
from ldm import files, shapes, tissue
from ldm.data import volumes
from ldm.drawing import figures
from ldm.judging import audit, metrics
from ldm.training import runs

HELD_OUT = 1 / 8  # share of the people in validate, and in test
COPIED = 0.1  # a person is drawn anew if more of its slices than this are copies; of honest ones 1 % count as such
TRIES = 10  # noises for one person, before it is said that this run copies
STATEMENT = "synthetic: drawn by a diffusion model, the brain of nobody; for research and teaching, never for diagnosis"
MET = ("KID", "KID's standard error", "precision", "recall")  # of report.json, in provenance.json
RATE = {"rate": shapes.NUMBER, str: object}
REPORT = {  # of a run, as far as it is told here
    "distribution?": {"samples?": {str: shapes.NUMBER}, str: object},
    "copies?": {"pixels?": RATE, "features?": RATE, str: object},
    str: object,
}


def write(generator, run, out, wanted, draw):
    """Draw a data set, or the rest of it.

    Args:
        generator: a `generator.Generator`.
        run: its folder.
        out: name that ends in .zip, or a folder that is made.
        wanted: what the data set is made with, for its provenance; whoever goes on must want the same. Of these,
            "count" (slices, rounded up to whole people, three or more), "label", "conditions", "seed", "voxel"
            (mm, of volumes; None for slices) and "reject_copies" are obeyed here, the others by `draw`.
        draw: callable (conditions, number of a noise) -> latents of one person.

    Returns:
        What `provenance.json` says.

    Raises:
        RunError: for a name that is taken, other flags than those it was begun with, or a run that
            copies its training people again and again.
    """
    first, last = generator.record["data"]["z"]
    depth = last - first + 1
    people = max(len(dataset.SPLITS), math.ceil(wanted["count"] / depth))  # each split has one
    if out.exists():
        raise runs.RunError(f"{out} is there already: move it away, or name another --out")
    parts = out.with_name(f"{out.name}.parts")
    report = read_report(run)
    begin(parts, {**wanted, "models": models_of(run)})
    suspicious = copies_of(generator) if wanted["reject_copies"] else lambda images: 0.0
    for case in tqdm(range(1, people + 1), desc=out.name, unit="person", disable=None):
        if not fact_file(parts, case).exists():
            draw_person(generator, parts, case, wanted, draw, suspicious)
    facts = [runs.load_json(fact_file(parts, case)) for case in range(1, people + 1)]
    written = provenance(run, generator, wanted, facts, people * depth, report)
    (join_zip if out.suffix == ".zip" else join_volumes)(out, parts, facts, written)
    shutil.rmtree(parts)
    return written


def fact_file(parts, case):
    """Where it is said what a person was drawn of; it is written last, so a person with it is whole."""
    return parts / f"{case:05d}.json"


def begin(parts, wanted):
    """Make the folder of what is drawn so far; refuse one that was begun with other flags, or by other models.

    Half of the people by one model and half by another would be a data set that no provenance can name.

    Raises:
        RunError: naming the first flag that differs.
    """
    begun = runs.load_json(parts / "wanted.json")
    if begun is None:
        runs.save_json(parts / "wanted.json", wanted)
        return
    now = json.loads(json.dumps(wanted))
    other = [name for name in now if begun.get(name) != now[name]]
    if other == ["models"]:
        raise runs.RunError(
            f"{parts} was begun before the run was trained on: remove the folder, and all are drawn anew"
        )
    if other:
        raise runs.RunError(
            f"{parts} was begun with another {other[0]} ({begun.get(other[0])}): give that, or remove the folder"
        )


# ---- one person ------------------------------------------------------------------------------------------------------


def draw_person(generator, parts, case, wanted, draw, suspicious):
    """Draw one person into `<case>.zip` or `<case>.nii.gz`, and then `<case>.json`."""
    record, rejected = generator.record, []
    known, said = person_conditions(record["data"], case, wanted)
    for attempt in range(TRIES):
        number = (case * TRIES + attempt) * 1000  # its slices' numbers follow: those of nobody else
        x = draw(known, number)
        images = generator.decode(x, known)
        share = suspicious(images)
        if share <= COPIED:
            break
        rejected.append({"noise": number, "share of copies": share})
    else:
        raise runs.RunError(
            f"person {case} came out as a copy of training people {TRIES} times: this run knows its people by heart, "
            "so train it with more people, or for fewer epochs"
        )
    pictures = figures.to_uint8(images)
    if wanted["voxel"]:
        axis, path = record["settings"].get("axis", 2), parts / f"{case:05d}.nii.gz"
        files.write_by(path, lambda part: volumes.save_volume(part, pictures, wanted["voxel"], axis, STATEMENT))
    else:
        classes = generator.decode_tissue(x, known) if generator.names_tissues else None
        files.write_by(parts / f"{case:05d}.zip", lambda part: write_slices(part, case, known["z"], pictures, classes))
    runs.save_json(fact_file(parts, case), {"case": case, "said": said, "noise": number, "rejected": rejected})


def person_conditions(data, case, wanted):
    """What one person is drawn of, and the row of the table that says so.

    The label is the one that is named, or labels in turn. A category that no word names is drawn evenly from its
    values, a number from the normal distribution of the training people within two standard deviations; each column by
    itself.

    Returns:
        Conditions of all slice indices, see `conditions`; {column: what the table says}.
    """
    rng, said, covariates = np.random.default_rng([wanted["seed"], case, 7]), {}, wanted["conditions"]
    if wanted["label"] is not None or data["labels"]:
        said["label"] = wanted["label"] or data["labels"][case % len(data["labels"])]
    named = dict(word.split("=", 1) for word in covariates if "=" in word)
    for column, about in data.get("columns", {}).items():
        values, draw = about.get("values"), np.clip(rng.standard_normal(), -2, 2)
        drawn = values[rng.integers(len(values))] if values else f"{about['mean'] + about['std'] * draw:.3g}"
        said[column] = named.get(column, drawn)
    words = [*covariates, *(f"{name}={value}" for name, value in said.items() if name not in ("label", *named))]
    return drawn_conditions(data, SWEEP, said.get("label"), words, alike=True), said


def write_slices(path, case, z, pictures, classes):
    """One person as a zip of PNGs; the split is told when all people are there."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:  # PNGs do not shrink further
        for i, index in enumerate(z.tolist()):
            file.writestr(f"case_{case:05d}_slice_{index}.nii.png", png(pictures[i]))
            if classes is not None:
                levels = np.array(tissue.LEVELS, "uint8")[classes[i]]
                file.writestr(f"seg_{case:05d}_slice_{index}.nii.png", png(levels))


def png(pixels):
    """(H, W) uint8 -> the bytes of a PNG that says that it is synthetic."""
    said, buffer = PngInfo(), io.BytesIO()
    said.add_text("Description", STATEMENT)
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()


# ---- copies ----------------------------------------------------------------------------------------------------------


def copies_of(generator):
    """What tells copies: callable images (N, H, W, 1) in [-1, 1] -> the share of them that are.

    A slice is a copy if it is nearer to a training slice than 99 % of the test people's slices are, after these went
    through the same first stage: see `ldm.judging.audit`.

    Raises:
        DataError: without test people, or without the data.
    """
    source = dataset.open_recorded(generator.record)
    size = generator.record["settings"]["image_size"]
    train, test = (dataset.read_split(source, split, size) for split in ("train", "test"))
    usual = generator.decode(generator.encode(test["image"], test), test)
    references, usual = (audit.shrunk(metrics.to_unit(images)) for images in (train["image"], usual))
    limit = float(np.percentile(audit.nearest(usual, references).distance, 1.0))

    def share(images):
        return float(np.mean(audit.nearest(audit.shrunk(metrics.to_unit(images)), references).distance < limit))

    return share


# ---- all people ------------------------------------------------------------------------------------------------------


def split_of(case, people):
    """The split of a person: the last eighth for testing, the eighth before it for validation, one at least."""
    held_out = max(1, round(people * HELD_OUT))
    return "train" if case <= people - 2 * held_out else "validate" if case <= people - held_out else "test"


def labels_table(facts):
    """`labels.csv`: a row for each person; None where there is nothing to say of people."""
    if not facts[0]["said"]:
        return None
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["case", *facts[0]["said"]])
    rows.writerows([f"{fact['case']:05d}", *fact["said"].values()] for fact in facts)
    return table.getvalue()


def join_zip(out, parts, facts, written):
    """All people in one zip, in the OASIS course layout."""

    def join(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as whole:
            for fact in facts:
                split = split_of(fact["case"], len(facts))
                with zipfile.ZipFile(parts / f"{fact['case']:05d}.zip") as part:
                    for name in part.namelist():
                        folder = f"keras_png_slices_{'seg_' if name.startswith('seg') else ''}{split}"
                        whole.writestr(f"keras_png_slices_data/{folder}/{name}", part.read(name))
            if table := labels_table(facts):
                whole.writestr("keras_png_slices_data/labels.csv", table)
            whole.writestr("keras_png_slices_data/provenance.json", json.dumps(written, indent=2))

    files.write_by(out, join)


def join_volumes(out, parts, facts, written):
    """All people as volumes in a folder, by split."""
    home = parts / "whole"
    for fact in facts:
        here, there = parts / f"{fact['case']:05d}.nii.gz", home / split_of(fact["case"], len(facts))
        there.mkdir(parents=True, exist_ok=True)
        if here.exists():  # else it was moved before an interruption
            here.rename(there / f"case_{here.name}")
    if table := labels_table(facts):
        files.write(home / "labels.csv", table)
    runs.save_json(home / "provenance.json", written)
    home.rename(out)


def read_report(run):
    """What the run's report found, {} without one.

    Raises:
        RunError: if it is damaged, which is to be known before people are drawn.
    """
    report = runs.load_json(run / "report.json", f"`python evaluate.py --run {run.name}` writes it anew") or {}
    if said := shapes.problems(report, REPORT, "report.json"):
        raise runs.RunError(f"{run}: {said[0]}: remove it, or let `python evaluate.py --run {run.name}` write it anew")
    return report


def provenance(run, generator, wanted, facts, slices, report):
    """Where a data set comes from: the run, what it was trained on, how it was drawn, what its report found."""
    data, people = generator.record["data"], len(facts)
    samples, copies = report.get("distribution", {}).get("samples", {}), report.get("copies", {})
    met = {name: samples[name] for name in MET if name in samples}
    met |= {f"share of copies by {kind}": copies[kind]["rate"] for kind in ("pixels", "features") if kind in copies}
    return {
        "synthetic": True,
        "statement": STATEMENT,
        "run": run.name,
        "models": models_of(run),
        "trained on": {"source": Path(data["source"]).name, "sha256": data.get("sha256"), "people": counts(data)},
        "drawn with": wanted,
        "versions": runs.versions(),
        "report": met or "not measured: `python evaluate.py` does",
        "people": people,
        "slices": slices,
        "splits": {
            split: [fact["case"] for fact in facts if split_of(fact["case"], people) == split]
            for split in dataset.SPLITS
        },
        "noises": {fact["case"]: fact["noise"] for fact in facts},
        "drawn anew as copies": {fact["case"]: fact["rejected"] for fact in facts if fact["rejected"]},
    }


def models_of(run):
    """{name of a model's file: its SHA-256} of a run."""
    paths = [run / f"{stage}.keras" for stage in ("autoencoder", "diffusion")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def counts(data):
    """How many people were in each split of what a run was trained on."""
    return {split: about["people"] for split, about in data.get("splits", {}).items()}
