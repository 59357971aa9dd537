"""DESIGN: which file may import which. Read off the source, so that a lazy import inside a function counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"train", "predict", "evaluate", "app"}
LIBRARY = ROOT / "ldm"
WINGS = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
GROUND = {
    "ldm.files",
    "ldm.batches",
    "ldm.tissue",
    "ldm.cropping",
    "ldm.shapes",
    "ldm.later",
}  # rooms that every other one may import


def files():
    """{module name: path} of everything that is ours and is neither a test nor a benchmark."""
    found = [*sorted(ROOT.glob("*.py")), *sorted(LIBRARY.glob("**/*.py"))]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


FILES = files()
ROOMS = {name for name in FILES if name.startswith("ldm.") and name.split(".")[-1] not in WINGS}


def wing(name):
    return {room for room in ROOMS if room.startswith(f"ldm.{name}.")}


ALLOWED = {  # what each file may import of ours, beside the ground floor
    **{room: wing(room.split(".")[1]) for room in ROOMS - GROUND},  # its own wing, and what is added below
    **{room: {"ldm.later"} - {room} for room in GROUND},
    "dataset": wing("data") | {"command"},
    "modules": {"ldm.diffusion.schedules"}
    | {f"ldm.training.{room}" for room in ("losses", "distribution", "reports", "corruption")}
    | wing("nets"),
    # both train networks: they are handed none, or build them of layers, and never import `modules`
    "ldm.training.adversary": wing("training") | {"ldm.nets.networks", "ldm.nets.saving"},
    "ldm.training.prior": wing("training")
    | {"ldm.nets.layers", "ldm.nets.networks", "ldm.nets.saving", "ldm.nets.transformer"},
    "features": {"dataset", "ldm.data.pixels"}
    | {f"ldm.training.{room}" for room in ("distribution", "losses", "optimizers", "runs")}
    | wing("nets"),
    "generator": {"modules", "ldm.training.runs", "ldm.training.records", "ldm.data.masks", "ldm.data.latents"}
    | wing("diffusion"),
    "conditions": {"dataset", "ldm.data.table", "ldm.training.runs"},
    "predict_flags": {"command", "dataset", "conditions", "generator", "ldm.drawing.figures", "ldm.training.runs"}
    | wing("diffusion"),
    "jobs": {"dataset", "conditions", "predict_flags", "ldm.data.single", "ldm.data.volumes", "ldm.drawing.figures"}
    | {"ldm.judging.metrics", "ldm.training.runs"},
    "page": {"dataset", "jobs", "ldm.data.single", "ldm.diffusion.samplers", "ldm.drawing.figures"}
    | {"ldm.training.runs"},
    "stages": {"dataset", "encoding", "modules", "features", "generator"} | ROOMS,
    "encoding": {"dataset", "modules"} | wing("data") | wing("training"),
    "plans": {"dataset", "encoding", "stages", "ldm.data.latents"} | wing("training"),
    "study": {"dataset", "modules", "features", "generator", "ldm.data.phantom", "ldm.data.latents"}
    | {"ldm.training.runs", "ldm.training.records", "ldm.data.repeats"}
    | {f"ldm.judging.{room}" for room in ("audit", "measures", "metrics", "planes")}
    | {"ldm.diffusion.samplers"},
    "synthetic": {"dataset", "conditions", "ldm.data.volumes", "ldm.drawing.figures", "ldm.training.runs"}
    | {"ldm.judging.audit", "ldm.judging.metrics"},
    "command": set(),
    **{command: set(FILES) - COMMANDS - {"ldm"} for command in COMMANDS},
    "app": {
        "command",
        "dataset",
        "generator",
        "page",
        "ldm.training.runs",
        "ldm.training.records",
        "ldm.training.distribution",
    },
    "evaluate": {"command", "dataset", "study", "ldm.diffusion.samplers", "ldm.drawing.pages", "ldm.drawing.report"}
    | {"ldm.training.runs", "ldm.training.records", "ldm.training.distribution"}
    | {"ldm.judging.planes", "ldm.judging.schema", "ldm.judging.quiz", "ldm.drawing.comparison", "ldm.drawing.quiz"},
}


def imports(path):
    """Dotted names of all modules that a file imports, wherever in it; "from ldm.a import b" counts as ldm.a.b if it
    is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ("ldm", "wing")
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = {f"{base}.{alias.name}" if base else alias.name for alias in node.names}
            found |= {name if name in ROOMS or name in FILES and "." not in name else base for name in names}
            if base == "ldm.later":  # `keras` there is Keras
                found |= {alias.name for alias in node.names} - {"Later"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Later":
            found |= {ast.literal_eval(node.args[0])}
    return found


def ours(name):
    return {module for module in imports(FILES[name]) if module in FILES}


def test_the_walk_sees_every_way_to_import(tmp_path):
    path = tmp_path / "room.py"
    path.write_text(
        "import numpy as np\nimport ldm.judging.metrics\nfrom ldm.drawing import figures, charts\n"
        "from ldm.diffusion.schedules import linear\ndef f():\n    import modules\n    from ..nets import layers\n"
        "from ldm.later import tensorflow as tf\nstages = Later('stages')\n"
    )
    expected = {"ldm.later", "tensorflow", "stages"} | {
        "numpy",
        "modules",
        "ldm.judging.metrics",
        "ldm.drawing.figures",
        "ldm.drawing.charts",
    }
    assert imports(path) == expected | {"ldm.diffusion.schedules", "ldm.nets.layers"}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_file_imports_only_what_the_design_allows(name):
    allowed = ALLOWED[name] | (GROUND if name not in GROUND else set())
    assert ours(name) <= allowed, f"{name} imports {ours(name) - allowed}"


def test_every_file_at_the_root_has_its_arrows():
    assert set(FILES) - {"ldm"} - {f"ldm.{name}" for name in WINGS} == set(ALLOWED)


def test_nothing_goes_in_circles():
    left = {name: ours(name) - {name} for name in FILES}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


def test_packages_import_nothing_and_say_what_is_where():
    for name in ("ldm", *(f"ldm.{name}" for name in WINGS)):
        assert imports(FILES[name]) == set()
        assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))


def test_every_room_is_on_the_map_of_its_wing():
    for room in ROOMS:
        package, _, short = room.rpartition(".")
        listed = ast.get_docstring(ast.parse(FILES[package].read_text(encoding="utf-8")))
        assert f"    {short} " in listed, f"{FILES[package]} does not say what {short} is"


def test_only_drawing_imports_matplotlib():
    drawing = {name for name, path in FILES.items() if any(m.split(".")[0] == "matplotlib" for m in imports(path))}
    assert drawing and drawing <= wing("drawing")


def test_only_the_page_imports_gradio():
    assert {name for name, path in FILES.items() if any(m.split(".")[0] == "gradio" for m in imports(path))} == {"page"}


def test_no_command_line_is_imported_by_the_program():
    for name, path in FILES.items():
        assert not imports(path) & COMMANDS, name


def test_networks_and_samplers_are_free_of_tensorflow():
    for room in (wing("nets") | wing("diffusion") | {"ldm.training.losses"}) - {"ldm.nets.normalization"}:
        assert not {m for m in imports(FILES[room]) if m.split(".")[0] == "tensorflow"}, room


def test_normalization_needs_tensorflow_only_where_it_is_the_backend():
    tree = ast.parse(FILES["ldm.nets.normalization"].read_text(encoding="utf-8"))
    guards = [node for node in tree.body if isinstance(node, ast.If)]
    assert [ast.unparse(guard.test) for guard in guards] == ["keras.backend.backend() == 'tensorflow'"]
    named = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "tf"}
    imported = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import) and "tf" in ast.unparse(node)}
    assert named and imported
    assert min(named | imported) > guards[0].lineno


def test_what_judges_and_draws_needs_no_network():
    for room in wing("judging") | wing("drawing"):
        frameworks = {module.split(".")[0] for module in imports(FILES[room])}
        assert not frameworks & {"keras", "tensorflow"}, room


def test_argparse_lives_in_the_files_at_the_root():
    for room in ROOMS:
        assert "argparse" not in imports(FILES[room]), room
    assert "argparse" not in imports(FILES["modules"])
