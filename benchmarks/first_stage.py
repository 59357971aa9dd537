"""How good is the first stage, and what made it so? Three commands; each prints a Markdown table.

    python benchmarks/first_stage.py table RUN ...          scores of trained runs on the test people, beside codecs
    python benchmarks/first_stage.py against --data ZIP     ours and diffusers' VQModel, so many minutes each, in turn
    python benchmarks/first_stage.py ablation --data ZIP    terms of the reconstruction loss, equal steps for each

All scores are on people that no training saw: the test people, and in the ablation, which decides, the validation
people. `table` also writes the rate/quality curve, and with `--keep FILE` its rows outlive the runs: `first_stage.json`
here has the README's. The peers of `against` run in `benchmarks/.venv`.
"""

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import serving
from PIL import Image

import dataset
import modules
from ldm import batches
from ldm.drawing import charts
from ldm.judging import metrics
from ldm.training import callbacks, distribution, losses, records, runs

HERE = Path(__file__).parent


def split_of(source, split, size):
    """All slices of a split: images (N, H, W, 1) in [-1, 1], z (N,), label (N,)."""
    found = dataset.read_split(source, split, size)
    return tuple(found[key] for key in ("image", "z", "label"))


def gradient(images):
    """Absolute differences of neighbouring pixels, along both axes together: (N, H, W, 1) -> (N, H, W)."""
    return np.abs(np.gradient(images[..., 0], axis=1)) + np.abs(np.gradient(images[..., 0], axis=2))


def scores(real, fake):
    """Means over slices, of images in [0, 1]. Sharpness is the mean gradient over the brain, fake by real."""
    brain = real[..., 0] > metrics.FOREGROUND
    return {
        "SSIM": metrics.ssim(real, fake).mean(),
        "foreground SSIM": np.nanmean(metrics.foreground_ssim(real, fake)),
        "PSNR": metrics.psnr(real, fake).mean(),
        "MAE": metrics.mae(real, fake).mean(),
        "sharpness": gradient(fake)[brain].mean() / gradient(real)[brain].mean(),
        "background": fake[real == 0].mean(),
    }


def show(rows, columns):
    """Print {name: {column: value}} as a Markdown table."""
    digits = {"PSNR": 1, "Frechet distance": 1}

    def cell(column, value):
        return f"{value:.{digits.get(column, 3)}f}" if isinstance(value, float) else str(value)

    print("| | " + " | ".join(columns) + " |\n|" + " --- |" * (1 + len(columns)))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(cell(column, row.get(column, "")) for column in columns) + " |")
    sys.stdout.flush()


def rounded(values):
    return {key: round(float(value), 1 if key == "PSNR" else 3) for key, value in values.items()}


# ---- table -----------------------------------------------------------------------------------------------------------


def through(autoencoder, images, z, label):
    """Reconstructions, a batch at a time."""
    import tensorflow as tf

    step = tf.function(autoencoder.reconstruct, reduce_retracing=True)
    return batches.in_batches(step, images, z, label)


def run_row(run, source):
    """One trained run: what it is, what it cost, how good it is."""
    autoencoder, about = records.load(run, "autoencoder")
    history = runs.read_history(run / "autoencoder.csv")
    real, z, label = split_of(source, "test", autoencoder.image_size)
    bits = getattr(autoencoder, "bits_per_slice", None)
    shape = "x".join(str(n) for n in autoencoder.latent_shape)
    minutes = sum(row.get("seconds", np.nan) for row in history) / 60  # what older runs do not know
    usage = about.get("codebook", {}).get("usage")
    quantized = {"ema": "VQ-VAE", "fsq": "FSQ"}
    return {
        "kind": "KL-VAE" if isinstance(autoencoder, modules.VAE) else quantized[autoencoder.quantizer],
        "pixels": autoencoder.image_size,
        "latents": shape,
        "bits": f"{bits:,.0f}" if bits else "",
        "parameters": f"{autoencoder.count_params() / 1e6:.1f} M",
        "minutes": f"{minutes:.0f}" if minutes == minutes else "",
        **rounded(scores(metrics.to_unit(real), metrics.to_unit(through(autoencoder, real, z, label)))),
        "codes used": f"{usage:.1%}" if usage else "",
    }


def test_people(source):
    return [source.case_names[case] for case in np.unique(source.case[source.select("test")]).tolist()]


def kept_rows(path, source):
    """Rows of earlier tables of the same test people, by run: {} where nothing is kept."""
    kept = runs.load_json(path) if path else None
    if kept and kept["test people"] != test_people(source):
        sys.exit(f"{path} holds scores on other test people than those of {source.path}: name another file for --keep")
    return kept["rows"] if kept else {}


def trivial_rows(source, size):
    real, z, _ = split_of(source, "test", size)
    known, known_z, _ = split_of(source, "train", size)
    guesses = metrics.trivial_predictions(metrics.mean_images([(metrics.to_unit(known), known_z)]), z)
    return {name: {"pixels": size, **rounded(scores(metrics.to_unit(real), guess))} for name, guess in guesses.items()}


def codec_curve(source, size, kind, qualities):
    """What a picture format makes of the same slices: [(bits of a whole file, foreground SSIM, PSNR)]."""
    real = metrics.to_unit(split_of(source, "test", size)[0])
    curve = []
    for quality in qualities:
        sizes, fakes = [], []
        for image in np.round(255 * real[..., 0]).astype("uint8"):
            buffer = io.BytesIO()
            options = {"quality": quality}
            if kind == "JPEG2000":
                options = {"quality_mode": "rates", "quality_layers": [quality], "irreversible": True}
            Image.fromarray(image).save(buffer, kind, **options)
            sizes.append(8 * len(buffer.getvalue()))
            fakes.append(np.asarray(Image.open(buffer).convert("L"), "float32") / 255)
        fake = np.stack(fakes)[..., None]
        curve.append((np.mean(sizes), np.nanmean(metrics.foreground_ssim(real, fake)), metrics.psnr(real, fake).mean()))
    return curve


def table(flags):
    """Scores of runs, trivial predictors beside them, and the rate/quality curve."""
    distribution.set_precision("auto")
    folders = [runs.folder(name) for name in flags.runs]
    about = records.of(folders[0], "autoencoder")
    source = dataset.open_recorded(about, flags.data)
    rows = kept_rows(flags.keep, source)
    for run in folders:
        if records.of(run, "autoencoder")["data"]["splits"] != about["data"]["splits"]:
            sys.exit(f"{run} was trained on other people than {folders[0]}: give runs of the same data and --seed")
        rows[run.name] = run_row(run, source)
    if flags.keep:
        runs.save_json(flags.keep, {"test people": test_people(source), "rows": rows})
    columns = list(rows[folders[0].name])
    curves, sizes, references = {}, sorted({row["pixels"] for row in rows.values()}), []
    for row in rows.values():
        if row["bits"]:
            point = (int(row["bits"].replace(",", "")), row["foreground SSIM"], row["PSNR"])
            curves.setdefault(f"{row['kind'].removesuffix('-VAE')}, {row['pixels']} pixels", []).append(point)
    for size in sizes:
        for name, row in trivial_rows(source, size).items():
            rows[f"{name}, {size}"] = row
            if name != metrics.BLACK:
                references.append((f"{name}, {size} pixels", row["foreground SSIM"], row["PSNR"]))
    show(rows, columns)
    largest = sizes[-1]
    curves = {name: sorted(points) for name, points in curves.items()}
    curves[f"WebP, {largest} pixels"] = codec_curve(source, largest, "WEBP", (1, 5, 20, 40))
    curves[f"JPEG 2000, {largest} pixels"] = codec_curve(source, largest, "JPEG2000", (300, 200, 100, 50, 30))
    charts.rate_curve(flags.out, curves, references)
    print(f"-> {flags.out}")


# ---- against ---------------------------------------------------------------------------------------------------------


def against(flags):
    """Ours and `VQModel` for as many minutes each, the same people, one after the other on the same machine."""
    from throughput import peer_python

    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "ours": [sys.executable, HERE / "ours.py", "autoencoder"],
            "diffusers VQModel": [peer_python(flags.peers), HERE / "peers.py", "autoencoder"],
        }
        rows = {}
        for name, command in sides.items():
            out = Path(folder) / f"{name.split()[0]}.npy"
            more = ["--data", flags.data, "--minutes", flags.minutes, "--out", out, "--image-size", flags.image_size]
            worker = serving.Worker([*command, *more])
            told = worker.run("learn")
            worker.run("reconstruct")
            worker.close()
            source = dataset.open_source(flags.data)
            real, _, _ = split_of(source, "test", flags.image_size)
            rows[name] = {
                "parameters": f"{worker.about['parameters'] / 1e6:.1f} M",
                "steps": int(told["steps"]),
                "slices": int(told["slices"]),
                **rounded(scores(metrics.to_unit(real), metrics.to_unit(np.load(out)))),
            }
    show(rows, list(rows["ours"]))


# ---- ablation --------------------------------------------------------------------------------------------------------


def gradient_difference(real, fake):
    """Mean absolute difference of neighbouring pixels' differences."""
    difference = np.float32(0)
    for axis in (1, 2):
        steps = [losses.ops.diff(losses.ops.cast(image, "float32"), axis=axis) for image in (real, fake)]
        difference += losses.mean_absolute(*steps)
    return difference


def multi_scale(real, fake):
    """1 - SSIM, averaged over the whole, half and a quarter of the resolution."""
    total = losses.structural_dissimilarity(real, fake)
    for _ in range(2):
        real, fake = (losses.ops.average_pool(losses.ops.cast(image, "float32"), 2) for image in (real, fake))
        total += losses.structural_dissimilarity(real, fake)
    return total / 3


def frequency(real, fake):
    """Mean absolute difference of Fourier coefficients, over the square root of their number."""
    import tensorflow as tf

    spectra = [tf.signal.rfft2d(tf.cast(image, tf.float32)[..., 0]) for image in (real, fake)]
    return tf.reduce_mean(tf.abs(spectra[0] - spectra[1])) / real.shape[1]


def perceptual(source, size):
    """A term: difference of the features, level by level, of a small network that has learned the training slices.

    That is LPIPS (arXiv 1801.03924) without its downloaded weights and its learned ones: features of unit length in
    every pixel, squared differences, mean over pixels, sum over levels.
    """
    import features

    with tempfile.TemporaryDirectory() as folder:
        features.of_run(Path(folder), source, size)
        network = runs.load_model(Path(folder) / "features_0.keras").network
    stack = network.layers[1 : [layer.name for layer in network.layers].index("features") - 3]  # convolutions alone

    def levels(x):
        found = []
        for layer in stack:
            x = layer(x)
            if type(layer).__name__ == "GroupNorm":
                unit = losses.ops.cast(x, "float32")
                found.append(unit / (losses.ops.norm(unit, axis=-1, keepdims=True) + 1e-6))
        return found

    def term(real, fake):
        pairs = zip(levels(real), levels(fake), strict=True)
        return sum(losses.ops.mean(losses.ops.sum(losses.ops.square(a - b), axis=-1)) for a, b in pairs)

    return term


L1, MSE, SSIM = losses.mean_absolute, losses.mean_squared, losses.structural_dissimilarity
VARIANTS = {  # (weight, term) each
    "L1": [(1, L1)],
    "MSE": [(1, MSE)],
    "L1 + MSE": [(1, L1), (1, MSE)],
    "L1 + MSE + 0.3 (1 - SSIM), as built": [(1, L1), (1, MSE), (0.3, SSIM)],
    "... with 1.0 (1 - SSIM)": [(1, L1), (1, MSE), (1.0, SSIM)],
    "... with multi-scale SSIM": [(1, L1), (1, MSE), (0.3, multi_scale)],
    "... and gradients": [(1, L1), (1, MSE), (0.3, SSIM), (0.5, gradient_difference)],
    "... and frequencies": [(1, L1), (1, MSE), (0.3, SSIM), (0.3, frequency)],
    "... and features of a small network": [(1, L1), (1, MSE), (0.3, SSIM), (0.05, perceptual)],
}


def ablation(flags):
    """One small VQ-VAE per loss: the same weights, batches and number of steps; scored on the validation people."""
    import keras
    import tensorflow as tf

    distribution.set_precision("auto")
    source = dataset.open_source(flags.data)
    real, z, label = split_of(source, "validate", flags.image_size)
    rows = {}
    for name in flags.variants or VARIANTS:
        named = VARIANTS[name]
        terms = [(w, perceptual(source, flags.image_size) if term is perceptual else term) for w, term in named]
        keras.utils.set_random_seed(flags.seed)
        window = dataset.brain_box(source, flags.image_size, 16)
        options = {"downsampling": 8, "patch": 4, "latent_channels": 8, "codes_per_latent": 2, "width": flags.width}
        model = modules.VQVAE(flags.image_size, crop_box=window, **options)
        model.compare = lambda real, fake, share, terms=terms: sum(weight * term(real, fake) for weight, term in terms)
        model.compile(optimizer=callbacks.make_optimizer(8e-4, flags.steps))
        step = tf.function(model.train_step)
        slices = dataset.make_dataset(source, "train", flags.image_size, flags.batch_size, training=True)
        for batch in slices.take(flags.steps):
            step(batch)
        fake = through(model, real, z, label)
        rows[name] = rounded(scores(metrics.to_unit(real), metrics.to_unit(fake)))
        print(name, rows[name], file=sys.stderr, flush=True)
    show(rows, list(rows[name]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    t = commands.add_parser("table")
    t.add_argument("runs", nargs="+", help="names or folders of runs whose first stage is trained")
    t.add_argument("--data", help="default: what the first run was trained on")
    t.add_argument("--keep", help="a JSON file of rows: its rows stand in the table too, those of the runs are added")
    t.add_argument("--out", default="first_stage.png", help="the rate/quality curve (default: first_stage.png)")
    a = commands.add_parser("against")
    a.add_argument("--minutes", type=float, default=20)
    a.add_argument("--peers", help="a Python that has diffusers (default: benchmarks/.venv, made on first use)")
    b = commands.add_parser("ablation")
    b.add_argument("--steps", type=int, default=400)
    b.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), help="default: all")
    b.add_argument("--seed", type=int, default=0, help="of the weights: a second one tells what is chance")
    b.add_argument("--batch-size", type=int, default=8)
    b.add_argument("--width", type=int, default=96)
    for command, size in ((a, 256), (b, 128)):
        command.add_argument("--data", required=True)
        command.add_argument("--image-size", type=int, default=size, choices=(64, 128, 256))
    flags = p.parse_args(argv)
    {"table": table, "against": against, "ablation": ablation}[flags.command](flags)


if __name__ == "__main__":
    main()
