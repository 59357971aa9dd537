"""How many network calls does a good picture need? KID and Frechet distance to the test people against calls.

    python benchmarks/ladder.py --run R --out ladder.png

Every point is drawn from the same noise and conditions, as `evaluate.py` draws its samples, and measured in the
features of the run's network. What was drawn is kept in the folder of the run: a second call goes on where the first
was interrupted. Prints a Markdown table; its floor is the distance of the validation people to the test people.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import evaluate
from ldm import charts, distribution, fidelity, runs, samplers

CALLS = (5, 10, 20, 50, 100, 250)
LEAST = {"ddpm": 20}  # with fewer calls DDPM draws noise


def points(flags):
    """(sampler, calls) in the order of their cost, so that an interrupted ladder has its cheap rungs."""
    found = [(name, calls) for name in flags.sampler for calls in flags.calls if calls >= LEAST.get(name, 0)]
    return sorted(found, key=lambda point: point[1])


def distances(reference, slices, many):
    """{"KID", "error", "Frechet distance"} of features, with or without the people as groups."""
    groups = (reference.case, slices.case) if many else (None, None)
    kid, error = fidelity.kernel_distance(reference.features, slices.features, *groups)
    return {
        "KID": kid,
        "error": error,
        "Frechet distance": fidelity.frechet_distance(reference.features, slices.features),
    }


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run")
    p.add_argument("--data", nargs="+")
    p.add_argument("--count", type=int, default=384, help="slices per point")
    p.add_argument("--sampler", nargs="+", default=["ddpm", "ddim", "dpm_solver_pp"], choices=tuple(samplers.SAMPLERS))
    p.add_argument("--calls", type=int, nargs="+", default=CALLS)
    p.add_argument("--out", default="ladder.png")
    flags = p.parse_args(argv)
    distribution.set_precision("auto")
    fixed = ["--feature-steps", "400", *(["--run", flags.run] if flags.run else [])]
    fixed += ["--data", *flags.data] if flags.data else []
    if flags.count < evaluate.LEAST:
        p.error(f"--count must be at least {evaluate.LEAST}")
    study = evaluate.open_study(evaluate.parser().parse_args([*fixed, "--count", str(flags.count)]))
    if "test" not in study.real or not (study.run / "diffusion.keras").exists():
        p.error(f"{study.run} needs a diffusion model and test people for a ladder")
    describe = evaluate.own_features(study)
    test = study.real["test"]
    test.features = describe(test.images)[0]
    many = len(np.unique(test.case)) >= evaluate.LEAST_PEOPLE
    print("| sampler | network calls | KID | Frechet distance | seconds per slice |\n| --- | --- | --- | --- | --- |")
    if "validate" in study.real:
        floor = study.real["validate"]
        floor.features = describe(floor.images)[0]
        row = distances(test, floor, many)
        print(
            f"| floor: validation people | | {row['KID']:.2f} ± {row['error']:.2f} | {row['Frechet distance']:.1f} | |"
        )
    curves = {}
    for name, calls in points(flags):
        study.flags.sampler, study.flags.steps = name, calls
        drawn = evaluate.draw_samples(study)
        drawn.features = describe(drawn.images)[0]
        row, seconds = distances(test, drawn, many), study.facts["cost"]["seconds per slice"]
        curves.setdefault(name, []).append((calls, row["KID"], row["error"]))
        kid, distance = f"{row['KID']:.2f} ± {row['error']:.2f}", row["Frechet distance"]
        print(f"| {name} | {calls} | {kid} | {distance:.1f} | {seconds:.2f} |", flush=True)
        charts.ladder(flags.out, curves, "KID to the test people")


if __name__ == "__main__":
    try:
        main()
    except (evaluate.dataset.DataError, runs.RunError) as mistake:
        sys.exit(f"ladder.py: {mistake}")
