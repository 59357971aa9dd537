"""What a user would otherwise train: a generator of diffusers or of MONAI, for so many minutes, on the same slices.

    python generators.py diffusers slices.npz out.zip --minutes 15 --heads 20

Called by `systems.py`, in the peers' virtual environment (`benchmarks/requirements.txt`). Each is trained as its own
tutorial does it, and drawn with DDIM (arXiv 2010.02502):

    diffusers   `train_unconditional.py`: `UNet2DModel` in pixels, six levels, attention at the fifth; eps, linear
                schedule, AdamW of 1e-4 that warms up and decays by a cosine, averaged weights
    monai       `2d_ldm_tutorial`: `AutoencoderKL` (a fourth of the size, 3 channels) with a patch discriminator, for
                half of the time; then `DiffusionModelUNet` in its latents, three levels; eps, Adam of 1e-4

What differs from the tutorials: both are told the slice index, as a class, since ours is; `--width` takes the place of
their 128 channels, with which a processor makes few steps; MONAI's perceptual loss is left out, for its weights are no
part of the package; its learning rate decays and its weights are averaged, too, as the time is short.
"""

import argparse
import io
import os
import time
import zipfile

import numpy as np
import torch
from peers import autocast
from PIL import Image
from torch.nn import functional

STEPS = 50  # of DDIM


class Batches:
    """Endless shuffled batches of the training slices: images (B, 1, H, W) and slice indices (B,)."""

    def __init__(self, images, z, size, low, seed=0):
        scaled = images[:, None].astype("float32") / 255
        self.images, self.z = torch.from_numpy(scaled * (1 - low) + low), torch.from_numpy(z).long()
        self.size, self.random = size, torch.Generator().manual_seed(seed)

    def __call__(self, flip=False):
        rows = torch.randint(len(self.z), (self.size,), generator=self.random)
        images = self.images[rows]
        return (images.flip(-1) if flip and torch.rand((), generator=self.random) < 0.5 else images), self.z[rows]


class Plan:
    """Learning rates and the end of a training that has so many minutes: a warm-up, then a cosine, by the clock."""

    def __init__(self, minutes, *optimizers):
        self.began, self.seconds = time.perf_counter(), 60 * minutes
        self.peaks = [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
        self.steps = 0

    def goes_on(self):
        """Set the learning rates; False when the time is over."""
        done = (time.perf_counter() - self.began) / self.seconds
        rate = min(1, done / 0.05) * 0.5 * (1 + np.cos(np.pi * min(1, done)))
        for optimizer, peak in self.peaks:
            optimizer.param_groups[0]["lr"] = peak * max(rate, 1e-3)
        self.steps += 1
        return done < 1


def descend(optimizer, loss, model):
    """One step; gradients clipped as the tutorials of diffusers do."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def learn_noise(model, x_0_of, scheduler, minutes, make):
    """Train a denoiser to tell the noise; returns its averaged weights, and the number of steps.

    Args:
        model: callable (x_t, t, z) -> noise.
        x_0_of: callable -> (x_0, z), a batch.
        make: callable parameters -> optimiser.
    """
    optimizer = make(model.parameters())
    average, plan = torch.optim.swa_utils.AveragedModel(model), Plan(minutes, optimizer)
    while plan.goes_on():
        x_0, z = x_0_of()
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(z),))
        with autocast():
            loss = functional.mse_loss(model(scheduler.add_noise(x_0, noise, t), t, z).float(), noise)
        descend(optimizer, loss, model)
        decay = min(0.9999, 1 - (1 + plan.steps) ** -0.75)  # diffusers' EMAModel, inv_gamma 1 and power 3/4
        average.avg_fn = lambda old, new, _, decay=decay: decay * old + (1 - decay) * new
        average.update_parameters(model)
    return average.module.eval(), plan.steps


class Told(torch.nn.Module):
    """A network that takes (x_t, t, z), whatever its own names for them are."""

    def __init__(self, network, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x_t, t, z):
        return self.call(self.network, x_t, t, z)


@torch.inference_mode()
def ddim(model, scheduler, shape, z):
    """Draw x_0 of some shape for slice indices z."""
    scheduler.set_timesteps(STEPS)
    x = torch.randn(shape)
    for t in scheduler.timesteps:
        with autocast():
            noise = model(x, torch.full((len(z),), int(t)), z).float()
        x = scheduler.step(noise, int(t), x)
        x = x[0] if isinstance(x, tuple) else x.prev_sample
    return x


def diffusers(flags, images, z):
    """Diffusion in pixels. Returns what draws slices of indices z -> (B, 1, H, W) in [0, 1], and facts."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    w = flags.width
    network = UNet2DModel(
        sample_size=images.shape[1],
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(w, w, 2 * w, 2 * w, 4 * w, 4 * w),
        down_block_types=[f"{'Attn' if i == 4 else ''}DownBlock2D" for i in range(6)],
        up_block_types=[f"{'Attn' if i == 1 else ''}UpBlock2D" for i in range(6)],
        num_class_embeds=int(z.max()) + 1,
    )
    model = Told(network, lambda network, x, t, z: network(x, t, class_labels=z).sample)
    batches = Batches(images, z, flags.batch_size, low=-1)
    model, steps = learn_noise(
        model,
        lambda: batches(flip=True),
        DDPMScheduler(num_train_timesteps=1000),
        flags.minutes,
        lambda p: torch.optim.AdamW(p, 1e-4, (0.95, 0.999), weight_decay=1e-6),
    )

    def draw(indices):
        x = ddim(model, DDIMScheduler(num_train_timesteps=1000), (len(indices), 1, *images.shape[1:]), indices)
        return (x + 1) / 2

    return draw, {"steps": steps, "parameters": sum(p.numel() for p in network.parameters())}


def monai(flags, images, z):
    """Latent diffusion. Returns what draws slices of indices z -> (B, 1, H, W) in [0, 1], and facts."""
    from monai.losses.adversarial_loss import PatchAdversarialLoss
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

    w = flags.width
    first_stage = AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(w, w, 2 * w),
        latent_channels=3,
        num_res_blocks=2,
        norm_num_groups=min(32, w),
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    judge = PatchDiscriminator(spatial_dims=2, num_layers_d=3, channels=max(8, w // 2), in_channels=1, out_channels=1)
    adversarial = PatchAdversarialLoss(criterion="least_squares")
    optimizers = torch.optim.Adam(first_stage.parameters(), 1e-4), torch.optim.Adam(judge.parameters(), 5e-4)
    batches, plan = Batches(images, z, flags.batch_size, low=0), Plan(flags.minutes / 2, *optimizers)
    warm_up = 10 * len(z) // flags.batch_size  # of the discriminator: the tutorial's ten epochs
    while plan.goes_on():
        real, _ = batches()
        with autocast():
            fake, mean, sigma = first_stage(real)
        kl = 0.5 * (mean.square() + sigma.square() - 2 * sigma.log() - 1).flatten(1).sum(1).mean()
        loss = functional.l1_loss(fake.float(), real) + 1e-6 * kl.float()
        if plan.steps > warm_up:
            loss = loss + 0.01 * adversarial(judge(fake.float())[-1], target_is_real=True, for_discriminator=False)
        descend(optimizers[0], loss, first_stage)
        if plan.steps > warm_up:
            on_fake, on_real = (judge(x.contiguous().detach())[-1] for x in (fake.float(), real))
            both = adversarial(on_fake, target_is_real=False, for_discriminator=True)
            both = both + adversarial(on_real, target_is_real=True, for_discriminator=True)
            descend(optimizers[1], 0.01 * 0.5 * both, judge)
    first_steps = plan.steps
    first_stage.eval()
    with torch.inference_mode():
        scale = 1 / first_stage.encode_stage_2_inputs(batches()[0]).std()

    def latents():
        real, indices = batches()
        with torch.no_grad(), autocast():
            return first_stage.encode_stage_2_inputs(real).float() * scale, indices

    network = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=2,
        channels=(w, 2 * w, 4 * w),
        norm_num_groups=min(32, w),
        attention_levels=(False, True, True),
        num_head_channels=(0, 2 * w, 4 * w),
        num_class_embeds=int(z.max()) + 1,
    )
    model = Told(network, lambda network, x, t, z: network(x, timesteps=t, class_labels=z))
    noises = {"num_train_timesteps": 1000, "schedule": "linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}
    model, steps = learn_noise(
        model, latents, DDPMScheduler(**noises), flags.minutes / 2, lambda p: torch.optim.Adam(p, 1e-4)
    )

    def draw(indices):
        shape = (len(indices), 3, *(side // 4 for side in images.shape[1:]))
        x = ddim(model, DDIMScheduler(**noises, clip_sample=False), shape, indices)
        with torch.inference_mode(), autocast():
            return first_stage.decode_stage_2_outputs(x / scale).float()

    counts = (sum(p.numel() for p in net.parameters()) for net in (first_stage, network))
    return draw, {"first stage's steps": first_steps, "steps": steps, "parameters": sum(counts)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("diffusers", "monai"))
    p.add_argument("slices", help=".npz: images (N, H, W) of 8 bits and z (N,)")
    p.add_argument("out", help=".zip to write, in the layout that `--data` reads")
    p.add_argument("--minutes", type=float, default=15.0)
    p.add_argument("--heads", type=int, default=20, help="so many slices are drawn of each index")
    p.add_argument("--width", type=int, default=32, help="of the widest resolution; 128 in the tutorials")
    p.add_argument("--batch-size", type=int, default=16)
    flags = p.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    with np.load(flags.slices) as file:
        images, z = file["images"], file["z"]
    draw, facts = {"diffusers": diffusers, "monai": monai}[flags.what](flags, images, z)
    print(", ".join(f"{count:,} {name}" for name, count in facts.items()))
    indices = torch.arange(int(z.min()), int(z.max()) + 1)
    with zipfile.ZipFile(f"{flags.out}.part", "w") as archive:
        for head in range(flags.heads):
            for index, image in zip(indices.tolist(), draw(indices).clamp(0, 1)[:, 0].numpy(), strict=True):
                png = io.BytesIO()
                Image.fromarray(np.round(255 * image).astype("uint8")).save(png, "PNG")
                archive.writestr(f"keras_png_slices_test/case_{head:03d}_slice_{index}.nii.png", png.getvalue())
    os.replace(f"{flags.out}.part", flags.out)


if __name__ == "__main__":
    main()
