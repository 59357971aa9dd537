"""DESIGN: which file may import which. Read off the source, so that a lazy import inside a function counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "predict", "evaluate")
ROOMS = sorted(path.stem for path in (ROOT / "ldm").glob("*.py") if path.stem != "__init__")
OURS = {"dataset", "modules", "features", *COMMANDS, "ldm", *(f"ldm.{room}" for room in ROOMS)}

ALLOWED = {  # what each file may import of ours; a command line may import everything but another command line
    **{f"ldm.{room}": set() for room in ROOMS},
    "ldm.samplers": {"ldm.schedules"},
    "ldm.layers": {"ldm.normalization"},
    "ldm.charts": {"ldm.figures"},
    "ldm.training": {"ldm.charts", "ldm.fidelity", "ldm.runs"},
    "ldm.rules": {"ldm.presets", "ldm.runs"},
    "dataset": {"ldm.phantom", "ldm.archive", "ldm.table", "ldm.transforms"},
    "features": {"dataset", "ldm.losses", "ldm.runs", "ldm.transforms", "ldm.layers"},
    "modules": {
        *("ldm.layers", "ldm.transformer", "ldm.schedules", "ldm.losses", "ldm.quantizers"),
        *("ldm.distribution", "ldm.adversary"),
    },
    **{command: OURS - set(COMMANDS) - {"ldm"} for command in COMMANDS},
}


def files():
    """{module name: path} of everything that is ours and is not a test."""
    rooms = {f"ldm.{room}": ROOT / "ldm" / f"{room}.py" for room in ROOMS}
    return {path.stem: path for path in sorted(ROOT.glob("*.py"))} | rooms | {"ldm": ROOT / "ldm" / "__init__.py"}


def imports(path):
    """Dotted names of all modules that a file imports, wherever in it; "from ldm import x" counts as ldm.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("ldm" if path.parent.name == "ldm" else "") if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = {f"{base}.{alias.name}" if base else alias.name for alias in node.names}
            found |= {name if name in OURS else base for name in names}
    return found


def test_the_walk_sees_every_way_to_import(tmp_path):
    (tmp_path / "ldm").mkdir()
    path = tmp_path / "ldm" / "room.py"
    path.write_text(
        "import numpy as np\nimport ldm.metrics\nfrom ldm import figures, layers\nfrom ldm.schedules import linear\n"
        "def f():\n    import modules\n    from . import samplers\n    from .losses import mean_squared\n"
    )
    assert imports(path) == {
        "numpy",
        "modules",
        *(f"ldm.{room}" for room in ("metrics", "figures", "layers", "schedules", "samplers", "losses")),
    }


@pytest.mark.parametrize("name", [name for name in files() if name in ALLOWED])
def test_file_imports_only_what_the_design_allows(name):
    ours = {module for module in imports(files()[name]) if module in OURS}
    assert ours <= ALLOWED[name], f"{name} imports {ours - ALLOWED[name]}"


def test_every_file_at_the_root_has_its_arrows():
    assert set(files()) - {"ldm"} <= set(ALLOWED)


def test_the_package_itself_imports_nothing():
    assert imports(files()["ldm"]) == set()
    assert ast.get_docstring(ast.parse(files()["ldm"].read_text()))


def test_every_room_is_on_the_map():
    listed = ast.get_docstring(ast.parse(files()["ldm"].read_text()))
    for room in ROOMS:
        assert f"    {room} " in listed, f"ldm/__init__.py does not say what {room} is"


def test_only_figures_and_charts_import_matplotlib():
    drawing = {name for name, path in files().items() if any(m.split(".")[0] == "matplotlib" for m in imports(path))}
    assert drawing == {"ldm.figures", "ldm.charts"}


def test_no_command_line_is_imported_by_the_program():
    for name, path in files().items():
        assert not imports(path) & set(COMMANDS), name


def test_networks_and_samplers_are_free_of_tensorflow():
    for room in ("layers", "transformer", "schedules", "samplers", "guidance", "losses", "quantizers"):
        assert not {m for m in imports(files()[f"ldm.{room}"]) if m.split(".")[0] == "tensorflow"}, room


def test_normalization_needs_tensorflow_only_where_it_is_the_backend():
    tree = ast.parse((ROOT / "ldm" / "normalization.py").read_text())
    guards = [node for node in tree.body if isinstance(node, ast.If)]
    assert [ast.unparse(guard.test) for guard in guards] == ["keras.backend.backend() == 'tensorflow'"]
    named = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "tf"}
    imported = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import) and "tf" in ast.unparse(node)}
    assert named and imported
    assert min(named | imported) > guards[0].lineno


def test_what_judges_pictures_needs_no_network_and_draws_none():
    for room in ("metrics", "fidelity", "audit", "anatomy", "report"):
        if room in ROOMS:
            frameworks = {module.split(".")[0] for module in imports(files()[f"ldm.{room}"])}
            assert not frameworks & {"keras", "tensorflow", "matplotlib"}, room


def test_argparse_lives_in_the_files_at_the_root():
    for room in ROOMS:
        assert "argparse" not in imports(files()[f"ldm.{room}"]), room
    assert "argparse" not in imports(files()["modules"])


def test_no_file_is_named_after_nothing_in_particular():
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            assert path.stem not in {"utils", "util", "common", "helpers", "helper", "misc", "tools"}, path
