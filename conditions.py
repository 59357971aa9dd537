"""What slices are drawn of: from the words of a command line, or from real slices, to the arrays that a network takes.

    drawn_conditions     slice indices, labels and covariates of slices that nobody has seen
    negative_conditions  those to guide away from
    drawn_masks          tissue masks: from files, or of a real person
    real_slices          real slices with the conditions that they have
    real_pair            the same, of two people

Conditions are {"z" (N,) int32, "label" (N,) int32, -1 = unknown; and, where the model has learned them, "covariates"
(N, K) float32, "mask" (N, h, w, 4) float32}. What a run knows is in `record["data"]`, which it wrote down when it was
trained: "z", the first and the last slice index; "labels", names; "columns" of the table of people.
"""

import numpy as np

import dataset
from ldm import batches
from ldm.data import table
from ldm.training import runs

SWEEP = "sweep"  # of slice indices: each of them, in order


def drawn_conditions(data, z=None, label=None, covariates=(), count=None, alike=False):
    """The conditions of slices that are to be drawn.

    Args:
        data: `record["data"]` of the run.
        z: slice indices, repeated as needed; SWEEP: all of them; None: spread over all.
        label: a name; None takes the labels in turn.
        covariates: words like "age=70". Of what no word says, a number is the mean of the training people, and a
            category runs through its values, more slowly than the labels do.
        count: number of slices; None is one for each slice index of a sweep, else 16, or more if `z` has more.
        alike: all are to be of one head, or between two: the first label and the first category where none is named.

    Raises:
        RunError: for what the run does not know.
    """
    first, last = data["z"]
    if z == SWEEP:
        z = np.linspace(first, last, count or last - first + 1)
    elif z is None:
        z = np.linspace(first, last, count or 16)
    else:
        z = np.resize(z, count or max(16, len(z)))
        if z.min() < first or z.max() > last:
            raise runs.RunError(f"--z must lie between {first} and {last}, the slices that this run was trained on")
    count, names = len(z), data["labels"]
    if label is not None:
        labels = np.full(count, label_number(label, names))
    else:
        labels = np.arange(count) % (1 if alike else len(names)) if names else np.full(count, -1)
    found = {"z": np.round(z).astype("int32"), "label": labels.astype("int32")}
    columns = data.get("columns", {})
    said = covariate_numbers(covariates, columns)
    values, period = np.zeros((count, len(columns)), "float32"), max(1, len(names))
    for k, column in enumerate(columns.values()):
        if k in said:
            values[:, k] = said[k]
        elif "values" in column and not alike:
            values[:, k] = np.arange(count) // period % len(column["values"])
            period *= len(column["values"])
    return found | ({"covariates": values} if columns else {})


def negative_conditions(data, conditions, label=None, covariates=()):
    """The same conditions with another label, other covariates, or both; None where neither is named.

    Args:
        data: `record["data"]` of the run.
        conditions: of the slices that are drawn.
        label: a name.
        covariates: words like "age=70".

    Raises:
        RunError: for what the run does not know.
    """
    if label is None and not covariates:
        return None
    away = dict(conditions)
    if label is not None:
        away["label"] = np.full_like(away["label"], label_number(label, data["labels"], "--negative-label"))
    if said := covariate_numbers(covariates, data.get("columns", {}), "--negative-conditions"):
        away["covariates"] = away["covariates"].copy()
        for k, value in said.items():
            away["covariates"][:, k] = value
    return away


def label_number(name, names, flag="--label"):
    """The number of a label among those of the training data.

    Raises:
        RunError: if the run does not know it.
    """
    if name not in names:
        raise runs.RunError(f"{flag} {name}: this run knows {' and '.join(names) or 'no labels'}")
    return names.index(name)


def covariate_numbers(words, columns, flag="--conditions"):
    """Words like "age=70" -> {k: value of the k-th column, as the network takes it}.

    Raises:
        RunError: for columns or values that the run does not know.
    """
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in columns:
            raise runs.RunError(f"{flag} {name}: this run was told {', '.join(columns) or 'no columns'}")
        try:
            found[list(columns).index(name)] = table.encode(text, columns[name])
        except ValueError as error:
            raise runs.RunError(f"{flag} {word}: {error}") from error
    return found


def drawn_masks(generator, files, z, data=None, split="test"):
    """The tissue masks that slices are drawn of.

    Args:
        generator: of a run that was told masks.
        files: PNGs, repeated as needed; or ["data"]: the masks of one real person, at the nearest slice indices.
        z: (N,) slice indices.
        data, split: of the real person; see `real_slices`.

    Returns:
        Classes (N, H, W) int32; the real slices (N, H, W, 1) that have these masks, or None; the condition "mask".

    Raises:
        RunError: if the run was not told masks, or the data has none.
    """
    settings, real = generator.record["settings"], None
    if not settings["diffusion"].get("condition_on_mask"):
        raise runs.RunError(
            "--mask: this run was not told masks: train one with `train.py diffusion --condition-on-mask`"
        )
    if files == ["data"]:
        source = dataset.open_recorded(generator.record, data)
        found = dataset.read_split(source, split, settings["image_size"], masks=True)
        rows = np.flatnonzero((found["mask"] >= 0).all(axis=(1, 2)))
        if not len(rows):
            raise runs.RunError(f"--mask data: {source.path} has no masks of the {split} people: name PNG files")
        rows = rows[found["case"][rows] == found["case"][rows[0]]]  # one person
        rows = [rows[np.abs(found["z"][rows] - index).argmin()] for index in z]
        tissue, real = found["mask"][rows], found["image"][rows]
    else:
        masks = [dataset.read_mask(path, settings["image_size"]) for path in files]
        tissue = np.stack([masks[i % len(masks)] for i in range(len(z))])
    return tissue, real, generator.tissue_fractions(tissue)


# ---- of real slices --------------------------------------------------------------------------------------------------


def real_source(record, data=None, label=None):
    """The real slices of a run, or others, labelled as the run numbers labels, unless `label` stands in for theirs.

    Raises:
        DataError: for a label that the run does not know.
    """
    source = dataset.open_recorded(record, data)
    return source.with_labels_of(record["data"]["labels"]) if label is None else source


def real_slices(generator, data=None, split="test", z=None, label=None, count=8):
    """Real slices with their conditions, spread evenly over slice indices.

    Args:
        generator: of a run.
        data: other data than those that the run was trained on.
        split: of its people: "train", "validate", "test".
        z: slice indices to choose from; None: all.
        label: a name that stands in for the slices' own labels.
        count: most slices.

    Returns:
        Images (N, H, W, 1) in [-1, 1]; their conditions.

    Raises:
        RunError: for an index or a label that is not there.
    """
    settings = generator.record["settings"]
    source = real_source(generator.record, data, label)
    with_masks = bool(settings["diffusion"].get("condition_on_mask") and source.masks)
    whole = dataset.read_split(source, split, settings["image_size"], masks=with_masks)
    rows = np.arange(len(whole["z"])) if z is None else np.flatnonzero(np.isin(whole["z"], z))
    if not len(rows):
        asked = " ".join(map(str, z))
        raise runs.RunError(f"--z {asked}: {source.path} has no such slices of the {split} people")
    rows = rows[np.argsort(whole["z"][rows], kind="stable")]
    chosen = {key: value[rows[batches.evenly(len(rows), count)]] for key, value in whole.items()}
    conditions = _conditions_of(chosen, source, generator.record["data"], label)
    if with_masks:
        conditions["mask"] = generator.tissue_fractions(chosen["mask"])
    return chosen["image"], conditions


def real_pair(generator, data=None, split="test", z=None, label=None):
    """As `real_slices`, of two people, of the slice index `z` or the middle one.

    Raises:
        RunError: if there are not two people.
    """
    source = real_source(generator.record, data, label)
    found = dataset.read_split(source, split, generator.record["settings"]["image_size"])
    people = np.unique(found["case"])[:2]
    if len(people) < 2:
        raise runs.RunError(f"interpolate --between slices needs two {split} people, and {source.path} has fewer")
    index = np.median(found["z"]) if z is None else z
    rows = [np.where(found["case"] == case, np.abs(found["z"] - index), np.inf).argmin() for case in people]
    chosen = {key: value[rows] for key, value in found.items()}
    return chosen["image"], _conditions_of(chosen, source, generator.record["data"], label)


def _conditions_of(chosen, source, data, label):
    """Slice indices, labels and covariates of slices that `dataset.read_split` has read."""
    labels = chosen["label"] if label is None else np.full_like(chosen["label"], label_number(label, data["labels"]))
    conditions = {"z": chosen["z"], "label": labels}
    if columns := data.get("columns"):
        conditions["covariates"] = dataset.covariates_of(source, chosen["case"], columns)
    return conditions
