"""What do others draw, and what does this project draw, in equal minutes?

    python benchmarks/systems.py --data ZIP --minutes 15 course-oasis-vae course-oasis-vqvae oasis-256
    python benchmarks/systems.py --data ZIP --minutes 15 64-f4 64-pixels diffusers monai

Each name is a preset of `train.py`, among them the course systems that this project descends from, or a peer, see
`generators.py`. Each is trained for so many minutes, draws a sheet by slice index and is judged on the test people by
`evaluate.py`; then a Markdown table is printed. Peers see the slices that the first preset sees, and are judged beside
it. A second call goes on where the first was interrupted, and only prints the table where all is done.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from throughput import peer_python

import dataset
from ldm.drawing import figures
from ldm.judging import metrics
from ldm.training import presets, records, runs

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("reconstruction", "texture", "scales", "anatomy")
SCALES = (32, 64, 128)
PEERS = ("diffusers", "monai")
SHOWN = 32  # slices of a sheet, those of one head


def command(*words):
    """Run one of the project's scripts; its refusal is ours."""
    status = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


def train_and_judge(system, flags):
    """Train a system, draw its sheet and write its report. Returns the report, what `report_part.json` holds."""
    run = f"{system}-{flags.minutes:g}"
    folder = ROOT / runs.folder(run)
    trained = folder / "systems_trained"  # written last, so that an interrupted training is gone on with
    if not trained.exists():
        labels = ["--labels", flags.labels] if flags.labels else []
        begin = [] if any(folder.glob("*.json")) else ["--preset", system, "--data", flags.data, *labels]
        command("train.py", *begin, "--run", run, "--minutes", flags.minutes)
        trained.touch()
    report = folder / "report_part.json"
    if not report.exists():
        command("predict.py", "--run", run, "--z", "sweep", "--sampler", "dpm_solver_pp", "--steps", 20)
        command("evaluate.py", "--run", run, "--count", flags.count, "--sections", *SECTIONS)
    return json.loads(report.read_text())


def peer(name, flags, frame):
    """Train a generator of another library on the slices that the run `frame` sees, and judge what it draws."""
    run = ROOT / runs.folder(frame)
    folder = run / name
    folder.mkdir(exist_ok=True)
    drawn = folder / f"{name}.zip"
    if not drawn.exists():
        record = list(records.all_of(run).values())[-1]
        found = dataset.read_split(dataset.open_recorded(record), "train", record["settings"]["image_size"])
        images = np.round(255 * metrics.to_unit(found["image"])).astype("uint8")[..., 0]
        np.savez(folder / "slices.npz", images=images, z=found["z"])
        indices = len(np.unique(found["z"]))
        worker = [peer_python(flags.peers), ROOT / "benchmarks/generators.py", name, folder / "slices.npz", drawn]
        how = ["--minutes", flags.minutes, "--heads", -(-flags.count // indices)]
        if subprocess.run([*map(str, worker + how)], cwd=ROOT).returncode:
            raise SystemExit(f"{name} did not train")
        opened = dataset.open_source(drawn)
        first = dataset.read_split(opened, opened.split[0], images.shape[1])["image"][:SHOWN]
        figures.save_png(folder / "sheet.png", figures.sheet(figures.enlarge(first), 8))
    report = folder / "report_part.json"
    if not report.exists():
        sections = [name for name in SECTIONS if name != "reconstruction"]
        given = ["--samples", drawn, "--out", folder, "--count", flags.count]
        command("evaluate.py", "--run", frame, *given, "--sections", *sections)
    return json.loads(report.read_text())


def pixels_of(name):
    """'power at 5.6 pixels' -> 5.6."""
    return float(name.split()[2])


def row(report):
    """A line of the table: {title: text}."""
    texture, sets = report["texture"], report["scales"]["sets"]
    levels = dict(zip(report["scales"]["pixels"], sets["samples"]["levels"], strict=False))
    first = report.get("reconstruction", {}).get("first stage")
    wave = min((name for name in texture if name.startswith("power at")), key=lambda name: abs(pixels_of(name) - 5.6))
    power, euler = texture[wave], texture["Euler number of bright white matter"]
    distance = report["anatomy"]["distance"]["samples"]
    return {
        "pixels": f"{report['about']['image size']}",
        "first stage: foreground SSIM": f"{first['foreground SSIM'][0]:.3f}" if first else "none",
        "power (people 1)": f"{power['samples']['mean']:.2f} at {pixels_of(wave):g} pixels",
        "Euler number of white matter": f"{euler['samples']['mean']:.1f} ({euler['people']['mean']:.1f})",
        "mean grey, sd": f"{distance['mean']:.2f}",
        **{f"AUC at {side}": f"{levels[side]['AUC']:.2f}" if side in levels else "" for side in SCALES},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("systems", nargs="+", choices=(*presets.PRESETS, *PEERS), metavar="SYSTEM")
    parser.add_argument("--data", required=True, type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--labels", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, each")
    parser.add_argument("--count", type=int, default=160, help="slices that are drawn and judged")
    parser.add_argument("--peers", help="Python that has them (default: benchmarks/.venv, made on first use)")
    flags = parser.parse_args(argv)
    ours = [system for system in flags.systems if system not in PEERS]
    if not ours:
        parser.error(f"{' '.join(flags.systems)}: name a preset first, whose slices peers see")
    frame, reports = f"{ours[0]}-{flags.minutes:g}", {system: train_and_judge(system, flags) for system in ours}
    reports |= {system: peer(system, flags, frame) for system in flags.systems if system in PEERS}
    rows = {system: row(reports[system]) for system in flags.systems}
    titles = list(next(iter(rows.values())))
    print(f"| {flags.minutes:g} minutes each | {' | '.join(titles)} |")
    print("| --- |" + " --- |" * len(titles))
    for system, values in rows.items():
        print(f"| `{system}` | {' | '.join(values.values())} |")


if __name__ == "__main__":
    main()
