#!/bin/sh
# The one command that passes the tests: lint, tests, and a smoke run of the command lines on phantom brains.
#     sh test.sh          under 15 minutes on 2 cores
#     sh test.sh --all    also the slow tests
# Where the packages are missing it makes a virtual environment, .venv, and installs them there.
set -eu
cd "$(dirname "$0")"

python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python
    elif python3 -c "import tensorflow, keras, einops, nibabel, pytest, xdist, ruff, skimage" 2>/dev/null; then python=python3
    else
        echo "packages are missing: making .venv and installing requirements-test.txt"
        python3 -m venv .venv
        python=.venv/bin/python
    fi
fi
if ! "$python" -c "import tensorflow, keras, einops, imageio, nibabel, scipy, umap, pytest, xdist, ruff, skimage" 2>/dev/null
then
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
trap 'rm -rf "$smoke"' EXIT
"$python" dataset.py phantom --people 8 --image-size 64 --out "$smoke/phantom.zip"
tiny="--data $smoke/phantom.zip --run $smoke/run --image-size 32 --epochs 1 --steps-per-epoch 4 --batch-size 8 --width 32"
narrow="--autoencoder-width 32"
"$python" train.py $tiny $narrow --views 2 --attention 4
"$python" predict.py --run "$smoke/run" --out "$smoke/samples" --steps 3 --count 4 --show-x0
"$python" predict.py reconstruct --run "$smoke/run" --out "$smoke/samples"
for file in ddim.png ddim.gif ddpm.png ddpm.gif reconstruct.png reconstruct.json; do
    [ -s "$smoke/samples/$file" ] || { echo "smoke run: $file was not written"; exit 1; }
done
"$python" train.py prior $tiny --run "$smoke/run" --prior-width 32 --prior-depth 2
"$python" - "$smoke" <<'END'
import sys

import predict

at = ["--run", f"{sys.argv[1]}/run", "--out", f"{sys.argv[1]}/samples", "--steps", "4"]
for words in (
    "--prior transformer --count 4 --top-k 50",
    "--person --sampler euler",
    "interpolate --count 4",
    "denoise --count 2 --from 0.3",
    "anomaly --count 2",
    "inpaint --count 2 --resample 2",
):
    if predict.main([*words.split(), *at]):
        sys.exit(f"smoke run: predict.py {words} failed")
END
"$python" evaluate.py --run "$smoke/run" --count 60 --steps 3 --feature-steps 20 --fail-above 0.9
"$python" train.py $tiny --run "$smoke/pixels" --autoencoder none --attention 8 --schedule flow --prediction flow
"$python" predict.py --run "$smoke/pixels" --out "$smoke/samples" --sampler heun --steps 3 --count 4 --guidance 2

"$python" train.py autoencoder $tiny $narrow --run "$smoke/fsq" --quantizer fsq --levels 8 5 5 --gan --random-latents
"$python" predict.py reconstruct --run "$smoke/fsq" --out "$smoke/samples"
"$python" train.py autoencoder $tiny $narrow --run "$smoke/vae" --autoencoder vae --epochs 4 --gan --segment --condition-on-label \
    --learning-rate 1e-6  # nothing is gained, so adversarial training begins
"$python" train.py latents --run "$smoke/vae"
"$python" predict.py --prior histogram --run "$smoke/vae" --out "$smoke/samples" --z sweep
"$python" predict.py reconstruct --run "$smoke/vae" --out "$smoke/samples"
"$python" benchmarks/first_stage.py table "$smoke/fsq" "$smoke/vae" --out "$smoke/samples/rate.png"
for file in samples/histogram.png samples/histogram_tissue.png samples/reconstruct_tissue.png samples/rate.png \
    samples/transformer.png samples/euler.nii.gz samples/interpolate.gif samples/denoise.png samples/anomaly.png \
    samples/inpaint.gif run/report.html run/report.json run/model_card.md; do
    [ -s "$smoke/$file" ] || { echo "smoke run: $file was not written"; exit 1; }
done

echo "== tests"
"$python" -m pytest -q -n 2 --dist loadgroup -m "$marker"
