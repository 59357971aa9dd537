"""Side by side: drawing codes from our `CodePrior`, and from a plain PyTorch loop with a key-value cache.

    python benchmarks/prior.py --peers PYTHON              # a Python that has PyTorch; minutes on 2 cores
    python benchmarks/prior.py --rows 1 8 32 --rounds 5

Both draw from networks of one size with random weights, in turn, each in its own process. Figures are medians over the
rounds, with the smallest and the largest; ratios above 1 are in our favour. Without --peers, the virtual environment of
`throughput.py` is taken, or made.
"""

import argparse
import math
import os
import statistics
import sys
from pathlib import Path

import serving


def ours(flags):
    """`CodePrior.sample`, under the precision policy that `--precision` names."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as command.py does
    import keras
    import numpy as np
    import tensorflow as tf

    from ldm.training.prior import CodePrior

    keras.mixed_precision.set_dtype_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[flags.precision])
    model = CodePrior(flags.num_codes, flags.code_shape, flags.width, flags.depth, flags.heads)
    rng = np.random.default_rng(0)  # a fresh prior knows nothing, and a constant could be folded
    model.head.kernel.assign(rng.normal(size=model.head.kernel.shape) * 0.1)

    def sample(rows):
        return lambda: model.sample(np.arange(rows)).numpy().shape

    parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    return {str(rows): sample(rows) for rows in flags.rows}, parameters, f"TensorFlow {tf.__version__}"


def theirs(flags):
    """The loop that one writes in PyTorch: caches of full length, attention to the part that is filled."""
    import torch
    from torch import nn

    functional = nn.functional
    width, heads, length = flags.width, flags.heads, flags.code_shape[0] * flags.code_shape[1]
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x, cache, i):  # x (B, 1, C), cache (2, B, heads, N, d)
            query, key, value = self.qkv(self.norms[0](x)).view(len(x), 3, heads, 1, -1).unbind(1)
            cache[0, :, :, i : i + 1], cache[1, :, :, i : i + 1] = key, value
            mixed = functional.scaled_dot_product_attention(query, *cache[:, :, :, : i + 1])
            x = x + self.out(mixed.transpose(1, 2).reshape(len(x), 1, width))
            return x + self.mlp(self.norms[1](x))

    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.code, self.slice = nn.Embedding(flags.num_codes + 1, width), nn.Embedding(256, width)
            self.position = nn.Parameter(torch.randn(length, width) * 0.02)
            self.blocks = nn.ModuleList(Block() for _ in range(flags.depth))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, flags.num_codes)

    model = Prior().to(getattr(torch, flags.precision)).eval()

    @torch.inference_mode()
    def draw(rows):
        kind = model.position.dtype
        caches = [torch.zeros(2, rows, heads, length, width // heads, dtype=kind) for _ in model.blocks]
        condition, code, codes = model.slice(torch.arange(rows))[:, None], torch.full((rows, 1), flags.num_codes), []
        for i in range(length):
            x = model.code(code) + model.position[i] + condition
            for block, cache in zip(model.blocks, caches, strict=True):
                x = block(x, cache, i)
            code = torch.multinomial(model.head(model.norm(x))[:, 0].float().softmax(-1), 1)
            codes.append(code)
        return torch.cat(codes, 1)

    tasks = {str(rows): lambda rows=rows: draw(rows).shape for rows in flags.rows}
    return tasks, sum(p.numel() for p in model.parameters()), f"PyTorch {torch.__version__}"


def compare(flags):
    """Ask both sides in turn, and print a line per number of rows."""
    from throughput import peer_python, spread

    options = ["--rows", *flags.rows, "--code-shape", *flags.code_shape]
    for name in ("num_codes", "width", "depth", "heads", "precision"):
        options += [f"--{name.replace('_', '-')}", getattr(flags, name)]
    sides = {
        "ours": serving.Worker([sys.executable, __file__, "ours", *options]),
        "PyTorch": serving.Worker([peer_python(flags.peers), __file__, "theirs", *options]),
    }
    for side, worker in sides.items():
        print(f"{side}: {worker.about['parameters'] / 1e6:.2f} M parameters, {worker.about['version']}")
    for rows in flags.rows:
        tokens = rows * flags.code_shape[0] * flags.code_shape[1]
        first = {side: worker.run(str(rows))["seconds"] for side, worker in sides.items()}
        seconds = {side: [] for side in sides}
        for _ in range(flags.rounds):
            for side, worker in sides.items():
                seconds[side].append(worker.run(str(rows))["seconds"])
        speed = {side: spread([tokens / s for s in values]) for side, values in seconds.items()}
        ratio = statistics.median(seconds["PyTorch"]) / statistics.median(seconds["ours"])
        print(
            f"prior {flags.precision} rows {rows:3}: tokens/s ours {speed['ours']}, PyTorch {speed['PyTorch']}, "
            f"ratio {ratio:.2f}; first call {first['ours']:.1f} s, {first['PyTorch']:.1f} s"
        )
    for worker in sides.values():
        worker.close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("side", nargs="?", choices=("ours", "theirs"), help="be one side's worker (what the parent starts)")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="slices drawn at once")
    p.add_argument("--code-shape", type=int, nargs=2, default=[30, 32])
    p.add_argument("--num-codes", type=int, default=1024)
    p.add_argument("--width", type=int, default=256)
    p.add_argument("--depth", type=int, default=6)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--peers", help="a Python that has PyTorch")
    p.add_argument("--tiny", action="store_true", help="tiny sizes: to see that it runs")
    flags = p.parse_args()
    if flags.tiny:
        flags.rows, flags.code_shape, flags.num_codes, flags.width, flags.depth = [2], [4, 4], 16, 16, 1
        flags.rounds = 1
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if flags.side is None:
        compare(flags)
    else:
        tasks, parameters, version = {"ours": ours, "theirs": theirs}[flags.side](flags)
        serving.serve(tasks, parameters=parameters, version=version)


if __name__ == "__main__":
    main()
