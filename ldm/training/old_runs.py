"""Run folders of earlier versions, read as today's: keys, layers and groups that had other names then.

    modernised          a `.keras` file of before, as bytes that Keras loads today; None for a file of today
    modern_weights      likewise a file of weights
    modern_settings     settings that a run wrote down then

What is renamed gets a line here, and `tests/old_runs` holds runs made before the first of these lines was needed.
"""

import io
import json
import re
import zipfile
from pathlib import Path

from ldm.later import Later

h5py = Later("h5py")

KEYS = {"window": "crop_box", "facts": "covariates"}  # of configurations and of settings
GROUPS = {  # of weights: Keras names the group of a layer after its class, or after the attribute that holds it
    r"fact(_\d+)?": r"covariate\1",
    r"layers/(?:vector|finite_scalar)_quantizer": "bottleneck",
}


def modern_settings(settings):
    """Settings (nested dictionaries, lists, numbers, words) with today's names of their keys."""
    if isinstance(settings, dict):
        return {KEYS.get(key, key): modern_settings(value) for key, value in settings.items()}
    return settings


def modernised(path):
    """The bytes of a `.keras` file of before with today's names, or None where nothing in it had another name.

    Args:
        path: of a file that Keras has saved.
    """
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    config = json.loads(parts["config.json"])
    modern, weights = modern_settings(config), _with_modern_groups(parts["model.weights.h5"])
    if modern == config and weights is None:
        return None
    parts["config.json"] = json.dumps(modern).encode()
    parts["model.weights.h5"] = weights or parts["model.weights.h5"]
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return made.getvalue()


def modern_weights(path):
    """The bytes of a weights file of before with today's names of its groups, or None where none had another name."""
    with h5py.File(path, "r") as file:
        changed = _changed_groups(file)
    return _with_modern_groups(Path(path).read_bytes()) if changed else None


def _with_modern_groups(data):
    """The bytes of a weights file with its groups, such as `fact_1`, named as today's layers are; None if they are."""
    stored = io.BytesIO(data)
    with h5py.File(stored, "r+") as file:
        changed = _changed_groups(file)
        for name, today in changed.items():
            file.move(name, today)
    return stored.getvalue() if changed else None


def _changed_groups(file):
    """{name: today's name} of the groups of an open weights file that had another name."""
    changed = {}

    def look(name):
        for old, new in GROUPS.items():
            if found := re.search(rf"(?:^|/)({old})$", name):
                changed[name] = name[: found.start(1)] + re.sub(old, new, found[1])

    file.visit(look)
    return changed
