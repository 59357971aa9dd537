"""ldm/drawing/figures.py: exact pixels, exact bytes, files that are whole or not there."""

import ast
import os
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
import pytest
from PIL import Image

from ldm.drawing import figures
from ldm.drawing.figures import GAP, GREY


def flat(*greys: int, height: int = 4, width: int = 6) -> np.ndarray:
    """One constant image per 8-bit grey value, as floats (N, H, W, 1) in [-1, 1]."""
    values = np.array(greys, np.float32) / 255 * 2 - 1
    return np.broadcast_to(values[:, None, None, None], (len(greys), height, width, 1)).copy()


@pytest.fixture
def frames():
    """Five frames of noise over all 256 greys, no two alike."""
    return list(np.random.default_rng(0).integers(0, 256, (5, 40, 50), dtype=np.uint8))


@pytest.fixture
def brains():
    """Three discs of different size, 32 x 32, and blurred look-alikes."""
    y, x = np.mgrid[:32, :32] - 16
    radius = np.hypot(x, y)
    real = np.stack([np.where(radius < r, 0.8, -1.0) for r in (6, 9, 12)])[..., None]
    fake = np.stack([np.tanh(r - radius) for r in (6, 9, 12)])[..., None]
    return real.astype(np.float32), fake.astype(np.float32)


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures drawn so far, in order, each of them also written as ever."""
    written, write = [], figures.write_figure
    monkeypatch.setattr(figures, "write_figure", lambda path, figure: (written.append(figure), write(path, figure)))
    return written


# ------------------------------------------------------------------------------------------------------------- to_uint8


def test_endpoints_midpoint_and_clipping():
    images = np.array([-1, 1, 0, -5, 5, -1 + 2 / 255], np.float32).reshape(1, 2, 3, 1)
    grey = figures.to_uint8(images)
    assert grey.dtype == np.uint8
    assert grey.ravel().tolist() == [0, 255, 128, 0, 255, 1]


def test_every_grey_value_survives_the_round_trip():
    greys = np.arange(256, dtype=np.uint8)
    images = (greys.astype(np.float32) / 127.5 - 1).reshape(1, 16, 16)
    assert (figures.to_uint8(images).ravel() == greys).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 4), np.float32), "shape"),
        (np.zeros((2, 4, 4, 3), np.float32), "shape"),
        (np.zeros((0, 4, 4), np.float32), "shape"),
        (np.zeros((2, 4, 4), np.uint8), "uint8"),
        (np.stack([np.zeros((4, 4)), np.full((4, 4), np.nan)]), "1 of 2 images hold NaN"),
    ],
)
def test_what_is_not_an_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        figures.to_uint8(images)


# ------------------------------------------------------------------------------------------------------ sheet, enlarge


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_image_k_lies_in_its_tile_and_the_rest_is_grey(columns):
    greys = (10, 60, 110, 160, 210)
    tiled = figures.sheet(flat(*greys), columns)
    rows = -(-5 // columns)
    assert tiled.shape == (rows * 4 + (rows - 1) * GAP, columns * 6 + (columns - 1) * GAP)
    left = np.ones(tiled.shape, bool)
    for k, grey in enumerate(greys):
        y, x = k // columns * (4 + GAP), k % columns * (6 + GAP)
        assert (tiled[y : y + 4, x : x + 6] == grey).all()
        left[y : y + 4, x : x + 6] = False
    assert (tiled[left] == GREY).all()


def test_an_image_is_neither_turned_nor_flipped():
    image = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    assert (figures.sheet(image) == figures.to_uint8(image)[0]).all()


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (8, 4), (9, 3), (14, 4), (16, 4), (32, 8)]
)
def test_default_sheet_is_near_square(count, columns):
    assert figures.sheet(flat(*[0] * count)).shape[1] == columns * (6 + GAP) - GAP


def test_columns_must_be_positive():
    with pytest.raises(ValueError, match="columns"):
        figures.sheet(flat(1, 2), columns=0)


def test_enlarge_scales_by_the_smallest_sufficient_whole_factor():
    assert figures.enlarge(flat(7, height=30, width=50), minimum=64).shape == (1, 90, 150)
    assert figures.enlarge(flat(7, height=64, width=64), minimum=64).shape == (1, 64, 64)
    assert (figures.to_uint8(figures.enlarge(flat(0, 7, 255), minimum=64)) == [[[0]], [[7]], [[255]]]).all()


def test_what_is_enlarged_is_smooth():
    """A slope stays one, without steps of whole pixels."""
    slope = np.broadcast_to(np.linspace(-0.9, 0.9, 16, dtype=np.float32), (1, 16, 16))
    assert np.diff(figures.enlarge(slope, minimum=64)[0, :, 8:-8], axis=1).min() > 0.02


# -------------------------------------------------------------------------------------------------------- save_png, gif


def test_png_is_lossless_grey_and_reproducible(tmp_path, frames):
    for name in ("new/folder/a.png", "b.png"):
        figures.save_png(tmp_path / name, frames[0])
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "new/folder/a.png").read_bytes()
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "L"
        assert (np.asarray(image) == frames[0]).all()


def test_gif_keeps_every_pixel_every_frame_and_the_timing(tmp_path, frames):
    path = tmp_path / "film.gif"
    figures.save_gif(path, iter(frames), fps=10, hold=2)
    back = iio.imread(path, mode="L")
    assert back.shape == (5, 40, 50)
    assert (back == np.stack(frames)).all()
    with Image.open(path) as film:
        durations = []
        for k in range(film.n_frames):
            film.seek(k)
            durations.append(film.info["duration"])
        assert durations == [100, 100, 100, 100, 2000]  # milliseconds
        assert film.info["loop"] == 0  # for ever


@pytest.mark.parametrize("greys", [256, 8])
def test_gif_can_be_read_back_where_only_a_part_changes(tmp_path, frames, greys):
    """As in a film of slices: black margins that never change, so the file stores a part of the frame only."""
    film = np.stack(frames) // (256 // greys) * (256 // greys)
    film[:, :10] = 0
    film[1:, 30:] = film[0, 30:]
    figures.save_gif(tmp_path / "film.gif", film)
    assert (iio.imread(tmp_path / "film.gif", mode="L") == film).all()
    coloured = iio.imread(tmp_path / "film.gif")  # what a reader gets who asks for nothing special
    assert (coloured.reshape(*film.shape, -1)[..., 0] == film).all()


def test_gif_of_a_still_and_of_repeated_frames(tmp_path, frames):
    figures.save_gif(tmp_path / "still.gif", frames[:1])
    assert (iio.imread(tmp_path / "still.gif", mode="L")[0] == frames[0]).all()
    a, b = frames[:2]
    figures.save_gif(tmp_path / "repeat.gif", [a, a, b, b], fps=10, hold=1)
    with Image.open(tmp_path / "repeat.gif") as film:
        total = 0
        for k in range(film.n_frames):
            film.seek(k)
            total += film.info["duration"]
    assert total == 1300
    figures.save_gif(tmp_path / "frozen.gif", [a, a, a])
    assert (iio.imread(tmp_path / "frozen.gif", mode="L") == a).all()


def test_gif_has_the_same_bytes_twice(tmp_path, frames):
    figures.save_gif(tmp_path / "a.gif", frames)
    figures.save_gif(tmp_path / "b.gif", frames)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_gif_refuses_what_it_cannot_show(tmp_path, frames):
    for bad, message in [
        (dict(frames=[]), "at least one"),
        (dict(frames=[frames[0], frames[0][1:]]), "one shape"),
        (dict(frames=[frames[0] / 255]), "uint8"),
        (dict(frames=frames, fps=0), "fps"),
        (dict(frames=frames, fps=100), "fps"),
    ]:
        with pytest.raises(ValueError, match=message):
            figures.save_gif(tmp_path / "bad.gif", **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path, frames, monkeypatch):
    path = tmp_path / "picture.png"
    figures.save_png(path, frames[0])
    before = path.read_bytes()

    def disk_full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(OSError, match="no space"):
            figures.save_png(path, frames[1])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["picture.png"]


# ---------------------------------------------------------------------------------------------------- denoising_frames


def test_frames_show_x_t_and_beside_it_x_0():
    steps = [(flat(k, k + 1), flat(k + 100, k + 101)) for k in range(5)]
    alone = figures.denoising_frames(iter(steps), columns=1, minimum=1)
    assert [frame[0, 0] for frame in alone] == [0, 1, 2, 3, 4]
    both = figures.denoising_frames(steps, columns=1, with_prediction=True, minimum=1)
    for k in range(5):
        assert (both[k][:, :6] == alone[k]).all()
        assert (both[k][:, 6:-6] == GREY).all()
        assert (both[k][:, -6:] == figures.sheet(steps[k][1], 1)).all()


def test_a_film_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no moment"):
        figures.denoising_frames([])


def test_small_slices_are_enlarged_in_a_film():
    assert figures.denoising_frames([(flat(9, height=64, width=64),) * 2])[0].shape == (128, 128)


# ---------------------------------------------------------------------------------------------------- labelled pictures


def test_reconstruction_sheet_holds_both_rows_pixel_for_pixel(tmp_path, brains):
    real, fake = brains
    figures.reconstruction_sheet(tmp_path / "a.png", real, fake, z=[3, 4, 5])
    picture = iio.imread(tmp_path / "a.png")[..., :3]
    for images in brains:
        wanted = np.repeat(figures.sheet(figures.enlarge(images), 3)[..., None], 3, axis=-1)
        assert contains(picture, wanted)


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` lies in `picture` somewhere, exactly."""
    height, width = part.shape[:2]
    ys, xs = picture.shape[0] - height + 1, picture.shape[1] - width + 1
    candidates = np.argwhere((picture[:ys, :xs] == part[0, 0]).all(-1))
    return any((picture[y : y + height, x : x + width] == part).all() for y, x in candidates)


def test_difference_has_a_fixed_scale(tmp_path, brains):
    """Half the error must look darker, not be stretched to the same colours; and no error is black."""
    real, _ = brains
    brightness = []
    for error in (0.0, 0.1, 0.2):
        path = tmp_path / f"{error}.png"
        figures.labelled_sheet(path, [("real", real)], difference=("error", np.full_like(real, error)))
        brightness.append(int(iio.imread(path)[-60, 60, :3].sum()))
    assert brightness[0] < 10 and brightness[0] < brightness[1] < brightness[2]


@pytest.mark.parametrize(
    ("draw", "side"),
    [
        (lambda path, a, b: figures.labelled_sheet(path, [("a", a)], None, ("error", b - a), 0.5, minimum=64), 64),
        (lambda path, a, b: figures.reconstruction_sheet(path, a, b, limit=0.5), 128),
        (lambda path, a, b: figures.pairs_sheet(path, a, b, limit=0.5, minimum=64), 64),
    ],
    ids=["labelled", "reconstruction", "pairs"],
)
def test_an_error_is_half_the_distance_in_the_colour_of_the_scale_and_has_no_sign(tmp_path, draw, side):
    """0.3 of [-1, 1] is 15 % of the grey range; between an error of +15 % and one of -15 % nothing is right."""
    board = (0.3 * (-1) ** np.indices((32, 32)).sum(axis=0))[None]
    draw(tmp_path / "a.png", np.zeros_like(board), board)
    colour = np.array(matplotlib.colormaps["magma"](0.15 / 0.5, bytes=True)[:3])
    assert contains(iio.imread(tmp_path / "a.png")[..., :3], np.tile(colour, (side, side, 1)))


@pytest.fixture
def tissue():
    """Three slices of 64 x 72 (the sheet doubles them), their classes, and true ones that are partly unknown."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 64, 72, 1)).astype(np.float32)
    return images, rng.integers(0, 4, (3, 64, 72)), rng.integers(-1, 4, (3, 64, 72), dtype=np.int8)


def test_tissue_sheet_holds_every_pixel_as_a_crisp_block_of_its_colour(tmp_path, tissue):
    images, classes, truth = tissue
    for name in ("a.png", "b.png"):
        figures.tissue_sheet(tmp_path / name, images, classes, z=[3, 4, 5], real_tissue=truth)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = iio.imread(tmp_path / "a.png")[..., :3]
    grey = figures.to_uint8(images)[..., None].repeat(3, axis=-1)
    colours = list(figures.COLOURS)
    for tiles in (grey, np.array(colours, np.uint8)[classes], np.array(colours, np.uint8)[truth]):
        blocks = tiles.repeat(2, axis=1).repeat(2, axis=2)
        assert all(contains(picture, block) for block in blocks)


def test_tissue_colours_differ_and_grow_brighter_like_a_t1_picture():
    luma = np.array(figures.COLOURS) @ (0.299, 0.587, 0.114)
    background, *tissues = luma[:4]
    assert background == 0 and (np.diff(tissues) > 40).all() and tissues[0] > luma[4] + 20


def test_tissue_legend_names_what_is_drawn(tmp_path, tissue, drawn):
    images, classes, truth = tissue
    names = ["background", "CSF", "grey matter", "white matter"]
    for real, expected in ((None, names), (abs(truth), names), (truth, [*names, "unknown"])):
        figures.tissue_sheet(tmp_path / "a.png", images, classes, z=[3, 4, 5], count=2, real_tissue=real)
        assert [text.get_text() for text in drawn[-1].legends[0].get_texts()] == expected
        words = [text.get_text() for text in drawn[-1].texts]
        assert words == ["picture", "tissue", *["true tissue"] * (real is not None), "slice 3", "slice 5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tissue=np.zeros((3, 64, 64), int)), "shape"),
        (dict(tissue=np.zeros((3, 64, 72, 1), int)), "shape"),
        (dict(tissue=np.zeros((3, 64, 72))), "integers in 0..3, not float64"),
        (dict(tissue=np.full((3, 64, 72), -1)), "integers in 0..3"),
        (dict(tissue=np.full((3, 64, 72), 255)), "integers in 0..3"),
        (dict(real_tissue=np.full((3, 64, 72), -2)), "integers in -1..3"),
        (dict(real_tissue=np.zeros((2, 64, 72), int)), "shape"),
        (dict(z=[1, 2]), "3 slices but 2 slice indices"),
    ],
)
def test_tissue_sheet_refuses_what_does_not_match(tmp_path, tissue, changes, message):
    images, classes, _ = tissue
    with pytest.raises(ValueError, match=message):
        figures.tissue_sheet(tmp_path / "a.png", **dict(images=images, tissue=classes) | changes)
    assert list(tmp_path.iterdir()) == []


def test_pairs_sheet_shows_left_right_and_difference_pixel_for_pixel_from_the_first_pair_on(tmp_path):
    left, right = np.random.default_rng(0).uniform(-1, 1, (2, 3, 128, 128))
    for name in ("a.png", "b.png"):
        figures.pairs_sheet(tmp_path / name, left, right, ["one", "two\nlines", "three"], count=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = iio.imread(tmp_path / "a.png")[..., :3]
    rows = [figures.sheet(pair, 2) for pair in np.stack([left, right], axis=1)]
    assert [contains(picture, row[..., None].repeat(3, axis=-1)) for row in rows] == [True, True, False]
    figures.pairs_sheet(tmp_path / "same.png", left, left)
    same = iio.imread(tmp_path / "same.png")[..., :3]
    assert 1 <= (same == (0, 0, 3)).all(-1).sum() / (3 * 128 * 128) < 1.01, "no difference: where magma begins"


def test_pairs_sheet_captions_every_pair(tmp_path, brains, drawn):
    figures.pairs_sheet(tmp_path / "a.png", *brains, captions=["near", "nearer", "far"], titles=["x", "y", "x - y"])
    assert {text.get_text() for text in drawn[0].texts} == {"near", "nearer", "far", "x", "y", "x - y"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(right=np.zeros((2, 32, 32))), "not so many pairs"),
        (dict(captions=["one"]), "1 captions"),
        (dict(titles=["one"]), "three titles"),
        (dict(count=0), "count of at least 1"),
    ],
)
def test_pairs_sheet_refuses_what_does_not_match(tmp_path, brains, changes, message):
    with pytest.raises(ValueError, match=message):
        figures.pairs_sheet(tmp_path / "a.png", **dict(left=brains[0], right=brains[1]) | changes)
    assert list(tmp_path.iterdir()) == []


def test_labelled_pictures_are_reproducible_and_leave_no_software_version(tmp_path, brains):
    real, fake = brains
    for name in ("a.png", "b.png"):
        figures.reconstruction_sheet(tmp_path / name, real, fake, z=np.arange(3))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in (tmp_path / "a.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_labels_are_drawn_and_count_limits_the_columns(tmp_path, brains):
    real, fake = brains
    figures.reconstruction_sheet(tmp_path / "all.png", real, fake)
    figures.reconstruction_sheet(tmp_path / "titled.png", real, fake, z=[3, 4, 5])
    figures.reconstruction_sheet(tmp_path / "two.png", real, fake, count=2)
    plain, titled, two = (iio.imread(tmp_path / f"{name}.png") for name in ("all", "titled", "two"))
    assert titled.shape[0] > plain.shape[0] and titled.shape[1] == plain.shape[1]
    assert (titled[:20] < 128).any(), "column titles are dark on white"
    assert plain.shape[1] - two.shape[1] == 128 + GAP


def test_labelled_sheet_refuses_rows_that_do_not_match(tmp_path, brains):
    real, fake = brains
    with pytest.raises(ValueError, match="one shape"):
        figures.labelled_sheet(tmp_path / "a.png", {"real": real, "fake": fake[:2]})
    with pytest.raises(ValueError, match="one shape"):
        figures.labelled_sheet(tmp_path / "a.png", {})
    with pytest.raises(ValueError, match="3 columns but 1"):
        figures.labelled_sheet(tmp_path / "a.png", {"real": real}, column_titles=["one"])
    with pytest.raises(ValueError, match="same shape"):
        figures.reconstruction_sheet(tmp_path / "a.png", real, fake[:2])


def test_no_global_plotting_state():
    """pyplot keeps every figure alive and may look for a display: the source must never import it."""
    tree = ast.parse(Path(figures.__file__).read_text(encoding="utf-8"))
    names = [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    ]
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any("pyplot" in name for name in names + modules)
