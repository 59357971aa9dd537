"""On an accelerator: the U-Net and the sampler on Keras' JAX backend beside diffusers on PyTorch, on the same card.

    python benchmarks/gpu.py                     # asks both sides in turn; needs jax, keras, torch, diffusers
    python benchmarks/gpu.py --device cpu --tiny # to see that it runs

Forward pass, DDIM with 50 steps and the training step, in bfloat16, compiled (XLA; `torch.compile`), on the network of
`throughput.py`; achieved TFLOP/s beside those of one large matrix product. Networks and samplers are `keras.ops` only,
so they are the same code as under TensorFlow; the training step is written here, because a Keras `train_step` belongs
to one backend.
"""

import argparse
import os
import statistics
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent


def jax_side(flags):
    """{task: callable}, {fact: value} of our network under KERAS_BACKEND=jax."""
    os.environ["KERAS_BACKEND"] = "jax"
    sys.path.insert(0, str(HERE.parent))
    try:
        import tensorflow  # noqa: F401
    except ImportError:  # `modules` imports it for its train_step, which is not used here
        sys.modules["tensorflow"] = types.ModuleType("tensorflow")
        sys.modules["tensorflow"].function = lambda plain: plain
    import jax
    import keras
    import numpy as np
    from jax import numpy as jnp

    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    import modules
    from ldm.diffusion import samplers, schedules

    if not hasattr(sys.modules["tensorflow"], "Tensor"):
        del sys.modules["tensorflow"]  # einops would take it for the real one

    device = jax.devices("cpu" if flags.device == "cpu" else None)[0]
    size, rows = flags.image_size, flags.batch_size
    unet = modules.UNet(
        size, 1, flags.width, (1, 2, 4, 4), blocks=2, attention=(size // 4,), head_size=min(64, flags.width)
    )
    model = modules.DiffusionModel(unet)
    optimizer = keras.optimizers.AdamW(1e-4)
    optimizer.build(unet.trainable_variables)
    variables = [v.value for v in unet.trainable_variables]
    fixed = [v.value for v in unet.non_trainable_variables]
    state = {"variables": variables, "optimizer": [v.value for v in optimizer.variables]}
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.normal(size=(rows, size, size, 1)).astype("float32"), device)
    z, t = jnp.arange(rows) % 32, jnp.full((rows,), 0.5)

    @jax.jit
    def denoise_with(variables, x_t, t):
        pairs = list(zip(unet.trainable_variables, variables, strict=True))
        with keras.StatelessScope(state_mapping=pairs):
            return model.denoise(x_t, t, {"z": z})

    @jax.jit
    def step(variables, moments, eps):
        def loss_of(variables):
            alpha, sigma = model.coefficients(t)
            inputs = {"x": schedules.add_noise(x, eps, alpha, sigma), "t": t, "z": z, "label": 0 * z, "keep": 0 * t + 1}
            out, _ = unet.stateless_call(variables, fixed, inputs, training=True)
            return jnp.mean((out - schedules.to_target("v", x, eps, alpha, sigma)) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(variables)
        variables, moments = optimizer.stateless_apply(moments, gradients, variables)
        return loss, variables, moments

    def train():
        loss, state["variables"], state["optimizer"] = step(state["variables"], state["optimizer"], x)
        loss.block_until_ready()

    def sample():
        *_, (x_t, _) = samplers.ddim(lambda x_t, t: denoise_with(variables, x_t, t), x, model.schedule, flags.steps)
        x_t.block_until_ready()

    a = jax.device_put(jnp.ones((flags.matmul, flags.matmul), "bfloat16"), device)
    product = jax.jit(lambda a: a @ a)
    tasks = {
        "forward": lambda: denoise_with(variables, x, t).block_until_ready(),
        "ddim": sample,
        "train": train,
        "matmul": lambda: product(a).block_until_ready(),
    }
    cost = denoise_with.lower(variables, x, t).compile().cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return tasks, {"parameters": unet.count_params(), "device": str(device), "flops": float(cost.get("flops", 0.0))}


def torch_side(flags):
    """{task: callable}, {fact: value} of diffusers' `UNet2DModel` under `torch.compile`."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    device = flags.device if flags.device == "cpu" or torch.cuda.is_available() else "cpu"
    size, rows, width = flags.image_size, flags.batch_size, flags.width
    model = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=[width, 2 * width, 4 * width, 4 * width],
        down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        attention_head_dim=min(64, width),
        num_class_embeds=32,
    ).to(device, memory_format=torch.channels_last)
    network = model if flags.tiny else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x = torch.randn(rows, 1, size, size, device=device).contiguous(memory_format=torch.channels_last)
    z = torch.arange(rows, device=device) % 32
    t = torch.full((rows,), 500, device=device)

    def wait():
        if device != "cpu":
            torch.cuda.synchronize()

    def out(x_t, t):
        with torch.autocast(device, torch.bfloat16):
            return network(x_t, t, class_labels=z).sample.float()

    def train():
        torch.nn.functional.mse_loss(out(x, t), x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    @torch.no_grad()
    def forward():
        out(x, t)
        wait()

    @torch.no_grad()
    def sample():
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(flags.steps)
        x_t = x
        for step in scheduler.timesteps:
            x_t = scheduler.step(out(x_t, step.to(device).expand(rows)), step, x_t).prev_sample
        wait()

    a = torch.ones(flags.matmul, flags.matmul, device=device, dtype=torch.bfloat16)

    def matmul():
        a @ a
        wait()

    tasks = {"forward": forward, "ddim": sample, "train": train, "matmul": matmul}
    return tasks, {"parameters": sum(p.numel() for p in model.parameters()), "device": str(device), "flops": 0.0}


def worker(flags):
    """One side as a process that answers the parent (`serving.serve`)."""
    import serving

    tasks, about = {"jax": jax_side, "torch": torch_side}[flags.side](flags)
    for task in tasks.values():
        for _ in range(2):  # compile; the second step of the optimiser sees types of its own
            task()
    serving.serve(tasks, **about)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image-size", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--matmul", type=int, default=8192, help="side of the large matrix product")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--tiny", action="store_true", help="tiny sizes: to see that it runs")
    p.add_argument("--only", choices=("jax", "torch"), help="one side, where the other is not installed")
    p.add_argument("--side", choices=("jax", "torch"), help=argparse.SUPPRESS)
    flags = p.parse_args()
    if flags.tiny:
        flags.image_size, flags.batch_size, flags.width, flags.steps, flags.rounds, flags.matmul = 16, 2, 32, 2, 1, 64
    if flags.side:
        return worker(flags)
    compare(flags)


def compare(flags):
    """Start the sides, ask them in turn, print the table."""
    from serving import Worker

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the card
    sides = {
        side: Worker([sys.executable, *sys.argv, "--side", side])
        for side in ((flags.only,) if flags.only else ("jax", "torch"))
    }
    seconds = {side: {} for side in sides}
    for task in ("matmul", "forward", "ddim", "train"):
        for _ in range(flags.rounds):
            for side, process in sides.items():
                seconds[side].setdefault(task, []).append(process.run(task)["seconds"])
    for side, process in sides.items():
        about, median = process.about, {task: statistics.median(s) for task, s in seconds[side].items()}
        speed = {task: flags.batch_size / median[task] for task in ("forward", "ddim", "train")}
        print(
            f"{side:6} {about['device']}, {about['parameters'] / 1e6:.1f} M: forward {speed['forward']:.1f} images/s, "
            f"DDIM-{flags.steps} {speed['ddim']:.2f}, training {speed['train']:.1f}; matmul "
            f"{2e-12 * flags.matmul**3 / median['matmul']:.1f} TFLOP/s"
        )
        if about["flops"]:
            print(f"{side:6} forward: {1e-12 * about['flops'] / median['forward']:.2f} TFLOP/s")
    if len(sides) == 2:
        for task in ("forward", "ddim", "train"):
            ratio = statistics.median(seconds["torch"][task]) / statistics.median(seconds["jax"][task])
            print(f"ratio  {task}: {ratio:.2f}")
    for process in sides.values():
        process.close()


if __name__ == "__main__":
    main()
