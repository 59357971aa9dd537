"""The sections of an evaluation's report: what `study.py` has measured, in words, tables and figures.

Nothing is measured here. A section takes facts (numbers, as they stand in report.json), what else is shown (counts, and
arrays for figures; images in [0, 1]) and `picture`, which says where the figure of a name goes; it draws its figures
there and returns a `report.Section`. What has not been measured, because something is lacking, is said to be so.
"""

import math

from ldm.drawing import charts, figures, looks, report

number = report.number

TITLES = {
    "reconstruction": "Reconstruction",
    "samples": "Samples",
    "distribution": "Distribution",
    "texture": "Texture",
    "scales": "At which scale do they pass?",
    "power": "What would be found?",
    "anatomy": "Anatomy",
    "use": "Use",
    "copies": "Copies",
    "embedding": "Embedding",
    "leaks": "Leaks",
    "cost": "Cost",
}
LACKING = {  # section -> {what is lacking: what can therefore not be said}
    "reconstruction": {
        "test people": "There are no test people: how faithful the first stage is to people it has not seen cannot be "
        "said.",
    },
    "samples": {
        "diffusion model": "There is no diffusion model yet: `python train.py diffusion --run {run}` makes one.",
    },
    "distribution": {
        "test people": "There are no test people: the distance to people that nobody trained on cannot be said.",
        "samples": "{count} samples are too few for a distance: at least {least} are needed (--count).",
        "slices": "{count} slices of people who were not trained on are too few for a distance.",
    },
    "texture": {
        "test people": "There are no test people: how soft or mottled slices are beside people's cannot be said.",
    },
    "scales": {
        "test people": "There are fewer than {least} test people: whether a classifier tells samples from people "
        "cannot be said.",
    },
    "power": {
        "test people": "There are fewer than {least} test people: what the report would find cannot be said.",
    },
    "use": {
        "test people": "There are no test people: of what use the slices are to people who are new cannot be said.",
        "people": "Fewer than {least} people or heads of each label: of what use the slices are cannot be said.",
        "labels": "The data has no labels and the samples no tissue masks: there is nothing to learn from them.",
    },
    "copies": {
        "test people": "There are no test people: how near a slice of somebody new comes to the training slices is "
        "unknown.",
    },
}
IN_PIXELS = "This model works in pixels: there is no first stage."


def section(name, facts, shown, lacks, picture):
    """One section of the report.

    Args:
        name: a key of TITLES.
        facts: as in report.json.
        shown: what the figures and sentences take beside them.
        lacks: a key of LACKING[name], if something could not be measured; else None.
        picture: function of a figure's name -> the path it is written to.
    """
    if lacks == "first stage":  # no warning: nothing is wrong with that
        return report.Section(TITLES[name], [IN_PIXELS])
    if lacks:
        return report.Section(TITLES[name], warnings=[LACKING[name][lacks].format(**shown)])
    text, tables, drawn, warnings = SECTIONS[name](facts, shown, picture)
    return report.Section(TITLES[name], text, tables, drawn, warnings)


def reconstruction(facts, shown, picture):
    """Scores of test people, some pairs, and how the scores depend on the slice index."""
    rows, bits = facts["reconstruction"], facts["bits_per_slice"]
    columns = list(rows["first stage"])
    cells = [[name, *(f"{number(mean)} ± {number(sd)}" for mean, sd in row.values())] for name, row in rows.items()]
    sheet, curve = picture("reconstruction"), picture("reconstruction_by_slice")
    real, fake, z = shown["pairs"]
    figures.reconstruction_sheet(sheet, 2 * real - 1, 2 * fake - 1, z)
    charts.by_slice_index(curve, shown["by slice"], "foreground SSIM")
    text = [
        f"{shown['slices']} slices of {shown['people']} test people; mean ± deviation over people. "
        "SSIM: 11x11 Gaussian, sigma 1.5, range [0, 1], zero padding. Foreground: the same map where the real slice is "
        "brighter than 0.05. MS-SSIM: the published weights of up to five scales.",
        f"Rate: {bits:,.0f} bits per slice." if bits else "The latents are continuous: no rate.",
    ]
    drawn = [(sheet, "real, reconstructed, difference"), (curve, "by slice index")]
    return text, [report.Table(["", *columns], cells)], drawn, []


def samples(facts, shown, picture):
    """Some of the samples, and how they were drawn."""
    sheet = picture("samples")
    figures.save_png(sheet, figures.sheet(figures.enlarge(2 * shown["images"] - 1), 8))
    return ["{count} slices {how}.".format(**shown)], [], [(sheet, "some of the samples")], []


def distribution(facts, shown, picture):
    """Distances between sets, ranked, and what makes them meaningless."""
    rows = facts["distribution"]
    columns = list(rows["samples"])
    cells = [[name, *(number(row.get(column)) for column in columns)] for name, row in rows.items()]
    chart = picture("distribution")
    ranked = {name: (row["KID"], row["KID's standard error"]) for name, row in rows.items() if "KID" in row}
    charts.ranking(chart, ranked, "KID to real people (less is better)")
    network = f"{shown['networks']} networks trained on this training split, on average"
    text = [
        f"Equal terms: {shown['count']} slices of {shown['people']} people or heads against as many of real people, in "
        f"the features of {network if shown['by own network'] else 'Inception-v3'}. The references are "
        f"{'halves of the test people' if shown['halves'] else 'test and validation people'}, one set "
        "after the other, and the floor is the other set. KID does not depend on numbers, is to all "
        f"{shown['held out']} people, and is around 0 for equal distributions; its standard error leaves out one "
        f"person, or one of {shown['heads']} heads, at a time. The Frechet distance depends on the number of slices: "
        f"compare it within the table only. Precision to coverage: {shown['neighbours']} neighbours, who are other "
        "people. MS-SSIM of pairs: different people, same slice index; samples that are more alike than real people "
        "lack diversity.",
    ]
    warnings = []
    if shown["few"]:
        warnings.append("There are too few people for an error from person to person: that of KID counts slices.")
    if shown["saw masks"]:
        warnings.append(
            "The samples were told tissue masks of training people: they have their outlines, here and below."
        )
    warnings += rank_warnings(rows, shown["floor"])
    return text, [report.Table(["", *columns], cells)], [(chart, "KID")], warnings


def rank_warnings(rows, floor):
    """A sentence for each order of KID that makes the other numbers meaningless.

    Args:
        rows: {name: {"KID", "KID's standard error"}}: of "samples", of bad generators, and of the floor.
        floor: its name.
    """
    kid = {name: row["KID"] for name, row in rows.items() if "KID" in row}
    least, model = kid.pop(floor), kid.pop("samples")
    said = [f"The model is no better than: {name}." for name, value in kid.items() if model >= value]
    if model < least - 2 * math.hypot(*(rows[name]["KID's standard error"] for name in (floor, "samples"))):
        said.append("The samples are nearer to people than other people are, by more than two errors: suspect a leak.")
    return said


def anatomy(facts, shown, picture):
    """Measures of the brain, their distances, and what conditions do to them."""
    found, means = facts["anatomy"], shown["means"]
    columns = ["", *means, *(f"{kind}: distance" for kind in found["distance"])]
    rows = []
    for name in means["samples"]:
        spreads = [f"{number(mean)} ± {number(sd)}" for mean, sd in (row[name] for row in means.values())]
        rows.append([name.replace("_", " "), *spreads, *(number(row.get(name)) for row in found["distance"].values())])
    curve, greys = picture("ventricles"), picture("grey_levels")
    axial = shown["area"] == "ventricle_area"
    charts.by_slice_index(curve, shown["areas"], "ventricle area / brain area" if axial else "brain area / picture")
    charts.histograms(greys, *shown["grey levels"])
    text = [
        f"{found['plane'].capitalize()} slices, {shown['plane is']}. Distance: Wasserstein-1 to the training people "
        "per slice index, in standard deviations of theirs; that of the test people is the floor."
    ]
    if shown["not said"]:
        text.append(shown["not said"])
    else:
        dice = ", ".join(f"{kind} {number(value)}" for kind, value in found["dice"].items())
        text.append(
            "Tissue is told by intensity, slice by slice. On phantom brains, whose tissue is known exactly, this "
            f"segmenter's Dice is {dice}."
        )
    if error := found["slice index error"]:
        said = ", ".join(f"{number(value, 2)} for {kind}" for kind, value in error.items())
        text.append(f"Slice index told from the picture, mean error in slices: {said}.")
    names, warnings = shown["labels"], []
    if len(names) < 2:
        warnings.append("The data has no labels: whether the label shows in the anatomy cannot be said.")
    elif axial:
        text.append(label_effects(found["label effect"], *names[:2]))
        warnings += [f"Label effect of {kind}: {why}" for kind, why in shown["refused"].items()]
    drawn = [
        (curve, f"{'ventricle' if axial else 'brain'} area by slice index"),
        (greys, "grey levels inside the brain"),
    ]
    return text, [report.Table(columns, rows)], drawn, warnings


def label_effects(effects, one, other):
    """The sentence on what two labels do to the ventricle area: {kind: {"d", "interval", "ratio"}}."""
    said = "; ".join(
        f"{kind} {number(e['d'], 2)} [{', '.join(number(end, 2) for end in e['interval'])}], {number(e['ratio'], 2)}"
        for kind, e in effects.items()
    )
    return (
        f"Ventricle area, {one} against {other}: Cohen's d with 95 % interval, and ratio of the means: {said}. "
        "d is of means over all slices of a person or head."
    )


def copies(facts, shown, picture):
    """Shares of samples that are too near to a training slice, whose slices these are, and the closest pairs."""
    found = facts["copies"]
    columns = ["", "threshold", "share closer", "95 % interval", "expected by chance"]
    rows = [
        [
            kind,
            number(found[kind]["threshold"]),
            f"{found[kind]['rate']:.1%}",
            "{:.1%} to {:.1%}".format(*found[kind]["interval"]),
            f"{found[kind]['expected']:.1%}",
        ]
        for kind in ("pixels", "features")
    ]
    chart, sheet = picture("copies"), picture("closest_pairs")
    charts.distances(chart, *shown["distances"], found["pixels"]["threshold"], "1 - correlation")
    fake, real, distance, whose = shown["pairs"]
    captions = [f"{value:.3f}, {name}" for value, name in zip(distance, whose, strict=True)]
    figures.pairs_sheet(sheet, 2 * fake - 1, 2 * real - 1, captions)
    most = sorted(found["people"].items(), key=lambda item: -item[1])[:5]
    text = [
        "Nearest training slice after a small shift, turn and scaling, mirrored or not, whatever brightness and "
        "contrast. Threshold: the 1st percentile of what slices of test people have, decoded as the samples are; about "
        "1 % of honest slices lie below it.",
        f"Training people with samples below it: {', '.join(f'{name} ({n})' for name, n in most) or 'nobody'}.",
    ]
    drawn = [(chart, "distance to the nearest training slice"), (sheet, "the closest pairs")]
    few = ["The threshold rests on few test people; the interval counts people, and is wide."] if shown["few"] else []
    return text, [report.Table(columns, rows)], drawn, few


def embedding(facts, shown, picture):
    """UMAP, coloured by kind, by slice index, and by label where there are labels."""
    charted = {
        "umap_kind": ("real and generated", "kind", False),
        "umap_slice": ("slice index", "z", True),
        "umap_label": ("label", "label", False),
    }
    drawn = []
    for name, (title, key, continuous) in charted.items():
        if shown[key] is not None:
            charts.embedding(picture(name), shown["points"], shown[key], title, continuous=continuous)
            drawn.append((picture(name), title))
    text = "UMAP of the features. Distances between far groups mean nothing; look for samples where no real ones are."
    return [text], [], drawn, []


def leaks(facts, shown, picture):
    """People and pictures in two splits, each said as a warning."""
    warnings = []
    if shown["kind"] == "class folders":
        warnings.append(
            "A person is what stands before the slice number in a file's name. In ADNI's archive that is a scan: who "
            "was scanned several times may be in several splits, and scores on the test people are then too good."
        )
    if shown["each"]:
        warnings.append(
            "Every slice counted as a person of its own (--person each), because names do not say whose it is: one "
            "person may be in two splits, and every score on the test people may be too good."
        )
    for stage, people in shown["seen"]:
        warnings.append(f"The {stage} stage saw {len(people)} of the test people, {people[0]} among them.")
    if repeated := facts["leaks"].get("repeated"):
        some = ", ".join(f"{one} and {other}" for one, other in repeated[:3])
        warnings.append(
            f"{len(repeated)} pairs of scans in two splits look like one person's ({some}): `python dataset.py people` "
            "writes a table of who is who."
        )
    for (case, z, split), (other, other_z, other_split) in shown["alike"]:
        warnings.append(
            f"Nearly the same slice: {case}, slice {z} ({split}), and {other}, slice {other_z} ({other_split})."
        )
    misfiled = facts["leaks"]["misfiled"]
    for (case, z), (other, other_z) in misfiled[:3]:
        warnings.append(
            f"Test person {case}, slice {z}, is as like training person {other}, slice {other_z}, as neighbouring "
            "slices of one person are: is one of them filed under the wrong person?"
        )
    if len(misfiled) > 3:
        warnings.append(f"So are {len(misfiled) - 3} more test slices; report.json names them.")
    text = [
        "People in two splits are refused when the data is opened. Slices were compared across splits by hash; and "
        "those of test people by how near they are to training slices, against how near neighbouring slices of one "
        "person are to each other.",
    ]
    return text + ([] if warnings else ["Nothing was found."]), [], [], warnings


def cost(facts, shown, picture):
    """What it takes to draw a slice."""
    rows = [[name, f"{v:,.2f}" if isinstance(v, float) else f"{v:,}"] for name, v in facts["cost"].items()]
    return [], [report.Table(["", ""], rows)], [], []


SECTIONS = {
    "reconstruction": reconstruction,
    "samples": samples,
    "distribution": distribution,
    "texture": looks.texture,
    "scales": looks.scales,
    "power": looks.power,
    "anatomy": anatomy,
    "use": looks.use,
    "copies": copies,
    "embedding": embedding,
    "leaks": leaks,
    "cost": cost,
}


def of_people(rows):
    """{"first stage": {"SSIM": (0.93, 0.02)}} -> {"first stage": {"SSIM": "0.930 ± 0.020"}}, as the report's table."""
    return {
        name: {score: f"{number(mean)} ± {number(sd)}" for score, (mean, sd) in row.items()}
        for name, row in rows.items()
    }


def card(name, record, facts, warnings, seed):
    """The facts of a model card, for `report.write_model_card`.

    Args:
        name: of the run.
        record: what its newest stage wrote down.
        facts: report.json.
        warnings: all sentences of warning in the report.
        seed: of the evaluation.
    """
    manifest, settings = record["data"], record["settings"]
    numbers = {key: facts[key] for key in ("distribution", "cost") if key in facts}
    if "reconstruction" in facts:
        numbers = {"reconstruction (mean ± deviation over people)": of_people(facts["reconstruction"]), **numbers}
    return {
        "title": f"Model card of {name}",
        "summary": "A generator of brain-MRI slices: latent diffusion. The report beside this card has the figures.",
        "data": {key: manifest[key] for key in ("source", "kind", "images", "labels", "sha256")},
        **(
            {}
            if settings["data"]
            else {"terms": "Phantom brains, drawn from formulas: nobody's data, free to pass on."}
        ),
        "people": {split: part["people"] for split, part in manifest["splits"].items()},
        "settings": {key: value for key, value in settings.items() if key != "data"},
        "seeds": {"training": settings["seed"], "evaluation": seed},
        "versions": record["versions"],
        "numbers": {**numbers, "share of copies": facts.get("copies", {}).get("pixels", {}).get("rate")},
        "Warnings": warnings,
    }
