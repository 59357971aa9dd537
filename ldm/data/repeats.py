"""Repeats: scans that look like one person's (`search`), and stacks that go on with another head (`head_changes`).

Names can be wrong about who is who: an archive may number scans, not people, or slices may have been sorted into the
wrong stacks. Pictures tell. A brain's folds differ from person to person and stay for life, so the fine pattern of
light and dark inside the brain is compared, where position, size, brightness and slow shading have been taken out.

How `likeness` works: every stack is cut to its brain, the same cut for all its slices, at FRAME x FRAME pixels; each
pixel is told by how it differs from its surroundings, in units of their contrast (`_detail`); what all stacks share at
that place is taken out, also as it would be if turned, moved or stretched (`_without_shared`): heads that lie alike are
not one person's. The likeness of two stacks is the mean correlation of their slices at the best of a few small
turns and slice offsets: one matrix product each, for all pairs at once.

How `find` decides: a stack that is blurred, or badly cut, is like everybody. So a likeness is read against those that
the two stacks have to all others (score normalisation, as in telling voices apart: Auckenthaler et al., "Score
normalization for text-independent speaker verification systems", Digital Signal Processing 10, 2000,
doi:10.1006/dspr.1999.0360). The threshold comes from pairs that are certainly different people, where labels say so,
else from all but the most alike: beyond a high quantile such a distribution falls exponentially, which says how many
false alarms are to be expected among all pairs.

How `head_changes` works: neighbouring slices of one head lie in the same place and are alike. Where a slice is less
like its own neighbour than like that of another stack, and by far less than neighbours usually are, the stack goes on
with another head. Who goes on with whose is the assignment of the highest correlation.
"""

import csv
import io
import itertools
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.batches import evenly
from ldm.data import archive, pixels, table
from ldm.later import Later
from ldm.later import tensorflow as tf

ndimage, optimize, sparse = Later("scipy.ndimage"), Later("scipy.optimize"), Later("scipy.sparse")

SIDE = 128  # pixels a side that slices are read at
FRAME = 32  # pixels a side of the brain's cut
REACH = 2.2  # half of the cut's side in standard deviations of the brain's pixels along it; a full ellipse has 2
NEAR = 2.7  # standard deviation of what is "around" a pixel, in pixels of the cut
FAINT = 0.04  # contrast that is noise, in units of the mean grey level of a brain
DARK = 16  # grey levels up to this do not count as brain
PLACES = 14  # the middle slices of a stack, which are compared
OFFSETS = range(-3, 4)  # slices that one stack may be ahead of the other
TURNS = (-6, -3, 0, 3, 6)  # degrees that one head may be turned against the other
ALIKE = 0.45  # the least likeness of one person's stacks, whatever those of strangers are
FALSE_ALARMS = 0.5  # pairs of strangers that are expected beyond the threshold
LEAST = 20  # stacks, below which nothing can be calibrated
MOST = 10_000  # stacks, whose likenesses take 400 MB
CERTAIN = 5000  # pairs of different labels that are enough for a threshold
NEIGHBOURS = 0.4  # correlation of neighbouring slices below which they say nothing of whose they are
EXAMPLES = 5  # of people with several names that are shown
LOOKED_AT = 24  # stacks that `dataset.py describe` looks at


class Stacks(NamedTuple):
    """What is compared of N stacks of slices.

    Attributes:
        scan: (N,) their numbers in `Source.scan`.
        row: (N, L) of each place the row in the source; -1 where the stack has no slice.
        detail: (N, L, FRAME * FRAME) float32, of zero mean and unit norm; zeros where there is no slice.
    """

    scan: np.ndarray
    row: np.ndarray
    detail: np.ndarray


class Found(NamedTuple):
    """What `find` has found.

    Attributes:
        pairs: (P, 2) places of stacks that are one person's, the most alike first.
        likeness: (P,) mean correlation of their slices.
        strangers: likeness that a half, and 99.9 %, of all pairs stay below.
        certain: how many pairs of different labels it was calibrated on; 0: on all pairs.
        compared: how many pairs there are.
    """

    pairs: np.ndarray
    likeness: np.ndarray
    strangers: tuple[float, float]
    certain: int
    compared: int


class Change(NamedTuple):
    """Where stacks change heads.

    Attributes:
        z: slice index of the last slices before it; `after` of the first behind it.
        stacks: how many have both.
        changed: (C,) scans whose next slice is another head's.
        onward: (C,) scans that these go on with, by the best assignment.
        likeness: mean correlation of the assigned neighbours.
    """

    z: int
    after: int
    stacks: int
    changed: np.ndarray
    onward: np.ndarray
    likeness: float


# ---- stacks -> detail ------------------------------------------------------------------------------------------------


def read(source, chosen=None, places=PLACES) -> Stacks:
    """Reads the middle slices of stacks.

    Args:
        source: a `dataset.Source`.
        chosen: numbers of the scans to read; None: all.
        places: how many slices of each at most.

    Raises:
        DataError: where a slice is damaged.
    """
    scans = np.unique(source.scan) if chosen is None else np.asarray(chosen)
    rows = _middle_rows(source, scans, places)
    detail = np.zeros((*rows.shape, FRAME * FRAME), np.float32)
    wanted = rows[rows >= 0]
    batches = pixels.read(source, tf.data.Dataset.from_tensor_slices(wanted).batch(64), SIDE, 64).prefetch(4)
    pending, stack = [], 0
    with pixels.data_errors(source), tqdm(total=len(wanted), desc="slices", delay=5, leave=False, disable=None) as bar:
        for batch in batches.as_numpy_iterator():
            pending.extend(batch[..., 0])
            bar.update(len(batch))
            while stack < len(rows) and len(pending) >= (count := int((rows[stack] >= 0).sum())):
                detail[stack, rows[stack] >= 0] = _detail(np.stack(pending[:count]))
                del pending[:count]
                stack += 1
    return Stacks(scans, rows, detail)


def _middle_rows(source, scans: np.ndarray, places: int) -> np.ndarray:
    """The rows of the slices nearest to the middle of each stack, (N, L); neighbours in it are neighbours there."""
    order = np.argsort(source.scan, kind="stable")  # within a scan, rows go by z
    bounds = np.searchsorted(source.scan[order], [scans, scans + 1]).T
    steps = np.diff(source.z[order])[np.diff(source.scan[order]) == 0]
    step = max(1, int(np.gcd.reduce(steps))) if len(steps) else 1
    rows = np.full((len(scans), places), -1)
    for stack, (first, last) in enumerate(bounds.tolist()):
        mine = order[first:last]
        z = (source.z[mine] - source.z[mine[0]]) // step
        place = z - (z[-1] + 1) // 2 + places // 2
        inside = (place >= 0) & (place < places)
        rows[stack, place[inside]] = mine[inside]
    return rows[:, (rows >= 0).any(axis=0)]


def _detail(stack: np.ndarray) -> np.ndarray:
    """What tells a brain from others: (n, H, W) grey levels -> (n, FRAME * FRAME) of zero mean and unit norm."""
    down, right = (_frame((stack > DARK).mean(axis=(0, axis))) for axis in (2, 1))
    return _unit(_told(down @ stack.astype(np.float32) @ right.T))


def _told(pictures: np.ndarray) -> np.ndarray:
    """How each pixel differs from those around it, in units of their contrast: (n, S, S) -> (n, S * S)."""
    brain = pictures > DARK / 2
    level = pictures.sum(axis=(1, 2)) / np.maximum(brain.sum(axis=(1, 2)), 1)
    pictures = pictures / np.maximum(level, 1e-3)[:, None, None].astype(np.float32)
    differs = pictures - ndimage.gaussian_filter(pictures, (0, NEAR, NEAR))
    contrast = np.sqrt(ndimage.gaussian_filter(differs**2, (0, NEAR, NEAR)))
    inside = ndimage.gaussian_filter(brain.astype(np.float32), (0, 1, 1))
    told = ndimage.gaussian_filter(differs / (contrast + FAINT) * inside, (0, 0.6, 0.6))
    return told.reshape(len(pictures), -1)


def _frame(profile: np.ndarray) -> np.ndarray:
    """The matrix (FRAME, H) that averages pixels along one axis into the cells of the cut around a profile (H,)."""
    pixel = np.arange(len(profile))
    weight = (profile + 1e-6) / (profile + 1e-6).sum()
    mean = weight @ (pixel + 0.5)
    spread = np.sqrt(weight @ (pixel + 0.5 - mean) ** 2)
    edges = mean + REACH * spread * np.linspace(-1, 1, FRAME + 1)
    low, high = edges[:-1, None], edges[1:, None]
    return (np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None) / (high - low)).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows (..., D) of zero mean and unit norm, whose products are correlations; constant ones are 0."""
    rows = rows - rows.mean(axis=-1, keepdims=True)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-6)


# ---- who was scanned twice -------------------------------------------------------------------------------------------


def likeness(stacks: Stacks) -> np.ndarray:
    """How alike each two stacks are: (N, N) mean correlation of their slices, at the best turn and slice offset."""
    there = (stacks.row >= 0).astype(np.float32)
    detail = _without_shared(stacks.detail, there)
    number, length = there.shape
    least = max(1, int(np.median(there.sum(axis=1))) // 2)
    best = np.full((number, number), -1, np.float32)
    tries = [(turn, offset) for turn in TURNS for offset in OFFSETS if abs(offset) < length]
    for turn, group in itertools.groupby(
        tqdm(tries, desc="turns and offsets", delay=5, leave=False, disable=None), key=lambda pair: pair[0]
    ):
        turned = _turned(detail, turn)
        for _, offset in group:
            mine = slice(max(0, -offset), length - max(0, offset))
            other = slice(max(0, offset), length - max(0, -offset))
            alike = detail[:, mine].reshape(number, -1) @ turned[:, other].reshape(number, -1).T
            alike /= np.maximum(there[:, mine] @ there[:, other].T, least)
            np.maximum(best, alike, out=best)
    return np.maximum(best, best.T)


def _without_shared(detail: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Takes out of each slice what the mean of all stacks at its place explains, and the mean's first-order changes.

    Args:
        detail: (N, L, FRAME * FRAME).
        there: (N, L), 1 where there is a slice, else 0.
    """
    mean = (detail.sum(axis=0) / np.maximum(there.sum(axis=0), 1)[:, None]).reshape(-1, FRAME, FRAME)
    place = (np.arange(FRAME, dtype=np.float32) + 0.5) * 2 / FRAME - 1
    y, x = place[:, None], place
    down, right = np.gradient(mean, axis=(1, 2))
    terms = np.stack([mean, down, right, y * down, x * down, y * right, x * right], axis=-1)
    left = np.empty_like(detail)
    for slices, out, basis in zip(detail.swapaxes(0, 1), left.swapaxes(0, 1), terms, strict=True):
        axes = np.linalg.qr(basis.reshape(FRAME * FRAME, -1))[0]
        out[:] = slices - (slices @ axes) @ axes.T
    return _unit(left * there[..., None])


def _turned(detail: np.ndarray, degrees: float) -> np.ndarray:
    if not degrees:
        return detail
    pictures = detail.reshape(-1, FRAME, FRAME)
    turned = ndimage.rotate(pictures, degrees, axes=(1, 2), reshape=False, order=1)
    return _unit(turned.reshape(detail.shape))


def normalised(alike: np.ndarray) -> np.ndarray:
    """Likenesses (N, N) in units of what each of the two stacks has with others; the diagonal is NaN.

    0 is the likeness that one in ten strangers has, 1 as much above that as that is above the median (for a stack whose
    likenesses vary little, as much as for the stack in the middle). These are quantiles, so that a few stacks of the
    same person do not move them.
    """
    alike = alike.astype(np.float64)
    np.fill_diagonal(alike, np.nan)
    middle, high = np.nanpercentile(alike, (50, 90), axis=1)
    unit = np.maximum(high - middle, max(np.median(high - middle), 1e-3))
    score = (alike - high[:, None]) / unit[:, None]
    return (score + score.T) / 2


def find(stacks: Stacks, label: np.ndarray) -> Found:
    """Pairs of stacks that look like one person's.

    Args:
        stacks: as `read` gives them, LEAST to MOST.
        label: (N,) of each stack; -1 = unknown. Stacks of different labels count as different people when the threshold
            is set.
    """
    alike = likeness(stacks)
    score = normalised(np.arctanh(np.clip(alike, -0.999, 0.999)))
    one, other = np.triu_indices(len(alike), 1)
    values, plain = score[one, other], alike[one, other]
    different = (label[one] >= 0) & (label[other] >= 0) & (label[one] != label[other])
    certain = int(different.sum()) if different.sum() >= CERTAIN else 0
    threshold = _threshold(values[different] if certain else values, len(values))
    beyond = np.flatnonzero((values > threshold) & (plain > ALIKE))
    beyond = beyond[np.argsort(-values[beyond], kind="stable")]
    pairs = np.stack([one[beyond], other[beyond]], axis=1)
    return Found(pairs, plain[beyond], tuple(np.percentile(plain, (50, 99.9)).tolist()), certain, len(values))


def _threshold(strangers: np.ndarray, pairs: int) -> float:
    """The score that FALSE_ALARMS of so many pairs of strangers are expected to exceed.

    Beyond a high quantile the distribution of strangers is taken as exponential; its decay is read from there to where
    half as many are left: a hundred pairs at least, among which a few repeats do not matter.
    """
    tail = max(0.01, min(0.5, 100 / len(strangers)))
    start, half = np.quantile(strangers, (1 - tail, 1 - tail / 2))
    decay = max(half - start, 1e-3) / np.log(2)
    return float(start + decay * np.log(tail * pairs / FALSE_ALARMS))


def search(source, label: np.ndarray | None = None) -> Found | None:
    """Pairs of scans of a source that look like one person's: `find`, with places in `np.unique(source.scan)`.

    Args:
        source: a `dataset.Source`.
        label: (N,) of each scan; None: the source's.

    Returns:
        None where there are too few stacks to tell, or slices that are no stacks.

    Raises:
        DataError: for more than MOST stacks.
    """
    scans, first = np.unique(source.scan, return_index=True)
    if len(scans) < LEAST or len(source.scan) < 3 * len(scans):
        return None
    if len(scans) > MOST:
        raise archive.DataError(f"--data {source.path}: {len(scans):,} stacks are too many to compare (limit {MOST}).")
    return find(read(source), source.label[first] if label is None else label)


def across_splits(source) -> list[tuple[str, str]] | None:
    """Names of scans in two splits that look like one person's, the most alike first; None where nobody can tell."""
    if (found := search(source)) is None:
        return None
    first = np.unique(source.scan, return_index=True)[1]
    pairs = found.pairs[source.split[first[found.pairs[:, 0]]] != source.split[first[found.pairs[:, 1]]]]
    return [tuple(source.case_names[case] for case in pair) for pair in source.case[first[pairs]].tolist()]


def groups(pairs: np.ndarray, case: np.ndarray) -> np.ndarray:
    """Who is whom: (N,) the group of each stack, when those of a pair and those of one case are one person's.

    Args:
        pairs: (P, 2) places of stacks.
        case: (N,) whom names take each stack for.
    """
    _, place = np.unique(case, return_inverse=True)
    ends = np.concatenate([pairs, np.stack([np.arange(len(case)), len(case) + place], axis=1)])
    size = len(case) + place.max() + 1
    links = sparse.coo_array((np.ones(len(ends), bool), ends.T), (size, size))
    return sparse.csgraph.connected_components(links, directed=False)[1][: len(case)]


def propose(source, labels=None, missing=(), links=None) -> tuple[list[str], str]:
    """What `dataset.py people` says, line by line, and the table that it writes: case, person, and other columns.

    Args:
        source: a `dataset.Source`, opened without a table, but linked.
        labels: path of a table of its scans, whose labels tell different people, and whose columns are kept.
        missing: texts that mean unknown in it.
        links: as `propose_links` gives them; they get rows in the table.

    Raises:
        DataError: naming the table that cannot be read.
    """
    known = table.find(source.store, labels, set(source.case_names.values()), missing)
    if "person" in known:
        known = {name: column for name, column in known.items() if name not in ("person", "slice")}
    scans, first = np.unique(source.scan, return_index=True)
    case, split, label = source.case[first], source.split[first], source.label[first]
    names = [source.case_names[number] for number in case.tolist()]
    if "label" in known and not source.label_names:
        values = [known["label"].get(table.person(name), "") for name in names]
        label = np.unique(["", *values], return_inverse=True)[1][1:] - 1
    found = search(source, label)
    group = groups(np.empty((0, 2), int) if found is None else found.pairs, case)
    shared = {g: sorted({names[i] for i in np.flatnonzero(group == g)}) for g in np.unique(group).tolist()}
    person = {name: shared[g][0] for name, g in zip(names, group.tolist(), strict=True)}
    if found is None:
        said = [f"{len(scans)} stacks of slices: too few, or too short, to tell who is like whom (least {LEAST})"]
        return said, _written(person, known, links) if links else ""
    return _said(found, shared, case, split, group), _written(person, known, links)


def _written(person: dict[str, str], known: dict[str, dict], links) -> str:
    """The table {case: person}, with other columns, and a row for every link: see `ldm.data.table.read`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *(["slice"] if links else []), "person", *known])
    for name, who in sorted(person.items()):
        said = [column.get(table.person(name), "") for column in known.values()]
        writer.writerow([name, *([""] if links else []), who, *said])
    for name, onward in sorted((links or {}).items()):
        for first, whose in sorted(onward.items()):
            writer.writerow([name, first, whose, *[""] * len(known)])
    return text.getvalue()


def _said(found: Found, shared: dict[int, list[str]], case, split, group) -> list[str]:
    """Lines on what was found: how sure it is, how many people there are, and how many of them are in two splits."""
    basis = f"{found.certain:,} pairs of different labels" if found.certain else "all pairs but the most alike"
    middle, high = found.strangers
    lines = [
        f"{found.compared:,} pairs of scans compared; likeness of strangers: {middle:.2f} in the middle, 1 in 1,000 is "
        f"above {high:.2f}"
    ]
    joined = {g: names for g, names in shared.items() if len(names) > 1}
    if len(found.pairs):
        lines.append(
            f"{len(found.pairs)} pairs look like one person's, likeness {found.likeness.min():.2f} to "
            f"{found.likeness.max():.2f}; {FALSE_ALARMS} pairs of strangers are expected among them (threshold set on "
            f"{basis})"
        )
    by_name = int(sum(n * (n - 1) // 2 for n in np.unique(case, return_counts=True)[1]))
    if by_name:
        both = int((case[found.pairs[:, 0]] == case[found.pairs[:, 1]]).sum())
        lines.append(f"of {by_name} pairs that are one person's by their names, {both} are by their looks")
    across = sum(len(np.unique(split[group == g])) > 1 for g in joined)
    lines.append(
        f"people: {len(np.unique(case))} by names, {len(shared)} by looks; {len(joined)} have several names, "
        f"{max(map(len, joined.values()), default=1)} at most, and {across} of these are in two splits"
    )
    return lines + [f"    {' = '.join(names)}" for names in list(joined.values())[:EXAMPLES]]


# ---- stacks that change heads ----------------------------------------------------------------------------------------


def head_changes(source, chosen=None) -> list[Change]:
    """Where stacks go on with another head.

    Args:
        source: a `dataset.Source`.
        chosen: numbers of the scans to look at; None: all.
    """
    scans = np.unique(source.scan) if chosen is None else np.asarray(chosen)
    rows = np.flatnonzero(np.isin(source.scan, scans))
    rows = rows[np.argsort(source.z[rows], kind="stable")]
    heights, starts = np.unique(source.z[rows], return_index=True)
    if len(scans) < 2 or len(heights) < 3:
        return []
    batches = pixels.read(source, tf.data.Dataset.from_tensor_slices(rows).batch(64), 2 * FRAME, 64).prefetch(4)
    before, gaps = None, []
    pending = np.empty((0, 2 * FRAME, 2 * FRAME), np.uint8)
    stream = iter(batches.as_numpy_iterator())
    bar = tqdm(total=len(rows), desc="neighbours", delay=5, leave=False, disable=None)
    with pixels.data_errors(source), bar:
        for z, mine in zip(heights.tolist(), np.split(source.scan[rows], starts[1:]), strict=True):
            while len(pending) < len(mine):
                pending = np.concatenate([pending, next(stream)[..., 0]])
            told = _told(pending[: len(mine)])
            pending = pending[len(mine) :]
            now = z, mine, _unit(told - told.mean(axis=0))
            if before is not None:
                gaps.append(_neighbours(before, now))
            before = now
            bar.update(len(mine))
    usual = np.median([np.median(own) for *_, own, _ in gaps if len(own)] or [0.0])
    if usual < NEIGHBOURS:  # slices that lie far apart: nothing can be told
        return []
    return [change for gap in gaps if (change := _change(*gap, usual))]


def _neighbours(below, above):
    """What two neighbouring slice indices say: (z, z), scans that have both, (N,) own and (N, N) all correlations."""
    (z, scan, told), (after, next_scan, next_told) = below, above
    both, one, other = np.intersect1d(scan, next_scan, return_indices=True)
    all_of_them = told[one] @ next_told[other].T
    return (z, after), both, np.diag(all_of_them).copy(), all_of_them


def _change(gap, scans, own, alike, usual) -> Change | None:
    """A `Change`, if there is one: see `head_changes`. `usual` is the correlation of neighbours."""
    if len(scans) < 2:
        return None
    others = alike.copy()
    np.fill_diagonal(others, -1)
    changed = (own < others.max(axis=1)) & (own < usual / 2)
    if not changed.any():
        return None
    below, above = optimize.linear_sum_assignment(-alike[np.ix_(changed, changed)])
    names = scans[changed]
    likeness = float(alike[np.ix_(changed, changed)][below, above].mean())
    return Change(*gap, len(scans), names, names[above], likeness)


def describe(source) -> list[str]:
    """A sentence for each place where stacks change heads, in at most LOOKED_AT stacks."""
    scans = np.unique(source.scan)
    changes = head_changes(source, scans[evenly(len(scans), LOOKED_AT)])
    return [
        f"note: {_changed(change)}; `dataset.py people` writes a table for --labels that links them anew"
        for change in changes
    ]


def _changed(change: Change) -> str:
    return f"{len(change.changed)} of {change.stacks} people change heads between slices {change.z} and {change.after}"


def propose_links(source) -> tuple[list[str], dict[str, dict[int, str]]]:
    """What `dataset.py people` says of stacks that change heads, and who goes on with whom.

    Returns:
        Lines, and {case: {first slice: whose its slices are from there on}} as `ldm.data.people.link` takes it. Empty
        where none changes; lines alone where people have several scans, among which a table cannot choose.
    """
    scans, first = np.unique(source.scan, return_index=True)
    names = [source.case_names[number] for number in source.case[first].tolist()]
    name = dict(zip(scans.tolist(), names, strict=True))
    lines, links = [], {}
    whose = {scan: name[scan] for scan in scans.tolist()}  # to whom the slices of each stack belong, from below upwards
    for change in head_changes(source):
        lines.append(f"{_changed(change)}; linked anew, neighbours have a mean correlation of {change.likeness:.2f}")
        onward = zip(change.changed.tolist(), change.onward.tolist(), strict=True)
        whose |= {other: whose[scan] for scan, other in onward}
        for other in sorted(change.onward.tolist()):
            links.setdefault(name[other], {})[change.after] = whose[other]
    if links and len(set(names)) < len(names):
        return [*lines, "people have several scans, so that no table can link them: sort the slices anew"], {}
    return lines, links
