"""Bytes in: what is damaged, forged or no picture is named in one sentence, and nothing more is read than declared."""

import io
import json
import os
import re
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from small_archives import THREE, brain, encode, oasis_entries, refuse, take, volume, write

import dataset
from dataset import DataError, data_errors, make_dataset, open_source
from ldm.data import archive


def test_a_progressive_jpeg_that_is_cut_between_two_scans_is_told():
    """A decoder takes what is left for a whole picture, and says nothing."""
    noise = np.random.default_rng(0).integers(0, 99, (64, 64, 3), dtype=np.uint8)
    for pixels, scans in ((noise, 10), (noise[..., 0], 6)):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", progressive=True, quality=90)
        whole = stream.getvalue()
        starts = [found.start() for found in re.finditer(b"\xff\xda", whole)]
        assert len(starts) == scans and archive.probe(whole) == archive.JPEG
        for start in starts[1:]:
            cut = whole[:start] + b"\xff\xd9"
            assert np.asarray(Image.open(io.BytesIO(cut))).shape == pixels.shape
            with pytest.raises(ValueError, match="is a truncated or damaged JPEG"):
                archive.probe(cut)
        for end in range(len(whole)):
            with pytest.raises(ValueError):
                archive.probe(whole[:end])


@pytest.fixture
def course(tmp_path):
    """A small archive in the OASIS course layout, 4 / 1 / 1 people."""
    return write(tmp_path / "oasis.zip", oasis_entries(THREE))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_later_of_two_equal_names_counts(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries(THREE))
    name = "keras_png_slices_data/keras_png_slices_train/case_001_slice_0.nii.png"
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, encode(brain(150)))
    source = open_source(path)
    assert len(source.entries) == 18
    first = take(make_dataset(source, "train", 24, 1, False), 1)[0]["image"]
    assert first.max() == pytest.approx(190 / 127.5 - 1)


def test_paths_that_are_no_data(tmp_path):
    refuse(tmp_path / "nowhere.zip", "nowhere.zip", "does not exist")
    refuse(write(tmp_path / "empty", {"a.txt": b""}), "no brain slices")
    (tmp_path / "data.tar").write_bytes(b"x")
    refuse(tmp_path / "data.tar", "unsupported suffix", ".zip")
    refuse([], "--data")
    refuse(write(tmp_path / "outer", {"inner/oasis.zip": b"x"}), "point --data at 'inner/oasis.zip'")
    refuse(write(tmp_path / "volumes.zip", {"a.nii.gz": b"x", "b.nii.gz": b"x"}), "a.nii.gz", "unpacked")


@pytest.mark.parametrize("place", ["a.zip", "folder"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: b"this is no image", "neither a PNG nor a JPEG"),
        (lambda data: b"", "empty"),
        (lambda data: data[:40], "truncated"),
        (lambda data: data[:-12], "truncated"),
        (lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "damaged"),
    ],
)
def test_damaged_image_is_named(tmp_path, place, damage, word):
    entries = oasis_entries(THREE)
    name = "keras_png_slices_data/keras_png_slices_train/case_002_slice_1.nii.png"
    entries[name] = damage(entries[name])
    refuse(write(tmp_path / place, entries), name, word)


def test_truncated_jpeg_is_named(tmp_path):
    entries = {f"{case}_{z}.jpg": encode(brain(9, 64), "JPEG") for case in range(4) for z in range(2)}
    entries["2_1.jpg"] = entries["2_1.jpg"][:-30]
    refuse(write(tmp_path / "a", entries), "2_1.jpg", "truncated")


def test_a_jpeg_for_printers_is_named_before_anything_is_decoded(tmp_path):
    entries = {f"{case}_{z}.jpg": encode(brain(9, 64), "JPEG") for case in range(4) for z in range(2)}
    file = io.BytesIO()
    Image.fromarray(brain(9, 64)).convert("CMYK").save(file, "JPEG")
    refuse(write(tmp_path / "a", entries | {"2_1.jpg": file.getvalue()}), "2_1.jpg", "CMYK", "save it in grey")


def test_damaged_zip(tmp_path, course):
    data = course.read_bytes()
    broken = tmp_path / "broken.zip"
    broken.write_bytes(data[: len(data) // 2])
    refuse(broken, "broken.zip", "not a readable zip")
    broken.write_bytes(b"no zip at all")
    refuse(broken, "broken.zip", "not a readable zip")
    place = data.index(b"IDAT") + 8  # one flipped bit within the first slice: its checksum in the directory differs
    broken.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    refuse(broken, "case_001_slice_0", "size or checksum")


def patch_directory(path, offset, value):
    """Overwrites bytes of the first entry in the central directory."""
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + offset
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


def test_encrypted_zip(course):
    refuse(patch_directory(course, 8, b"\x01\x00"), "case_001_slice_0", "encrypted")


def test_unknown_compression(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries(THREE), zipfile.ZIP_LZMA)
    refuse(path, "case_001_slice_0", "deflate")


@pytest.mark.parametrize("name", ["../evil_1.png", "/etc/evil_1.png", "a/../../evil_1.png", "C:/evil_1.png"])
def test_path_outside_the_archive(tmp_path, name):
    refuse(write(tmp_path / "a.zip", oasis_entries(THREE) | {name: encode(brain(0))}), name, "outside the archive")


def test_decompression_bombs(tmp_path):
    big = write(tmp_path / "big.zip", oasis_entries(THREE) | {"bomb_1.png": bytes(70 * 2**20)}, zipfile.ZIP_DEFLATED)
    refuse(big, "bomb_1.png", "declares")
    # An entry that says 100 bytes and inflates to 50 million: never more than it declares is inflated.
    liar = write(tmp_path / "liar.zip", {"a_1.png": bytes(5 * 10**7), "b_1.png": b""}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refuse(patch_directory(liar, 24, struct.pack("<I", 100)), "a_1.png", "damaged")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    # A tiny file whose header declares 60,000 x 60,000 pixels.
    entries = oasis_entries(THREE)
    name = next(iter(entries))
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + b"\x08\0\0\0\0"
    entries[name] = entries[name][:12] + header + struct.pack(">I", zlib.crc32(header)) + entries[name][33:]
    refuse(write(tmp_path / "wide.zip", entries), name, "60000 x 60000")


def test_mixtures(tmp_path, course):
    refuse([course, course], "mixture")
    volume(tmp_path / "both" / "a.nii")
    (tmp_path / "both" / "b_1.png").write_bytes(encode(brain(0)))
    refuse(tmp_path / "both", "volumes and PNG")


def test_large_archive_opens_fast(tmp_path):
    image = encode(brain(0, 8))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for case in range(2_000):
            for z in range(25):
                split = "train" if case < 1_800 else "validate" if case < 1_900 else "test"
                file.writestr(f"keras_png_slices_{split}/case_{case:04d}_slice_{z}.nii.png", image)
    start = time.perf_counter()
    source = open_source(tmp_path / "a.zip")
    seconds = time.perf_counter() - start
    assert len(source.entries) == 50_000
    assert seconds < 5, f"{seconds:.1f} s for 50,000 slices"  # 200,000 take 2.5 s; slack for busy machines


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege there")
def test_a_link_that_leads_back_is_not_followed(tmp_path):
    """Slices behind a link to another folder count once, those behind a link to a folder above not again."""
    entries = {f"{p}_{z}.png": encode(brain(0)) for p in range(1, 5) for z in (0, 1)}
    folder = write(tmp_path / "a", entries)
    other = write(tmp_path / "b", {"9_0.png": encode(brain(0))})
    (folder / "inner").mkdir()
    (folder / "inner" / "back").symlink_to(folder)
    (folder / "aside").symlink_to(other)
    assert sorted(open_source(folder).entries) == [*entries, "aside/9_0.png"]


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege there")
def test_a_link_that_leads_nowhere_is_said(tmp_path):
    """As git-annex and DataLad keep what was not fetched: who is only behind such links is left out, and said to be."""
    folder = write(tmp_path / "a", {f"{p}_{z}.png": encode(brain(0)) for p in range(1, 5) for z in (0, 1)})
    for name in ("9_0.png", "9_1.png", "README"):
        (folder / name).symlink_to(".git/annex/objects/gone")
    source = open_source(folder)
    assert len(source.entries) == 8
    reason = "links that lead nowhere (to fetch, as by `datalad get`)"
    assert source.listing.left_out == [(reason, ["9_0.png", "9_1.png"])]
    for name in source.entries:
        (folder / name).unlink()
    refuse(folder, "'9_0.png'", "lead nowhere", "datalad get")


@pytest.mark.parametrize("place", ["a.zip", "folder"])
def test_names_do_not_command_the_terminal(tmp_path, place, capsys):
    entries = {f"p\x1b[31m{p}\n_{z}.png": encode(brain(0)) for p in range(1, 5) for z in (0, 1)}
    path = write(tmp_path / place, entries)
    assert set(open_source(path).case_names.values()) == {rf"p\x1b[31m{p}\x0a" for p in range(1, 5)}
    assert dataset.main(["describe", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_table_declares_its_size(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries(THREE) | {"labels.csv": bytes(20 * 2**20)}, zipfile.ZIP_DEFLATED)
    refuse(path, "'labels.csv' declares 20,971,520 bytes", "no table of people")
    refuse(write(tmp_path / "b", oasis_entries(THREE) | {"labels.csv": bytes(20 * 2**20)}), "no table of people")


def test_bytes_after_the_end_of_a_jpeg_do_no_harm_and_half_of_one_does(tmp_path):
    entries = {f"{case}_{z}.jpg": encode(brain(9 * case, 64), "JPEG") for case in range(4) for z in range(2)}
    whole = entries["2_1.jpg"]
    for tail in (bytes(500), b"\xff\xd8 a thumbnail"):
        source = open_source(write(tmp_path / f"tail{len(tail)}", entries | {"2_1.jpg": whole + tail}))
        assert len(source.entries) == 8
    scan = whole.index(b"\xff\xda")
    half = whole[: (scan + len(whole)) // 2] + b"\xff\xd9"
    refuse(write(tmp_path / "half", entries | {"2_1.jpg": half}), "2_1.jpg", "half a JPEG")
    source = open_source(tmp_path / "half", check=False)  # not looked at when opened: named when it is read
    split = str(source.split[source.entries.index("2_1.jpg")])
    with pytest.raises(DataError, match="'2_1.jpg' cannot be decoded"), data_errors(source):
        take(make_dataset(source, split, 16, 2, False, cache_bytes=0), 9)
    grey = encode(np.full((64, 64), 128, np.uint8), "JPEG")  # what a decoder paints where nothing is: here it is meant
    assert len(open_source(write(tmp_path / "grey", entries | {"2_1.jpg": grey})).entries) == 8


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes only there")
def test_names_that_are_not_utf8_are_read_and_can_be_written_down(tmp_path, capsys):
    """A folder with Latin-1 names, and a zip that says nothing of its encoding: opened, described, split by person."""
    folder = os.fsencode(tmp_path / "folder")
    os.mkdir(folder)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for person in (b"m\xfcller_1", b"m\xfcller_2", b"\xff\xfe_3"):
            for z in (1, 2):
                with open(os.path.join(folder, person + b"_%d.png" % z), "wb") as one:
                    one.write(encode(brain(z)))
                file.writestr(person.decode("cp437") + f"_{z}.png", encode(brain(z)))
    for path in (tmp_path / "folder", tmp_path / "a.zip"):
        assert dataset.main(["describe", str(path)]) == 0
        source = dataset.open_source(path)
        assert len(source.case_names) == 3
        json.dumps(source.manifest()).encode()
        assert capsys.readouterr().out.encode()  # can be shown
        assert dataset.read_split(source, "train", 24)["image"].max() > -1


def test_the_end_of_a_zip_that_contradicts_its_directory_is_refused(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries(THREE))
    good = path.read_bytes()
    place = good.rindex(b"PK\5\6")
    for count in (65535, 3, 0):
        path.write_bytes(good[: place + 8] + struct.pack("<HH", count, count) + good[place + 12 :])
        refuse(path, "a.zip", f"its end says {count:,} entries")
    path.write_bytes(good[: place + 16] + struct.pack("<L", 2**31) + good[place + 20 :])
    refuse(path, "a.zip", "damaged")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    refuse(tmp_path / "a.zip", "neither a file nor a folder")
    refuse("", "names nothing")
