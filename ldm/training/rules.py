"""What settings a run can have, and which flags would have no effect on them.

Settings are the nested dictionary of `ldm.training.presets.DEFAULTS`. Every refusal is a `RunError` that names the
flag and the way out, before any long work starts.
"""

import numpy as np

from ldm.training import runs
from ldm.training.presets import DEFAULTS, merged


def spelt(key, group=None):
    """The flag that sets `key` of the settings, in that group of them."""
    owner = f"{group}-" if group == "prior" and key in ("width", "depth", "heads") else ""
    owner = "autoencoder-" if (group, key) == ("autoencoder", "width") else owner
    return f"--{owner}{key.replace('_', '-')}"


def latent_shape(settings):
    """(h, w, C) of what the diffusion model denoises: latents, or pixels."""
    size, group = settings["image_size"], settings["autoencoder"]
    if settings["first_stage"] == "none":
        return (size, size, 1)
    height, width = (group["crop_box"] or (0, 0, size, size))[2:]
    channels = group["latent_channels"] * (group["codes_per_latent"] if settings["first_stage"] == "vqvae" else 1)
    return (height // group["downsampling"], width // group["downsampling"], channels)


def resolve_levels(flags, settings):
    """Finite scalar quantisation has as many channels as levels, and no size of a codebook; the rest has no levels.

    Raises:
        RunError: for a flag that would have no effect.
    """
    group = settings["autoencoder"]
    if settings["first_stage"] == "vqvae" and group["quantizer"] == "fsq":
        for flag in ("num_codes", "latent_channels"):
            if getattr(flags, flag) is not None:
                raise runs.RunError(f"--{flag.replace('_', '-')} has no effect with --quantizer fsq: give --levels")
        group["latent_channels"] = len(group["levels"])
        if min(group["levels"]) < 3 or max(group["levels"]) > 256 or np.prod(group["levels"], dtype=float) > 2**20:
            raise runs.RunError("--levels must lie between 3 and 256 each, and make at most 1048576 codes together")
    elif flags.levels:
        raise runs.RunError("--levels has no effect without --quantizer fsq: leave it out, or add that")


def refuse_idle_flags(flags, settings):
    """Raises:
    RunError: for a flag of the first stage that would have no effect.
    """
    group, first = settings["autoencoder"], settings["first_stage"]
    kind = group["quantizer"] if first == "vqvae" else first
    some, gan = ("--autoencoder vqvae or vae", first != "none"), ("--gan", group["gan"] and first != "none")
    needs = {
        "cosine": ("--quantizer ema", kind == "ema"),
        "codes_per_latent": ("--autoencoder vqvae", first == "vqvae"),
        "num_codes": ("--quantizer ema", kind == "ema"),
        "quantizer": ("--autoencoder vqvae", first == "vqvae"),
        **dict.fromkeys(("kl_weight", "kl_cycles"), ("--autoencoder vae", kind == "vae")),
        **dict.fromkeys(("adversarial_weight", "random_latents"), gan),
        **dict.fromkeys(("gan", "segment", "condition_on_label", "autoencoder_width", "patch"), some),
        **dict.fromkeys(("downsampling", "crop"), some),
    }
    for flag, (needed, met) in needs.items():
        if getattr(flags, flag) and not met:
            raise runs.RunError(f"{spelt(flag)} has no effect without {needed}: leave it out, or add that")
    side = settings["image_size"] // (1 if first == "none" else group["downsampling"])
    levels = [side // 2**level for level in range(len(settings["diffusion"]["multipliers"]))]
    if idle := sorted(set(flags.attention or ()) - set(levels)):
        raise runs.RunError(f"--attention {idle[0]} has no effect: the U-Net's levels have {levels} pixels a side")


def check(settings):
    """Refuse numbers that cannot be, before any work starts.

    Raises:
        RunError: naming the flag.
    """
    positive = {"image_size": settings["image_size"], "views": settings["latents"]["views"]}
    for stage in ("autoencoder", "diffusion", "prior"):
        group = settings[stage]
        names = (
            "batch_size",
            "epochs",
            "learning_rate",
            "width",
            "blocks",
            "latent_channels",
            "num_codes",
            "codes_per_latent",
            "head_size",
            "accumulate",
            "depth",
            "heads",
        )
        positive |= {name: group[name] for name in names if name in group}
        group["steps_per_epoch"] = group["steps_per_epoch"] or None
        if (group["steps_per_epoch"] or 1) < 1:
            raise runs.RunError("--steps-per-epoch must be 0 (one pass) or more")
        for name, value in positive.items():
            if value <= 0:
                raise runs.RunError(f"{spelt(name, stage)} must be more than 0, not {value}")
    first = settings["autoencoder"]
    for name in ("kl_weight", "kl_cycles", "adversarial_weight"):
        if first[name] < 0:
            raise runs.RunError(f"--{name.replace('_', '-')} must be 0 or more, not {first[name]}")
    size, unet, prior = settings["image_size"], settings["diffusion"], settings["prior"]
    if not 0 <= settings["seed"] <= runs.LAST_SEED:
        raise runs.RunError(f"--seed must lie between 0 and {runs.LAST_SEED}, not {settings['seed']}")
    if not 0 <= unet["dropout"] < 1:
        raise runs.RunError(f"--dropout must be 0 or more and less than 1, not {unet['dropout']}")
    if unet["patience"] is not None and unet["patience"] < 1:
        raise runs.RunError(f"--patience must be 1 or more epochs, not {unet['patience']}")
    if unet["patience"] and unet["select"] == "kid":
        raise runs.RunError("--patience goes by the validation loss, not by --select kid: leave one of them out")
    if min(unet["multipliers"]) < 1:
        raise runs.RunError(f"--multipliers must be 1 or more each, not {min(unet['multipliers'])}")
    if unet["min_snr_gamma"] is not None and unet["min_snr_gamma"] <= 0:
        raise runs.RunError(f"--min-snr-gamma must be more than 0, not {unet['min_snr_gamma']}: the paper's is 5")
    if unet["min_snr_gamma"] is not None and unet["loss"] != "mse":
        raise runs.RunError(f"--min-snr-gamma weighs squared errors: leave it out, or --loss {unet['loss']}")
    if prior["width"] % prior["heads"] or prior["width"] % 2:
        raise runs.RunError(
            f"--prior-width {prior['width']} must be even and divisible by --prior-heads {prior['heads']}"
        )
    if unet["recompute"] and unet["dropout"]:
        raise runs.RunError("--recompute would draw another --dropout on the way back: leave one of them out")
    if unet["prediction"] == "eps" and (unet["zero_snr"] or unet["schedule"] == "flow"):
        ends = "--zero-snr" if unet["zero_snr"] else "--schedule flow"
        raise runs.RunError(f"{ends} ends in noise alone, where eps tells nothing of x_0: add --prediction v")
    if settings["first_stage"] != "none":
        factor = settings["autoencoder"]["downsampling"]
        if size % factor:
            raise runs.RunError(f"--image-size {size} must be divisible by --downsampling {factor}")
    check_levels(settings)
    for multiplier in unet["multipliers"]:
        channels = unet["width"] * multiplier
        if channels > unet["head_size"] and channels % unet["head_size"]:
            raise runs.RunError(f"--width times {multiplier} is {channels}, not divisible by --head-size")


def check_levels(settings):
    """Refuse a U-Net that halves what it denoises more often than that can be halved.

    Raises:
        RunError: naming the flag.
    """
    height, width, _ = latent_shape(settings)
    levels = len(settings["diffusion"]["multipliers"])
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise runs.RunError(
            f"--multipliers with {levels} levels do not fit {height}x{width}: give fewer, or another --image-size"
        )


def identity(settings, stage):
    """The part of the settings that makes a stage's weights what they are; only epochs may change afterwards."""
    common = {key: settings[key] for key in ("image_size", "first_stage", "axis", "flip", "seed")}
    if stage in ("diffusion", "prior") or stage == "autoencoder" and settings[stage]["condition_on_label"]:
        common["labels"] = settings["labels"]
    planned = ("epochs", "kl_cycle_steps", "crop_box", "recompute", "accumulate", "patience")
    return common | {key: value for key, value in settings[stage].items() if key not in planned}


def refuse_change(run, stage, settings):
    """Raises:
    RunError: if a stage was already begun with other settings.
    """
    stored = runs.load_json(run / f"{stage}.json")
    if not stored:
        return
    known = merged(DEFAULTS, stored["settings"])  # what an older version did not write down was its default
    before, now = identity(known, stage), identity(settings, stage)
    for key in now:
        if before[key] != now[key]:
            flag = "--autoencoder" if key == "first_stage" else spelt(key, stage)
            raise runs.RunError(
                f"{run}: its {stage} stage was begun with {flag} {before.get(key)}, not {now[key]}: leave the flag out "
                "to go on, or give the new run a name with --run"
            )
