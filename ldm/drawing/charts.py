"""Curves, scatter plots and histograms: every picture with axes.

Plain numbers in, one PNG out, drawn with `matplotlib.figure.Figure` (no pyplot, no global state) and written by
`ldm.drawing.figures.write_figure`, so the promises made there hold here as well: whole files only, same input, same
bytes.

Every chart must be readable in grey print and 700 pixels wide on a telephone: what differs in colour also differs in
marker, dash or hatch.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.drawing.figures import DPI, near_square, write_figure
from ldm.later import Later

canvas, ticker = Later("matplotlib.figure"), Later("matplotlib.ticker")

TRAINING, VALIDATION = {"color": "#1f4e79"}, {"color": "#d9730d"}  # distinct in grey print and to colour-blind readers
WHOLE, FOREGROUND, BACKGROUND = {"color": "black"}, {**VALIDATION, "ls": "--"}, {**TRAINING, "ls": ":"}
FAINT = {"color": "0.65", "lw": 1, "marker": ""}
MARKERS = "os^DvPX*"  # one per curve, so that grey print tells them apart
CURVES = ("#1f4e79", "#d9730d", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#000000")  # 7 to 8 markers: 56 pairs
DASHES = ("-", "--", ":", "-.")
VISIBLE = 30  # times as long as the shortest bar, the longest one leaves too little of it
LETTER = 11  # points: charts of a report are 720 pixels wide, and shrunk to half of that on a telephone
SPREAD = "mean; shaded: one standard deviation either way"


# ------------------------------------------------------------------------------------------------ histories of training


def _by_column(rows: Sequence[dict]) -> dict[str, dict[float, float]]:
    """Rows of a history, {column: number} each, turned into {column: {epoch: number}}, in the order of the columns."""
    history: dict[str, dict[float, float]] = {}
    for row in rows:
        for column, value in row.items():
            if column != "epoch":
                history.setdefault(column, {})[row["epoch"]] = value
    if not history:
        raise ValueError("the history holds no epoch with a number in it: nothing to draw")
    return history


def _panels(count: int) -> tuple["canvas.Figure", np.ndarray]:
    """A figure of small multiples and its `count` axes, row by row."""
    columns = min(near_square(count), 4)  # more than 4 abreast no longer fit a page
    rows = math.ceil(count / columns)
    figure = canvas.Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def _plain(axes, title: str, colour: str = "black") -> None:
    """Give an axes the looks that all curves here share."""
    axes.set_title(title, fontsize=10, loc="left", color=colour)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_metric(axes, name: str, series: list[tuple[str, dict, dict[float, float]]]) -> None:
    """Draw the curves of one metric, each (legend, looks of the line, {epoch: value}), into one axes."""
    shown: list[float] = []
    lost = 0
    for legend, looks, points in series:
        finite = sorted((epoch, value) for epoch, value in points.items() if math.isfinite(value))
        lost += len(points) - len(finite)
        if finite:
            epochs, values = zip(*finite, strict=True)
            # Dots where there are few points: a single one draws no line at all.
            looks = {"lw": 1.6, "marker": "o" if len(values) <= 20 else "", "ms": 3} | looks
            axes.plot(epochs, values, label=legend, **looks)
            shown += values
    if shown and min(shown) > 0 and max(shown) > 10 * min(shown):
        axes.set_yscale("log")
    # A diverged run must not look like a shorter one.
    note = f"  ({lost} not finite)" if lost else ""
    _plain(axes, name + note, "#b00020" if lost else "black")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, (left + right - 1) / 2), max(right, (left + right + 1) / 2))  # at least one epoch wide
    if len(series) > 1 and shown:
        axes.legend(fontsize=8, frameon=False)


def loss_curves(rows: Sequence[dict], png_path: str | Path) -> None:
    """Draw the history of a training run as small multiples, one panel per metric, training and validation together.

    The vertical axis is logarithmic where all values are positive and span more than a decade.

    Args:
        rows: the history, {"epoch": number, metric: number, ...} for each epoch; "val_" stands before the metrics of
            the validation data. A metric that was not measured in an epoch is left out there; NaN is a result.
        png_path: PNG file to write.

    Raises:
        ValueError: if there is no epoch yet.
    """
    history = _by_column(rows)
    names = list(dict.fromkeys(column.removeprefix("val_") for column in history))  # in the file's order, each once
    figure, panels = _panels(len(names))
    for panel, name in zip(panels, names, strict=True):
        candidates = (("training", TRAINING, name), ("validation", VALIDATION, f"val_{name}"))
        _draw_metric(panel, name, [(legend, looks, history[c]) for legend, looks, c in candidates if c in history])
    for panel in panels[-panels[0].get_gridspec().ncols :]:  # the lowest panel of every column
        panel.set_xlabel("epoch", fontsize=9)
    write_figure(png_path, figure)


def _as_counts(foreground, background) -> np.ndarray:
    """Check how often each code was used, and return both counts as (2, K)."""
    counts = [np.asarray(foreground), np.asarray(background)]
    shapes = [array.shape for array in counts]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(f"foreground and background must be counts of one shape (K,), not {shapes[0]} and {shapes[1]}")
    counts = np.stack(counts)
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError("foreground and background must be counts: finite and not negative")
    return counts


def dead_codes(foreground, background) -> int:
    """The number of codes of a codebook that were never used, given the counts (K,) in the brain and beside it."""
    return int((~_as_counts(foreground, background).any(axis=0)).sum())


def _draw_ranks(axes, foreground, background) -> None:
    """Draw how often codes are used against their rank, both logarithmic, foreground and background ranked apart."""
    size = len(foreground)
    for legend, looks, counts in (("foreground", FOREGROUND, foreground), ("background", BACKGROUND, background)):
        used = np.sort(counts[counts > 0])[::-1]
        marker = "o" if len(used) <= 20 else ""
        label = f"{legend}: {len(used):,} used"
        axes.plot(np.arange(1, len(used) + 1), used, label=label, lw=1.6, marker=marker, ms=3, **looks)
    top = max(5, foreground.max(), background.max()) ** 1.6  # the upper third is for the legend
    axes.set(xscale="log", yscale="log", xlim=(0.8, 1.3 * size), ylim=(0.8, top))
    axes.set_xlabel("rank", fontsize=9)
    _plain(axes, "how often each code was used, last epoch")
    title = f"{dead_codes(foreground, background):,} of {size:,} codes dead"
    # No "best" place: matplotlib would search through every code for it.
    axes.legend(title=title, title_fontsize=8, fontsize=8, alignment="left", loc="upper right", frameon=False)


def codebook_health(rows: Sequence[dict], png_path: str | Path, foreground, background) -> None:
    """Draw how the codebook of a VQ-VAE is used: usage, perplexity, revivals over the epochs, and its codes by rank.

    A panel whose columns the history lacks is left out; so are the revivals where there were none.

    Args:
        rows: the history, for each epoch {"epoch": number} and any of "usage", "usage_foreground", "usage_background"
            (shares of the codes, in [0, 1]), "perplexity", "revived" (a sum over the epoch).
        png_path: PNG file to write.
        foreground: (K,) how often each code was used in the last epoch where latents show brain.
        background: (K,) likewise where they show none.

    Raises:
        ValueError: if there is no epoch yet, or the counts are not two of one length K, finite and not negative.
    """
    counts = _as_counts(foreground, background)
    history = _by_column(rows)
    size = counts.shape[1]
    parts = {
        "usage": ("whole", WHOLE),
        "usage_foreground": ("foreground", FOREGROUND),
        "usage_background": ("background", BACKGROUND),
    }
    percent = {column: {epoch: 100 * share for epoch, share in history.get(column, {}).items()} for column in parts}
    usage = [(*parts[column], points) for column, points in percent.items() if points]
    drawn = {"codes used (%)": usage} if usage else {}
    if perplexity := history.get("perplexity"):
        ends = {min(perplexity) - 0.5: size, max(perplexity) + 0.5: size}  # a line even where there is one epoch only
        drawn["perplexity"] = [("perplexity", WHOLE, perplexity), (f"K: {size:,} codes", FAINT, ends)]
    if any(history.get("revived", {}).values()):
        drawn["codes revived per epoch"] = [("revived", WHOLE, history["revived"])]
    figure, panels = _panels(len(drawn) + 1)
    for panel, (name, series) in zip(panels, drawn.items(), strict=False):
        _draw_metric(panel, name, series)
        panel.set_xlabel("epoch", fontsize=9)
        if series is usage:
            panel.set(yscale="linear", ylim=(-2, 102))  # fixed, so that two runs compare
    _draw_ranks(panels[-1], *counts)
    write_figure(png_path, figure)


# ---------------------------------------------------------------------------------------------- what was measured


def _as_points(name: str, points, what: Sequence[str] = ("bits", "foreground SSIM", "PSNR")) -> np.ndarray:
    """Check the points of a curve, three numbers each, and return them as (3, N) by the first one, rising."""
    points = [tuple(point) for point in points]
    if not points or any(len(point) != 3 for point in points):
        raise ValueError(f"{name}: points must be ({', '.join(what)}) each, not {points}")
    points = np.array(points, float)
    if not np.isfinite(points).all() or (points[:, 0] <= 0).any():
        raise ValueError(f"{name}: points must be finite, and their {what[0]} above 0, not {points.tolist()}")
    return points[points[:, 0].argsort(kind="stable")].T


def rate_curve(path: str | Path, curves: dict[str, Sequence[tuple]], references: Sequence[tuple] = ()) -> None:
    """Draw what quality a first stage reaches for how many bits, foreground SSIM and PSNR side by side.

    Args:
        path: PNG file to write.
        curves: name -> points (bits per slice, foreground SSIM, PSNR in dB), joined by rising bits.
        references: (name, foreground SSIM, PSNR in dB) each, drawn as level dashed lines: what needs no bits at all,
            such as the mean image of every slice index.

    Raises:
        ValueError: if there is no curve, a point does not hold three finite numbers, or bits are not above 0.
    """
    series = {name: _as_points(name, points) for name, points in curves.items()}
    if not series:
        raise ValueError("a rate curve needs at least one curve")
    levels = [(name, _as_points(name, [(1, *both)])) for name, *both in references]  # true at any number of bits
    figure = canvas.Figure(figsize=(7.6, 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2)
    for row, (axes, title) in enumerate(zip(panels, ("foreground SSIM", "PSNR (dB)"), strict=True), 1):
        for number, (name, points) in enumerate(series.items()):
            marker, colour = MARKERS[number % len(MARKERS)], CURVES[number % len(CURVES)]
            axes.plot(points[0], points[row], label=name, marker=marker, color=colour, lw=1.4, ms=6)
        for number, (name, level) in enumerate(levels):
            dashes = (0, (7 / 2**number, 2))  # the later the shorter
            axes.axhline(level[row, 0], label=name, color="0.45", ls=dashes, lw=1.2, zorder=1)
        axes.set_xscale("log")
        axes.margins(x=0.08, y=0.08)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 20k
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("bits per slice", fontsize=9)
        _plain(axes, title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False, handlelength=3)
    write_figure(path, figure)


def _single(height: float) -> tuple["canvas.Figure", "canvas.Axes"]:
    """A figure of one axes, as wide as the page of a report."""
    figure = canvas.Figure(figsize=(7.2, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _looks(number: int) -> dict:
    """Colour, marker and dashes of a curve by its number: colour alone would be lost in grey print."""
    kinds = {"color": CURVES, "marker": MARKERS, "ls": DASHES}
    return {"lw": 1.5, "ms": 4, **{key: values[number % len(values)] for key, values in kinds.items()}}


def _finish(path: str | Path, axes: "canvas.Axes", x: str, y: str, title: str | None, note: str | None = None) -> None:
    """Label the one axes of a figure, put the legend below it, where it hides nothing, and write the figure."""
    _plain(axes, title or "")
    axes.title.set_fontsize(LETTER)
    axes.tick_params(labelsize=LETTER)
    axes.set_xlabel(x, fontsize=LETTER)
    axes.set_ylabel(y, fontsize=LETTER)
    if labels := axes.get_legend_handles_labels()[1]:
        columns = 2 if max(map(len, labels)) <= 32 else 1
        looks = {"fontsize": LETTER, "title_fontsize": LETTER, "frameon": False, "handlelength": 3, "markerscale": 1.6}
        axes.figure.legend(loc="outside lower center", ncols=columns, title=note, **looks)
    write_figure(path, axes.figure)


def _as_numbers(name: str, values) -> np.ndarray:
    """Check that `values` are one or more finite numbers (N,)."""
    values = np.asarray(values, float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite numbers (N,), at least one")
    return values


def _draw_band(axes: "canvas.Axes", x, mean: np.ndarray, spread: np.ndarray, label: str, looks: dict) -> None:
    """Draw a mean as a line and one standard deviation around it as a shade."""
    axes.fill_between(x, mean - spread, mean + spread, color=looks["color"], alpha=0.15, lw=0)
    axes.plot(x, mean, label=label, **looks)


def by_slice_index(path: str | Path, series: dict[str, tuple], label: str, title: str | None = None) -> None:
    """Draw how a measurement depends on the slice index: the mean over people or slices, one standard deviation shaded.

    Args:
        path: PNG file to write.
        series: name -> (z, values), integer slice indices (N,) and a number each (N,). Values that are not finite
            (a score that is undefined on an empty slice) are left out, and counted in the legend.
        label: what the values are, with their unit.
        title: of the figure.

    Raises:
        ValueError: if there is no series, or z and values are not of one shape (N,).
    """
    if not series:
        raise ValueError("a chart by slice index needs at least one series")
    _, axes = _single(4.2)
    for number, (name, (z, values)) in enumerate(series.items()):
        z, values = np.asarray(z), np.asarray(values, float)
        if z.ndim != 1 or z.shape != values.shape:
            raise ValueError(f"{name}: z and values must have one shape (N,), not {z.shape} and {values.shape}")
        finite = np.isfinite(values)
        lost = f" ({np.sum(~finite)} not finite)" if not finite.all() else ""
        indices = np.unique(z[finite])
        groups = [values[finite & (z == index)] for index in indices]
        mean, spread = (np.array([f(group) for group in groups]) for f in (np.mean, np.std))
        _draw_band(axes, indices, mean, spread, name + lost, _looks(number))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True))
    _finish(path, axes, "slice index", label, title, SPREAD)


def distances(path: str | Path, samples, baseline, threshold: float, label: str) -> None:
    """Draw how far generated slices and slices of test people lie from their nearest training slice, as shares.

    Args:
        path: PNG file to write.
        samples: (N,) distance of each generated slice.
        baseline: (M,) distance of each slice of people whom training never saw.
        threshold: distance below which a slice counts as a copy.
        label: what the distance is, with its unit.

    Raises:
        ValueError: if distances or threshold are none or not finite.
    """
    both = {"test people": _as_numbers("baseline", baseline), "generated": _as_numbers("samples", samples)}
    _as_numbers("threshold", [threshold])
    edges = np.histogram_bin_edges(np.concatenate([*both.values(), [threshold]]), 40)
    _, axes = _single(4.2)
    for looks, (name, values) in zip(
        ({"fill": True, "color": "0.78"}, {**TRAINING, "lw": 2}), both.items(), strict=True
    ):
        share = np.histogram(values, edges)[0] / len(values)
        closer = (values < threshold).mean()
        axes.stairs(100 * share, edges, label=f"{name}: {100 * closer:.1f}% below the threshold", **looks)
    axes.axvline(threshold, color="black", ls="--", lw=1.4, label=f"copy threshold: {threshold:.3g}")
    _finish(path, axes, label, "share of slices (%)", None)


def embedding(path: str | Path, points, groups, title: str, continuous: bool = False) -> None:
    """Draw points of a 2-D embedding, coloured by group or by a number. Its axes have no unit, so they bear no ticks.

    Args:
        path: PNG file to write.
        points: (N, 2).
        groups: (N,) a name each; or, if `continuous`, a number each, such as the slice index, with a colour bar.
        title: of the figure; says what the colour means.
        continuous: whether groups are numbers on a scale.

    Raises:
        ValueError: if points are not finite (N, 2), at least one, or there are not N groups.
    """
    points, groups = np.asarray(points, float), np.asarray(groups)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"points must be finite numbers (N, 2), at least one, not of shape {points.shape}")
    if groups.shape != points.shape[:1]:
        raise ValueError(f"{len(points)} points but groups of shape {groups.shape}")
    figure, axes = _single(5.6)
    looks = {"s": float(np.clip(12_000 / len(points), 9, 40)), "linewidths": 0}
    if continuous:
        drawn = axes.scatter(*points.T, c=_as_numbers("groups", groups), cmap="viridis", alpha=0.8, **looks)
        figure.colorbar(drawn, shrink=0.8).ax.tick_params(labelsize=LETTER)
    for number, name in enumerate([] if continuous else np.unique(groups)):
        members = points[groups == name]
        marker, colour = MARKERS[number % len(MARKERS)], CURVES[number % len(CURVES)]
        axes.scatter(*members.T, c=colour, marker=marker, alpha=0.6, label=f"{name} ({len(members):,})", **looks)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", "datalim")
    _finish(path, axes, "", "", title)


def ranking(path: str | Path, rows: dict[str, tuple], label: str) -> None:
    """Draw a distance as horizontal bars from top to bottom, with its standard error: floor, model, bad generators.

    Where the longest bar would make others invisible, the axis is linear around 0 and logarithmic beyond, and says so.

    Args:
        path: PNG file to write.
        rows: name -> (value, standard error), the latter None or NaN where it is not known.
        label: what the value is, with its unit.

    Raises:
        ValueError: if there is no row, or a value is not finite.
    """
    values = _as_numbers("values of a ranking", [value for value, _ in rows.values()])
    errors = np.array([error for _, error in rows.values()], float)
    known = np.nan_to_num(errors)
    _, axes = _single(0.9 + 0.5 * len(rows))
    places = np.arange(len(rows))
    axes.barh(places, values, xerr=errors, color="#7f9fbf", edgecolor="black", height=0.62, lw=0.6, capsize=4)
    for place, value, error in zip(places, values, errors, strict=True):
        words = f"{value:.3g}" + (f" ± {error:.2g}" if np.isfinite(error) else "")
        end = max(0, value + np.nan_to_num(error))
        axes.annotate(words, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=LETTER)
    ends = np.array([min(0, (values - known).min()), max(0, (values + known).max())])
    sizes = np.maximum(np.abs(values), known)
    least = sizes.min(where=sizes > 0, initial=np.inf)
    if sizes.max() > VISIBLE * least:
        axes.set_xscale("symlog", linthresh=least)
        axes.xaxis.set_major_formatter("{x:.3g}")
        label += f"; logarithmic beyond {least:.2g}"
    scale = axes.xaxis.get_transform()
    low, high = scale.transform(ends)
    room = low - 0.03 * (high - low), high + 0.36 * ((high - low) or 1)  # the right end is for the numbers
    axes.set_xlim(*scale.inverted().transform(room))
    axes.set_yticks(places, [textwrap.fill(name, 24) for name in rows])
    axes.invert_yaxis()
    axes.axvline(0, color="black", lw=0.8)
    _finish(path, axes, label, "", None)


def ladder(path: str | Path, curves: dict[str, Sequence[tuple]], label: str) -> None:
    """Draw the quality of samples against what they cost, one curve per sampler, network calls on a logarithmic axis.

    The vertical axis is logarithmic too where all values are positive and span more than a decade.

    Args:
        path: PNG file to write.
        curves: sampler -> points (network calls, value, standard error).
        label: what the value is, with its unit.

    Raises:
        ValueError: if there is no curve, a point does not hold three finite numbers, or calls are not above 0.
    """
    series = {name: _as_points(name, points, ("network calls", "value", "error")) for name, points in curves.items()}
    if not series:
        raise ValueError("a ladder needs at least one curve")
    _, axes = _single(4.4)
    for number, (name, (calls, values, errors)) in enumerate(series.items()):
        axes.errorbar(calls, values, errors, label=name, capsize=3, elinewidth=1, **_looks(number) | {"ms": 6})
    values = np.concatenate([points[1] for points in series.values()])
    axes.set_xscale("log")
    axes.set_yscale("log" if values.min() > 0 and values.max() > 10 * values.min() else "linear")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    _finish(path, axes, "network calls per sample", label, None)


def histograms(path: str | Path, real, fake) -> None:
    """Draw the mean grey-level histogram of real and of generated slices, one standard deviation over slices shaded.

    Args:
        path: PNG file to write.
        real: (N, B) the histogram of each slice, counts or shares in B equal bins from black to white. Each is scaled
            to a sum of 100 %; empty ones (a slice without brain) and those with NaN are left out.
        fake: (M, B) likewise of generated slices.

    Raises:
        ValueError: if they are not of such shapes, or none is left.
    """
    real, fake = np.asarray(real, float), np.asarray(fake, float)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"histograms must have shapes (N, B) and (M, B), not {real.shape} and {fake.shape}")
    _, axes = _single(4.2)
    for number, (name, counts) in enumerate((("real", real), ("generated", fake))):
        counts = counts[counts.sum(axis=1) > 0]  # false for NaN
        if not len(counts):
            raise ValueError(f"{name}: no histogram holds any pixel")
        share = 100 * counts / counts.sum(axis=1, keepdims=True)
        levels = 100 * (np.arange(share.shape[1]) + 0.5) / share.shape[1]
        label = f"{name}: {len(counts):,} slices"
        _draw_band(axes, levels, share.mean(0), share.std(0), label, _looks(number) | {"marker": ""})
    axes.set(xlim=(0, 100))
    axes.set_ylim(bottom=0)
    _finish(path, axes, "grey level (% of range)", "share of pixels (%)", None, SPREAD)
