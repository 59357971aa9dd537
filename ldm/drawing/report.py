"""The report of an evaluation as one web page, and the model card as Markdown: what was measured, set in type.

Nothing is computed or drawn here. `write_html` takes sections of words, tables and pictures, and writes one file that
needs no network and runs no script: pictures are data URIs, the style sheet is inside, and a content security policy
forbids the rest. It reads on a telephone (one column, wide tables scroll within their own box), on paper, in light and
in dark. Every word from outside (run names, file names, labels) is escaped.

Both files are whole or not there, and the same input gives the same bytes.

References:
    Mitchell et al., "Model Cards for Model Reporting", 2019, arXiv:1810.03993: what a model card should say.
"""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

from ldm import files

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #595959; --line: #ccc; --alarm: #a40000; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --faint: #a8a8a8; --line: #444; --alarm: #ff8a80; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: inherit; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
tbody th { font-weight: normal; min-width: 7rem; }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; }
figcaption, .note { color: var(--faint); font-size: 0.9rem; }
.warning { border-left: 0.3rem solid var(--alarm); padding-left: 0.8rem; }
.warning strong { color: var(--alarm); }
@media print {
  @page { margin: 15mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  h2 { break-after: avoid; }
  figure, tr, .warning { break-inside: avoid; }
  img { max-height: 22cm; }
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PICTURES = {b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"\xff\xd8\xff": "jpeg"}  # first bytes of a file -> its kind
NUMBER = re.compile(r"[-+]?\d|n/a$|-?inf$")  # how the text of a cell begins that is set flush right

CARD = {  # the parts of a model card in order: key of its facts -> heading
    "run": "Run",
    "data": "Training data",
    "terms": "Terms of the data",
    "people": "People per split",
    "settings": "Recipe",
    "seeds": "Seeds",
    "versions": "Versions",
    "numbers": "Evaluation",
    "use": "Intended use",
    "limits": "Limits",
}
USUAL = {  # what a card says where its facts do not: these three are never left out
    "terms": "Not recorded. Before you pass on the model or its pictures, ask under which terms the data was given.",
    "use": "Research and teaching on generative models of brain slices: method comparison, augmentation studies, "
    "demonstration. Not for diagnosis, not as a stand-in for patients, not as evidence about any person.",
    "limits": (
        "It draws what its training people look like: other scanners, sequences, ages and diseases are not covered.",
        "A slice that looks right may be anatomically wrong: the evaluation compares sets, and vouches for no slice.",
        "A generator can reproduce training slices: read the share of copies before publishing model or pictures.",
    ),
}


class Table(NamedTuple):
    """A table: titles of its columns, rows of as many cells (the first one names the row), a note below it."""

    columns: Sequence[str]
    rows: Sequence[Sequence]
    note: str = ""


class Section(NamedTuple):
    """A part of the report: warnings first, then paragraphs, tables, and figures as (path or bytes, caption)."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str | Path | bytes, str]] = ()
    warnings: Sequence[str] = ()


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals and thousands set apart; "n/a" for None and NaN, which were not measured."""
    if value is None or math.isnan(value):
        return "n/a"
    return f"{round(float(value), digits) + 0.0:,.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _words(value) -> str:
    """Any value as text: whole numbers in full, others to six digits, what was not measured as "n/a"."""
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "n/a"
    return f"{value:.6g}" if isinstance(value, Real) and not isinstance(value, Integral) else str(value)


def _as_list(words: str | Sequence[str]) -> Sequence[str]:
    """One string is one paragraph, not one for each of its letters."""
    return [words] if isinstance(words, str) else words


def _check(table: Table) -> None:
    """Raise ValueError unless every row has as many cells as there are columns."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"a table of {len(table.columns)} columns has a row of {len(row)} cells: {list(row)}")


# ---------------------------------------------------------------------------------------------------------- report.html


def _cell(value) -> str:
    """One cell of a table, flush right if it is a number."""
    words = _words(value)
    looks = ' class="number"' if NUMBER.match(words) else ""
    return f"<td{looks}>{escape(words)}</td>"


def _head(value, scope: str) -> str:
    """The head of a column or of a row ("col" or "row")."""
    return f'<th scope="{scope}">{escape(_words(value))}</th>'


def _html_table(table: Table) -> str:
    _check(table)
    heads = "".join(_head(title, "col") for title in table.columns)
    heads = f"<thead><tr>{heads}</tr></thead>\n" if any(table.columns) else ""
    rows = ["<tr>" + "".join([_head(row[0], "row"), *map(_cell, row[1:])]) + "</tr>" for row in table.rows]
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = "\n".join(rows)
    # tabindex: a box that scrolls must be reachable by keyboard.
    return f'<div class="scroll" tabindex="0"><table>\n{heads}<tbody>\n{body}\n</tbody>\n</table></div>{note}'


def _html_figure(picture: str | Path | bytes, caption: str) -> str:
    data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    kind = next((kind for start, kind in PICTURES.items() if data.startswith(start)), None)
    if kind is None:
        raise ValueError(f"the figure of {caption!r} is none of {', '.join(PICTURES.values())}")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    words = escape(caption)
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def _html_section(index: int, section: Section) -> str:
    parts = [f'<section id="part{index}">', f"<h2>{escape(section.title)}</h2>"]
    parts += [f'<p class="warning"><strong>Warning:</strong> {escape(w)}</p>' for w in _as_list(section.warnings)]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in _as_list(section.text)]
    parts += [_html_table(table) for table in section.tables]
    parts += [_html_figure(*figure) for figure in section.figures]
    return "\n".join([*parts, "</section>"])


def write_html(path: str | Path, title: str, sections: Sequence[Section], facts: Mapping[str, object]) -> None:
    """Write a report as one self-contained web page: no script, no network, pictures inside.

    Args:
        path: file to write; missing folders are made.
        title: of the page.
        sections: its parts in order.
        facts: name -> value, a table at the top: run, data, counts, versions.

    Raises:
        ValueError: if a row has not as many cells as its table has columns, or a figure is no PNG, GIF or JPEG.
        FileNotFoundError: if the file of a figure is missing.
    """
    contents = "".join(
        f'<li><a href="#part{index}">{escape(section.title)}</a></li>' for index, section in enumerate(sections, 1)
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(title)}</h1>",
        *([_html_table(Table(("", ""), list(facts.items())))] if facts else []),
        *([f"<nav><ol>{contents}</ol></nav>"] if contents else []),
        *(_html_section(index, section) for index, section in enumerate(sections, 1)),
        "</main>",
        "</body>",
        "</html>",
    ]
    files.write(path, "\n".join(parts) + "\n")


# ----------------------------------------------------------------------------------------------------------- model card


def _plain(value) -> str:
    """A value as one line of Markdown in which nothing of it is taken for markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(_words(value).split()))


def _markdown_table(table: Table) -> str:
    _check(table)
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return "\n".join(lines + ["", _plain(table.note)] * bool(table.note))


def _markdown(value) -> str:
    """A fact by its kind: a Table, a mapping as bullets of name and value (nested), a sequence as bullets or blocks."""
    if isinstance(value, Mapping | list | tuple) and not value:
        return "none"
    if isinstance(value, Table):
        return _markdown_table(value)
    if isinstance(value, Mapping):
        return "\n".join(_bullet(f"**{_plain(name)}:**", item) for name, item in value.items())
    if isinstance(value, list | tuple):
        if any(isinstance(item, Table) for item in value):
            return "\n\n".join(map(_markdown, value))
        return "\n".join(f"- {_plain(item)}" for item in value)
    return _plain(value)


def _bullet(name: str, item) -> str:
    """One bullet; of a mapping in a mapping, with its own bullets below."""
    if isinstance(item, Mapping) and item:
        return "\n".join([f"- {name}", *("  " + line for line in _markdown(item).splitlines())])
    if isinstance(item, Mapping | list | tuple):
        item = ", ".join(map(_words, item)) or "none"
    return f"- {name} {_plain(item)}"


def write_model_card(path: str | Path, facts: Mapping[str, object]) -> None:
    """Write a model card (arXiv:1810.03993) as Markdown.

    Args:
        path: file to write; missing folders are made.
        facts: "title" and "summary" (text), and the parts of `CARD`: "run", "data", "terms", "people", "settings",
            "seeds", "versions", "numbers", "use", "limits". Each is text, a number, a mapping (bullets of name and
            value, one in another), a sequence of texts (bullets), a `Table` or a sequence of these. Facts under any
            other name follow in parts of their own. Missing terms, use and limits are filled in from `USUAL`.

    Raises:
        ValueError: if a row has not as many cells as its table has columns.
    """
    facts = {**USUAL, **{key: value for key, value in facts.items() if value is not None}}
    parts = [f"# {_plain(facts.pop('title', 'Model card'))}"]
    if "summary" in facts:
        parts.append(_plain(facts.pop("summary")))
    for key in dict.fromkeys([*CARD, *facts]):
        if key in facts:
            parts.append(f"## {CARD.get(key) or _plain(key)}\n\n{_markdown(facts[key])}")
    files.write(path, "\n\n".join(parts) + "\n")
