"""The smoke run of `sh test.sh`: the command lines, one after the other, on tiny phantoms and tiny networks.

    python tests/smoke.py FOLDER whole     all stages of one run, all tasks
    python tests/smoke.py FOLDER others    pixels, the other first stages and samplers; then judges the first half's run

FOLDER holds phantom.zip. All commands of a half share one process, because importing TensorFlow takes longer than most
of them; `test.sh` runs both halves side by side, because most of it is one thread's work.
"""

import importlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = "--data {0}/phantom.zip --image-size 32 --epochs 1 --steps-per-epoch 4 --batch-size 8 --width 32"
NARROW = f"{TINY} --autoencoder-width 32"
RUN = "--run {0}/run"
DRAWN = f"{RUN} --out {{0}}/samples"
OTHER = "--out {0}/other"

WHOLE = f"""
train {RUN} {NARROW} --gan --views 2 --multipliers 1 --attention 8 --condition-on-mask --gates --recompute
predict {DRAWN} --steps 3 --count 4 --show-x0
predict reconstruct {DRAWN}
train prior {RUN} {TINY} --prior-width 32 --prior-depth 2
predict {DRAWN} --prior transformer --count 4 --top-k 50
predict prior normal {DRAWN} --count 2
predict person {DRAWN} --sampler euler --steps 4
predict {DRAWN} --mask data --count 4 --sampler ddim --steps 4
predict interpolate {DRAWN} --count 2 --steps 2
predict interpolate {DRAWN} --count 4 --between slices --split train --steps 4
predict archive {RUN} --out {{0}}/samples/drawn.zip --count 70 --steps 1 --reject-copies
dataset describe {{0}}/samples/drawn.zip
predict denoise {DRAWN} --count 2 --from 0.3 --steps 4
predict anomaly {DRAWN} --count 2 --steps 4
predict inpaint {DRAWN} --count 2 --resample 2 --steps 4
second_stage ladder {RUN} --count 50 --sampler ddim --calls 2 3 --feature-steps 20 --out {{0}}/samples/ladder.png
"""

# Of the KL-VAE nothing is gained with this learning rate, so adversarial training begins. The last line judges the
# run of the other half, which trains it first of all.
OTHERS = f"""
train --run {{0}}/pixels {TINY} --autoencoder none --attention 16 --schedule flow --prediction flow --accumulate 2 \
--labels {{0}}/people.csv --conditions age sex
predict --run {{0}}/pixels {OTHER} --sampler heun dpm_solver_pp --steps 3 --count 4 \
--guidance 2 --label NC --negative-label AD --conditions age=70 --negative-conditions age=60
train autoencoder --run {{0}}/fsq {NARROW} --patch 4 --quantizer fsq --levels 8 5 5 --gan --random-latents
train autoencoder --run {{0}}/vae {NARROW} --patch 4 --autoencoder vae --epochs 4 --gan --segment --condition-on-label \
--learning-rate 1e-6
train latents --run {{0}}/vae
predict prior histogram --run {{0}}/vae {OTHER} --z sweep
predict reconstruct --run {{0}}/vae {OTHER}
first_stage table {{0}}/fsq {{0}}/vae {OTHER}/rate.png
evaluate {RUN} --count 60 --steps 3 --feature-steps 20 --fail-above 0.9
"""

WRITTEN = {
    "whole": """ddim.png ddim.gif ddpm.png ddpm.gif reconstruct.png reconstruct.json transformer.png normal.png
        person_euler.nii.gz interpolate.gif denoise.png anomaly.png inpaint.gif ddim_mask.png ladder.png drawn.zip""",
    "others": """heun.gif histogram.png histogram_tissue.png reconstruct_tissue.png rate.png
        ../run/report.html ../run/report.json ../run/model_card.md""",
}


def wait_for(path, minutes=15):
    """Until the other half has written it."""
    for _ in range(minutes * 60):
        if path.exists():
            return
        time.sleep(1)
    sys.exit(f"smoke run: {path.name} was not written")


def main(folder, half):
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    lines = {"whole": WHOLE, "others": OTHERS}[half].format(folder).strip().splitlines()
    (Path(folder) / "people.csv").write_text("case,label,age,sex\n1,AD,71,F\n2,NC,64,M\n3,AD,80,F\n4,NC,,M\n")
    for line in lines:
        print(f"== {line.replace(folder, 'smoke')}", flush=True)
        command, *words = line.split()
        if half == "others" and f"{folder}/run" in words:
            wait_for(Path(folder) / "samples/transformer.png")  # drawn when all of that run is trained
        began = time.time()
        if importlib.import_module(command).main(words):
            sys.exit(f"smoke run: {line} failed")
        print(f"== {time.time() - began:.0f} seconds", flush=True)
    home = Path(folder) / {"whole": "samples", "others": "other"}[half]
    for name in WRITTEN[half].split():
        if not (home / name).exists() or not (home / name).stat().st_size:
            sys.exit(f"smoke run: {name} was not written")


if __name__ == "__main__":
    main(*sys.argv[1:])
