"""What a run can start from: the presets, which stand over the defaults of `ldm.training.settings`."""

from ldm.training.settings import defaults, merged, unknown_keys


def of(name):
    """The complete settings of a preset.

    Raises:
        KeyError: if the preset names what is no setting.
    """
    if unknown := unknown_keys(PRESETS[name]):
        raise KeyError(f"the preset {name} sets {', '.join(unknown)}: there is no such setting")
    return merged(defaults(), PRESETS[name])


def _sized(image_size, downsampling):
    """A first stage for slices of one size and latents of one size, and a U-Net that fits them."""
    latents = image_size // downsampling
    halvings = {4: 0, 8: 1, 16: 1, 32: 2, 64: 3}[latents]
    return {
        "image_size": image_size,
        "autoencoder": {
            "downsampling": downsampling,
            "patch": 4 if downsampling > 4 else 2,  # what costs most is the full resolution
            "width": 96 if downsampling > 4 else 64,
            "crop": True,
            "num_codes": 256 if downsampling == 16 else 1024,
            "codes_per_latent": 2,  # as many bits as one code, where nothing is cropped
            "batch_size": 4 if image_size == 256 else 8,  # many small steps learn more in the same time
            "epochs": 14,
        },
        "latents": {"views": 4},
        "diffusion": {"multipliers": [1, 2, 3, 4][: halvings + 1], "blocks": 1, "attention": [8]},
    }


def _in_pixels(image_size):
    """Diffusion straight in pixels, as the course projects did that this one descends from.

    Theirs are the linear schedule of T = 1000 steps (arXiv 2006.11239), a loss of the noise, and that loss Huber's;
    sample with `--sampler ddpm --steps 1000`. The averaged weights, even times and AdamW are ours. So is that the
    network says the noise through v, and that no channel is normalised by itself: without these two, pictures came out
    at every brightness.
    """
    return {
        "image_size": image_size,
        "first_stage": "none",
        "diffusion": {
            "schedule": "linear",
            "prediction": "eps_v",
            "loss": "huber",
            "width": 32,
            "groups": 8,
            "multipliers": [1, 2, 4, 4] if image_size == 64 else [1, 2, 2, 4, 4],
            "blocks": 1,
            "attention": [16, 8],
            "head_size": 32,
            "batch_size": 16,
            "epochs": 40,
        },
    }


# Times and scores were measured on 2 CPU cores with bfloat16; README has the commands.
PRESETS = {
    # 64x64 phantoms, latents 14x12x4 within the crop box: all stages in 8 to 20 minutes
    "phantom": {
        "data": None,
        "image_size": 64,
        "autoencoder": {
            "crop": True,  # and one code per latent: with fewer channels diffusion learns more in its few minutes
            "batch_size": 8,
            "epochs": 10,
            "steps_per_epoch": 160,
            "learning_rate": 8e-4,
        },
        "latents": {"views": 2},
        "diffusion": {
            "multipliers": [1, 2],
            "blocks": 1,
            "attention": [8],
            "batch_size": 32,
            "epochs": 14,
            "steps_per_epoch": 90,
            "learning_rate": 8e-4,
        },
    },
    # an OASIS-like archive at 256x256, latents 24x20x4 within the crop box. Four smooth channels of a KL-VAE are
    # learned sooner than the eight of the VQ-VAE of 256-f8, which show as much.
    "oasis-256": merged(
        _sized(256, 8),
        {
            "first_stage": "vae",
            "autoencoder": {"kl_weight": 1e-7, "epochs": 28},
            "diffusion": {"attention": [16, 8], "epochs": 48, "steps_per_epoch": 100, "patience": 8},
        },
    ),
    # slices of 64, 128, 256 pixels; latents of a fourth, an eighth, a sixteenth of that
    **{f"{size}-f{factor}": _sized(size, factor) for size in (64, 128, 256) for factor in (4, 8, 16)},
    **{f"{size}-pixels": _in_pixels(size) for size in (64, 128)},
}
