"""Sections of an evaluation's report on how slices look: what a viewer sees first, said in numbers and plain words.

As in `pages`, nothing is measured here.
"""

from ldm.drawing import charts, report
from ldm.tissue import NAMES

number = report.number

SETS = {"validation people": "validation people", "decoded": "decoded test people", "samples": "samples"}
SAID = {  # how the name of a number begins: what is said where it is too low, and where it is too high
    "power": (
        "soft: {who} have {mean:.0%} of people's {name}, and people differ by {spread:.0%}",
        "grainy: {who} have {mean:.0%} of people's {name}, and people differ by {spread:.0%}",
    ),
    "residual power": (
        "alike: less the mean image, {who} have {mean:.0%} of people's {name}, and people differ by {spread:.0%}",
        "unruly: less the mean image, {who} have {mean:.0%} of people's {name}, and people differ by {spread:.0%}",
    ),
    "Euler number of bright": (
        "clumped: white matter of {who} has only {mean:.1f} islands less holes, people's {people}",
        "mottled: white matter of {who} falls into {mean:.1f} islands, people's into {people}",
    ),
    "Euler number of grey": (
        "riddled: grey matter of {who} has an Euler number of {mean:.0f}, people's {people}: more holes, fewer pieces",
        "plain: grey matter of {who} has an Euler number of {mean:.0f}, people's {people}: fewer holes, or more pieces",
    ),
    "width": (
        "thin: the cortical ribbon of {who} is {mean:.2f} pixels wide, people's {people}",
        "thick: the cortical ribbon of {who} is {mean:.2f} pixels wide, people's {people}",
    ),
    "grey matter's peak": (
        "dark: grey matter of {who} has a grey level of {mean:.2f}, people's {people}",
        "bright: grey matter of {who} has a grey level of {mean:.2f}, people's {people}",
    ),
    "white matter's peak": (
        "dark: white matter of {who} has a grey level of {mean:.2f}, people's {people}",
        "bright: white matter of {who} has a grey level of {mean:.2f}, people's {people}",
    ),
    "valley": (
        "stark: between grey and white matter the grey levels of {who} dip to {mean:.2f} of the peak, people's to "
        "{people}",
        "flat: between grey and white matter the grey levels of {who} dip to {mean:.2f} of the peak only, people's to "
        "{people}",
    ),
    "share of slices in which grey": (
        "parted: grey and white matter of {who} share one peak of grey levels in {mean:.2f} of slices, people's in "
        "{people}",
        "merged: grey and white matter of {who} share one peak of grey levels in {mean:.2f} of slices, people's in "
        "{people}",
    ),
}


def verdict(name, found):
    """What is wrong with samples, and which stage is to blame, in one sentence; None if nothing can be told.

    Args:
        name: of a number of texture.
        found: its part of the facts, see `ldm.judging.blame.beside`.
    """
    if "to blame" not in found:
        return None
    kind = "samples" if "samples" in found else "decoded"
    row, people = found[kind], found["people"]
    (words,) = (pair[row["z"] > 0] for start, pair in SAID.items() if name.startswith(start))
    said = words.format(
        who=SETS[kind],
        name=name.removeprefix("residual "),
        mean=row["mean"],
        spread=people["spread"],
        people=f"{number(people['mean'], 2)} ± {number(people['spread'], 2)}",
    )
    relative = "power" in name
    decoded = found.get("decoded", {}).get("mean")
    through = None if decoded is None else f"{decoded:.0%}" if relative else number(decoded, 2)
    if kind == "decoded":
        cause = "the first stage is to blame"
    elif through is None:
        cause = "there is no first stage, so the model is to blame"
    else:
        blamed = {
            (): "which stage is to blame cannot be told",
            ("first stage",): "so the first stage is to blame",
            ("second stage",): "so the second stage is to blame",
        }.get(tuple(found["to blame"]), "so both stages are to blame")
        cause = f"decoded test people have {through}, {blamed}"
    return f"{said[0].upper()}{said[1:]}; {cause}."


def texture(facts, shown, picture):
    """Softness, islands of white matter, cortex and grey levels beside people, and whose fault a difference is."""
    found = facts["texture"]
    present = [kind for kind in SETS if any(kind in row for row in found.values())]
    rows = []
    for name, row in found.items():
        cells = [f"{number(row['people']['mean'], 2)} ± {number(row['people']['spread'], 2)}"]
        for kind in present:
            part = row.get(kind)
            cells.append(
                f"{number(part['mean'], 2)} (z {number(part['z'], 1)} ± {number(part['error'], 1)})" if part else ""
            )
        rows.append([name, *cells])
    table = report.Table(["", "test people", *(SETS[kind] for kind in present)], rows)
    said = {name: verdict(name, row) for name, row in found.items()}
    powers = [name for name in found if "power" in name]
    warnings = [said[name] for name in [*shown["soft"][:1], *powers, *found] if said.get(name)]
    warnings = list({words.split(":")[0]: words for words in reversed(warnings)}.values())[::-1]  # one of each kind
    if shown["few"]:
        warnings.append("There are too few test people to know what people differ by: z scores are shaky.")
    text = [
        "Mean ± deviation over people; z is the difference from the test people in such deviations, ± its standard "
        "error, always at the same slice indices. A warning names what lies further from people than 1 deviation and 3 "
        "errors. Power: of all waves of about that length, as a multiple of people's; residual: after the mean image "
        "of the slice index was subtracted. Euler number: pieces less holes, averaged over slices.",
        *([] if warnings else ["Nothing here tells these slices from people's."]),
    ]
    islands = picture("islands")
    charts.by_slice_index(islands, {SETS.get(k, k): v for k, v in shown["islands"].items()}, "islands of white matter")
    return text, [table], [(islands, "islands of bright white matter, less holes, by slice index")], warnings


def passes(row, floor=0.5):
    """Whether a classifier that has seen neither could not tell these slices from people's, nor from the floor."""
    return row["AUC"] - 1.96 * row["error"] <= max(0.5, floor)


def scale_warnings(found, sizes):
    """From which size on samples are told from people, what the first stage alone costs, and what is no result.

    Args:
        found: {kind: {"levels": [{"AUC", "error"}]}}, as `ldm.judging.measures.scales` puts it down.
        sizes: of the levels in pixels, the coarsest first.
    """
    floor = [row["AUC"] for row in found["validation people"]["levels"]] if "validation people" in found else None
    floor, said = floor or [0.5] * len(sizes), []
    for kind in ("samples", "decoded"):
        rows = found[kind]["levels"] if kind in found else []
        failed = [i for i, row in enumerate(rows) if not passes(row, floor[i])]
        if failed:
            row = rows[failed[0]]
            said.append(
                f"{SETS[kind].capitalize()} are told from people at {sizes[failed[0]]} pixels already: a classifier is "
                f"right in {row['AUC']:.0%} ± {row['error']:.0%} of pairs; at {sizes[-1]} pixels in "
                f"{rows[-1]['AUC']:.0%}."
            )
        if any(after["AUC"] < before["AUC"] - 0.1 for before, after in zip(rows, rows[1:], strict=False)):
            said.append(
                f"The classifier of {SETS[kind]} gets worse with finer pictures: it had too few slices, no pass."
            )
    for kind, part in found.items():
        if kind not in SETS and passes(part["levels"][-1]):
            said.append(f"The classifier does not even tell {kind} from people: a pass here means nothing.")
    return said


def scales(facts, shown, picture):
    """AUC of a classifier at each size, how many pairs it needs, and distances of small pieces."""
    found, sizes = facts["scales"]["sets"], facts["scales"]["pixels"]
    rows, pieces = [], []
    for kind, part in found.items():
        needed = part["pairs needed"]
        cells = [f"{row['AUC']:.2f} ± {row['error']:.2f}" for row in part["levels"]]
        rows.append([SETS.get(kind, kind), *cells, "" if needed is None else needed])
        distances = [f"{d[0]:.4f} ± {d[1]:.4f}" if d else "" for d in part["patches"].values()]
        pieces.append([SETS.get(kind, kind), *distances])
    sampled = found.get("samples")
    text = [
        f"How often a classifier, shown a generated slice and one of {shown['people']} test people at the same slice "
        "index, knows which is which: 0.5 = cannot tell, 1 = always; ± its standard error over people. Less than two "
        "of these above 0.5, or above the floor's, is a pass. It has learnt from training people and the other half of "
        "the generated slices, several times over. It looks at texture of this and coarser sizes, and is blind to "
        "gain, offset, place and mirroring. Validation people are the floor. Last column, where it is nearly always "
        f"right: how many pairs of slices teach it an AUC of {shown['reached']}.",
    ]
    if sampled:
        good = [size for size, row in zip(sizes, sampled["levels"], strict=True) if passes(row)]
        text.append(f"Samples pass at {', '.join(map(str, good))} pixels." if good else "Samples pass at no size.")
    tables = [
        report.Table(["", *(f"{size} pixels" for size in sizes), f"pairs to {shown['reached']}"], rows),
        report.Table(
            ["pieces of", *next(iter(found.values()))["patches"]] if found else [""],
            pieces,
            "Squared MMD of pieces of the brain to those of test people, ± standard error: around 0 for equal ones.",
        ),
    ]
    return text, tables, [], scale_warnings(found, sizes)


def power(facts, shown, picture):
    """The smallest of each planted fault that is found with these people."""
    rows = []
    for fault, found in facts["power"].items():
        tried = ", ".join(f"{size}: {errors:.1f}" for size, errors in found["errors"].items())
        smallest = "cannot be told" if found["found"] is None else f"{found['found']:g}"
        rows.append([fault, smallest, found["by"] or "", tried])
    text = [
        f"Faults planted in slices of {shown['people']} test people, each at several sizes. Found: the fault moves a "
        "number by at least two of the standard errors that it has with these people; the move itself is known well, "
        "as the same people are measured with the fault and without. What is smaller cannot be told from people's own "
        "differences: that would take more people.",
    ]
    if not shown["first stage"]:
        text.append("There is no first stage, so no noise in its latents.")
    if len(shown["labels"]) < 2:
        text.append("There are no labels to be mixed up.")
    table = report.Table(["fault", "smallest found", "by", "size: standard errors"], rows)
    return text, [table], [], []


def between(interval):
    return " to ".join(number(end, 2) for end in interval)


def use(facts, shown, picture):
    """What was learned from drawn slices, beside what was learned from people."""
    found, text, tables = facts["use"], [], []
    if found["label"]:
        one, other = shown["labels"]
        text.append(
            f"{one} or {other}, told by a small classifier that has learned from each of these, and tried on "
            f"{shown['people']} people who were not trained on: area under the ROC curve by person, mean of "
            f"{shown['seeds']} draws of the people learned from. 0.5 is chance."
        )
        rows = [
            [name, row["people"], number(row["AUC"]), between(row["interval"]), between(row["gap's interval"])]
            for name, row in found["label"].items()
        ]
        columns = ["learned from", "people or heads", "AUC", "95 % interval", "less that of all real people"]
        tables.append(report.Table(columns, rows))
        drawn, real = found["label"]["drawn slices"], found["label"]["all real people"]
        if drawn["interval"][0] <= 0.5 < real["interval"][0]:
            text.append("Nothing of the label can be learned from the drawn slices; from real ones it can.")
        low, high = drawn["gap's interval"]
        told = "less than" if high < 0 else "more than" if low > 0 else "as much, as far as can be told, as"
        text.append(f"Drawn slices teach {told} all real people: AUC {drawn['gap']:+.2f}, 95 % {between((low, high))}.")
        if real["interval"][0] <= 0.5:
            text.append("This classifier cannot tell the label from real slices either: the table says little.")
    if found["tissue"]:
        text.append("Tissue: Dice on real slices of a small segmenter that has learned from slices and their masks.")
        rows = [[name, *(f"{number(m)} ± {number(s)}" for m, s in row)] for name, row in found["tissue"].items()]
        tables.append(report.Table(["learned from", *NAMES[1:]], rows, "± standard deviation over seeds."))
    return text, tables, [], []
