"""Make the model that comes with the repository, `checkpoint/phantom/`, out of a run that was trained on phantoms.

    python train.py --run to-ship && python evaluate.py --run to-ship
    python benchmarks/ship.py --run to-ship

Weights are written in 16 bits, rounded to 14, which Keras reads as any others; records, report and model card come
along. What is shipped is compared with the run first, and refused if it draws something else, is larger than 12 MB, or
was not trained on phantoms.
"""

import argparse
import io
import re
import shutil
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py

import command
from conditions import drawn_conditions
from generator import Generator
from ldm import files
from ldm.judging import metrics
from ldm.training import records, runs

MOST_BYTES, LEAST_PSNR = 12 * 10**6, 40.0
COPIED = ("autoencoder.json", "diffusion.json", "report.json", "report.html", "model_card.md")


def in_16_bits(keras_file):
    """The bytes of a `.keras` file with its float32 weights as float16, compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(keras_file) as before, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            data = before.read(name)
            after.writestr(name, halved(data) if name.endswith(".weights.h5") else data)
    return out.getvalue()


def shortened(values):
    """float32 -> float16 of which eight bits of the mantissa are kept, rounded: the two that are 0 then compress."""
    bits = values.astype("float16").view("uint16").astype("uint32")
    return ((bits + 2) & 0xFFFC).astype("uint16").view("float16")


def halved(data):
    """The bytes of an HDF5 file with its float32 arrays as float16."""
    out = io.BytesIO()
    with h5py.File(io.BytesIO(data)) as before, h5py.File(out, "w") as after:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                values = item[()]
                made = after.create_dataset(name, data=shortened(values) if item.dtype == "float32" else values)
            else:
                made = after.require_group(name)
            made.attrs.update(item.attrs)

        before.visititems(copy)
        after.attrs.update(before.attrs)
    return out.getvalue()


def titled(data, before, after):
    """The bytes of a report or a card with another name of the run in its title; facts keep the name that they had."""
    title = rf"(Model card of |Can the pictures of ){re.escape(before)}(?=\s)"
    return re.sub(title.encode(), rf"\g<1>{after}".encode(), data)


def ship(run, out):
    """Write the folder; returns {name: number} of what it is."""
    record = records.read(run, "diffusion")
    if record is None or record["settings"]["data"] is not None:
        raise runs.RunError(
            f"{run} was not trained on the phantoms of `python train.py`: nobody else's data is shipped"
        )
    made = out.with_name(f"~{out.name}")
    shutil.rmtree(made, ignore_errors=True)
    for name in ("autoencoder.keras", "diffusion.keras"):
        files.write(made / name, in_16_bits(run / name))
    for name in COPIED:
        if (run / name).exists():
            files.write(made / name, titled((run / name).read_bytes(), run.name, out.name))
    size = sum(path.stat().st_size for path in made.iterdir())
    before, after = (drawn(folder) for folder in (run, made))
    facts = {"run": run.name, "bytes": size, "PSNR to the run": float(metrics.psnr(before, after).mean())}
    if size > MOST_BYTES or facts["PSNR to the run"] < LEAST_PSNR:
        raise runs.RunError(
            f"{run} is not shipped: {facts}, and at most {MOST_BYTES} bytes, {LEAST_PSNR} dB are wanted"
        )
    runs.save_json(made / "shipped.json", facts)
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
    return facts


def drawn(folder):
    """A few slices of a run, in [0, 1]."""
    generator = Generator(folder)
    known = drawn_conditions(generator.record["data"], count=4)
    return metrics.to_unit(generator.decode(generator.draw(generator.noise(0, 4), known, steps=10), known))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--out", default="checkpoint/phantom", help="folder to write (default: %(default)s)")
    flags = parser.parse_args(argv)

    def work():
        print(f"-> {flags.out}: {ship(runs.folder(flags.run), Path(flags.out))}")
        return 0

    return command.run("ship.py", work, (runs.RunError,))


if __name__ == "__main__":
    sys.exit(main())
