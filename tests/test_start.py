"""A command says what is wrong with its flags, or what they are, before it imports what takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = ROOT / "tests" / "old_runs" / "vqvae"
HEAVY = ("tensorflow", "keras", "matplotlib", "scipy", "sklearn", "umap", "nibabel", "h5py", "gradio")

HELP = {  # -> what is said among other things
    "train.py": "--image-size",
    "predict.py": "predict.py person",
    "predict.py anomaly": "--from",
    "evaluate.py": "--fail-above",
    "dataset.py phantom": "--people",
    "app.py": "--port",
}
REFUSED = {  # -> what the sentence names
    "train.py --image-size 30": "--image-size 30",
    "train.py --gan --autoencoder none": "--gan has no effect",
    "train.py --dry-run --data nowhere.zip": "nowhere.zip",
    "train.py --run unheard-of --batch-size 3 --replicas 2": "--batch-size 3",
    "train.py --precision half": "--precision",
    "predict.py --sampler nonsense": "--sampler",
    "predict.py sample --count 0": "--count",
    "predict.py --run no_such_run": "no_such_run",
    f"predict.py --z 999 --run {RUN}": "--z must lie between",
    f"predict.py --label XX --run {RUN}": "XX",
    f"predict.py reconstruct --data nowhere.zip --run {RUN}": "nowhere.zip",
    "evaluate.py --count 0": "--count",
    "evaluate.py --run no_such_run": "no_such_run",
    f"evaluate.py --run {RUN} --data nowhere.zip": "nowhere.zip",
    "app.py --run no_such_run": "no_such_run",
    "app.py --port x": "--port",
    f"app.py --port 0 --run {RUN}": "--port 0",
    "dataset.py describe nowhere.zip": "nowhere.zip",
    "dataset.py phantom --people 0 --out nowhere.zip": "people",
    "dataset.py people --data nowhere.zip --out LICENSE": "LICENSE is there already",
    "evaluate.py compare a b --out c.zip": "--out c.zip does not end in .html",
}
WORDS = {**{f"{name} --help": (0, said) for name, said in HELP.items()}, **{w: (2, s) for w, s in REFUSED.items()}}

EACH = """
import contextlib, io, json, runpy, sys
found = {}
for words in json.loads(sys.argv[1]):
    said, status, sys.argv = io.StringIO(), None, words.split()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    found[words] = status, said.getvalue(), sorted(sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{words: (exit status, what was said, the modules imported by then)}, one command after the other."""
    run = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps([*WORDS])], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("words", WORDS)
def test_flags_are_told_and_refused_before_anything_heavy_is_imported(found, words):
    status, said, imported = found[words]
    assert status == WORDS[words][0] and WORDS[words][1] in said
    assert "dataset" in imported and not set(HEAVY) & set(imported)
