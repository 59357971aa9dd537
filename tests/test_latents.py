"""The file of latents: what lies in it, and that its stream is the one of the slices."""

import numpy as np
import pytest
from small_archives import oasis_entries, take, write

import dataset
from dataset import make_dataset, open_source
from ldm.data import archive, latents, masks

VIEWS, COUNT = 3, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """12 training slices of 4 people, each of its own grey level, with masks."""
    people = {"train": [1, 2, 3, 4], "validate": [5], "test": [6]}
    path = tmp_path_factory.mktemp("latents") / "a.zip"
    return open_source(write(path, oasis_entries(people, slices=3)))


@pytest.fixture(scope="module")
def path(source, tmp_path_factory):
    """Latents that say who they are: channel 0 is the view, channel 1 the row of the table; masks and codes alike."""
    rows = source.select("train")
    who = np.empty((VIEWS, COUNT, 2, 2, 2), "float32")
    who[..., 0], who[..., 1] = np.arange(VIEWS)[:, None, None, None], np.arange(COUNT)[:, None, None]
    code = (100 * who[..., 0] + who[..., 1]).astype("int32")
    mask = np.stack([who[..., 0], who[..., 1], 0 * who[..., 0], 0 * who[..., 0] + 0.5], axis=-1)
    path = tmp_path_factory.mktemp("file") / "new folder" / "train.npz"
    latents.write(path, who, source.z[rows], source.label[rows], source.case[rows], codes=code, mask=mask)
    return path


def keys(batch):
    return list(zip(batch["case"].tolist(), batch["z"].tolist(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_order_is_that_of_the_slices(source, path, training):
    """One seed shows the second stage the same slices, whether they come as pictures or as latents."""
    options = {"seed": 5, "start_step": 1}
    slices = take(make_dataset(source, "train", 16, 5, training, **options), 7)
    for one, other in zip(slices, take(latents.make_dataset(path, 5, training, **options), 7), strict=True):
        assert keys(one) == keys(other)
        np.testing.assert_array_equal(one["label"], other["label"])
        assert other["image"].dtype == np.float32 and other["z"].dtype == np.int32
    assert dataset.make_latents_dataset is latents.make_dataset


def test_shares_together_are_the_batch(path):
    """Batches of 10 out of 12 slices straddle epochs; masks come along."""
    whole, *shares = (
        take(latents.make_dataset(path, 10, True, masks=True, share=share), 5) for share in ((0, 1), (0, 2), (1, 2))
    )
    for batch, *parts in zip(whole, *shares, strict=True):
        for key, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), values)


def test_who_lets_go_of_a_dataset_does_not_wait_for_its_tuning(source, path):
    """TensorFlow's tuning thread wakes once a minute, and at times misses that it is to end."""
    for made in (make_dataset(source, "train", 16, 5, True, cache_bytes=0), latents.make_dataset(path, 5, True)):
        assert made.options().autotune.enabled is False


@pytest.mark.parametrize("most, expected", [(None, range(12)), (40, range(12)), (5, [0, 3, 6, 8, 11]), (1, [0])])
def test_validation_sees_so_many_slices_at_most_evenly_spread(source, path, most, expected):
    streams = (
        make_dataset(source, "train", 16, 2, False, most=most),
        make_dataset(source, "train", 16, 2, False, most=most, cache_bytes=0),
        latents.make_dataset(path, 2, False, most=most),
    )
    rows = [(source.case[row], source.z[row]) for row in source.select("train")]
    for stream in streams:
        assert [key for batch in take(stream, 99) for key in keys(batch)] == [rows[place] for place in expected]


def test_conditions_masks_and_codes_travel_with_their_latents(source, path):
    rows = source.select("train")
    with_masks = take(latents.make_dataset(path, 5, True, seed=2, masks=True), 12)
    with_codes = take(latents.make_dataset(path, 5, True, seed=2, codes=True), 12)
    for batch, coded in zip(with_masks, with_codes, strict=True):
        view, row = batch["image"][:, 0, 0].astype(int).T
        assert batch["case"].tolist() == source.case[rows[row]].tolist()
        assert batch["z"].tolist() == source.z[rows[row]].tolist()
        np.testing.assert_array_equal(batch["mask"][:, 1, 1].T, [view, row, 0 * row, 0 * row + 0.5])
        np.testing.assert_array_equal(coded["codes"][:, 1, 0], 100 * view + row)
        assert "image" not in coded and "mask" not in coded


def test_training_goes_through_the_views_and_the_rest_sees_the_slices_as_they_are(path):
    """In V epochs every slice is seen once in every view, and each epoch mixes the views."""
    batches = take(latents.make_dataset(path, 6, True, seed=1), VIEWS * COUNT // 6)
    seen = np.concatenate([batch["image"][:, 0, 0] for batch in batches]).astype(int).reshape(VIEWS, COUNT, 2)
    every = {(view, row) for view in range(VIEWS) for row in range(COUNT)}
    assert {tuple(pair) for pair in seen.reshape(-1, 2).tolist()} == every
    said = np.concatenate([batch["augmented"] for batch in batches])
    np.testing.assert_array_equal(said, np.minimum(seen.reshape(-1, 2)[:, 0], 1))  # view 0 is as it is
    for epoch in seen:
        assert set(epoch[:, 0].tolist()) == set(range(VIEWS)) and len(set(epoch[:, 1].tolist())) == COUNT
    for batch in take(latents.make_dataset(path, 5, False), 3):
        assert (batch["image"][..., 0] == 0).all() and (batch["augmented"] == np.zeros(len(batch["z"]))).all()


def test_resumed_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(path):
    def stream(start_step):
        return take(latents.make_dataset(path, 5, True, seed=3, masks=True, start_step=start_step), 9 - start_step)

    unbroken = stream(0)
    for skipped in (1, 4):  # batches of 5 straddle the epochs of 12
        for one, other in zip(stream(skipped), unbroken[skipped:], strict=True):
            assert one.keys() == other.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])


def shown(source, number, with_masks=False, batch_size=5, **options):
    batches = make_dataset(source, "train", 24, batch_size, training=False, masks=with_masks)
    parts = list(latents.view(batches, number, **options))
    return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in parts[0]}


def test_view_0_is_the_slice_and_the_others_are_augmented_each_in_its_own_way(source):
    plain = dataset.read_split(source, "train", 24)
    views = [shown(source, number, seed=4) for number in range(3)]
    np.testing.assert_array_equal(views[0]["image"], plain["image"])
    for number, view in enumerate(views):
        for key in ("z", "label", "case"):
            np.testing.assert_array_equal(view[key], plain[key])
        for other in views[number + 1 :]:
            assert (view["image"] != other["image"]).any(axis=(1, 2, 3)).all()
        assert np.abs(view["image"] - plain["image"]).mean() < 0.1  # still the same slice
    for batch_size in (1, 5):  # a slice's change does not depend on its neighbours
        again = shown(source, 1, batch_size=batch_size, seed=4)["image"]
        np.testing.assert_allclose(again, views[1]["image"], atol=1e-6)
    assert (shown(source, 1, seed=5)["image"] != views[1]["image"]).any()
    weak = shown(source, 1, seed=4, strength=0.2)["image"]
    assert np.abs(weak - plain["image"]).mean() < np.abs(views[1]["image"] - plain["image"]).mean()


def test_the_range_of_a_channel_leaves_out_its_farthest_latents(tmp_path):
    """A 10,000th on either side: of 40,000 latents of a channel, evenly spread over [0, 1], four."""
    steps = np.linspace(0.0, 1.0, 40_000, dtype="float32")
    steps = np.random.default_rng(0).permutation(steps).reshape(2, 50, 20, 20)
    latents.write(tmp_path / "train.npz", np.stack([steps, 3.0 - 2.0 * steps], axis=-1), *[np.zeros(50, "int32")] * 3)
    (low, first_low), (high, first_high) = latents.ranges(tmp_path / "train.npz")
    np.testing.assert_allclose([low, high, first_low, first_high], [1e-4, 1 - 1e-4, 1 + 2e-4, 3 - 2e-4], atol=2e-3)
    assert 0 < low < 2e-4


def test_masks_of_a_view_move_with_its_slices(source):
    plain, view = (shown(source, number, with_masks=True, seed=4, flip=True) for number in (0, 1))
    np.testing.assert_array_equal(view["image"], shown(source, 1, seed=4, flip=True)["image"])
    assert (view["mask"] != plain["mask"]).any()
    assert ((view["mask"] > 0) == (view["image"][..., 0] > -0.7)).mean() > 0.93
    assert masks.tissue_fractions(view["mask"], (4, 4)).numpy().sum() == pytest.approx(COUNT * 16)


def test_a_large_file_stays_on_disk_and_gives_the_same(path, tmp_path, monkeypatch):
    names, options = ("latents", "codes", "mask", "z"), {"seed": 2, "masks": True}
    whole, batches = latents.read(path, *names), take(latents.make_dataset(path, 5, True, **options), 4)
    monkeypatch.setattr(latents, "WHOLE", 0)
    for array, name, mapped in zip(whole, names, latents.read(path, *names), strict=True):
        assert isinstance(mapped, np.memmap) == (name != "z") and mapped.dtype == array.dtype
        np.testing.assert_array_equal(mapped, array)
    for one, other in zip(batches, take(latents.make_dataset(path, 5, True, **options), 4), strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    np.savez_compressed(tmp_path / "other.npz", latents=whole[0], z=whole[3])  # not ours: read, not mapped
    np.testing.assert_array_equal(latents.read(tmp_path / "other.npz", "latents")[0], whole[0])


def test_a_file_without_views_is_refused(tmp_path):
    latents.write(tmp_path / "train.npz", np.zeros((0, 3, 2, 2, 1)), *[np.zeros(3, "int32")] * 3)
    with pytest.raises(archive.DataError, match=r"train\.npz cannot be read \(its latents are of shape \(0, 3"):
        latents.ranges(tmp_path / "train.npz")


@pytest.mark.parametrize("wrong", [8, -1, 0.5, "shape"])
def test_codes_that_the_codebook_does_not_have_are_refused(wrong, tmp_path):
    right = np.arange(24).reshape(1, 3, 2, 4) % 8
    for name, found in (("right", right), ("wrong", right[..., :3] if wrong == "shape" else right * 0 + wrong)):
        latents.write(tmp_path / f"{name}.npz", np.zeros((1, 3, 2, 2, 1)), *[np.zeros(3, "int32")] * 3, codes=found)
    np.testing.assert_array_equal(latents.codes(tmp_path / "right.npz", (2, 4), 8), right)
    with pytest.raises(archive.DataError, match=r"wrong\.npz cannot be read \(its codes are not of shape"):
        latents.codes(tmp_path / "wrong.npz", (2, 4), 8)


def test_the_range_of_a_large_file_is_that_of_some_of_its_slices(tmp_path, monkeypatch):
    values = np.arange(1000.0)[None, :, None, None, None]
    latents.write(tmp_path / "train.npz", values, *[np.zeros(1000, "int32")] * 3)
    monkeypatch.setattr(latents, "SEEN", 100)
    (low,), (high,) = latents.ranges(tmp_path / "train.npz")
    assert 0 <= low < 1 and 998 < high <= 999


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(path, tmp_path, monkeypatch):
    target = tmp_path / "train.npz"
    target.write_bytes(b"old")

    def full_disk(file, **arrays):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        latents.write(target, np.zeros((1, 1, 2, 2, 1)), *[np.zeros(1, "int32")] * 3)
    assert target.read_bytes() == b"old" and [item.name for item in tmp_path.iterdir()] == ["train.npz"]
