"""Phantom brains: axial, skull-stripped, T1-like slices whose anatomy is known exactly.

Nothing is downloaded and nothing is learnt here: a person is a few dozen random numbers, and a slice is a formula
evaluated at every pixel. So a laptop can train on phantoms, and, since the true tissue of every pixel is known, a
generator trained on them can be checked against the truth.

How a slice comes about, in the order of the file:

    Waves      a smooth random field in space, the source of all irregular shape
    Person     the random numbers: size, asymmetry, folding, ventricle size, label, bias field
    _cortex    distance to the pial surface: hull, fissure between the hemispheres, sulci, insula
    _core      distances to what lies in the middle: ventricles, deep grey nuclei, cisterns
    _tissues   distances -> the fraction of every tissue in every pixel (the partial volume)
    _acquire   fractions -> T1 intensities, bias field, blur, Rician noise
    slices     the function that draws them
    write      a zip of them
    stand_in   the zip that stands in where no data is named

Shapes are signed distances in millimetres, positive inside. All of them are functions of (x, y, z), so neighbouring
slices fit together as in a volume. x runs to the image's right, y towards the forehead (up in the image), z upwards.
The frame is 256 mm wide and slice `z` lies z mm above the first. As in the OASIS course archive, the 32 slices span
the band from the basal ganglia (z = 0) to the roof of the lateral ventricles (z = 31).
"""

import collections
import concurrent.futures
import io
import itertools
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm import files, tissue
from ldm.data import archive
from ldm.data.people import SPLITS, check_seed
from ldm.later import Later

ndimage = Later("scipy.ndimage")

MOST_PEOPLE, LARGEST = 100_000, 2048  # people of an archive, pixels a side
STAND_IN, STAND_IN_PEOPLE = Path("dataset/phantom.zip"), 96  # where no data is named
SLICES = 32
LABELS = ("AD", "NC")  # label 0 = AD, 1 = NC: the order of sorted class folders

# What the label AD changes, and nothing else. Every other number of a person is drawn alike for both labels.
AD_VENTRICLE_AREA = 1.6  # expected ventricle area, summed over the slices, AD / NC
AD_SULCUS_WIDTH = 1.5  # width of sulci, fissure, insula and rim, AD / NC; gives about 1.35 times the CSF around them

FRAME_MM = 256.0  # the image is this wide and high
ROI_MM = (200.0, 168.0)  # height, width of the centred window that holds every brain; only this much is computed
T1 = {"csf": 0.13, "grey": 0.47, "deep grey": 0.66, "white": 0.84}  # mean intensity, as a fraction of full scale
POINT_SPREAD = 0.6  # standard deviation of the scanner's blur, mm
NOISE = 0.02  # standard deviation of the Rician noise before the magnitude, same unit

# Area of the ventricles ~ radius of their tubes ^ 1.44, measured on 24 persons drawn with both labels. (Not ^ 2: the
# septum and the branches that already overlap take no part in the growth.)
VENTRICLE_EXPONENT = 1 / 1.44


class Waves:
    """A smooth Gaussian random field: a sum of plane waves, so it can be evaluated anywhere in space.

    Args:
        rng: numpy Generator.
        wavelength: typical wavelength, mm.
        count: number of waves; more are closer to Gaussian and slower.
        z_stretch: how many times longer the waves are along z, so that shapes persist through the slices.
    """

    def __init__(self, rng, wavelength, count, z_stretch=1.0):
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        frequencies = 2 * np.pi / (wavelength * rng.uniform(0.75, 1.3, (count, 1)))
        self.k = (directions * frequencies / (1, 1, z_stretch)).astype(np.float32)  # (count, 3), rad / mm
        self.phase = rng.uniform(0, 2 * np.pi, count).astype(np.float32)

    def __call__(self, x, y, z):
        """Field in the plane z at the grid of columns x (w,) and rows y (h,): (h, w), zero mean, unit variance; h even.

        cos(a + b) = cos(a) cos(b) - sin(a) sin(b) parts the columns from the rows, so the sum over the waves is a
        matrix product: far cheaper than a cosine per wave and pixel.
        """
        a = y[:, None] * self.k[:, 1] + self.phase + self.k[:, 2] * np.float32(z)  # (h, count)
        b = x[:, None] * self.k[:, 0]  # (w, count)
        rows, columns = np.hstack([np.cos(a), -np.sin(a)]), np.hstack([np.cos(b), np.sin(b)])
        # Two rows at a time: a product this small stays on one thread. Whole, BLAS would spread it over all cores, and
        # waiting for a core that something else keeps busy costs many times the product itself.
        pairs = rows.reshape(-1, 2, rows.shape[1]) @ columns.T
        return pairs.reshape(len(y), len(x)) * np.float32(np.sqrt(2 / len(self.phase)))


@dataclass(frozen=True)
class Person:
    """Everything that makes one phantom differ from another. Lengths in mm."""

    label: int  # index into LABELS
    size: float  # scale of the head
    aspect: float  # scale of the width only
    outline: np.ndarray  # (2, 4) cosine and sine coefficients of the outline's radius, relative
    midline: tuple  # bend (mm) and phase (rad) of the fissure
    ventricle: tuple  # scale of the radius, left and right
    horns: np.ndarray  # (9, 3) displacement of the ventricles' nodes
    sulcus: float  # half-width of the sulci
    depth: float  # scale of the depth of the sulci
    ribbon: float  # thickness of the cortex
    folds: tuple  # two Waves, whose zero levels are the primary and the secondary sulci
    warp: tuple  # two Waves, displacement of the folds in x and y
    relief: tuple  # two Waves, variation of sulcal depth and of cortical thickness
    texture: Waves  # fine variation of the signal
    bias: np.ndarray  # (5,) coefficients of the bias field
    gain: float  # brightness of the whole scan


def _person(rng, label):
    """Draw a Person. Both labels draw the same numbers from `rng`; AD then scales ventricles and sulci."""
    area = AD_VENTRICLE_AREA if LABELS[label] == "AD" else 1.0
    width = AD_SULCUS_WIDTH if LABELS[label] == "AD" else 1.0
    radius = (area * rng.lognormal(0, 0.2)) ** VENTRICLE_EXPONENT
    left_right = rng.normal(0, 0.05)
    return Person(
        label=label,
        size=rng.normal(1, 0.015),
        aspect=rng.normal(1, 0.015),
        outline=rng.normal(0, 0.008, (2, 4)) / np.array([1, 1, 1.5, 2]),
        midline=(rng.normal(0, 1.2), rng.uniform(0, 2 * np.pi)),
        ventricle=(radius * (1 + left_right), radius * (1 - left_right)),
        horns=rng.normal(0, 1.2, (len(HORNS), 3)),
        sulcus=0.7 * width * rng.lognormal(0, 0.1),
        depth=rng.normal(1, 0.06),
        ribbon=rng.normal(3.3, 0.15),
        folds=tuple(Waves(rng, wavelength * rng.normal(1, 0.05), 60, z_stretch=2.0) for wavelength in (24, 16)),
        warp=(Waves(rng, 28, 30), Waves(rng, 28, 30)),
        relief=(Waves(rng, 35, 20), Waves(rng, 30, 20)),
        texture=Waves(rng, 7, 60),
        bias=rng.normal(0, 0.05, 5),
        gain=rng.normal(1, 0.03),
    )


def _smooth_min(a, b, blend):
    """Minimum of two distances, rounded over `blend` mm where they are nearly equal."""
    h = np.maximum(blend - np.abs(a - b), 0) / blend
    return np.minimum(a, b) - h * h * blend / 4


def _segment(x, y, start, end):
    """Distance from the points to the segment from `start` to `end`, mm."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def _ellipsoid(x, y, z, centre, axes, turn=0.0):
    """Signed distance (positive inside, first order) in the plane z to an ellipsoid turned by `turn` rad about z."""
    dx, dy, w = x - centre[0], y - centre[1], (z - centre[2]) / axes[2]
    cosine, sine = math.cos(turn), math.sin(turn)
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    a, b = axes[:2]
    level = np.sqrt((u / a) ** 2 + (v / b) ** 2 + w * w)
    slope = np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2) / np.maximum(level, 1e-6)  # |grad level| in the plane
    return (1 - level) / np.maximum(slope, 0.5 / max(a, b))


def _hull(person, x, y, z):
    """Signed distance to the smooth outline of the brain, sulci bridged over."""
    t = z / (SLICES - 1)
    half_width = (74 - 2.5 * t * t) * person.size * person.aspect
    half_height = (90.5 - 3.5 * t * t) * person.size
    theta = np.arctan2(x / half_width, y / half_height)  # 0 = forehead
    radius = 1.0
    for n, (cosine, sine) in enumerate(person.outline.T.tolist(), start=1):
        radius = radius + cosine * np.cos(n * theta) + sine * np.sin(n * theta)
    # An egg, widest behind the middle; low slices are boxier, for the temporal lobes.
    radius += 0.02 * np.cos(3 * theta) - 0.03 * (1 - t) * np.cos(4 * theta) - 0.01 - 0.01 * (1 - t)
    rho = np.hypot(x / half_width, y / half_height)
    notch = 2.5 * np.exp(-((x / 5) ** 2))  # the fissure dents the outline at both poles
    return (radius - rho) * np.hypot(x, y) / np.maximum(rho, 1e-3) - notch


def _fissure(x, y, z):
    """Distance to the fissure between the hemispheres: in front of the corpus callosum and behind it."""
    genu = float(np.interp(z, (0, 6, 12, 24, 31), (26, 34, 24, 16, 20)))  # y of its front end
    splenium = float(np.interp(z, (0, 8, 16, 31), (-44, -55, -56, -44)))  # y of its rear end
    return np.minimum(_segment(x, y, (0, genu), (0, 120)), _segment(x, y, (0, splenium), (0, -120)))


def _insula(x, y, z):
    """Distance to the Sylvian fissure and the sulcus that circles the insula, on both sides; grows with z."""
    side = np.abs(x)
    stem = _segment(side, y, (90, -6 - z / 3), (47, -2))
    floor = _segment(side, y, (43, 20 - z / 3), (46, -26 + z / 3))
    fade = max(z - 12, 0) * 0.9  # the insula ends about half way up
    return np.minimum(stem + fade * 0.6, floor + fade)


def _cortex(person, grid, head, z, core, warp):
    """Signed distance to the pial surface, positive in the cortex and below it.

    Sulci are the zero level of a random field. The field is looked up at a point pushed outwards, towards the surface,
    in proportion to depth: that stretches it along the normal, and its zero level becomes sheets that dive inwards.

    Args:
        grid: columns x (w,) and rows y (h,), mm. head: (x, y), each (h, w), mm, the same points in the head's own
            coordinates. z: mm. warp: (x, y), each (h, w), the two warp fields, unit variance.
        core: (h, w) signed distance to ventricles and deep grey, which sulci keep away from.
    Returns:
        hull, pial: (h, w) signed distances. ribbon: (h, w) thickness of the cortex, mm.
    """
    hull = _hull(person, *head, z)
    fissure = _fissure(*head, z)
    step = grid[0][1] - grid[0][0]
    relief, gape = (field(*grid, z) for field in person.relief)
    depth = _smooth_min(hull, fissure, 12.0)
    down, right = np.gradient(depth, step)
    push = 0.77 * np.maximum(depth, 0)
    rows = np.arange(len(grid[1]))[:, None] + (1.6 * warp[1] - push * down) / step
    columns = np.arange(len(grid[0])) + (1.6 * warp[0] - push * right) / step
    keep_away = np.maximum(core + 7.0, 0)
    # Sulci gape at the surface and close towards their floor, each to its own degree.
    width = person.sulcus * np.exp(0.35 * gape) * (0.7 + 0.7 * np.exp(-np.maximum(depth, 0) / 6))
    # Primary sulci are far apart and deep, secondary ones close and shallow; depths in mm.
    pial = np.minimum(hull - (0.3 + 0.5 * relief) * person.sulcus, fissure - width)
    for waves, floor, spread in zip(person.folds, (18.5, 9.0), (5.0, 4.0), strict=True):
        field = ndimage.map_coordinates(waves(*grid, z), (rows, columns), order=1, mode="nearest")
        slope = np.hypot(*np.gradient(field, step))
        sheet = np.abs(field) / np.maximum(slope, 0.03)  # distance to the zero level, first order
        below_floor = np.maximum(depth - person.depth * (floor + spread * np.tanh(relief)), 0)
        pial = _smooth_min(pial, np.hypot(sheet, below_floor + keep_away) - width, 2.0)
    insula = _insula(head[0] + 1.8 * field, head[1] + 1.8 * warp[1], z) + keep_away * 0.3
    ribbon = person.ribbon * (1 + 0.12 * gape)
    return hull, _smooth_min(pial, insula - 2.0 * person.sulcus, 2.0), ribbon


# Nodes of one lateral ventricle, a tube from the frontal horn over the body down into the atrium: |x|, y, z, radius.
HORNS = np.array(
    [
        (25, 27, 1, 3.0),
        (26, 28, 13, 4.8),
        (10, 5, 17, 4.2),
        (19, 18, 24, 5.2),
        (11, -1, 26, 7.2),
        (12, -24, 27, 7.8),
        (13, -38, 16, 7.2),
        (15, -46, 4, 3.8),
        (5, -17, 12, 3.0),
    ]
)


def _ventricles(person, x, y, z):
    """Signed distance to the lateral ventricles (tubes along HORNS) and the third ventricle."""
    inside = _ellipsoid(x, y, z, (0, -10, 3), (2.8 * sum(person.ventricle) / 2, 19, 14))
    for side, scale in zip((-1, 1), person.ventricle, strict=True):
        nodes = HORNS.copy()
        nodes[:, :3] += person.horns * (1, 1, 0.5)
        tube = np.full_like(x, -1e3)
        for (x0, y0, z0, r0), (x1, y1, z1, r1) in itertools.pairwise(nodes.tolist()):
            # Ventricles are taller than wide, so heights count only 0.6.
            dx, dy, dz = x1 - x0, y1 - y0, 0.6 * (z1 - z0)
            px, py, pz = side * x - x0, y - y0, 0.6 * (z - z0)
            along = np.clip((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
            gap = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2 + (pz - along * dz) ** 2)
            tube = -_smooth_min(-tube, gap - scale * (r0 + along * (r1 - r0)), 5.0)
        tube = np.minimum(tube, side * x - 0.7)  # the septum parts left from right
        inside = np.maximum(inside, tube)
    return inside


def _cisterns(_, x, y, z):
    """Signed distance to the pools of CSF under the brain that reach into the lowest slices."""
    side = np.abs(x)
    chiasm = _ellipsoid(side, y, z, (0, 21, -5), (6, 11, 10))
    arms = _ellipsoid(side, y, z, (12, 15, -6), (13, 3.5, 10), -0.25)
    tectum = _ellipsoid(side, y, z, (0, -38, -4), (8, 9, 9))
    return np.maximum(np.maximum(chiasm, arms), tectum)


def _deep_grey(_, x, y, z):
    """Signed distance to thalamus, caudate nucleus and putamen."""
    side = np.abs(x)
    thalamus = _ellipsoid(side, y, z, (12, -16, 9), (10, 18, 14), 0.45)
    caudate = _ellipsoid(side, y, z, (22, 17, 11), (5, 12, 13), -0.5)
    putamen = _ellipsoid(side, y, z, (30, -4, 4), (7, 21, 16), 0.2)
    return np.maximum(np.maximum(thalamus, caudate), putamen)


def _core(person, x, y, z):
    """Signed distances to the ventricles, the deep grey and the cisterns: (3, h, w), mm.

    They lie in the middle of the brain, so only a window around them is computed; beyond it all are "far outside".
    """
    rows = np.flatnonzero((y[:, 0] > -75) & (y[:, 0] < 60))
    columns = np.flatnonzero(np.abs(x[len(x) // 2]) < 50)
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    distances = np.full((3, *x.shape), -99, np.float32)
    for distance, shape in zip(distances, (_ventricles, _deep_grey, _cisterns), strict=True):
        distance[window] = shape(person, x[window], y[window], z)
    return distances


def _ramp(distance, blur):
    """Fraction (0 .. 1) of a pixel that lies inside a surface at this signed distance."""
    return np.clip(0.5 + distance / blur, 0, 1)


def _tissues(person, x, y, z, voxel):
    """Fractions of background, CSF, cortical grey, deep grey, white (5, h, w), and of ventricle (h, w)."""
    grid = x[0], y[:, 0]
    # No anatomy is straight or symmetric: the midline bends, and every outline is a little wavy.
    warp = [field(*grid, z) for field in person.warp]
    bend, phase = person.midline
    head = (
        x - bend * np.sin(y / 55 + phase) + 0.5 * warp[0],
        y + 0.5 * warp[1],
    )
    ventricle, deep, cisterns = _core(person, *head, z)
    hull, pial, ribbon = _cortex(person, grid, head, z, np.maximum(ventricle, deep), warp)
    blur = max(voxel, 1.0)
    brain = _ramp(hull, blur)
    in_ventricle = _ramp(ventricle, 1.3 * blur)
    below_pia = _ramp(np.minimum(pial, -cisterns), 1.5 * blur) * (1 - in_ventricle)
    below_ribbon = _ramp(pial - ribbon, 3.0 * blur)
    deep = _ramp(deep, 2.5 * blur) * below_pia
    white = below_pia * below_ribbon * (1 - deep)
    grey = np.maximum(below_pia - deep - white, 0)
    csf = 1 - below_pia
    return np.stack([1 - brain, brain * csf, brain * grey, brain * deep, brain * white]), brain * in_ventricle


def _acquire(person, fractions, x, y, z, rng):
    """T1-weighted magnitude image (h, w) in [0, 1] from tissue fractions (5, h, w)."""
    signal = np.einsum("t,thw->hw", np.float32([0.0, *T1.values()]), fractions)
    u, v = x / 100, y / 100
    bias = sum(c * p for c, p in zip(person.bias.tolist(), (u, v, u * v, u * u - 0.3, v * v - 0.3), strict=True))
    signal *= np.exp(bias) * person.gain * (1 + 0.02 * person.texture(x[0], y[:, 0], z))
    signal = ndimage.gaussian_filter(signal, POINT_SPREAD / (x[0, 1] - x[0, 0]))
    # The magnitude of a complex signal with Gaussian noise in both channels is Rician.
    real, imaginary = NOISE * rng.standard_normal((2, *signal.shape), np.float32)
    return np.hypot(signal + real, imaginary)


def _grid(image_size):
    """Window of the frame that is computed, and the fine grid inside it.

    Returns:
        window: two slices, rows and columns of the image.
        x, y: (h * fine, w * fine) float32, mm, centres of the fine pixels.
        fine: how many fine pixels a pixel has along each axis; small images are averaged down from fine ones.

    Raises:
        ValueError: image_size is odd or below 16.
    """
    if image_size < 16 or image_size % 2:
        raise ValueError(f"image_size must be even and at least 16, not {image_size}")
    fine = -(-192 // image_size)
    pixel = FRAME_MM / image_size
    half = [min(int(np.ceil(mm / 2 / pixel)), image_size // 2) for mm in ROI_MM]
    middle = image_size // 2
    window = tuple(np.s_[middle - n : middle + n] for n in half)
    centres = (np.arange(image_size * fine, dtype=np.float32) + 0.5) * np.float32(pixel / fine) - FRAME_MM / 2
    rows, columns = (centres[w.start * fine : w.stop * fine] for w in window)
    x, y = np.meshgrid(columns, -rows)
    return window, x, y, fine


def _average(a, fine):
    """Mean over blocks of fine x fine pixels in the last two axes."""
    return a.reshape(*a.shape[:-2], a.shape[-2] // fine, fine, a.shape[-1] // fine, fine).mean(axis=(-3, -1))


def _person_slices(person, image_size, rng):
    """Yield image, mask, ventricles for z = 0 .. 31, each (image_size, image_size)."""
    window, x, y, fine = _grid(image_size)
    levels = np.array(tissue.LEVELS, np.uint8)
    for z in range(SLICES):
        fractions, ventricle = _tissues(person, x, y, float(z), FRAME_MM / image_size / fine)
        fractions, ventricle = _average(fractions, fine), _average(ventricle, fine)
        background, csf, cortex, deep, white = fractions
        # The pixel's largest tissue where at least half of it is brain, so that the outline owes nothing to the folds.
        classes = np.where(background > 0.5, 0, 1 + np.argmax([csf, cortex + deep, white], axis=0))
        signal = _acquire(person, fractions, _average(x, fine), _average(y, fine), float(z), rng)
        # Skull stripping: exactly 0 outside, and never 0 inside, so that the outline can be read off the image.
        inside = np.where(classes > 0, np.clip(np.round(255 * signal), 1, 255), 0)
        image, mask = np.zeros((2, image_size, image_size), np.uint8)
        ventricles = np.zeros((image_size, image_size), bool)
        image[window], mask[window] = inside, levels[classes]
        ventricles[window] = (ventricle > 0.5) & (classes == tissue.CSF)
        yield image, mask, ventricles


def slices(people, image_size=256, seed=0):
    """Slices of `people` phantom persons, one person after the other, from the lowest slice to the highest.

    A person depends on `seed` and the case number only: `slices(2)` are the first two persons of `slices(4)`, and the
    anatomy is the same at every `image_size`. Odd cases are "NC", even cases "AD".

    Args:
        people: number of persons, >= 0.
        image_size: height and width in pixels, even, >= 16. The frame is 256 mm wide at every size.
        seed: int >= 0.

    Yields:
        dicts, ordered by case, then z:
        "image": (image_size, image_size) uint8; background exactly 0, brain 1 .. 255.
        "mask": (image_size, image_size) uint8, the true tissue, in `ldm.tissue.LEVELS`.
        "ventricles": (image_size, image_size) bool, the part of the CSF that is lateral or third ventricle.
        "z": int, 0 .. 31. "label": int, index into LABELS. "case": int, from 1.

    Raises:
        ValueError: image_size is odd or below 16.
    """
    for case in range(1, people + 1):
        yield from _slices_of(case, image_size, seed)


def _slices_of(case, image_size, seed):
    """What `slices` yields of one person."""
    rng = np.random.default_rng([seed, case])
    person = _person(rng, label=case % len(LABELS))
    for z, (image, mask, ventricles) in enumerate(_person_slices(person, image_size, rng)):
        yield {
            "image": image,
            "mask": mask,
            "ventricles": ventricles,
            "z": z,
            "label": person.label,
            "case": case,
        }


def _drawn_on_all_cores(people, image_size, seed):
    """What `slices` yields, drawn a few people ahead: NumPy lets other threads work meanwhile."""
    cores, ahead = os.cpu_count() or 1, collections.deque()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for case in range(1, people + 1):
            ahead.append(pool.submit(lambda case: list(_slices_of(case, image_size, seed)), case))
            if len(ahead) > cores:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def write(out, people: int, image_size: int = 256, seed: int = 0) -> None:
    """Writes phantom brains as a zip in the OASIS course layout, with masks and `labels.csv`.

    About 75 / 12.5 / 12.5 % of the people are in train / validate / test, at least one in each; as labels alternate
    from person to person, every split has about as many of each.

    Args:
        out: the zip to write; it appears under this name only when it is whole.
        people: number of people, at least 3.
        image_size: height and width of the slices in pixels.
        seed: of the phantoms.

    Raises:
        DataError: a negative seed, too few people, an image size that phantoms do not have, or a folder that cannot be
            written.
    """
    check_seed(seed)
    if people < len(SPLITS):
        raise archive.DataError(
            f"--people {people} is too few: train, validate and test need one each, so give 3 or more."
        )
    for flag, value, most in (("people", people, MOST_PEOPLE), ("image-size", image_size, LARGEST)):
        if value > most:
            raise archive.DataError(f"--{flag} {value} is too much: give {most:,} at most.")
    try:
        files.check_file(out)
        files.write_by(out, lambda part: _write_zip(part, Path(out).name, people, image_size, seed))
    except OSError as error:
        raise archive.DataError(f"--out {out} cannot be written ({error.strerror}).") from error
    except ValueError as error:
        raise archive.DataError(f"--image-size {image_size} does not suit phantoms: {error}.") from error


def stand_in() -> Path:
    """The zip of phantoms that stands in where no data is named, drawn first if it is not there yet."""
    if not STAND_IN.exists():
        print(f"no --data given: drawing {STAND_IN_PEOPLE} phantom brains into {STAND_IN}", flush=True)
        write(STAND_IN, STAND_IN_PEOPLE)
    return STAND_IN


def _write_zip(path, shown, people, image_size, seed):
    """Write the zip of `write`; `shown` stands before the progress bar."""
    held_out = max(1, round(people / 8))
    ends = {"train": people - 2 * held_out, "validate": people - held_out, "test": people}  # last case of each split
    labels = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:  # PNGs do not shrink further
        for item in tqdm(
            _drawn_on_all_cores(people, image_size, seed),
            total=people * SLICES,
            desc=shown,
            unit="slice",
            delay=1,
            disable=None,
        ):
            case, z = item["case"], item["z"]
            split = next(name for name, end in ends.items() if case <= end)
            labels[case] = LABELS[item["label"]]
            for folder, prefix, pixels in (("", "case", item["image"]), ("seg_", "seg", item["mask"])):
                entry = f"keras_png_slices_{folder}{split}/{prefix}_{case:03d}_slice_{z}.nii.png"
                file.writestr(f"keras_png_slices_data/{entry}", _png(pixels))
        table = "".join(f"{case:03d},{label}\n" for case, label in labels.items())
        file.writestr("keras_png_slices_data/labels.csv", "case,label\n" + table)


def _png(pixels):
    """(H, W) uint8 -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
