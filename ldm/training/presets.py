"""What a run can start from: the presets, which stand over the defaults of `ldm.training.settings`."""

from ldm.training.settings import defaults, merged, unknown_keys
from ldm.training.systems import SYSTEMS


def of(name):
    """The complete settings of a preset.

    Raises:
        KeyError: if the preset names what is no setting.
    """
    if unknown := unknown_keys(PRESETS[name]):
        raise KeyError(f"the preset {name} sets {', '.join(unknown)}: there is no such setting")
    return merged(defaults(), PRESETS[name])


# Crisper and more alike at equal steps: measured for 64-f4 and 128-f8 (docs/results.md). Others have it only where
# they are made of these.
CRISP = {"texture_weight": 0.03, "plain_end": 0.35}


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
            **(CRISP if (image_size, downsampling) in ((64, 4), (128, 8)) else {}),
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
    at every brightness. At 128 pixels it takes patches of 2x2 as one, so that no level works on more than 64x64.
    """
    patch, width = {64: (1, 32), 128: (2, 48)}[image_size]
    return {
        "image_size": image_size,
        "first_stage": "none",
        "diffusion": {
            "schedule": "linear",
            "prediction": "eps_v",
            "loss": "huber",
            "patch": patch,
            "width": width,
            "groups": 8,
            "multipliers": [1, 2, 4, 4],
            "blocks": 1,
            "attention": [16, 8],
            "head_size": width,
            "batch_size": 16,
            "epochs": 40,
            "learning_rate": 5e-4,
        },
    }


def _on_cards(width, latent_channels, batch_size, steps, epochs):
    """Slices of 256 pixels on GPUs: NOT YET RUN on any.

    That they fit is reasoned from what docs/speed.md measured on a processor: at most 270 MiB a slice for the first
    stage, and 50 MiB a picture of 64x64 for the U-Net of width 64, so 6 MiB for latents of 24x20. At eight slices and
    32 latents that is 2.3 GiB beside TensorFlow's own, at 16 and 64 with twice the width 5 GiB.
    """
    return merged(
        _sized(256, 8),
        {
            "first_stage": "vae",
            "center": True,  # such archives are rarely registered
            "autoencoder": {
                "kl_weight": 1e-6,
                "latent_noise": 0.4,
                "latent_channels": latent_channels,
                "batch_size": batch_size // 4,
                "epochs": 40,
                "steps_per_epoch": steps,
            },
            "diffusion": {
                "width": width,
                "multipliers": [1, 2, 4],
                "blocks": 2,
                "attention": [16, 8],
                "batch_size": batch_size,
                "epochs": epochs,
                "steps_per_epoch": steps,
                "patience": 20,
                "learning_rate": 5e-4,  # 1e-3 is measured without a GPU only: batches of 16 and 32, width 64
            },
        },
    )


def _sharpened(epochs, histogram_weight=0.0):
    """What makes a decoder sharp over a frozen encoder: a discriminator, the texture losses, slices as they are."""
    return {
        "autoencoder": {
            "freeze_encoder": True,
            "gan": True,
            "adversarial_weight": 0.3,
            "texture_weight": 0.03,
            "histogram_weight": histogram_weight,
            "latent_noise": 0.3,
            "augment": 0.0,
            "plain_end": 0.0,
            "epochs": epochs,
            "steps_per_epoch": 400,
            "learning_rate": 4e-4,
        }
    }


# An OASIS-like archive at 256x256, latents 24x20x4 within the crop box. The texture loss beside a learning encoder left
# a grid in four channels, so detail is asked for over the frozen encoder (docs/results.md). Noise on latents in
# training makes the decoder forgive what diffusion gets wrong, and spreads what it must know over all of them.
OASIS = merged(
    _sized(256, 8),
    {
        "first_stage": "vae",
        "flip": True,
        "autoencoder": {
            "kl_weight": 1e-6,  # a posterior of 6 to 14 % of the latents' standard deviation
            "kl_cycles": 0,
            "latent_noise": 0.4,
            "latent_channels": 4,
            "plain_end": 0.35,
            "learning_rate": 1e-3,
            "epochs": 10,
            "steps_per_epoch": 500,
        },
        "latents": {"views": 4},
        "diffusion": {
            "attention": [32, 16, 8],
            "batch_size": 16,
            "tell_augmented": True,
            "epochs": 40,
            "steps_per_epoch": 139,
        },
    },
)

# With eight channels people are decoded better, and what is drawn is crisper, and more mottled.
EIGHT = merged(OASIS, {"autoencoder": {"latent_channels": 8, "texture_weight": 0.03, "epochs": 12}})

# The same for archives of many thousand slices, whose epochs would take hours: they end after so many steps. Such
# archives are rarely registered, and need not be axial.
SHORT_EPOCHS = {
    "center": True,
    "flip": False,
    "autoencoder": {"epochs": 28, "steps_per_epoch": 600},
    "latents": {"views": 1},
    "diffusion": {"epochs": 60, "steps_per_epoch": 250, "patience": 8, "tell_augmented": False},
}
AS_MEASURED = {"plain_end": 0.0, "learning_rate": 6e-4}  # on ADNI
LARGE = merged(merged(OASIS, SHORT_EPOCHS), {"autoencoder": AS_MEASURED})

# Times and scores were measured on 2 CPU cores with bfloat16; docs/ has the commands.
PRESETS = {
    # 64x64 phantoms, latents 14x12x4 within the crop box: as much as is learned in ten minutes, on whatever machine
    "phantom": {
        "data": None,
        "minutes": 9.5,  # what it takes on a slow processor to save and to start is not all foreseen
        "image_size": 64,
        "autoencoder": {
            "crop": True,  # and one code per latent: with fewer channels diffusion learns more in its few minutes
            "batch_size": 8,
            "epochs": 10,
            "steps_per_epoch": 160,
            "learning_rate": 8e-4,
        },
        "latents": {"views": 4},
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
    "oasis-256": OASIS,
    # the -sharp of each: with a decoder that is sharpened over the encoder of a finished run of the first,
    # `train.py --preset oasis-256 --run A`, then `train.py --preset oasis-256-sharp --init-from A --run B`, which takes
    # over the latents and the U-Net of A
    "oasis-256-sharp": merged(OASIS, _sharpened(epochs=8, histogram_weight=1.0)),
    "oasis-256-eight": EIGHT,
    "oasis-256-eight-sharp": merged(EIGHT, _sharpened(epochs=8, histogram_weight=1.0)),
    "large-256": LARGE,
    "large-256-sharp": merged(LARGE, _sharpened(epochs=5)),
    **{f"large-{size}": merged(_sized(size, size // 16), SHORT_EPOCHS) for size in (64, 128)},
    # one T4 or card like it (16 GB), one of 24 to 80 GB, several of these. Not yet run.
    "t4-256": _on_cards(width=64, latent_channels=4, batch_size=32, steps=500, epochs=60),
    "card-256": _on_cards(width=128, latent_channels=8, batch_size=64, steps=500, epochs=120),
    "cards-256": _on_cards(width=128, latent_channels=8, batch_size=256, steps=250, epochs=120),
    # slices of 64, 128, 256 pixels; latents of a fourth, an eighth, a sixteenth of that
    **{f"{size}-f{factor}": _sized(size, factor) for size in (64, 128, 256) for factor in (4, 8, 16)},
    **{f"{size}-pixels": _in_pixels(size) for size in (64, 128)},
    **SYSTEMS,
}


MANY, T4 = 12_000, 20.0  # training slices from which an archive is large; GiB of memory that a T4 has less of


# Rules of thumb: minutes of all stages on a processor with 16-bit arithmetic, and how many times more without it.
LEAST_MINUTES, WITHOUT = {256: 45, 128: 20}, 3


def choose(side, slices, machine, minutes=None):
    """The preset for an archive and a machine, where the user names none.

    Args:
        side: pixels of the slices, the longer side.
        slices: number of training slices.
        machine: {"gpus": number, "memory": GiB of the smallest, "fast": ...}, see `distribution.machine`.
        minutes: of `--minutes` for all stages; without a GPU, slices are made smaller where there are too few.

    Returns:
        Its name, and the reason: the end of a sentence.
    """
    size = 256 if side >= 192 else 128 if side >= 96 else 64
    what = f"slices of {side} pixels"
    if minutes and not machine["gpus"]:
        least = {large: (1 if machine["fast"] else WITHOUT) * LEAST_MINUTES[large] for large in LEAST_MINUTES}
        more = least.get(size)
        while minutes < least.get(size, 0):
            size //= 2
            few = f"{minutes:g} minutes are too few on this processor (give {more})"
            what = f"slices of {side} pixels, made smaller: {few}"
    many = f"{slices} training slices are too many for a pass in each epoch"
    if size < 256:
        return (f"large-{size}", f"{what}, and {many}") if slices > MANY else (f"{size}-f{size // 16}", what)
    if machine["gpus"] > 1:
        return "cards-256", f"{what}, and there are {machine['gpus']} GPUs (settings not yet run on any)"
    if machine["gpus"]:
        name = "t4-256" if machine["memory"] < T4 else "card-256"
        return name, f"{what}, and the GPU has {machine['memory']:.0f} GiB (settings not yet run on any)"
    if slices > MANY:
        return "large-256", f"{what}, without a GPU, and {many}"
    return "oasis-256", f"{what}, without a GPU"
