"""Write flags.md: every flag of train.py, predict.py and evaluate.py, from where the program itself reads them.

python docs/flags.py
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import predict_flags  # noqa: E402
from ldm.training import presets, settings  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
HEADER = "| flag | default | may be | what it is |\n| --- | --- | --- | --- |"


def page():
    """The text of flags.md."""
    parts = [
        "# All flags",
        "Made by `python docs/flags.py`, which must be run again when a flag changes. What most people need of them: "
        "[flags that matter](flags-that-matter.md).",
        f"## train.py\n\nPresets: {', '.join(f'`{name}`' for name in presets.PRESETS)}. A flag stands over its preset.",
        settings.flag_table().strip().replace("<", "&lt;"),
        "## predict.py\n\n`python predict.py TASK`; without a task slices are drawn, the task `sample`.",
    ]
    for name, task in predict_flags.TASKS.items():
        rows = [_row(action) for action in predict_flags.parser(name)._actions if action.dest != "help"]
        parts.append("\n".join([f"### {name}\n\n{task.about}\n", HEADER, *rows]))
    parts.append("\n".join(["## evaluate.py\n", HEADER, *map(_row, evaluate.parser()._actions[1:])]))
    return "\n\n".join(parts) + "\n"


def _row(action):
    """One flag of an argparse parser as a row; its default stands in its help."""
    told, _, default = (action.help or "").partition(" (default: ")
    if not default and action.default not in (None, False, argparse.SUPPRESS):
        default = str(action.default)
    choices = ", ".join(map(str, action.choices)) if action.choices else ""
    spelt = action.option_strings[0] if action.option_strings else action.dest
    return f"| `{spelt}` | {default.removesuffix(')')} | {choices} | {told} |".replace(
        "%(default)s", str(action.default)
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(f"-> {PAGE}")
