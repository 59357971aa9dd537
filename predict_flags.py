"""The flags of `predict.py`: what each says, what it takes, what it is when it is not given, and which task has it.

A new flag costs two places: a field of a group here, and the function in `predict.py` that is given the group. A task
has only flags that have an effect there; those that have one only beside another flag are listed in `needs`.
"""

import argparse
import dataclasses
import inspect
import math
from pathlib import Path

import command
import dataset
from conditions import SWEEP, negative_conditions
from generator import PRIORS
from ldm.diffusion import samplers, schedules
from ldm.drawing import figures
from ldm.training import runs

USUAL = ", ".join(f"{name} {sampler.calls}" for name, sampler in samplers.SAMPLERS.items())
MOST_SLICES, MOST_CALLS = 10**6, 10**5  # of one command: what is more is a slip of the finger


def number(kind, least=None, most=None, above=None):
    """A function text -> number of that kind within bounds, for argparse; it refuses what is not finite."""
    bounds = {"at least {}": least, "at most {}": most, "above {}": above}
    wanted = " and ".join(words.format(bound) for words, bound in bounds.items() if bound is not None)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (least is None or value >= least) and (most is None or value <= most)
        if not (abs(value) < math.inf and inside and (above is None or value > above)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}{f' {wanted}' if wanted else ''}, not {text}")
        return value

    return parse


def slice_index(text):
    """A number, or the word that stands for all of them."""
    return text if text == SWEEP else number(int)(text)


def flag(default, text, **more):
    """A field of a group of flags, with what argparse is to know of it."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be seen in the slices."""

    count: int | None = flag(None, "slices", type=number(int, least=1, most=MOST_SLICES))
    z: tuple | None = flag(None, "slice indices, repeated as needed, or 'sweep'", nargs="+", type=slice_index)
    label: str | None = flag(
        None, "a label of the training data, by name (default: labels in turn, or the slices' own)"
    )
    conditions: tuple = flag((), "what else the run was told of people: age=70", nargs="+", metavar="COLUMN=VALUE")
    mask: tuple | None = flag(
        None, "tissue masks to draw slices of, PNGs; or 'data': of a --split person", nargs="+", metavar="FILE"
    )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the diffusion model draws."""

    sampler: tuple | str = flag(
        ("ddim", "ddpm"), "each for pictures of its own", nargs="+", choices=tuple(samplers.SAMPLERS)
    )
    steps: int | None = flag(
        None, f"calls of the denoiser (default: {USUAL})", type=number(int, least=1, most=MOST_CALLS)
    )
    eta: float = flag(0.0, "DDIM's noise: 0 is deterministic, 1 is DDPM-like", type=number(float, 0, 1))
    spacing: str = flag("uniform", "of a sampler's times", choices=samplers.SPACINGS)
    guidance: float = flag(1.0, "more than 1 exaggerates the conditions", type=number(float, -100, 100))
    guidance_rescale: float = flag(0.0, "share of the added contrast to take back", type=number(float, 0, 1))
    negative_label: str | None = flag(None, "guide away from this label, not from an unconditional slice")
    negative_conditions: tuple = flag(
        (), "guide away from these, not from an unconditional slice", nargs="+", metavar="COLUMN=VALUE"
    )
    seed: int = flag(0, "same seed, same bytes", type=number(int, 0, runs.LAST_SEED))

    def options_for(self, sampler, generator, known):
        """What `Generator.trajectory` is told of these flags, for one sampler and the conditions of some slices."""
        away = negative_conditions(generator.record["data"], known, self.negative_label, self.negative_conditions)
        own = {"eta": self.eta, "spacing": self.spacing}
        return {
            "seed": self.seed,
            "guidance_scale": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "negative": away,
            **{name: value for name, value in own.items() if name in samplers.named(sampler).takes},
        }


@dataclasses.dataclass(frozen=True)
class Real:
    """Which real slices are read."""

    data: list | None = flag(None, "default: the data that the run was trained on", nargs="+")
    split: str = flag("test", "people whose slices are read", choices=dataset.SPLITS)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Where pictures go, and what they look like."""

    out: Path = flag(Path("samples"), "folder for the pictures", type=Path)
    fps: float = flag(12.0, "frames per second of the GIF", type=number(float, above=0, most=figures.MOST_FPS))
    show_x0: bool = flag(False, "put the predicted x_0 beside x_t in the GIF", action="store_true")


@dataclasses.dataclass(frozen=True)
class Single:
    """Flags of one task or two, which stand for themselves; and those of the command."""

    run: str | None = flag(None, "name of the run (default: the one that was trained last)")
    precision: str = flag("auto", "of the networks", choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"))
    coherence: float = flag(
        samplers.COHERENCE,
        "how the noises of neighbouring slices of a head correlate; 1: all the same",
        type=number(float, least=0, most=1),
    )
    voxel: tuple = flag((1.0, 1.0, 1.0), "mm, for the volume's affine", nargs=3, type=number(float, above=0))
    start: float = flag(0.5, "t to which real slices are noised", spelt="--from", type=number(float, above=0, most=1))
    between: str = flag("noises", "two noises, or two real slices", choices=("noises", "slices"))
    box: tuple | None = flag(
        None,
        "pixels to draw anew (default: the middle)",
        nargs=4,
        type=number(int),
        metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"),
    )
    resample: int = flag(5, "times that each noise level is gone through", type=number(int, least=1))
    kind: str = flag(
        None,
        "what draws: codes one by one; each place by itself, as in training; N(0, I)",
        choices=PRIORS,
        spelt="kind",
    )
    temperature: float = flag(1.0, "0: always the likeliest code", type=number(float, least=0))
    top_k: int = flag(0, "draw from the k likeliest codes; 0: from all", type=number(int, least=0))
    reject_copies: bool = flag(False, "draw people anew who are too near to a training person", action="store_true")
    top_p: float = flag(1.0, "draw from the likeliest codes of the share p", type=number(float, above=0, most=1))


GROUPS = {"wanted": Wanted, "sampling": Sampling, "real": Real, "pictures": Pictures, "single": Single}
FIELDS = {field.name: field for group in GROUPS.values() for field in dataclasses.fields(group)}


# ---- tasks: which flags each has -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the things that `predict.py` does.

    Attributes:
        about: for `--help`.
        flags: names in FIELDS.
        stage: of the run, without which it cannot be done.
        changes: {flag: what argparse is to know instead}.
    """

    about: str
    flags: str
    stage: str = "diffusion"
    changes: dict = dataclasses.field(default_factory=dict)

    @property
    def names(self):
        return ("run", "precision", "out", *self.flags.split())

    def default_of(self, name):
        return self.changes.get(name, {}).get("default", FIELDS[name].default)


GUIDED = "steps guidance guidance_rescale negative_label negative_conditions seed"
DRAWN = f"sampler eta spacing {GUIDED} count label conditions fps"
OF_REAL = f"{GUIDED} count z label data split fps"
MANY, ALL = ({"count": {"help": f"slices (default: {words})"}} for words in ("16, or all of a sweep", "all"))
EIGHT = {"count": {"default": 8}, "z": {"type": number(int), "help": "slice indices to choose from (default: all)"}}
ONE = {"sampler": {"nargs": None, "default": "ddim", "help": "how it is drawn"}}
TASKS = {
    "sample": Task("Slices out of noise.", f"{DRAWN} z mask data split show_x0", changes=MANY),
    "person": Task(
        "One head: all slice indices, in order.", f"{DRAWN} mask data split show_x0 coherence voxel", changes=ALL
    ),
    "prior": Task(
        "Slices of latents that a simpler model draws.",
        "kind count z label seed temperature top_k top_p",
        "autoencoder",
        MANY,
    ),
    "interpolate": Task(
        "From one noise, or one real slice, to another.",
        f"{DRAWN} z between start data split",
        changes=ONE
        | {"count": {"type": number(int, least=2), "default": 12, "help": "points, both ends included"}}
        | {"z": {"nargs": None, "type": number(int), "help": "slice index of them all (default: a middle one)"}},
    ),
    "denoise": Task("Variations of real slices.", f"sampler eta start {OF_REAL}", changes=ONE | EIGHT),
    "anomaly": Task("What does not belong in real slices.", f"sampler eta start {OF_REAL}", changes=ONE | EIGHT),
    "inpaint": Task(
        "A part of real slices drawn anew.",
        f"box resample {OF_REAL}",
        changes=EIGHT | {"steps": {"default": samplers.INPAINT.calls, "help": "calls of the denoiser"}},
    ),
    "archive": Task(
        "A data set of drawn people: whole stacks, a table, where it comes from.",
        f"sampler eta spacing {GUIDED} count label conditions coherence voxel reject_copies",
        changes={
            "sampler": ONE["sampler"] | {"default": "dpm_solver_pp"},
            "count": {"default": 1000, "help": "slices, rounded up to whole people, of whom there are three or more"},
            "out": {"default": Path("synthetic.zip"), "help": "a .zip of slices, or a folder of NIfTI volumes"},
            "voxel": {"help": "mm, of volumes"},
        },
    ),
    "reconstruct": Task("Real slices through the first stage, with scores.", "data split", "autoencoder"),
}


# ---- from words to values --------------------------------------------------------------------------------------------


class Parser(command.Parser):
    """Its complaints are `runs.RunError`s: the page has them, too, and must not end as a command line does."""

    def error(self, message):
        raise runs.RunError(message.removeprefix("argument "))


def spelt(name):
    """The flag of a field on the command line."""
    return FIELDS[name].metadata.get("spelt", "--" + name.replace("_", "-"))


def parser(name):
    """The flags of a task."""
    task = TASKS[name]
    p = Parser(prog=f"predict.py {name}", description=task.about)
    for field in task.names:
        more = {**FIELDS[field].metadata, **task.changes.get(field, {}), "default": argparse.SUPPRESS}
        more.pop("spelt", None)
        default = task.default_of(field)
        if default not in (None, (), False) and "default" not in more["help"]:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            more["help"] += f" (default: {shown})"
        p.add_argument(spelt(field), **more, **({"dest": field} if spelt(field).startswith("-") else {}))
    return p


def named_task(argv):
    """The name of the task that a command line means, and the flags after it.

    Raises:
        RunError: for a task that is none.
    """
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "sample"
    if name == "sample":
        short = Parser(add_help=False, allow_abbrev=False)
        short.add_argument("--prior", default="diffusion", choices=("diffusion", *PRIORS))
        short.add_argument("--person", action="store_true")
        found, argv = short.parse_known_args(argv)
        if found.person and found.prior != "diffusion":
            raise runs.RunError("--person takes all slices from one noise of the diffusion model: leave --prior out")
        if found.prior != "diffusion":
            name, argv = "prior", [found.prior, *argv]
        elif found.person:
            name = "person"
    if name not in TASKS:
        raise runs.RunError(f"there is no task {name}: name one of {', '.join(TASKS)}")
    return name, argv


def parse(argv):
    """A command line -> (name of its task, {flag: value}), with the defaults of what is not said.

    Raises:
        RunError: for flags that the task does not have, values out of bounds, and flags that would have no effect.
    """
    name, words = named_task(argv)
    task = TASKS[name]
    given, unknown = parser(name).parse_known_args(words)
    if unknown:
        word = unknown[0].partition("=")[0]
        if word in map(spelt, FIELDS):
            raise runs.RunError(f"{word} has no effect on {name}: leave it out")
        raise runs.RunError(f"{name} does not know {word}: `python predict.py {name} --help` lists its flags")
    values = {field: task.default_of(field) for field in task.names} | vars(given)
    z = values.get("z")
    if isinstance(z, list) and SWEEP in z:
        if len(z) > 1:
            raise runs.RunError(f"--z takes slice indices, or {SWEEP!r} alone, not {' '.join(map(str, z))}")
        values["z"] = SWEEP
    for fields, effective, without in needs(values):
        for field in fields.split():
            if not effective and values.get(field) != task.default_of(field) and field in values:
                raise runs.RunError(f"{spelt(field)} has no effect without {without}: leave it out, or add that")
    if values.get("spacing") == "trailing" and (values["steps"] or 0) > schedules.TABLE_LENGTH:
        raise runs.RunError(f"--spacing trailing has at most {schedules.TABLE_LENGTH} steps, not {values['steps']}")
    return name, values


def needs(values):
    """(flags, whether they have an effect beside the values of the others, what would give them one)."""
    yield "guidance_rescale negative_label negative_conditions", values.get("guidance") != 1.0, "--guidance above 1"
    yield "eta", "ddim" in values.get("sampler", ()), "--sampler ddim"
    if "mask" in values:
        yield "data split", values["mask"] == ["data"], "--mask data"
    if "reject_copies" in values:
        yield "voxel", values["out"].suffix != ".zip", "a folder as --out"
    if "kind" in values:
        yield "temperature top_k top_p", values["kind"] == "transformer", "prior transformer"
    if "between" in values:
        yield "start data split", values["between"] == "slices", "--between slices"
        yield "conditions spacing", values["between"] == "noises", "--between noises"


def grouped(values):
    """{flag: value} of a task -> {name in GROUPS: the group}."""
    return {
        name: group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for name, group in GROUPS.items()
    }


def arguments(function, values):
    """What the function of a task is called with: groups of flags, and single ones, by the names of its arguments."""
    groups = grouped(values)
    single = groups.pop("single")
    names = [name for name in inspect.signature(function).parameters if name != "run"]
    return {name: groups[name] if name in groups else getattr(single, name) for name in names}
