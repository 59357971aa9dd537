"""Command line: can the pictures of a run be trusted? One report: faithful, diverse, plausible, and nobody's copy.

    python evaluate.py --run R                    -> report.html, report.json, model_card.md in the run's folder
    python evaluate.py --run R --fail-above 0.02  exit status 3 if more than 2 % of the samples are copies
    python evaluate.py --run R --sections copies  some sections only -> report_part.html, report_part.json
    python evaluate.py --run R --samples other.zip --out F   slices that another generator drew, read in the same way
    python evaluate.py compare R S T              what their reports say, side by side -> comparison.html
    python evaluate.py --run R --quiz             a page for human eyes: which of two slices is drawn? -> quiz.html
    python evaluate.py score answers.json --run R how often the eyes were right

Every number stands beside what it must be read against: the distance of real people to other real people (the floor),
and what bad generators get. What cannot be said (no test people, no labels, few samples) is said to be so.

`study.py` measures, `ldm/drawing/pages.py` sets in type.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import command

# Before NumPy is: its small products, spread over cores that something else keeps busy, wait for them 10 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if __name__ == "__main__":
    command.from_the_start("evaluate.py")

import dataset
from ldm import files, shapes
from ldm.diffusion import samplers
from ldm.drawing import comparison, pages, report
from ldm.drawing import quiz as quiz_pages
from ldm.judging import planes, quiz, schema
from ldm.later import Later
from ldm.training import distribution, records, runs

study = Later("study")  # it takes seconds to import

ORDER = tuple(pages.TITLES)  # of the sections
OF_THE_RUN = ("reconstruction", "cost")  # they say nothing of slices that another generator drew


def parser():
    p = command.Parser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="name of the run (default: the one that was trained last)")
    p.add_argument("--data", nargs="+", help="real slices (default: the data that the run was trained on)")
    p.add_argument("--sections", nargs="+", metavar="NAME", help=f"of {', '.join(ORDER)} (default: all)")
    p.add_argument("--count", type=int, default=1000, help="slices to draw (default: 1000)")
    p.add_argument("--samples", metavar="ARCHIVE", help="slices that another generator drew, instead of drawing some")
    p.add_argument("--sampler", default="dpm_solver_pp", choices=tuple(samplers.SAMPLERS))
    p.add_argument("--steps", type=int, default=20, help="network calls per slice (default: 20)")
    p.add_argument(
        "--features", default="own", choices=("own", "inception"), help="own: learned on the training slices"
    )
    p.add_argument("--feature-steps", type=int, default=400, help="training of own features (default: 400)")
    p.add_argument("--quiz", action="store_true", help="write quiz.html and quiz_sheet.json instead of a report")
    p.add_argument("--fail-above", type=float, metavar="RATE", help="exit status 3 if a larger share is copies")
    p.add_argument("--plane", choices=planes.PLANES, help="of the slices (default: of headers, or by their symmetry)")
    p.add_argument("--out", help="folder of the report (default: the run's folder)")
    p.add_argument("--seed", type=int, default=0, help="of noise and conditions")
    p.add_argument("--precision", default="auto", choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"))
    return p


def check(flags):
    """Refuse numbers that cannot be, before anything is loaded."""
    ranges = {"count": (1, 10**6), "steps": (1, 10**5), "feature_steps": (1, 10**6), "seed": (0, runs.LAST_SEED)}
    for name, (least, most) in ranges.items():
        value, flag = getattr(flags, name), f"--{name.replace('_', '-')}"
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise runs.RunError(f"{flag} must be {bound}, not {value}")
    if flags.fail_above is not None and not 0 <= flags.fail_above < 1:
        raise runs.RunError(f"--fail-above is a share between 0 and 1, not {flags.fail_above}")
    for name in flags.sections or ():
        if name not in ORDER:
            raise runs.RunError(f"--sections {name}: there are {', '.join(ORDER)}")
    for flag, value in (("--fail-above", flags.fail_above), ("--sections", flags.sections)):
        if flags.quiz and value is not None:
            raise runs.RunError(f"{flag} is about a report, which --quiz does not write: leave one of them out")
    if flags.samples and not flags.out:
        raise runs.RunError("--samples: give --out FOLDER too, for a report beside the run's own")
    for name in (flags.sections or ()) if flags.samples else ():
        if name in OF_THE_RUN:
            raise runs.RunError(f"--sections {name} is about the run, not about --samples: leave one of them out")
    if flags.fail_above is not None and flags.sections and "copies" not in flags.sections:
        raise runs.RunError("--fail-above needs copies among the --sections: add it")


def check_model(run, names):
    """Refuse sections of which none can be measured before there is a diffusion model."""
    if not (run / "diffusion.keras").exists() and all("samples" in study.needs([name], wanted=False) for name in names):
        make = f"`python train.py diffusion --run {run.name}` makes one"
        raise runs.RunError(f"--sections {' '.join(names)}: there is no diffusion model yet: {make}")


def work(flags):
    """Do what the flags say; returns the exit status."""
    check(flags)
    began = time.time()
    run = runs.folder(flags.run) if flags.run is not None else runs.newest("diffusion", "autoencoder")
    out = Path(flags.out) if flags.out else run
    files.check_folder(out)
    records.all_of(run)  # refuses what is no run before TensorFlow is imported, which takes seconds,
    records.refuse_damaged(run, "autoencoder", "diffusion")
    dataset.refuse_absent(flags.data or ())  # and data that is absent
    dataset.refuse_absent([] if flags.samples is None else [flags.samples], "--samples")
    command.load("evaluate.py", "study")
    print(f"{run}: {distribution.set_precision(flags.precision)}")
    if flags.quiz:
        return write_quiz(run, out, flags)
    names = [name for name in ORDER if name in (flags.sections or ORDER)]
    if flags.samples:
        names = [name for name in names if name not in OF_THE_RUN]
    elif flags.sections:
        check_model(run, names)
    known = study.make(
        run,
        flags.data,
        drawn=flags.samples,
        count=flags.count,
        sampler=flags.sampler,
        steps=flags.steps,
        kind=flags.features,
        feature_steps=flags.feature_steps,
        seed=flags.seed,
        out=out,
        needs=study.needs(names),
        plane=flags.plane,
    )
    found = study.measure(known, [name for name in names if name in study.MEASURES])
    found["samples"] = shown_samples(known.samples, run.name, flags)
    found["cost"] = study.cost(known.drawing, began)
    found = {name: found[name] for name in names if name in found}
    sections = {
        name: pages.section(name, *part[:3], lambda figure: out / "evaluation" / f"{figure}.png")
        for name, part in found.items()
    }
    facts = {"about": about(known, run.name, flags), **report_facts(found, sections)}
    warnings = [warning for section in sections.values() for warning in section.warnings]
    written = write(out, flags.samples or run.name, known, facts, sections, whole=names == list(ORDER))
    show(facts, warnings)
    print(f"-> {', '.join(written)}")
    return audit_status(facts, flags.fail_above)


def write(out, name, known, facts, sections, whole):
    """Write the report, and, of a whole evaluation, the model card; returns their names.

    What some sections say has a name of its own, so that it never takes the place of a whole report.
    """
    stem, facing = "report" if whole else "report_part", {"run": name, **runs.versions()}
    report.write_html(out / f"{stem}.html", f"Can the pictures of {name} be trusted?", [*sections.values()], facing)
    runs.save_json(out / f"{stem}.json", facts)
    written = [str(out / f"{stem}.html"), f"{stem}.json"]
    if whole:
        warnings = [warning for section in sections.values() for warning in section.warnings]
        card = pages.card(name, known.people.record, facts, warnings, known.seed)
        report.write_model_card(out / "model_card.md", card)
        written.append("model_card.md")
    return written


def shown_samples(samples, run, flags):
    """Some of the samples, to be looked at."""
    if samples is None:
        return study.Measured({}, {"run": run}, "diffusion model")
    how = f"by {flags.sampler}, {flags.steps} network calls each, seed {flags.seed}"
    how = f"of {flags.samples}" if flags.samples else how
    return study.Measured({}, {"images": samples.spread(32).images, "count": len(samples), "how": how})


def report_facts(found, sections):
    """The content of report.json: the facts of all sections, and what is said of leaks."""
    facts = {key: value for part in found.values() for key, value in part.facts.items()}
    if "leaks" in facts:
        facts["leaks"] = {**facts["leaks"], "said": list(sections["leaks"].warnings)}
    entries = {name: entry for part in found.values() for name, entry in part.people.items()}
    people = {
        name: {"value": e.value, "error": e.error, "left out": e.left_out, "people": dict(e.people)}
        for name, e in entries.items()
    }
    return {**facts, "by person": people}


def about(known, run, flags):
    """What a report must agree on with another to be compared, and what it may differ in."""
    drawn = {"samples": flags.samples} if flags.samples else {}
    return {
        "format": schema.FORMAT,
        "run": run,
        **drawn,
        "data": str(known.people.source.manifest()["sha256"]),
        "image size": known.people.record["settings"]["image_size"],
        "features": known.features or [],
        "count": len(known.samples) if flags.samples else flags.count,
        "sampler": "none of ours" if flags.samples else flags.sampler,
        "steps": flags.steps,
        "seed": flags.seed,
    }


def show(facts, warnings):
    """Print the numbers that decide, and the warnings."""
    lines = []
    if "reconstruction" in facts:
        row = facts["reconstruction"]["first stage"]
        lines += [(f"reconstruction, {name}", *row[name]) for name in ("SSIM", "foreground SSIM", "PSNR")]
    for name, row in facts.get("distribution", {}).items():
        if "KID" in row:
            lines.append((f"KID, {name}", row["KID"], row["KID's standard error"]))
    for name in ("precision", "recall"):
        if "distribution" in facts:
            lines.append((name, facts["distribution"]["samples"][name], None))
    for kind in ("pixels", "features"):
        if "copies" in facts:
            lines.append((f"copies, {kind}", facts["copies"][kind]["rate"], None))
    print()
    for name, value, spread in lines:
        more = "" if spread is None else f" ± {report.number(spread, 4)}"
        print(f"{name:45}{report.number(value, 4):>10}{more}")
    for warning in warnings:
        print(f"note: {warning}")


def audit_status(facts, limit):
    """3 if more samples are copies than the limit allows, else 0.

    Raises:
        RunError: if a limit was given and nothing could be counted.
    """
    if limit is None:
        return 0
    if "copies" not in facts:
        raise runs.RunError("--fail-above: copies could not be counted, the report says why")
    rate = max(facts["copies"][kind]["rate"] for kind in ("pixels", "features"))
    if rate > limit:
        print(f"evaluate.py: {rate:.1%} of the samples are nearer to a training slice than --fail-above allows")
        return 3
    return 0


# ---- runs side by side -----------------------------------------------------------------------------------------------


def compare_parser():
    p = command.Parser(prog="evaluate.py compare", description="What the reports of runs say, side by side.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run with a report, or a report.json")
    p.add_argument("--out", default="comparison.html", help="page to write (default: comparison.html)")
    return p


def read_report(name):
    """The report of a run, of some sections where there is no whole one, or of a file.

    Raises:
        RunError: if there is none, or it is of another version.
    """
    path = Path(name) if name.endswith(".json") else runs.folder(name) / "report.json"
    part = runs.folder(name) / "report_part.json"
    if not name.endswith(".json") and not path.exists() and part.exists():
        print(f"note: {name} has a report of some sections only, {part}: the rest is n/a.")
        path = part
    make = f"`python evaluate.py --run {path.resolve().parent.name}` writes it"
    facts = runs.load_json(path, f"{make} anew")
    if facts is None:
        raise runs.RunError(f"{path} is not there: {make}")
    if said := schema.problems(facts):
        raise runs.RunError(f"{path} is of another version ({said[0]}): {make} anew")
    if facts["about"]["format"] != schema.FORMAT:
        raise runs.RunError(f"{path} is of format {facts['about']['format']}, not {schema.FORMAT}: {make} anew")
    return facts


def comparable(names, reports):
    """Reports without what cannot be compared, which is printed.

    Raises:
        RunError: if nothing can be.
    """
    about = [report["about"] for report in reports]
    for name, one in zip(names[1:], about[1:], strict=True):
        if one["image size"] != about[0]["image size"]:
            raise runs.RunError(
                f"{names[0]} has slices of {about[0]['image size']} pixels and {name} of {one['image size']}: their "
                "numbers cannot be compared"
            )
        if one["data"] != about[0]["data"]:
            print(f"note: {name} was read against other data than {names[0]}: only people of the same name count.")
        if one["count"] != about[0]["count"]:
            print(f"note: {one['count']} slices of {name}, {about[0]['count']} of {names[0]}: {comparison.BY_COUNT}")
    have = {name: tuple(one["features"]) for name, one in zip(names, about, strict=True) if one["features"]}
    if len(set(have.values())) <= 1:  # a report of some sections may have none
        return reports
    print(
        "note: these runs were read in the features of different networks, so their distances cannot be compared: copy "
        f"features_*.keras of {next(iter(have))} into the other runs' folders, and evaluate them again."
    )
    return [comparison.without_features(report) for report in reports]


def compare(flags):
    """Do what `evaluate.py compare` says; returns the exit status."""
    if len(flags.runs) < 2:
        raise runs.RunError("compare takes two runs or more: name another one")
    if not flags.out.lower().endswith(".html"):
        raise runs.RunError(f"--out {flags.out} does not end in .html: name a page")
    files.check_file(flags.out)
    reports = [read_report(name) for name in flags.runs]
    names = [Path(name.removesuffix(".json")).name for name in flags.runs]
    if len(set(names)) < len(names):
        names = flags.runs
    reports = comparable(names, reports)
    sections = comparison.page(names, reports, schema.difference)
    for section in sections[:-1]:  # how they were drawn is for the page
        print(f"\n{comparison.plain(section.tables[0])}")
    report.write_html(flags.out, f"{', '.join(names)}, side by side", sections, {})
    print(f"-> {flags.out}")
    return 0


# ---- for human eyes --------------------------------------------------------------------------------------------------


def write_quiz(run, out, flags):
    """Write the page of pairs, and the sheet of answers apart; returns the exit status."""
    if not flags.samples and not (run / "diffusion.keras").exists():
        raise runs.RunError(f"--quiz: there is no diffusion model yet: `python train.py diffusion --run {run.name}`")
    sampling = {"count": flags.count, "sampler": flags.sampler, "steps": flags.steps, "seed": flags.seed}
    known = study.make(run, flags.data, drawn=flags.samples, out=out, needs={"samples"}, **sampling)
    real = known.people.real.get("test")
    if real is None:
        raise runs.RunError("--quiz: there are no test people, and training people may have been learned by heart")
    pictures, sheet = quiz.pairs(real, known.samples, flags.seed)
    name = hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:12]
    files.write(out / "quiz.html", quiz_pages.page(name, pictures))
    runs.save_json(out / "quiz_sheet.json", {"quiz": name, "run": run.name, "sheet": sheet})
    print(f"-> {out / 'quiz.html'}; quiz_sheet.json says what is right: keep it from those who answer")
    return 0


def score_parser():
    p = command.Parser(prog="evaluate.py score", description="How often the answers to a quiz are right.")
    p.add_argument("answers", nargs="+", help="answers.json of those who answered")
    p.add_argument("--run", help="name of the run whose quiz it is (default: the one that was trained last)")
    p.add_argument("--sheet", help="the answer sheet (default: quiz_sheet.json of the run)")
    return p


def score(flags):
    """Do what `evaluate.py score` says; returns the exit status."""
    if flags.sheet:
        path = Path(flags.sheet)
    else:
        path = (runs.folder(flags.run) if flags.run is not None else runs.newest("diffusion")) / "quiz_sheet.json"
    sheet = runs.load_json(path)
    if sheet is None:
        raise runs.RunError(f"{path} is not there: `python evaluate.py --run R --quiz` writes a quiz and its sheet")
    if shapes.problems(sheet, quiz.SHEET, "it"):
        raise runs.RunError(f"{path} is no answer sheet: put its copy back; another quiz has other answers")
    print(f"{'':20}{'size':>6}{'right':>12}{'share':>8}   95 % interval")
    for file in flags.answers:
        given = runs.load_json(Path(file))
        if given is None or given.get("quiz") != sheet["quiz"] or not isinstance(given.get("answers"), dict):
            raise runs.RunError(f"{file} answers no quiz of {path}: name its own --run or --sheet")
        try:
            found = quiz.score(sheet["sheet"], {int(n): side for n, side in given["answers"].items()})
        except ValueError as mistake:
            raise runs.RunError(f"{file}: {mistake}") from mistake
        for size, row in found.items():
            low, high = row["interval"]
            told = "told apart" if low > 0.5 else "cannot be told apart" if high > 0.5 else "worse than guessing"
            right = f"{row['right']} of {row['answered']}"
            print(f"{Path(file).stem:20}{size:>6}{right:>12}{row['share']:>8.0%}   {low:.0%} to {high:.0%}: {told}")
    return 0


OTHERS = {"compare": (compare_parser, compare), "score": (score_parser, score)}


def parse(words):
    """The words of a command line -> flags, and the function that does what they say."""
    make, do = OTHERS.get(words[0], (parser, work)) if words else (parser, work)
    return make().parse_args(words if do is work else words[1:]), do


def main(argv=None):
    """Run the command line; exit status: 0 done, 2 a user's mistake, 3 too many copies, 130 or 143 interrupted."""
    flags, do = parse(sys.argv[1:] if argv is None else argv)
    hint = "run the same command to go on"
    return command.run("evaluate.py", lambda: do(flags), (dataset.DataError, runs.RunError), hint)


if __name__ == "__main__":
    command.leave(main())
