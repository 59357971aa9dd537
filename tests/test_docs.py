"""README and docs: short, whole, true. Every command in them is understood; links lead somewhere; flags are today's."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import app
import dataset
import evaluate
import predict_flags
import train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands(path):
    """[(script, words)] of every command line of ours that a page shows, in blocks and in sentences."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    inline = re.findall(r"`python ([^`\n]+)`", text)
    blocks = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines = inline + re.findall(r"python ((?:\w+/)?\w+\.py[^\n&;]*)", "\n".join(blocks))
    found = [shlex.split(line, comments=True) for line in lines]
    return [(words[0], words[1:]) for words in found if words[0].endswith(".py") and "..." not in words]


SHOWN = [(path.name, script, words) for path in PAGES for script, words in commands(path)]


def of(script):
    return [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, name, words in SHOWN if name == script]


def test_the_pages_show_the_commands_that_there_are():
    assert {"train.py", "predict.py", "evaluate.py"} <= {script for _, script, _ in SHOWN}
    assert len(SHOWN) > 60


@pytest.mark.parametrize("words", of("train.py"))
def test_a_training_is_understood(words, tmp_path, monkeypatch):
    """Also that no flag of it is without effect; what a run of that name is already does not matter here."""
    if "--help" in words or "TASK" in words:
        return
    monkeypatch.chdir(tmp_path)
    words = [word.replace("$p", "256-f8") for word in words]
    given = train.parser().parse_args(words)
    if given.init_from:  # the run of an earlier line of the page
        (tmp_path / "checkpoint" / given.init_from).mkdir(parents=True)
        (tmp_path / "checkpoint" / given.init_from / "autoencoder.keras").touch()
    if given.run and not given.preset and given.stage in ("diffusion", "prior", "latents"):
        return  # its settings are those of the run's first stage, which is not here
    assert train.resolve(given)


def test_every_task_of_predict_is_shown():
    lines = [words for _, script, words in SHOWN if script == "predict.py"]
    lines = [words for words in lines if "--help" not in words and "TASK" not in words]
    assert {predict_flags.parse(words)[0] for words in lines} == set(predict_flags.TASKS)


@pytest.mark.parametrize("words", of("evaluate.py"))
def test_an_evaluation_is_understood(words):
    flags, do = evaluate.parse(words)
    if do is evaluate.work:
        evaluate.check(flags)


@pytest.mark.parametrize("words", of("app.py"))
def test_a_page_is_understood(words):
    assert app.parser().parse_args(words)


def test_commands_on_data_are_understood():
    for _, script, words in SHOWN:
        if script == "dataset.py" and len(words) > 1:  # else a sentence that names the command
            dataset._parser().parse_args(words)


def test_other_scripts_exist_and_know_the_flags_that_are_shown():
    scripts = [(name, words) for _, name, words in SHOWN if "/" in name]
    assert scripts
    for name, words in scripts:
        source = (ROOT / name).read_text(encoding="utf-8")
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in source, f"{name} {flag}"


# ---- the pages -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 180
    assert len(README.split()) <= 1500


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_can_be_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8")):
            if "://" not in target and (there := (page.parent / target).resolve()) not in seen:
                todo.append(there)
    assert set(PAGES) <= seen


def test_every_picture_is_shown():
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert {path.name for path in (ROOT / "imgs").iterdir()} <= set(re.findall(r"imgs/([\w.]+)", text))


def module(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_pip_installs_every_module():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["py-modules"]
    assert sorted(told) == sorted(path.stem for path in ROOT.glob("*.py"))


def test_the_table_of_flags_is_up_to_date():
    """`python docs/flags.py` writes it."""
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == module("flags").page()


@pytest.mark.slow
def test_the_lesson_runs_and_says_what_it_promises(capsys):
    lesson = module("teaching")
    assert [title.split(".")[0] for title, _ in lesson.blocks()] == [str(n) for n in range(1, 11)]
    names = {}
    for _, code in lesson.blocks():
        exec(compile(code, "teaching.md", "exec"), names)
    said = capsys.readouterr().out
    assert names["history"][-1] < names["history"][0]  # step 7: the loss falls
    assert abs(names["sample"].std() - 0.5) < 0.02  # step 5: the deviation of the data
    assert "a black image" in said


def test_the_site_is_built(tmp_path):
    commands = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed: docs/requirements.txt")
    pytest.importorskip("material", reason="mkdocs-material is not installed: docs/requirements.txt")
    from mkdocs.config import load_config

    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    assert (tmp_path / "site" / "teaching" / "index.html").exists()
    assert (tmp_path / "site" / "imgs" / "oasis_sweep.png").exists()
