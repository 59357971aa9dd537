"""Runs side by side: tables of what several reports say, for the terminal and for a page."""

from ldm.drawing.report import Section, Table, number

BY_COUNT = "Frechet distance to coverage depend on the number of slices."


def table(names, reports, difference):
    """The numbers that runs are compared by, and how far each run is from the first.

    Args:
        names: of the runs.
        reports: the content of their `report.json`.
        difference: function of two entries of "by person" -> (difference, standard error, people), see
            `ldm.judging.schema.difference`.

    Returns:
        A `Table`: a row per number; a column per run, and one per run but the first with its difference to the first.
    """
    found = [report["by person"] for report in reports]
    first = found[0]
    columns = ["", *names, *(f"{name} less {names[0]}" for name in names[1:])]
    rows = []
    for name in dict.fromkeys(name for one in found for name in one):  # of a report of some sections only a part
        cells = [number(one[name]["value"] if name in one else None) for one in found]
        both = [
            difference(other[name], first[name]) if name in other and name in first else None for other in found[1:]
        ]
        rows.append([name, *cells, *(said(*gap) if gap else number(None) for gap in both)])
    note = "± one standard error, over the people whom both runs were read against and, of KID, over the heads drawn."
    return Table(columns, rows, f"{note} A difference below two errors cannot be told.")


def said(gap, error, people):
    """A difference in words."""
    if error != error:
        return f"{number(gap)} (too few people in common for an error)"
    told = "" if abs(gap) >= 2 * error else " (cannot be told)"
    return f"{'+' if gap > 0 else ''}{number(gap)} ± {number(error)}{told}"


def others(names, reports):
    """The rest of what reports say in one number: distances, copies, cost; without errors of their differences."""
    rows = []
    for title, of in {
        "Frechet distance": lambda r: r["distribution"]["samples"]["Frechet distance"],
        "precision": lambda r: r["distribution"]["samples"]["precision"],
        "recall": lambda r: r["distribution"]["samples"]["recall"],
        "coverage": lambda r: r["distribution"]["samples"]["coverage"],
        "share of copies, pixels": lambda r: r["copies"]["pixels"]["rate"],
        "share of copies, features": lambda r: r["copies"]["features"]["rate"],
        "seconds per slice": lambda r: r["cost"]["seconds per slice"],
    }.items():
        cells = []
        for report in reports:
            try:
                cells.append(number(of(report)))
            except KeyError:  # this section was not asked for
                cells.append(number(None))
        rows.append([title, *cells])
    return Table(["", *names], rows, BY_COUNT)


def looks(names, reports):
    """How samples look beside people: their texture, and how surely a classifier tells them from people at each size.

    People are those of the first run that has the number.
    """
    rows = {}

    def put(name, people, place, cell):
        rows.setdefault(name, [name, people, *[number(None)] * len(names)])[2 + place] = cell

    for place, report in enumerate(reports):
        for name, found in report.get("texture", {}).items():
            if "samples" in found:
                people = f"{number(found['people']['mean'], 2)} ± {number(found['people']['spread'], 2)}"
                put(name, people, place, number(found["samples"]["mean"], 2))
        scales = report.get("scales", {})
        levels = {
            kind: [f"{number(level['AUC'], 2)} ± {number(level['error'], 2)}" for level in found["levels"]]
            for kind, found in scales.get("sets", {}).items()
        }
        floor = levels.get("validation people", [number(None)] * len(scales.get("pixels", ())))
        for size, people, cell in zip(scales.get("pixels", ()), floor, levels.get("samples", ()), strict=False):
            put(f"told from people at {size} pixels, AUC", people, place, cell)
    note = "± what people differ by; of an AUC ± one standard error, and people are the validation people."
    return Table(["", "people", *names], [*rows.values()], note)


def without_features(report):
    """The content of a `report.json` less what was measured in the features of a network."""
    kept = {name: part for name, part in report.items() if name != "distribution"}
    if "copies" in kept:
        kept["copies"] = {name: part for name, part in kept["copies"].items() if name != "features"}
    return {**kept, "by person": {name: one for name, one in report["by person"].items() if name != "KID"}}


def page(names, reports, difference):
    """The sections of a page."""
    about = [report["about"] for report in reports]
    keys = ("data", "image size", "features", "count", "sampler", "steps", "seed")
    how = [[key, *(", ".join(v) if isinstance(v := one[key], list) else str(v) for one in about)] for key in keys]
    seen = looks(names, reports)
    return [
        Section("Compared person by person", tables=[table(names, reports, difference)]),
        Section("Beside each other", tables=[others(names, reports)]),
        *([Section("How they look", tables=[seen])] if seen.rows else []),
        Section("How they were drawn", tables=[Table(["", *names], how)]),
    ]


def plain(table):
    """A `Table` as lines for a terminal."""
    cells = [[str(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, table.note])
