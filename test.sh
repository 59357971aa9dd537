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
tiny="--data $smoke/phantom.zip --image-size 32 --epochs 1 --steps-per-epoch 4 --batch-size 8 --width 32"
narrow="--autoencoder-width 32"

whole_run() { # all stages, all tasks, the evaluation
    at="--run $smoke/run"
    "$python" train.py $at $tiny $narrow --gan --views 2 --attention 4 --condition-on-mask --gates --recompute
    "$python" predict.py $at --out "$smoke/samples" --steps 3 --count 4 --show-x0
    "$python" predict.py reconstruct $at --out "$smoke/samples"
    "$python" train.py prior $at $tiny --prior-width 32 --prior-depth 2
    "$python" - "$smoke" <<'END'
import sys

import predict

at = ["--run", f"{sys.argv[1]}/run", "--out", f"{sys.argv[1]}/samples"]
for words in (
    "--prior transformer --count 4 --top-k 50",
    "--person --sampler euler --steps 4",
    "--mask data --count 4 --sampler ddim --steps 4",
    "interpolate --count 4 --between slices --split train --steps 4",
    "interpolate --count 2 --steps 2",
    "--prior normal --count 2",
    "denoise --count 2 --from 0.3 --steps 4",
    "anomaly --count 2 --steps 4",
    "inpaint --count 2 --resample 2 --steps 4",
):
    if predict.main([*words.split(), *at]):
        sys.exit(f"smoke run: predict.py {words} failed")
END
    "$python" benchmarks/second_stage.py ladder $at --count 50 --sampler ddim --calls 2 3 --feature-steps 20 \
        --out "$smoke/samples/ladder.png"
    "$python" evaluate.py $at --count 60 --steps 3 --feature-steps 20 --fail-above 0.9
}

other_runs() { # pixels; the other first stages
    printf 'case,label,age,sex\n1,AD,71,F\n2,NC,64,M\n3,AD,80,F\n4,NC,,M\n' > "$smoke/people.csv"
    "$python" train.py --run "$smoke/pixels" $tiny --autoencoder none --attention 16 --schedule flow --prediction flow \
        --accumulate 2 --labels "$smoke/people.csv" --conditions age sex
    "$python" predict.py --run "$smoke/pixels" --out "$smoke/other" --sampler heun dpm_solver_pp --steps 3 --count 4 \
        --guidance 2 --label NC --negative-label AD --conditions age=70 --negative-conditions age=60
    "$python" train.py autoencoder --run "$smoke/fsq" $tiny $narrow --quantizer fsq --levels 8 5 5 --gan --random-latents
    "$python" train.py autoencoder --run "$smoke/vae" $tiny $narrow --autoencoder vae --epochs 4 --gan --segment \
        --condition-on-label --learning-rate 1e-6  # nothing is gained, so adversarial training begins
    "$python" train.py latents --run "$smoke/vae"
    "$python" predict.py --prior histogram --run "$smoke/vae" --out "$smoke/other" --z sweep
    "$python" predict.py reconstruct --run "$smoke/vae" --out "$smoke/other"
    "$python" benchmarks/first_stage.py table "$smoke/fsq" "$smoke/vae" --out "$smoke/other/rate.png"
}

# Side by side, because most of it is one thread's work. `set -e` holds in subshells that nothing asks for their status.
(set -e; other_runs) >"$smoke/other.log" 2>&1 &
other=$!
(set -e; whole_run)
wait "$other" || { cat "$smoke/other.log"; exit 1; }
for file in ddim.png ddim.gif ddpm.png ddpm.gif reconstruct.png reconstruct.json transformer.png euler.nii.gz \
    interpolate.gif denoise.png anomaly.png inpaint.gif ddim_mask.png ladder.png; do
    [ -s "$smoke/samples/$file" ] || { echo "smoke run: $file was not written"; exit 1; }
done
for file in other/heun.gif other/histogram.png other/histogram_tissue.png other/reconstruct_tissue.png other/rate.png \
    run/report.html run/report.json run/model_card.md; do
    [ -s "$smoke/$file" ] || { echo "smoke run: $file was not written"; exit 1; }
done

echo "== tests"
"$python" -m pytest -q -n 2 -m "$marker"
