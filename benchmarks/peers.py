"""Worker: what a user would otherwise take, for `throughput.py`: diffusers on PyTorch, a DataLoader, zipfile + Pillow.

Runs in a virtual environment of its own (`benchmarks/requirements.txt`). The tasks are those of `ours.py`.
"""

import argparse
import io
import os
import re
import time
import zipfile

import numpy as np
import serving
import torch

CHANNELS_LAST = torch.channels_last


def autocast():
    """bfloat16 where the processor multiplies it, as on our side (`distribution.set_precision`)."""
    with open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    fast = "amx_bf16" in flags or "avx512_bf16" in flags
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def descend(loss, model, optimizer):
    """One optimiser step, clipped as on our side."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()


def unet(flags):
    """`UNet2DModel`, told the slice index as a class."""
    from diffusers import UNet2DModel

    widths = [flags.width * m for m in flags.multipliers]
    attention = [i == 2 for i in range(len(widths))]  # the level of a quarter of the resolution
    model = UNet2DModel(
        sample_size=flags.image_size,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        attention_head_dim=min(64, flags.width),
        num_class_embeds=32,
    ).to(memory_format=CHANNELS_LAST)
    rows, size = flags.batch_size, flags.image_size
    x_0 = (torch.randn(rows, 1, size, size) * 0.5).clamp(-1, 1).contiguous(memory_format=CHANNELS_LAST)
    z = torch.arange(rows) % 32
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

    def train():
        t = torch.randint(0, 1000, (rows,))
        eps = torch.randn_like(x_0)
        a = alpha_bar[t][:, None, None, None]
        with autocast():
            out = model(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t, class_labels=z).sample
        loss = torch.nn.functional.mse_loss(out.float(), eps)
        descend(loss, model, optimizer)

    @torch.inference_mode()
    def denoise(x_t, t):
        with autocast():
            return model(x_t, t, class_labels=z).sample.float()

    def sample():
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler()
        scheduler.set_timesteps(flags.steps)
        x_t = torch.randn(rows, 1, size, size).contiguous(memory_format=CHANNELS_LAST)
        for t in scheduler.timesteps:
            x_t = scheduler.step(denoise(x_t, t), t, x_t).prev_sample

    def calls():
        for _ in range(flags.steps):
            denoise(x_0, 500)

    train()

    def forward():
        denoise(x_0, 500)

    return {"train": train, "forward": forward, "ddim": sample, "calls": calls}, model


def vq_model(flags):
    """`VQModel`, f8: widths 64-64-128-128, one block per level, 1,024 codes of 4 channels."""
    from diffusers import VQModel

    widths = [flags.width, flags.width, 2 * flags.width, 2 * flags.width]
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=1024,
        norm_num_groups=min(32, flags.width),
    ).to(memory_format=CHANNELS_LAST)


def vq_step(model, optimizer, images):
    """One step on images (B, 1, H, W): L1 + MSE + the model's own commitment and codebook loss."""
    with autocast():
        out = model(images)
    fake = out.sample.float()
    loss = (fake - images).abs().mean() + (fake - images).square().mean() + out.commit_loss.float().mean()
    descend(loss, model, optimizer)


def first_stage(flags):
    """Steps of `VQModel` on one random batch."""
    model = vq_model(flags)
    rows, size = flags.batch_size, flags.image_size
    images = (torch.randn(rows, 1, size, size) * 0.5).clamp(-1, 1).contiguous(memory_format=CHANNELS_LAST)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-4)

    def train():
        vq_step(model, optimizer, images)

    @torch.inference_mode()
    def encode():
        with autocast():
            model.encode(images)

    train()
    return {"train": train, "encode": encode}, model


def autoencoder(flags):
    """`VQModel` trained on real slices for so many minutes: AdamW 4e-4, batch 8."""
    model = vq_model(flags)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-4)

    def learn():
        slices, steps = Slices(flags.data, size=flags.image_size), 0
        began = time.perf_counter()
        while True:
            for images in torch.utils.data.DataLoader(slices, 8, shuffle=True, drop_last=True):
                if time.perf_counter() - began > 60 * flags.minutes:
                    return {"steps": steps, "slices": 8 * steps}
                vq_step(model, optimizer, images.contiguous(memory_format=CHANNELS_LAST))
                steps += 1

    @torch.inference_mode()
    def reconstruct():
        test, fakes = Slices(flags.data, "test", flags.image_size), []
        for images in torch.utils.data.DataLoader(test, 32):
            with autocast():
                fakes.append(model(images.contiguous(memory_format=CHANNELS_LAST)).sample.float())
        np.save(flags.out, torch.cat(fakes).clamp(-1, 1).permute(0, 2, 3, 1).contiguous().numpy())

    return {"learn": learn, "reconstruct": reconstruct}, model


class Slices(torch.utils.data.Dataset):
    """Slices of one split out of a zip: what a course project writes. In order of case, then slice index."""

    def __init__(self, path, split="train", size=None):
        self.path, self.archive, self.size = path, None, size
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith((".png", ".jpeg"))]
        names = [n for n in names if f"_{split}/" in n and "_seg_" not in n] or names
        self.names = sorted(names, key=lambda n: [int(number) for number in re.findall(r"\d+", n)])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        from PIL import Image

        if self.archive is None:  # opened in the process that reads
            self.archive = zipfile.ZipFile(self.path)
        image = Image.open(io.BytesIO(self.archive.read(self.names[i % len(self.names)])))
        if self.size and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image, np.float32)[None] / 127.5 - 1)


def loader(flags):
    """`DataLoader` with worker processes, or, with 0 of them, one process that reads."""
    slices = Slices(flags.data)
    state = {}

    def start():
        began = time.perf_counter()
        sampler = torch.utils.data.RandomSampler(slices, replacement=True, num_samples=10**9)
        state["batches"] = iter(
            torch.utils.data.DataLoader(slices, flags.batch_size, sampler=sampler, num_workers=flags.workers)
        )
        next(state["batches"])
        return {"first_batch_s": time.perf_counter() - began}

    def read():
        for _ in range(flags.steps):
            next(state["batches"])

    return {"start": start, "read": read}, None


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("what", choices=("unet", "first_stage", "autoencoder", "loader"))
    p.add_argument("--image-size", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4, 4])
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--data")
    p.add_argument("--minutes", type=float, default=20, help="autoencoder: time to learn")
    p.add_argument("--out", help="autoencoder: .npy for the test people's reconstructions")
    flags = p.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tasks, model = {"unet": unet, "first_stage": first_stage, "autoencoder": autoencoder, "loader": loader}[flags.what](
        flags
    )
    parameters = sum(p.numel() for p in model.parameters()) if model else 0
    serving.serve(tasks, parameters=parameters, version=f"PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
