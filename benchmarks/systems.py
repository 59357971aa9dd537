"""What do the course systems draw that this project descends from, and what does it draw itself, in equal minutes?

    python benchmarks/systems.py --data ZIP --minutes 15 course-oasis-vae course-oasis-vqvae oasis-256

Each name is a preset of `train.py`. Each is trained for so many minutes, draws a sheet by slice index and is judged on
the test people by `evaluate.py`; then a Markdown table is printed. A second call goes on where the first was
interrupted, and only prints the table where all is done.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ldm.training import presets, runs

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("reconstruction", "texture", "scales", "anatomy")
SCALES = (32, 64, 128)


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


def row(report):
    """A line of the table: {title: text}."""
    texture, sets = report["texture"], report["scales"]["sets"]
    levels = dict(zip(report["scales"]["pixels"], sets["samples"]["levels"], strict=False))
    first = report.get("reconstruction", {}).get("first stage")
    power, euler = texture["power at 5.6 pixels"], texture["Euler number of bright white matter"]
    distance = report["anatomy"]["distance"]["samples"]
    return {
        "pixels": f"{report['about']['image size']}",
        "first stage: foreground SSIM": f"{first['foreground SSIM'][0]:.3f}" if first else "none",
        "power at 5.6 pixels": f"{power['samples']['mean']:.2f}",
        "Euler number of white matter": f"{euler['samples']['mean']:.1f} ({euler['people']['mean']:.1f})",
        "mean grey, sd": f"{distance['mean']:.2f}",
        **{f"AUC at {side}": f"{levels[side]['AUC']:.2f}" if side in levels else "" for side in SCALES},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("systems", nargs="+", choices=tuple(presets.PRESETS), metavar="PRESET")
    parser.add_argument("--data", required=True, type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--labels", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, each")
    parser.add_argument("--count", type=int, default=160, help="slices that are drawn and judged")
    flags = parser.parse_args(argv)
    rows = {system: row(train_and_judge(system, flags)) for system in flags.systems}
    titles = list(next(iter(rows.values())))
    print(f"| {flags.minutes:g} minutes each | {' | '.join(titles)} |")
    print("| --- |" + " --- |" * len(titles))
    for system, values in rows.items():
        print(f"| `{system}` | {' | '.join(values.values())} |")


if __name__ == "__main__":
    main()
