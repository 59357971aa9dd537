"""Every setting of a run, declared once: the table OPTIONS.

From this table come the flags of `train.py` and their help, the defaults, the keys that a preset may have, the values
that are refused, what may change when a run is gone on with, the arguments of the models, and the table of flags in the
documentation. A new option of a network takes two places: a line here, and the network that obeys it.

Settings are what a run is, {"image_size": 64, ..., "diffusion": {"epochs": 14, ...}, ...}: a nested mapping that JSON
can write and nobody can change. `merged` makes new ones. Every refusal is a `RunError`, one sentence that names the
flag, before any long work starts.
"""

import dataclasses
import math

from ldm.training import runs

TRAINED = ("autoencoder", "diffusion", "prior")  # stages that have epochs
TITLES = {  # of the groups of flags
    "command": "what is done",
    "run": "data, and what all stages share",
    TRAINED: "training, of each stage that runs",
    "autoencoder": "first stage",
    "latents": "latents",
    "diffusion": "diffusion",
    "prior": "prior, a transformer over the codes of a VQ-VAE",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        group: the stage in whose settings it stands; "run" for what all stages share, "command" for what is no part of
            a run. Of a tuple of stages, each has its own, and one flag sets those of the stages that run.
        name: its key there.
        default: where neither preset nor flag says anything; one for each stage of a tuple.
        kind: str, int, float or bool.
        help: what it is, for `--help` and the documentation.
        choices: the only values that it may have.
        bounds: of a number, in the notation of intervals: "[0, 1)" is 0 or more and less than 1.
        many: "+" or "*" where it is a list of one or more values, of any number of them; None where it is one value.
        flag: None for the one that is spelt like the name; "" where only presets, or the program itself, set it.
        feeds: models, in words, whose constructor takes it as an argument of this name.
        needs: what must be so for its flag to have an effect, a key of NEEDS.
        changes: whether it may be another when a run is gone on with. All others make the weights what they are.
    """

    group: str | tuple
    name: str
    default: object
    kind: type
    help: str
    choices: tuple = ()
    bounds: str | None = None
    many: str | None = None
    flag: str | None = None
    feeds: str = ""
    needs: str | None = None
    changes: bool = False

    @property
    def groups(self):
        """The stages that have it, a tuple."""
        return self.group if isinstance(self.group, tuple) else (self.group,)

    @property
    def word(self):
        """Its flag as an identifier, "learning_rate"; empty where it has none."""
        return self.name if self.flag is None else self.flag

    @property
    def spelt(self):
        """Its flag as one types it, "--learning-rate"; where it has none, its place in a preset."""
        return f"--{self.word.replace('_', '-')}" if self.word else f"{self.group}.{self.name}"


EMA, FIRST, AUGMENTED = "--quantizer ema", "--autoencoder vqvae or vae", "--augment above 0"
VIEWS = "latents of several --views"

# fmt: off
OPTIONS = (
    #      group, name, default, kind, help, and what else there is to say
    Option("command", "run", None, str, "name of the run, whose folder is checkpoint/<run> (default: the data's)"),
    Option("command", "preset", None, str, "settings to start from (default: chosen by data and machine)"),
    Option("command", "dry_run", False, bool, "say what would be done, and stop"),
    Option("command", "self_test", False, bool, "can these settings overfit 8 slices? Minutes; writes nothing"),
    Option("command", "verbose", False, bool, "say all metrics of each epoch, not the three that matter most"),
    Option("command", "precision", "auto", str, "numbers of the networks; auto: the 16 bits that are fast here",
           ("auto", "float32", "mixed_bfloat16", "mixed_float16")),
    Option("command", "replicas", None, int, "number of GPUs, or, without any, of logical CPU devices to try it out",
           bounds="[1, 1024]"),

    Option("run", "data", None, str, "zip, folder, or volumes: NIfTI, MGZ, Analyze, DICOM (default: phantom brains)",
           many="+"),
    Option("run", "labels", None, str, "CSV table of people: case, label, ... (default: labels.csv in the archive)"),
    Option("run", "missing", None, str, "texts that mean unknown in that table, beside NA, null, ...: -4 in ADNI's",
           many="+"),
    Option("run", "person", None, str, "how people are told apart where names do not do it: 'each', every slice is "
           "somebody else; or a regular expression with the group (?P<person>...)"),
    Option("run", "contrast", None, str, "the one to use of several: t1, t2, flair, ... (default: t1)"),
    Option("run", "axis", 2, int, "axis of volumes along which to slice (2: axial)", (0, 1, 2)),
    Option("run", "image_size", 128, int, "pixels a side", bounds="[8, 1024]"),
    Option("run", "first_stage", "vqvae", str, "none: diffusion straight in pixels", ("vqvae", "vae", "none"),
           flag="autoencoder"),
    Option("run", "init_from", None, str, "run whose weights the stages begin with, as far as they fit",
           changes=True),
    Option("run", "validation_slices", 640, int, "that an epoch is validated with at most, the same ones each time, "
           "evenly spread over people and slice indices", bounds="[8, 1000000]", changes=True),
    Option("run", "minutes", None, float, "plan epochs and steps such that the stages that run take so long "
           "together", bounds="[1, 100000]", changes=True),
    Option("run", "center", False, bool, "move each scan so that its head lies in the middle of the picture"),
    Option("run", "flip", False, bool, "mirror training slices left to right"),
    Option("run", "seed", 0, int, "of splits that are carved out, order, augmentation, weights and noise",
           bounds=f"[0, {runs.LAST_SEED}]"),

    Option("autoencoder", "downsampling", 4, int, "image pixels per latent pixel, a side", (4, 8, 16), needs=FIRST,
           feeds="VQVAE VAE"),
    Option("autoencoder", "patch", 2, int, "pixels a side that its first layer takes as one", (2, 4), needs=FIRST,
           feeds="VQVAE VAE"),
    # presets crop; what was trained before there was a choice did not
    Option("autoencoder", "crop", False, bool, "leave out the margin that is black in all slices", needs=FIRST),
    Option("autoencoder", "crop_box", None, int, "top, left, height, width in pixels; found when training begins",
           many="+", bounds="[0, 1024]", flag="", feeds="VQVAE VAE", changes=True),
    Option("autoencoder", "quantizer", "ema", str, "of the VQ-VAE: learned codebook, or fixed grid", ("ema", "fsq"),
           needs="--autoencoder vqvae", feeds="VQVAE"),
    Option("autoencoder", "width", 64, int, "channels of its first level", bounds="[1, 4096]", flag="autoencoder_width",
           needs=FIRST, feeds="VQVAE VAE"),
    Option("autoencoder", "blocks", 1, int, "residual blocks per level", bounds="[1, 16]", flag="", feeds="VQVAE VAE"),
    Option("autoencoder", "latent_channels", 4, int, "channels of a latent; of a VQ-VAE: of a code",
           bounds="[1, 1024]", needs="--autoencoder vae or --quantizer ema"),
    Option("autoencoder", "num_codes", 1024, int, "size of the learned codebook", bounds="[2, 1048576]", needs=EMA,
           feeds="VQVAE"),
    Option("autoencoder", "codes_per_latent", 1, int, "vqvae: each latent is cut into so many parts",
           bounds="[1, 64]", needs="--autoencoder vqvae", feeds="VQVAE"),
    Option("autoencoder", "cosine", False, bool, "its codes are compared by direction only", needs=EMA, feeds="VQVAE"),
    Option("autoencoder", "levels", (8, 5, 5, 5), int, "fsq: levels of each channel of a code", bounds="[3, 256]",
           many="+", needs="--quantizer fsq", feeds="VQVAE"),
    Option("autoencoder", "kl_weight", 1e-6, float, "vae: weight of the KL divergence, in nats per slice",
           bounds="[0, 1000]", needs="--autoencoder vae", feeds="VAE"),
    Option("autoencoder", "kl_cycles", 4, int, "vae: times that this weight rises from 0; 0: constant",
           bounds="[0, 1000]", needs="--autoencoder vae", feeds="VAE"),
    Option("autoencoder", "kl_cycle_steps", None, int, "half of the training as it was planned when it began",
           bounds="[0, 1000000000]", flag="", feeds="VAE", changes=True),
    Option("autoencoder", "latent_noise", 0.0, float, "vae: most noise on what the decoder sees in training, in "
           "standard deviations of the latents; diffusion errs by 0.1 to 0.3", bounds="[0, 2]",
           needs="--autoencoder vae", feeds="VAE"),
    Option("autoencoder", "freeze_encoder", False, bool, "train the decoder alone, so that latents stay what they are",
           needs="--init-from"),
    Option("autoencoder", "augment", 1.0, float, "how strongly training slices are turned, scaled, moved, brightened; "
           "0: not at all, which keeps their outlines hard", bounds="[0, 1]", needs=FIRST),
    Option("autoencoder", "plain_end", 0.0, float, "last share of its steps, as planned, that sees slices as they are, "
           "which hardens outlines; more --epochs later turn them again", bounds="[0, 1]", needs=AUGMENTED),
    Option("autoencoder", "condition_on_z", True, bool, "tell it the slice index", needs=FIRST, feeds="VQVAE VAE"),
    Option("autoencoder", "condition_on_label", False, bool, "tell it the label", needs=FIRST),
    Option("autoencoder", "segment", False, bool, "let it name tissues, from their masks", needs=FIRST),
    Option("autoencoder", "texture_weight", 0.0, float, "of the difference in fine detail, in the reconstruction loss; "
           "it rises over the first 1,000 steps", bounds="[0, 100]", needs=FIRST, feeds="VQVAE VAE"),
    Option("autoencoder", "histogram_weight", 0.0, float, "of the difference in the histograms of each neighbourhood, "
           "likewise in the reconstruction loss", bounds="[0, 100]", needs=FIRST, feeds="VQVAE VAE"),
    Option("autoencoder", "gan", False, bool, "sharpen it with a discriminator", needs=FIRST),
    Option("autoencoder", "adversarial_weight", 0.1, float, "gan: its gradient, relative to the reconstruction's",
           bounds="[0, 100]", needs="--gan"),
    Option("autoencoder", "random_latents", False, bool, "gan: the discriminator sees random pictures, too",
           needs="--gan"),

    Option("latents", "views", 8, int, "latents stored per slice: the first as is, the others augmented",
           bounds="[1, 1000]", needs=FIRST),

    Option("diffusion", "schedule", "cosine", str, "alpha and sigma by time",
           ("linear", "scaled_linear", "cosine", "sigmoid", "flow"), feeds="DiffusionModel"),
    Option("diffusion", "prediction", "v", str, "what the network says; eps_v: v, whose errors count as those of "
           "eps", ("eps", "v", "x_0", "flow", "edm", "eps_v"), feeds="DiffusionModel"),
    Option("diffusion", "width", 64, int, "channels of the U-Net's first level", bounds="[1, 4096]", feeds="UNet"),
    Option("diffusion", "multipliers", (1, 2, 4), int, "channels of each level, in widths", bounds="[1, 64]", many="+",
           feeds="UNet"),
    Option("diffusion", "patch", 1, int, "pixels a side that the U-Net takes as one", (1, 2, 4), feeds="UNet",
           flag="unet_patch"),
    Option("diffusion", "blocks", 2, int, "residual blocks per level", bounds="[1, 16]", feeds="UNet"),
    Option("diffusion", "attention", (16, 8), int, "resolutions with attention, pixels a side of the whole picture",
           bounds="[1, 1024]", many="*", feeds="UNet"),
    Option("diffusion", "head_size", 64, int, "channels per attention head", bounds="[1, 4096]", feeds="UNet"),
    Option("diffusion", "groups", 32, int, "of channels that are normalised together, at most", bounds="[1, 1024]",
           feeds="UNet"),
    Option("diffusion", "dropout", 0.0, float, "share of features that training leaves out", bounds="[0, 1)",
           feeds="UNet"),
    Option("diffusion", "drop_conditions", 0.1, float, "share of slices that training shows without conditions",
           bounds="[0, 0.33]", flag="", feeds="DiffusionModel"),
    Option("diffusion", "gates", False, bool, "additive attention gates on the skips", feeds="UNet"),
    Option("diffusion", "recompute", False, bool, "gradient checkpointing: compute blocks again on the way back; "
           "less memory, more time", feeds="UNet", changes=True),
    Option("diffusion", "conditions", (), str, "columns of the table that it is told beside the label: age sex",
           many="*"),
    Option("diffusion", "condition_on_mask", False, bool, "tell it the tissue mask, where there is one"),
    Option("diffusion", "tell_augmented", False, bool, "tell it which views are augmented, so that it draws the "
           "first, slices as they are", needs=VIEWS),
    Option("diffusion", "select", "loss", str, "which epoch is kept: least validation loss, or samples nearest to "
           "validation people", ("loss", "kid")),
    Option("diffusion", "patience", None, int, "epochs without a new least validation loss, after which training stops",
           bounds="[1, 1000000]", changes=True),
    Option("diffusion", "zero_snr", False, bool, "rescale the schedule to end in pure noise", feeds="DiffusionModel"),
    Option("diffusion", "loss", "mse", str, "how the network's errors count", ("mse", "l1", "huber"),
           feeds="DiffusionModel"),
    Option("diffusion", "min_snr_gamma", None, float, "cap of the loss's weight at low noise, 5 in the paper",
           bounds="(0, 1000]", feeds="DiffusionModel"),
    Option("diffusion", "accumulate", 1, int, "parts in which a batch goes through the network, for less memory and "
           "the same step", bounds="[1, 1024]", feeds="DiffusionModel", changes=True),

    Option("prior", "width", 128, int, "channels", bounds="[2, 4096]", flag="prior_width", feeds="CodePrior"),
    Option("prior", "depth", 4, int, "blocks", bounds="[1, 64]", flag="prior_depth", feeds="CodePrior"),
    Option("prior", "heads", 2, int, "attention heads", bounds="[1, 64]", flag="prior_heads", feeds="CodePrior"),
    Option("prior", "dropout", 0.1, float, "share of features that training leaves out", bounds="[0, 1)", flag="",
           feeds="CodePrior"),

    Option(TRAINED, "batch_size", (16, 32, 8), int, "slices a step, over all replicas", bounds="[1, 65536]"),
    Option(TRAINED, "epochs", (20, 100, 20), int, "after each, the stage is validated, drawn, and kept if it is best",
           bounds="[1, 1000000]", changes=True),
    Option(TRAINED, "steps_per_epoch", (None,) * 3, int, "0: one pass over the training split",
           bounds="[0, 1000000]"),
    Option((*TRAINED, "latents"), "planned", (False,) * 4, bool, "whether --minutes, or a run that was taken over, "
           "has set the two above, or the views", flag="", changes=True),
    Option(TRAINED, "learning_rate", (6e-4, 1e-3, 1e-3), float, "at its peak, after warm-up; then it decays",
           bounds="(0, 1]"),
    Option(TRAINED, "decay", ("cosine",) * 3, str, "of the learning rate: cosine, to the planned end; inverse_sqrt, "
           "which needs no end: more --epochs later are as if planned at once (without --plain-end)",
           ("cosine", "inverse_sqrt")),
)
# fmt: on


# ---- settings: read-only ---------------------------------------------------------------------------------------------


class Settings(dict):
    """A dictionary that is made once and never changed, nor what is in it; `merged` makes another one."""

    def _refuse(self, *_, **__):
        raise TypeError("settings are read-only: `merged` makes new ones")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo):
        return self


def frozen(value):
    """A nested dictionary as `Settings`, its lists as tuples."""
    if isinstance(value, dict):
        return Settings((key, frozen(inner)) for key, inner in value.items())
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def merged(base, over):
    """New settings: those of `base`, with the values of `over` in their places."""
    changed = {key: merged(base.get(key) or {}, value) for key, value in over.items() if isinstance(value, dict)}
    return frozen({**base, **over, **changed})


def places():
    """(group, key, option) of every setting; the group "run" is the outermost dictionary."""
    return [
        (group, option.name, option) for option in OPTIONS for group in option.groups if option.groups != ("command",)
    ]


def at(settings, group, key):
    """One of the settings."""
    return (settings if group == "run" else settings[group])[key]


def defaults():
    """The settings of a run of which nothing is said."""
    found = {}
    for group, key, option in places():
        value = option.default[option.groups.index(group)] if len(option.groups) > 1 else option.default
        (found if group == "run" else found.setdefault(group, {}))[key] = value
    return frozen(found)


def unknown_keys(values):
    """Which keys of a nested dictionary are no settings, "diffusion.depth" for example."""
    known = {(group, key) for group, key, _ in places()}
    groups = {group for group, _ in known} - {"run"}
    inner = [f"{group}.{key}" for group in groups & values.keys() for key in values[group] if (group, key) not in known]
    return sorted([key for key in values if key not in groups and ("run", key) not in known] + inner)


def known(values):
    """What of a nested dictionary is a setting."""
    found = {}
    for group, key, _ in places():
        held = values if group == "run" else values.get(group, {})
        if key in held:
            (found if group == "run" else found.setdefault(group, {}))[key] = held[key]
    return found


# ---- flags -----------------------------------------------------------------------------------------------------------


def flags():
    """{title: options that have a flag}, in the order of the table."""
    found = {title: [] for title in TITLES.values()}
    for option in OPTIONS:
        if option.word:
            found[TITLES[option.group]].append(option)
    return found


def with_flags(settings, given, stages):
    """Settings with flags over them, checked.

    Args:
        settings: complete.
        given: {word of a flag: value}; None is a flag that was not given.
        stages: that will run; a flag of several stages sets those of these.

    Raises:
        RunError: for a flag that would have no effect, a value out of its bounds, or values that do not go together.
    """
    over = {}
    for group, key, option in places():
        value = given.get(option.word)
        if value is not None and (len(option.groups) == 1 or group in stages):
            (over if group == "run" else over.setdefault(group, {}))[key] = value
    settings = merged(settings, over)
    check_values(settings)
    refuse_idle(settings, given)
    # One pass over the data is None on disk; a grid of codes has as many channels as levels.
    over = {stage: {"steps_per_epoch": settings[stage]["steps_per_epoch"] or None} for stage in TRAINED}
    if _bottleneck(settings) == "fsq":
        over["autoencoder"]["latent_channels"] = len(settings["autoencoder"]["levels"])
    settings = merged(settings, over)
    check_together(settings)
    return settings


def _bottleneck(settings):
    """What is in the middle of the first stage: "ema", "fsq", "vae" or "none"."""
    first = settings["first_stage"]
    return settings["autoencoder"]["quantizer"] if first == "vqvae" else first


NEEDS = {  # what a flag may need to have an effect -> whether these settings have it
    FIRST: lambda s: s["first_stage"] != "none",
    "--autoencoder vqvae": lambda s: s["first_stage"] == "vqvae",
    "--autoencoder vae": lambda s: s["first_stage"] == "vae",
    "--autoencoder vae or --quantizer ema": lambda s: _bottleneck(s) in ("vae", "ema"),
    EMA: lambda s: _bottleneck(s) == "ema",
    "--quantizer fsq": lambda s: _bottleneck(s) == "fsq",
    "--gan": lambda s: s["first_stage"] != "none" and s["autoencoder"]["gan"],
    "--init-from": lambda s: s["init_from"] is not None,
    VIEWS: lambda s: s["first_stage"] != "none" and s["latents"]["views"] > 1,
    AUGMENTED: lambda s: s["first_stage"] != "none" and s["autoencoder"]["augment"] > 0,
}


def refuse_idle(settings, given):
    """Refuse flags that would have no effect.

    Args:
        settings: with these flags.
        given: as in `with_flags`.

    Raises:
        RunError: naming the first such flag, and what it needs.
    """
    for option in OPTIONS:
        value = given.get(option.word)
        if value is None or value is False or option.needs is None or NEEDS[option.needs](settings):
            continue
        levels = " (with --quantizer fsq, --levels says it)" if option.name in ("num_codes", "latent_channels") else ""
        raise runs.RunError(f"{option.spelt} has no effect without {option.needs}: leave it out, or add that{levels}")
    side = _side(settings)
    levels = [side // 2**level for level in range(len(settings["diffusion"]["multipliers"]))]
    if idle := sorted(set(given.get("attention") or ()) - set(levels)):
        raise runs.RunError(f"--attention {idle[0]} has no effect: the U-Net's levels have {levels} pixels a side")


def _side(settings):
    """Side of the whole picture in pixels of what is denoised."""
    factor = 1 if settings["first_stage"] == "none" else settings["autoencoder"]["downsampling"]
    return settings["image_size"] // factor


# ---- what cannot be --------------------------------------------------------------------------------------------------


def check_values(settings):
    """Check each setting by itself: kind, choices, bounds.

    Raises:
        RunError: naming the flag and what it may be.
    """
    for group, key, option in places():
        check_value(option, at(settings, group, key))


def check_command(given):
    """Check the flags that are no part of a run.

    Args:
        given: as in `with_flags`.

    Raises:
        RunError: as `check_values`.
    """
    for option in OPTIONS:
        if option.group == "command":
            check_value(option, given.get(option.word, option.default))


def check_value(option, value):
    """Check the value of one option; None passes where it is what stands there when nothing is said.

    Raises:
        RunError: as `check_values`.
    """
    unsaid = (option.default,) if len(option.groups) == 1 else option.default
    if value is None and None in unsaid:
        return
    several = option.many and isinstance(value, list | tuple)
    for each in value if several else (value,):
        numbers = (int, float) if option.kind is float else option.kind
        if not isinstance(each, numbers) or (isinstance(each, bool) and option.kind is not bool):
            raise runs.RunError(f"{option.spelt} must be {_kinds[option.kind]}, not {each!r}")
        if option.choices and each not in option.choices:
            raise runs.RunError(f"{option.spelt} must be one of {', '.join(map(str, option.choices))}, not {each}")
        if option.bounds and not within(each, option.bounds):
            every = " each" if several else ""
            raise runs.RunError(f"{option.spelt} must be {in_words(option.bounds)}{every}, not {each}")


_kinds = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _ends(bounds):
    """ "[0, 1)" -> "0", "1"."""
    low, high = bounds[1:-1].split(", ")
    return low, high


def within(value, bounds):
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = map(float, _ends(bounds))
    above = value >= low if bounds[0] == "[" else value > low
    return above and (value <= high if bounds[-1] == "]" else value < high)


def in_words(bounds):
    """ "[0, 1)" -> "0 or more and less than 1"."""
    low, high = _ends(bounds)
    lowest = f"{low} or more" if bounds[0] == "[" else f"more than {low}"
    return f"{lowest} and {'at most' if bounds[-1] == ']' else 'less than'} {high}"


def check_together(settings):
    """Check what is fine by itself, but not beside the rest.

    Raises:
        RunError: naming the flags.
    """
    first, unet, prior = settings["autoencoder"], settings["diffusion"], settings["prior"]
    size, factor = settings["image_size"], first["downsampling"]
    if math.prod(first["levels"]) > 2**20:
        raise runs.RunError("--levels must make at most 1048576 codes together")
    if first["freeze_encoder"] and not settings["init_from"]:
        raise runs.RunError("--freeze-encoder keeps an encoder that is trained: name its run with --init-from")
    if unet["patience"] and unet["select"] == "kid":
        raise runs.RunError("--patience goes by the validation loss, not by --select kid: leave one of them out")
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
    if settings["first_stage"] != "none" and size % factor:
        raise runs.RunError(f"--image-size {size} must be divisible by --downsampling {factor}")
    check_levels(settings)
    for multiplier in unet["multipliers"]:
        channels = unet["width"] * multiplier
        if channels > unet["head_size"] and channels % unet["head_size"]:
            raise runs.RunError(f"--width times {multiplier} is {channels}, not divisible by --head-size")


def check_levels(settings):
    """Check that what the U-Net denoises can be halved as often as it has levels.

    Raises:
        RunError: naming the flag.
    """
    height, width, _ = latent_shape(settings)
    levels, patch = len(settings["diffusion"]["multipliers"]), settings["diffusion"]["patch"]
    if height % (patch * 2 ** (levels - 1)) or width % (patch * 2 ** (levels - 1)):
        raise runs.RunError(
            f"--multipliers with {levels} levels do not fit {height}x{width}: give fewer, or another --image-size"
            + (f", or --unet-patch {patch // 2}" if patch > 1 else "")
        )


# ---- what the models are made of -------------------------------------------------------------------------------------


def latent_shape(settings):
    """(h, w, C) of what the diffusion model denoises: latents, or pixels."""
    size, group = settings["image_size"], settings["autoencoder"]
    if settings["first_stage"] == "none":
        return (size, size, 1)
    height, width = (group["crop_box"] or (0, 0, size, size))[2:]
    channels = group["latent_channels"] * (group["codes_per_latent"] if settings["first_stage"] == "vqvae" else 1)
    return (height // group["downsampling"], width // group["downsampling"], channels)


def attention_rows(settings):
    """Where the U-Net has attention, in rows of what it sees: `attention` is said of the whole picture."""
    rows = latent_shape(settings)[0]
    return [resolution * rows // _side(settings) for resolution in settings["diffusion"]["attention"]]


def arguments(settings, model):
    """{argument: value} of a model's constructor, as far as options feed it."""
    return {key: at(settings, group, key) for group, key, option in places() if model in option.feeds.split()}


# ---- going on with a run ---------------------------------------------------------------------------------------------


def identity(settings, stage):
    """{option: value} of what makes the weights of a stage what they are: what may not change when it is gone on with.

    Labels count where the stage is told them; which people there are, the record of the data says.
    """
    told = stage in ("diffusion", "prior") or stage == "autoencoder" and settings[stage]["condition_on_label"]
    apart = {"data"} | (set() if told else {"labels"})
    return {
        option: at(settings, group, key)
        for group, key, option in places()
        if group in ("run", stage) and not option.changes and key not in apart
    }


# ---- documentation ---------------------------------------------------------------------------------------------------


def flag_table():
    """All flags of `train.py` as Markdown: a heading and a table for each group of them."""
    lines = []
    for title, options in flags().items():
        lines += [f"### {title[0].upper()}{title[1:]}", "", "| flag | default | may be | what it is |"]
        lines += ["| --- | --- | --- | --- |", *map(_row, options), ""]
    return "\n".join(lines)


def _row(option):
    several = len(option.groups) > 1
    values = option.default if several else (option.default,)
    default = ", ".join(_shown(value) for value in values if value is not None)
    may_be = ", ".join(map(str, option.choices)) or (in_words(option.bounds) if option.bounds else "")
    return f"| `{option.spelt}` | {default} | {may_be} | {option.help} |"


def _shown(value):
    words = {True: "yes", False: "no"}
    return (
        words[value] if isinstance(value, bool) else " ".join(map(str, value if isinstance(value, tuple) else [value]))
    )
