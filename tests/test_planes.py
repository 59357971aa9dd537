"""ldm/judging/planes.py: which way slices were cut, of a head made of ellipsoids, of phantoms and of real people."""

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import study
from ldm.data import phantom
from ldm.judging import measures, planes

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "oasis1_slices.zip"


def head(axis, seed=0):
    """Slices (9, 64, 64, 1) across an axis of a head: long, less wide, least high, a cerebellum low at the back."""
    x, y, z = np.mgrid[-1:1:64j, -1:1:64j, -1:1:64j]  # right, front, top
    volume = 0.7 * ((x / 0.62) ** 2 + (y / 0.82) ** 2 + (z / 0.5) ** 2 < 1)
    volume += 0.3 * ((x / 0.4) ** 2 + ((y + 0.4) / 0.3) ** 2 + ((z + 0.4) / 0.2) ** 2 < 1)
    places = np.random.default_rng(seed).integers(22, 42, 9)
    cut = np.moveaxis(volume, axis, 0)[places]
    return np.rot90(cut, axes=(1, 2))[..., None].astype("float32")  # the last axis, top or front, upwards


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_is_cut_as_it_seems(axis):
    assert planes.guess(head(axis)) == planes.PLANES[axis]
    moved = np.stack([np.roll(image, i - 4, axis=1) for i, image in enumerate(head(axis))])
    assert planes.guess(0.5 * moved) == planes.PLANES[axis], "wherever it lies, and however dark it is"


def test_phantoms_are_axial():
    images = np.stack([piece["image"] for piece in phantom.slices(2, 32)])[..., None] / np.float32(255)
    assert planes.guess(images) == "axial"


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the OASIS slices are not beside this checkout (shared/data)")
def test_real_slices_are_axial():
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = [name for name in archive.namelist() if "slices_test/" in name and name.endswith("0.nii.png")][:40]
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name))), np.float32) / 255 for name in names]
    assert planes.guess(np.stack(pictures)[..., None]) == "axial"


def test_what_is_told_comes_first_then_headers_then_symmetry():
    def people(axis):
        store = SimpleNamespace(axis=axis) if axis is not None else SimpleNamespace()
        real = {"train": SimpleNamespace(images=head(0))}
        return SimpleNamespace(source=SimpleNamespace(store=store), real=real)

    assert study.plane_of(people(1), "axial") == ("axial", "as --plane says")
    assert study.plane_of(people(1)) == ("coronal", "as the volumes' headers say")
    plane, how = study.plane_of(people(None))
    assert plane == "sagittal" and "symmetry" in how


@pytest.mark.parametrize(("plane", "symmetry"), [("sagittal", False), ("coronal", True)])
def test_what_does_not_hold_in_a_plane_is_not_said(plane, symmetry):
    z, case = np.tile(np.arange(3), 3), np.repeat(np.arange(3), 3)
    slices = measures.Slices(head(0), z, case % 2, case)
    found = measures.anatomy(slices, slices, None, ["AD", "NC"], (np.zeros((1, 16, 16)),) * 2, (plane, "told"))
    said = found.facts["anatomy"]
    assert said["plane"] == plane and not said["label effect"] and not found.shown["refused"]
    names = set(found.shown["means"]["samples"])
    assert ("symmetry" in names) == symmetry and not names & {"csf", "grey", "white", "ventricle_area"}
    assert found.shown["area"] == "brain_area" and plane in found.shown["not said"]
