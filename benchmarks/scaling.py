"""How a training step's time and memory grow with image size, batch, width and replicas; FLOP/s against the peak.

    python benchmarks/scaling.py --out scaling.png

Each point is a process of its own: the U-Net of `throughput.py`, but heads of 32, one size changed at a time.
Operations are TensorFlow's count of the forward pass, times three for a training step (backwards costs twice that); the
peak is that of a single 3x3 convolution, 128 -> 128 channels at 64x64, measured in the same process.
"""

import argparse
import statistics
import sys
from pathlib import Path

from serving import Worker

HERE = Path(__file__).parent
BASE = {"image-size": 64, "batch-size": 8, "width": 64, "replicas": 1}
POINTS = {"image-size": (32, 64, 128), "batch-size": (2, 4, 8, 16), "width": (32, 64, 96), "replicas": (1, 2)}
TINY = {"image-size": 16, "batch-size": 2, "width": 32, "replicas": 1}


def measure(sizes, repeats):
    """Train a few steps at these sizes; returns a dict of figures."""
    options = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    worker = Worker([sys.executable, HERE / "ours.py", "unet", *options, "--head-size", "32"])
    flops = 3 * worker.run("count")["flops"]
    worker.run("train")
    answers = [worker.run("train") for _ in range(repeats)]
    peaks = [worker.run("convolution") for _ in range(5)]
    worker.close()
    seconds = statistics.median(answer["seconds"] for answer in answers)
    return {
        **sizes,
        "seconds": seconds,
        "peak_mib": answers[-1]["peak_mib"],
        "gflop": flops / 1e9,
        "gflops": flops / seconds / 1e9,
        "peak_gflops": max(peak["flops"] / peak["seconds"] for peak in peaks) / 1e9,
    }


def plot(rows, path):
    """Seconds and MiB per step against each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(POINTS), figsize=(12, 5), sharey="row", layout="constrained")
    for column, name in enumerate(rows):
        x = [row[name] for row in rows[name]]
        for axis, key, label in ((axes[0, column], "seconds", "seconds a step"), (axes[1, column], "peak_mib", "MiB")):
            axis.plot(x, [row[key] for row in rows[name]], "o-", color="#355f8d")
            axis.set(xlabel=name.replace("-", " "), xticks=x, ylim=(0, None))
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
    figure.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="scaling.png", help="the plot")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--tiny", action="store_true", help="tiny sizes: to see that it runs")
    flags = p.parse_args()
    base = TINY if flags.tiny else BASE
    points = {"batch-size": (2, 4)} if flags.tiny else POINTS
    rows, known = {name: [] for name in points}, {}
    print("image size  batch  width  replicas   s/step    MiB   GFLOP  GFLOP/s  of a convolution's")
    for name, values in points.items():
        for value in values:
            sizes = {**base, name: value}
            key = tuple(sizes.values())
            if key not in known:
                known[key] = row = measure(sizes, flags.repeats)
                print(
                    f"{row['image-size']:10} {row['batch-size']:6} {row['width']:6} {row['replicas']:9} "
                    f"{row['seconds']:8.3f} {row['peak_mib']:6.0f} {row['gflop']:7.0f} {row['gflops']:8.0f} "
                    f"{row['gflops'] / row['peak_gflops']:6.0%} of {row['peak_gflops']:.0f}",
                    flush=True,
                )
            rows[name].append(known[key])
    if not flags.tiny:
        plot(rows, flags.out)
        print(f"-> {flags.out}")


if __name__ == "__main__":
    main()
