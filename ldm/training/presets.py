"""What a run is, unless flags say otherwise: the defaults, and the presets that stand over them."""

import copy

DEFAULTS = {
    "data": None,  # the phantom brains, drawn on first use
    "labels": None,  # a table of people; None: the one in the archive, if any
    "axis": 2,
    "image_size": 128,
    "first_stage": "vqvae",
    "flip": False,
    "seed": 0,
    "autoencoder": {
        "downsampling": 4,
        "patch": 2,
        "crop": False,  # presets crop; what was trained before there was a choice did not
        "crop_box": None,  # found when training begins
        "quantizer": "ema",
        "width": 64,
        "blocks": 1,
        "latent_channels": 4,
        "num_codes": 1024,
        "codes_per_latent": 1,
        "cosine": False,
        "levels": [8, 5, 5, 5],
        "kl_weight": 1e-6,
        "kl_cycles": 4,
        "kl_cycle_steps": None,  # half of the training
        "condition_on_z": True,
        "condition_on_label": False,
        "segment": False,
        "gan": False,
        "adversarial_weight": 0.1,
        "random_latents": False,
        "batch_size": 16,
        "epochs": 20,
        "steps_per_epoch": None,  # one pass over the training split
        "learning_rate": 6e-4,
    },
    "latents": {"views": 8},
    "diffusion": {
        "schedule": "cosine",
        "prediction": "v",
        "width": 64,
        "multipliers": [1, 2, 4],
        "blocks": 2,
        "attention": [16, 8],
        "head_size": 64,
        "dropout": 0.0,
        "drop_conditions": 0.1,
        "gates": False,
        "recompute": False,
        "conditions": [],  # columns of the table
        "condition_on_mask": False,
        "select": "loss",  # of the validation people; or "kid", of samples against them
        "patience": None,  # epochs without a new least loss of theirs, after which training stops
        "zero_snr": False,
        "loss": "mse",
        "min_snr_gamma": None,
        "accumulate": 1,
        "batch_size": 32,
        "epochs": 100,
        "steps_per_epoch": None,
        "learning_rate": 5e-4,
    },
    "prior": {
        "width": 128,
        "depth": 4,
        "heads": 2,
        "dropout": 0.1,
        "batch_size": 8,
        "epochs": 20,
        "steps_per_epoch": None,
        "learning_rate": 1e-3,
    },
}


def merged(base, over):
    """A deep copy of `base` with the values of `over` in their places."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else copy.deepcopy(value)
    return result


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

    Theirs are the linear schedule of T = 1000 steps (arXiv 2006.11239), the noise as what the network says, and the
    Huber loss; sample with `--sampler ddpm --steps 1000`. The averaged weights, even times and AdamW are ours.
    """
    return {
        "image_size": image_size,
        "first_stage": "none",
        "diffusion": {
            "schedule": "linear",
            "prediction": "eps",
            "loss": "huber",
            "width": 32,
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
    # 64x64 phantoms, latents 14x12x4 within the window: all stages in 8 to 20 minutes
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
    # an OASIS-like archive at 256x256, latents 24x20x4 within the window. Four smooth channels of a KL-VAE are learned
    # sooner than the eight of the VQ-VAE of 256-f8, which show as much.
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
