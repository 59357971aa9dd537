"""In which plane slices lie, and what of the anatomy can be said of slices in it.

    guess   images -> "axial", "coronal" or "sagittal"
    HOLDS   plane -> measures of `ldm.judging.anatomy` that mean something there

The left half of a head mirrors the right one, so axial and coronal slices are symmetric about a line from top to
bottom, and sagittal ones are not. An axial slice with the forehead up is longer than wide, a coronal one is not.
"""

import numpy as np

from ldm.judging import audit

PLANES = ("sagittal", "coronal", "axial")  # by the axis of a volume in RAS orientation that they are cut across
# Correlation of the mean of framed slices with its mirror image: 0.996 of OASIS (axial), 0.988 and 0.987 of coronal and
# axial slices of one volume; 0.84 of its sagittal slices, 0.64 of ADNI's.
SYMMETRIC = 0.94
OUTLINE = ("brain_area", "background", "mean", "deviation")
HOLDS = {
    "axial": ("csf", "grey", "white", "ventricle_area", "symmetry", *OUTLINE),
    "coronal": ("symmetry", *OUTLINE),
    "sagittal": OUTLINE,
}
WHY_NOT = {  # what is not said, and why
    "coronal": "These are coronal slices. The segmenter and the place of the ventricles are made for axial slices, and "
    "have been checked on those only: tissue, ventricles and the label's effect on them are not said.",
    "sagittal": "These are sagittal slices, which have no symmetry. The segmenter and the place of the ventricles are "
    "made for axial slices, and have been checked on those only: tissue, ventricles and the label's effect on them are "
    "not said.",
}


def guess(images, most=400):
    """The plane of slices whose top is the top, or the front, of the head.

    Args:
        images: (N, H, W, 1) in [0, 1].
        most: slices that are looked at, evenly spread.

    Returns:
        One of PLANES.
    """
    some = audit.shrunk(images[np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)], 64)
    some = some[..., 0]
    mean = audit.framed(some.astype("float32")).mean(axis=0)  # heads lie one upon the other, wherever they were
    if np.corrcoef(mean.ravel(), mean[:, ::-1].ravel())[0, 1] < SYMMETRIC:
        return "sagittal"
    lengths = [np.median(_spread(some.mean(axis=axis))) for axis in (2, 1)]
    return "axial" if lengths[0] > lengths[1] else "coronal"


def _spread(profiles):
    """Standard deviation of place along each of the profiles (N, L), in pixels."""
    place = np.arange(profiles.shape[1])
    weight = (profiles + 1e-6) / (profiles + 1e-6).sum(axis=1, keepdims=True)
    return np.sqrt(weight @ place**2 - (weight @ place) ** 2)
