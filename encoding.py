"""Stage 2: images -> latents. Every slice goes through the first stage, once as it is and once for each other view.

    encode_latents   images -> latents/<split>.npz
    renew_latents    the same, where what lies there is not what the next stage needs
    encoded          the work, piece after piece, each kept on disk, so that a killed encoding goes on

A large archive takes hours on a laptop. So every piece is kept until all are done, in a folder whose name is a digest
of all that the latents depend on; the same command then goes on after the last piece.
"""

import contextlib
import functools
import hashlib
import json
import shutil

import numpy as np
import tensorflow as tf
from tqdm import tqdm

import dataset
import modules
from ldm import files
from ldm.data import archive, latents
from ldm.data.masks import tissue_fractions
from ldm.training import distribution, records, runs
from ldm.training.settings import latent_shape

BATCH, PIECE = 64, 16  # slices that are encoded at a time; batches of a piece
# Strength of augmentation for what the second stage learns to draw (`pixels.augment`): turned and shifted a little, no
# head larger or brighter: with all of it at 0.4, brains came out 1.2 deviations too large. Turned and shifted at 0.4,
# people's own slices differ from the mean image with 1.43 times their power at 32 pixels; at 0.2 it is 1.11 times.
GENTLY = (0.2, 0.0)


def encode_latents(run, settings, source, manifest):
    """Stage 2: images -> `latents/<split>.npz`, for the splits that training may see; see `ldm.data.latents`."""
    if not runs.is_chief():  # one machine encodes, the others wait for it
        return
    autoencoder = records.load_first_stage(run)
    records.write(run, "latents", settings, manifest, finished=False)
    masks, options = settings["diffusion"]["condition_on_mask"], {"seed": settings["seed"], "flip": settings["flip"]}
    model = hashlib.sha256((run / "autoencoder.keras").read_bytes()).hexdigest()
    for split, views in (("train", settings["latents"]["views"]), ("validate", 1)):
        rows = [getattr(source, name)[source.select(split)].tolist() for name in ("z", "label", "case")]
        depends = [model, masks, options, GENTLY, BATCH, PIECE, manifest, source.center, rows]
        digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
        pieces = run / "latents" / f"{split}.{digest}"
        arrays = encoded(autoencoder, source, split, views, masks, kept=pieces, **options)
        latents.write(run / "latents" / f"{split}.npz", **arrays)
    epochs = records.of(run, "autoencoder")["epochs"]
    records.write(run, "latents", settings, manifest, finished=True, epochs=epochs)
    for pieces in (run / "latents").glob("*.*/"):  # also those of another first stage
        shutil.rmtree(pieces, ignore_errors=True)


def renew_latents(run, settings, source, manifest, strategy, needed):
    """Encode the latents again where what lies beside them is not what the next stage needs: slices, masks, codes.

    Args:
        run, settings, source, manifest, strategy: as everywhere here.
        needed: names of arrays that the next stage reads beside the latents.
    """
    stale = not records.are_current(run)
    for split in ("train", "validate"):
        path, rows = run / "latents" / f"{split}.npz", source.select(split)
        with latents.opened(path) as file:
            same = all(np.array_equal(file[name], getattr(source, name)[rows]) for name in ("z", "label", "case"))
            stale |= not same or any(name not in file for name in needed)
        stale = stale or latents.read(path, "latents")[0].shape[2:] != latent_shape(settings)
    distribution.wait_for_all(strategy)  # nobody writes before all have looked
    if stale:
        print("latents: of another first stage, of other slices or labels, or without masks or codes; encoding again")
        encode_latents(run, settings, source, manifest)
        distribution.wait_for_all(strategy)


def encoded(autoencoder, source, split, views, masks, *, seed, flip, kept=None):
    """The latents of a split and what belongs to them, as `latents.write` takes them.

    Args:
        autoencoder: a trained first stage.
        source: of the slices.
        split: "train" or "validate".
        views: V.
        masks: whether the tissue fractions come along.
        seed, flip: of the augmentation of all views but the first.
        kept: folder of the pieces that are there already, and of those that are made now; None keeps none.

    Returns:
        {"latents" (V, N, h, w, C) float16; "z", "label", "case" (N,) int32; "codes" (V, N, h, w) int32, where the first
        stage has a codebook; "mask" (V, N, h, w, 4) float16, with masks}.
    """
    describe = described(autoencoder, masks)
    batches, found = -(-len(source.select(split)) // BATCH), []
    for number in range(views):
        paths = [kept and kept / f"{number}-{first}.npz" for first in range(0, batches, PIECE)]
        pieces = []
        while len(pieces) < len(paths) and (piece := read_piece(paths[len(pieces)])):
            pieces.append(piece)
        done, rows = min(batches, len(pieces) * PIECE), []
        if 0 < done < batches:
            print(f"latents: {split}, view {number + 1} of {views}: going on after {done} of {batches} batches")
        plain = dataset.make_dataset(
            source, split, autoencoder.image_size, BATCH, training=False, masks=masks, start_step=done
        )
        batched = latents.view(plain, number, seed=seed, flip=flip, strength=GENTLY, first=done * BATCH)
        bar = {"desc": f"latents: {split}", "unit": "batch", "delay": 1, "disable": None}
        for n, batch in enumerate(tqdm(batched, total=batches, initial=done, **bar), start=done + 1):
            rows.append(describe(batch))
            if n % PIECE == 0 or n == batches:
                pieces.append({key: np.concatenate([row[key] for row in rows]) for key in rows[0]})
                rows = []
                if kept:
                    files.write_by(paths[len(pieces) - 1], functools.partial(np.savez, **pieces[-1]))
        found.append({key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]})
        print(f"latents: {split}, view {number + 1} of {views}", flush=True)
    arrays = {key: found[0][key] for key in ("z", "label", "case")}  # the same in every view
    return arrays | {key: np.stack([view[key] for view in found]) for key in found[0] if key not in arrays}


def described(autoencoder, masks):
    """Callable (batch of slices) -> {what `encoded` returns: array (B, ...)}, compiled."""
    encode = tf.function(autoencoder.encode, reduce_retracing=True, autograph=False)
    quantized = isinstance(autoencoder, modules.VQVAE)
    codes = tf.function(autoencoder.codes, reduce_retracing=True, autograph=False) if quantized else None

    def describe(batch):
        latent = encode(batch["image"], batch["z"], batch["label"])
        row = {"latents": latent.numpy().astype("float16")} | ({"codes": codes(latent).numpy()} if quantized else {})
        if masks:
            fractions = tissue_fractions(batch["mask"], latent.shape[1:3], autoencoder.crop_box)
            row["mask"] = fractions.numpy().astype("float16")
        return row | {key: batch[key].numpy() for key in ("z", "label", "case")}

    return describe


def read_piece(path):
    """A piece that `encoded` has kept, {name: array}; None if there is none, or none that can be read."""
    if path and path.exists():
        with contextlib.suppress(archive.DataError), latents.opened(path) as file:
            return dict(file)
    return None
