"""Pictures made of pictures: contact sheets, denoising GIFs, labelled comparisons, tissue maps.

What has axes lives in `ldm.drawing.charts`, and these two are the only rooms that import matplotlib. This one knows
nothing of models or datasets. It takes the images the rest of the project works with, floats (N, H, W, 1) or (N, H, W)
in [-1, 1], and turns them into 8-bit grey in one place, `to_uint8`. Anything array-like will do, tensors included.

Three promises hold for every file written here, and for those of `ldm.drawing.charts`, which are written by
`write_figure`:

- atomic: it is written under a temporary name in the same folder and then renamed, so whoever watches the folder never
  opens half a picture, and a failure leaves the previous picture as it was;
- reproducible: same input, same bytes (no dates, no software versions), so a changed picture means a changed result;
- no global state: `matplotlib.figure.Figure` is used directly, without pyplot, so nothing leaks between calls, no
  display is needed, and drawing inside a training callback is safe.
"""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange, repeat
from PIL import Image

from ldm import files
from ldm.batches import evenly
from ldm.later import Later
from ldm.tissue import NAMES

cm, colors = Later("matplotlib.cm"), Later("matplotlib.colors")
canvas, patches = Later("matplotlib.figure"), Later("matplotlib.patches")
iio = Later("imageio.v3")

GAP = 2  # pixels between two tiles
GREY = 48  # grey value of gaps and empty tiles: dark, yet told apart from the black background of a slice
MOST_FPS = 50  # of a GIF: viewers slow down what is faster
DPI = 100  # of every matplotlib figure; labelled sheets measure in pixels and only divide by it
# Of the tissue classes, and of the unknown, -1. Blue, orange, pale yellow also grow brighter in this order, as in a
# T1 picture.
COLOURS = ((0, 0, 0), (0, 114, 178), (230, 159, 0), (250, 240, 160), (GREY, GREY, GREY))


# ---------------------------------------------------------------------------------------------------- arrays to arrays


def _as_stack(images) -> np.ndarray:
    """Return `images` as float32 (N, H, W), with at least one image and no NaN."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        raise ValueError("images are uint8 already; figures take floats in [-1, 1]")
    images = images.astype(np.float32)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (N, H, W) or (N, H, W, 1), none of them 0, not {images.shape}")
    if np.isnan(images).any():
        broken = int(np.isnan(images).any(axis=(1, 2)).sum())
        raise ValueError(f"{broken} of {len(images)} images hold NaN: the model that made them has diverged")
    return images


def to_uint8(images) -> np.ndarray:
    """Turn images of the project into 8-bit grey: -1 becomes 0, 1 becomes 255, anything beyond is clipped.

    Args:
        images: floats (N, H, W, 1) or (N, H, W) in [-1, 1].

    Returns:
        uint8 (N, H, W).

    Raises:
        ValueError: on another shape, on no image at all, on uint8 input, on NaN.
    """
    grey = np.round((_as_stack(images) + 1) / 2 * 255)
    return np.clip(grey, 0, 255).astype(np.uint8)


def _factor(height: int, width: int, minimum: int) -> int:
    """The smallest whole factor that brings both sides to at least `minimum` pixels."""
    return max(1, math.ceil(minimum / min(height, width)))


def enlarge(images, minimum: int = 128) -> np.ndarray:
    """Scale small images up by the smallest whole factor that brings both sides to at least `minimum` pixels.

    Bicubic: a 64-pixel brain shown as blocks hides its shape, shown smoothly it does not.

    Args:
        images: floats (N, H, W, 1) or (N, H, W) in [-1, 1].
        minimum: wanted length of the shorter side in pixels; images already that large are returned as they are.

    Returns:
        float32 (N, k H, k W). Bicubic interpolation may overshoot [-1, 1] a little at edges; `to_uint8` clips.
    """
    images = _as_stack(images)
    height, width = images.shape[1:]
    factor = _factor(height, width, minimum)
    if factor == 1:
        return images
    size = (width * factor, height * factor)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images])


def near_square(count: int) -> int:
    """Columns for `count` tiles: no empty tile if the sheet stays within 3 : 1, else the squarest with some empty."""
    least = math.ceil(math.sqrt(count))
    return next((c for c in range(least, count + 1) if count % c == 0 and c * c <= 3 * count), least)


def _tile(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Lay uint8 tiles (N, H, W, ...) out row by row, `GAP` pixels of `GREY` between them, none around them."""
    rows = math.ceil(len(tiles) / columns)
    # Each tile brings the gap to its right and below it; the last ones' are cut off again.
    padding = ((0, rows * columns - len(tiles)), (0, GAP), (0, GAP), (0, 0))[: tiles.ndim]
    tiles = np.pad(tiles, padding, constant_values=GREY)
    return rearrange(tiles, "(r c) h w ... -> (r h) (c w) ...", c=columns)[:-GAP, :-GAP]


def sheet(images, columns: int | None = None) -> np.ndarray:
    """Tile images into one contact sheet, row by row from the top left.

    Args:
        images: floats (N, H, W, 1) or (N, H, W) in [-1, 1].
        columns: tiles per row; by default a near-square sheet (32 images give 4 rows of 8).

    Returns:
        uint8 (R H + (R - 1) GAP, C W + (C - 1) GAP) for R rows and C columns; tiles left empty are dark grey.

    Raises:
        ValueError: if `columns` is not positive, or the images are none (see `to_uint8`).
    """
    tiles = to_uint8(images)
    columns = near_square(len(tiles)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    return _tile(tiles, columns)


def denoising_frames(
    trajectory: Iterable[tuple],
    columns: int | None = None,
    with_prediction: bool = False,
    minimum: int = 128,
) -> list[np.ndarray]:
    """A trajectory from noise to slices as one contact sheet per moment, for `save_gif`.

    Args:
        trajectory: what a sampler yields, (x_t, x_0) per moment, both in image space (decoded, if the diffusion is
            latent): floats (N, H, W, 1) or (N, H, W). Values of a noisy x_t beyond [-1, 1] are clipped.
        columns: tiles per row of each sheet; near-square by default.
        with_prediction: put the sheet of the predicted x_0 to the right of the sheet of x_t; else x_0 may be None.
        minimum: shorter side of a tile in pixels; smaller images are enlarged by a whole factor.

    Returns:
        uint8 frames, all of one shape.

    Raises:
        ValueError: if the trajectory is empty.
    """
    frames = []
    for x_t, x_0 in trajectory:
        frame = sheet(enlarge(x_t, minimum), columns)
        if with_prediction:
            between = np.full((len(frame), 4 * GAP), GREY, np.uint8)  # wider than a gap: two sheets, not one
            frame = np.concatenate([frame, between, sheet(enlarge(x_0, minimum), columns)], axis=1)
        frames.append(frame)
    if not frames:
        raise ValueError("the trajectory holds no moment: nothing to show")
    return frames


# ------------------------------------------------------------------------------------------------------ arrays to files


def write_figure(path: str | Path, figure: "canvas.Figure") -> None:
    """Write a matplotlib figure as PNG, without the software version that matplotlib would put in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    files.write(path, buffer.getvalue())


def _as_frame(array) -> np.ndarray:
    """Check that `array` is a grey picture, uint8 (H, W)."""
    array = np.asarray(array)
    if array.ndim != 2 or array.dtype != np.uint8:
        raise ValueError(f"expected a uint8 (H, W) picture such as sheet() returns, not {array.dtype} {array.shape}")
    return array


def save_png(path: str | Path, array: np.ndarray) -> None:
    """Save a grey picture as PNG.

    Args:
        path: file to write; missing folders are made.
        array: uint8 (H, W), as `sheet` returns it.

    Raises:
        ValueError: if the array is anything else.
    """
    files.write(path, iio.imwrite("<bytes>", _as_frame(array), extension=".png"))


def save_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float = 12, hold: float = 1.5) -> None:
    """Save grey frames as a GIF that loops for ever and rests on its last frame.

    Nothing is lost: a GIF has room for all 256 greys. Consecutive frames that are equal are stored once, for as long as
    both would have been shown.

    Args:
        path: file to write; missing folders are made.
        frames: uint8 (H, W) each, all of one shape, as `denoising_frames` returns them.
        fps: frames per second, at most 50, beyond which browsers slow a GIF down to 10. GIF counts in 1/100 s.
        hold: seconds for which the last frame stays.

    Raises:
        ValueError: if there is no frame, shapes differ, or `fps` is out of range.
    """
    frames = [_as_frame(frame) for frame in frames]
    if not frames:
        raise ValueError("a GIF needs at least one frame")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"all frames must have one shape, not {sorted({frame.shape for frame in frames})}")
    if not 0 < fps <= MOST_FPS:
        raise ValueError(f"fps must lie in (0, {MOST_FPS}], not {fps}")
    # In whole 1/100 s, GIF's unit; written in milliseconds, imageio's unit.
    durations = [10 * round(100 / fps)] * (len(frames) - 1) + [10 * round(100 * hold)]
    how = {
        "duration": durations if len(frames) > 1 else durations[0],
        "loop": 0,  # for ever
        "optimize": False,  # would give every frame a palette of its own
    }
    data = iio.imwrite("<bytes>", np.stack(frames), extension=".gif", plugin="pillow", is_batch=True, **how)
    files.write(path, data)


# ---------------------------------------------------------------------------------------------------- labelled pictures


def labelled_sheet(
    path: str | Path,
    rows: dict[str, np.ndarray] | Sequence[tuple[str, np.ndarray]],
    column_titles: Sequence[str] | None = None,
    difference: tuple[str, np.ndarray] | None = None,
    limit: float = 0.2,
    minimum: int = 128,
) -> None:
    """Save rows of images with a title beside each row and above each column, pixel for pixel.

    Args:
        path: PNG file to write.
        rows: row title -> images, floats (N, H, W, 1) or (N, H, W) in [-1, 1], the same N, H, W in every row.
        column_titles: N titles.
        difference: optional last row, (title, a - b) for images a, b in [-1, 1]. Its magnitude |a - b| / 2, the error
            as a share of the whole grey range, is shown in colour, with the scale beside it.
        limit: error at which the colours end, in (0, 1]. Fixed rather than fitted, so that two pictures compare.
        minimum: shorter side of a tile in pixels; smaller images are enlarged by a whole factor.

    Raises:
        ValueError: if there is no row, the rows differ in shape, or the number of column titles is not N.
    """
    pairs = list(rows.items() if isinstance(rows, dict) else rows)
    tiles = [(title, enlarge(images, minimum)) for title, images in pairs]
    if difference is not None:
        title, signed = difference
        # Magnitude before interpolation: between an error of +x and one of -x lies no perfect pixel.
        tiles.append((title, enlarge(np.abs(_as_stack(signed)) / 2, minimum)))
    if not pairs or len({images.shape for _, images in tiles}) > 1:
        raise ValueError(f"rows must be images of one shape, not {[images.shape for _, images in tiles]}")
    columns, height, _ = tiles[0][1].shape
    if column_titles is not None and len(column_titles) != columns:
        raise ValueError(f"{columns} columns but {len(column_titles)} column titles")
    scale = cm.ScalarMappable(colors.Normalize(0, limit), "magma")
    painted = [(title, _grey_as_rgb(images)) for title, images in tiles[: len(pairs)]]
    painted += [(title, _painted(scale, errors)) for title, errors in tiles[len(pairs) :]]
    margin = GAP if difference is None else 7 * _letter(height)
    figure = _labelled_figure(painted, column_titles, margin)
    if difference is not None:
        _add_scale(figure, scale, margin, height)
    write_figure(path, figure)


def _grey_as_rgb(images) -> np.ndarray:
    """Images in [-1, 1], (N, H, W) -> uint8 (N, H, W, 3)."""
    return repeat(to_uint8(images), "n h w -> n h w rgb", rgb=3)


def _painted(scale: "cm.ScalarMappable", errors: np.ndarray) -> np.ndarray:
    """Errors (N, H, W) -> uint8 (N, H, W, 3) in the colours of a scale."""
    return scale.cmap(scale.norm(errors), bytes=True)[..., :3]


def _letter(height: int) -> int:
    """Size in pixels of the letters beside tiles of that height."""
    return int(np.clip(height // 11, 13, 20))


def _labelled_figure(
    rows: list[tuple[str, np.ndarray]], column_titles: Sequence[str] | None, margin: int = GAP
) -> "canvas.Figure":
    """Lay out rows of (title, uint8 tiles (N, H, W, 3)), with an empty `margin` in pixels to their right."""
    columns, height, width, _ = rows[0][1].shape
    # All lengths in pixels, origin at the bottom left as matplotlib has it.
    text = _letter(height)
    lines = max(title.count("\n") for title, _ in rows) + 1
    left, bottom = (lines + 1) * text, GAP
    top = 2 * text if column_titles is not None else GAP
    total_width = left + columns * (width + GAP) - GAP + margin
    total_height = bottom + len(rows) * (height + 2 * GAP) - 2 * GAP + top
    figure = canvas.Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI)
    points = text * 72 / DPI

    def label(x: float, y: float, words: str, room: int, **how) -> None:
        longest = max(map(len, words.split("\n")))
        size = min(points, points * room / (0.65 * text * longest + 1))  # a letter is about 0.65 of its size wide
        figure.text(x / total_width, y / total_height, words, fontsize=size, ha="center", va="center", **how)

    for number, (title, tiles) in enumerate(rows):
        y = total_height - top - height - number * (height + 2 * GAP)
        label(left / 2, y + height / 2, title, height, rotation=90)
        # figimage copies pixels without resampling, which an axes of the same size does not promise; and given
        # red, green, blue it also skips the colormap, whose rounding may shift a grey by one.
        figure.figimage(_tile(tiles, columns), left, y)
    for number, title in enumerate(column_titles or ()):
        label(left + number * (width + GAP) + width / 2, total_height - top / 2, title, width)
    return figure


def _add_scale(figure: "canvas.Figure", scale: "cm.ScalarMappable", margin: int, height: int) -> None:
    """Put the colour bar of errors into the margin of a labelled figure, beside its last row."""
    points = 0.85 * _letter(height) * 72 / DPI
    total_width, total_height = figure.bbox.size
    box = ((total_width - margin + 12) / total_width, (GAP + 0.06 * height) / total_height, 12 / total_width)
    axes = figure.add_axes((*box, 0.88 * height / total_height))
    bar = figure.colorbar(scale, cax=axes, extend="max", ticks=[0, scale.norm.vmax / 2, scale.norm.vmax])
    bar.ax.set_yticklabels([f"{100 * tick:.3g}%" for tick in bar.get_ticks()])
    bar.ax.tick_params(labelsize=points, length=3)
    bar.set_label("of grey range", fontsize=points)


def _slice_titles(z, total: int, chosen: list[int]) -> list[str] | None:
    """Column titles of the chosen ones of `total` slices; None without slice indices."""
    if z is None:
        return None
    z = np.asarray(z).reshape(-1)
    if len(z) != total:
        raise ValueError(f"{total} slices but {len(z)} slice indices")
    return [f"slice {index}" for index in z[chosen]]


def reconstruction_sheet(
    path: str | Path, real, fake, z=None, count: int = 8, limit: float = 0.2, called: str = "reconstructed"
) -> None:
    """Save real slices above their reconstructions above the error, so that what was lost can be pointed at.

    Args:
        path: PNG file to write.
        real: floats (N, H, W, 1) or (N, H, W) in [-1, 1].
        fake: the reconstructions, same shape and order.
        z: N integer slice indices for the column titles; no titles without.
        count: most columns to show; of more images, an even selection is taken.
        limit: error at which the colours end, as a share of the grey range.
        called: what was done to the second row.

    Raises:
        ValueError: if shapes differ, or there are not N slice indices.
    """
    real, fake = _as_stack(real), _as_stack(fake)
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have the same shape, not {real.shape} and {fake.shape}")
    chosen = evenly(len(real), count)
    titles = _slice_titles(z, len(real), chosen)
    real, fake = real[chosen], fake[chosen]
    rows = [("real", real), (called, fake)]
    labelled_sheet(path, rows, titles, difference=("|difference|", fake - real), limit=limit)


def pairs_sheet(
    path: str | Path,
    left,
    right,
    captions: Sequence[str] | None = None,
    titles: Sequence[str] = ("generated", "in training", "|difference|"),
    count: int = 8,
    limit: float = 0.2,
    minimum: int = 128,
) -> None:
    """Save pairs of images below each other, one pair a row: left, right and their difference, a caption beside them.

    Meant for the closest pairs of an audit, generated slice and nearest training slice: three tiles abreast are still
    large enough to judge on a telephone.

    Args:
        path: PNG file to write.
        left: floats (N, H, W, 1) or (N, H, W) in [-1, 1], the most telling pair first.
        right: the other half of each pair, same shape and order.
        captions: N captions, each at most a few lines; none by default.
        titles: of the three columns.
        count: most pairs to show, from the first.
        limit: difference at which the colours end, as a share of the grey range.
        minimum: shorter side of a tile in pixels; smaller images are enlarged by a whole factor.

    Raises:
        ValueError: if shapes differ, there are not N captions or three titles, or `count` is not positive.
    """
    left, right = _as_stack(left), _as_stack(right)
    captions = [""] * len(left) if captions is None else captions
    if left.shape != right.shape or len(captions) != len(left):
        raise ValueError(f"{left.shape} and {right.shape} with {len(captions)} captions are not so many pairs")
    if count < 1 or len(titles) != 3:
        raise ValueError(f"a sheet of pairs needs a count of at least 1 and three titles, not {count} and {titles}")
    left, right = left[:count], right[:count]
    scale = cm.ScalarMappable(colors.Normalize(0, limit), "magma")
    difference = _painted(scale, enlarge(np.abs(left - right) / 2, minimum))
    pairs = np.stack([_grey_as_rgb(enlarge(left, minimum)), _grey_as_rgb(enlarge(right, minimum)), difference], axis=1)
    height = pairs.shape[2]
    margin = 7 * _letter(height)
    figure = _labelled_figure(list(zip(captions, pairs, strict=False)), titles, margin)
    _add_scale(figure, scale, margin, height)
    write_figure(path, figure)


def _as_tissue(labels, shape: tuple[int, ...], lowest: int) -> np.ndarray:
    """Check that `labels` are tissue classes, whole numbers from `lowest` to 3 in an array of that shape."""
    labels = np.asarray(labels)
    if labels.shape != shape:
        raise ValueError(f"tissue must have shape {shape} like the images, not {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < lowest or labels.max() > 3:
        raise ValueError(f"tissue must be integers in {lowest}..3, not {labels.dtype} {labels.min()}..{labels.max()}")
    return labels.astype(int)


def tissue_sheet(
    path: str | Path, images, tissue, z=None, count: int = 8, real_tissue=None, minimum: int = 128
) -> None:
    """Save slices above their tissue maps in colour, pixel for pixel, with the names of the colours beside them.

    Args:
        path: PNG file to write.
        images: floats (N, H, W, 1) or (N, H, W) in [-1, 1].
        tissue: integers (N, H, W): 0 background, 1 CSF, 2 grey matter, 3 white matter.
        z: N integer slice indices for the column titles; no titles without.
        count: most columns to show; of more images, an even selection is taken.
        real_tissue: the true masks for a third row, like `tissue`, or -1 where unknown.
        minimum: shorter side of a tile in pixels; smaller ones are enlarged by a whole factor, as crisp blocks.

    Raises:
        ValueError: if shapes differ, a class is none of the above, or there are not N slice indices.
    """
    images = _as_stack(images)
    maps = [("tissue", _as_tissue(tissue, images.shape, 0))]
    if real_tissue is not None:
        maps.append(("true tissue", _as_tissue(real_tissue, images.shape, -1)))
    chosen = evenly(len(images), count)
    titles = _slice_titles(z, len(images), chosen)
    colours = np.array(COLOURS, np.uint8)
    rows = [("picture", _grey_as_rgb(images[chosen]))] + [(title, colours[labels[chosen]]) for title, labels in maps]
    factor = _factor(*images.shape[1:], minimum)
    rows = [(title, repeat(t, "n h w rgb -> n (h k) (w l) rgb", k=factor, l=factor)) for title, t in rows]
    letter = _letter(height := images.shape[1] * factor)
    margin = 10 * letter
    figure = _labelled_figure(rows, titles, margin)
    unknown = maps[-1][1][chosen].min() < 0
    named = list(zip((*NAMES, "unknown"), COLOURS, strict=True))[: len(COLOURS) if unknown else -1]
    middle = GAP + (len(maps) * (height + 2 * GAP) - 2 * GAP) / 2  # of the maps, in pixels from the bottom
    width, total_height = figure.bbox.size
    figure.legend(
        handles=[
            patches.Patch(facecolor=np.divide(colour, 255), edgecolor="black", lw=0.5, label=name)
            for name, colour in named
        ],
        loc="center left",
        bbox_to_anchor=(1 - margin / width, middle / total_height),
        fontsize=letter * 72 / DPI,
        frameon=False,
        handlelength=1,
        handletextpad=0.4,
    )
    write_figure(path, figure)
