#!/bin/sh
# The one command that passes the tests: lint, tests, and a smoke run of the command lines on phantom brains.
#     sh test.sh          under 15 minutes on 2 cores with AVX512, 25 with AVX2 only
#     sh test.sh --all    also the slow tests
#     sh test.sh --lowest with the lowest versions that requirements.txt allows, in .venv-lowest (Python 3.11 or 3.12)
# Where the packages are missing it makes a virtual environment, .venv, and installs them there.
set -eu
cd "$(dirname "$0")"

needed="import tensorflow, keras, einops, imageio, nibabel, pydicom, scipy, sklearn, umap, pytest, xdist, ruff, skimage, hypothesis"
python=${PYTHON:-}
if [ "${1:-}" = "--lowest" ]; then
    python=.venv-lowest/bin/python
    [ -x "$python" ] || python3 -m venv .venv-lowest
    # "name>=1.2" becomes "name==1.2.*": the lowest version with its repairs
    sed -E 's/>=([0-9.]+)/==\1.*/; /^-r/d' requirements.txt requirements-test.txt >.venv-lowest/requirements.txt
    "$python" -m pip install --quiet --disable-pip-version-check -r .venv-lowest/requirements.txt
fi
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python
    elif python3 -c "$needed" 2>/dev/null; then python=python3
    else
        echo "packages are missing: making .venv and installing requirements-test.txt"
        python3 -m venv .venv
        python=.venv/bin/python
    fi
fi
if ! "$python" -c "$needed" 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
fi
export TF_CPP_MIN_LOG_LEVEL=3

marker="not slow"
[ "${1:-}" = "--all" ] && marker=""

echo "== ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .

echo "== smoke run on phantoms: dataset, train, predict, evaluate"
smoke=$(mktemp -d)
others=
trap 'kill $others 2>/dev/null || true; rm -rf "$smoke"' EXIT  # where one half failed, the other need not go on
"$python" dataset.py phantom --people 8 --image-size 64 --out "$smoke/phantom.zip"
"$python" tests/smoke.py "$smoke" others >"$smoke/others.log" 2>&1 &
others=$!
"$python" tests/smoke.py "$smoke" whole
wait "$others" || { cat "$smoke/others.log"; exit 1; }
others=

echo "== tests"
"$python" -m pytest -q -n 2 -m "$marker"
