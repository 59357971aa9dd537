"""Run folders of earlier versions, read as today's: keys, layers and groups that had other names then.

    modernised          a `.keras` file of before, as bytes that Keras loads today; None for a file of today
    modern_settings     settings that a run wrote down then

What is renamed gets a line here, and `tests/old_runs` holds runs made before the first of these lines was needed.
"""

import io
import json
import re
import zipfile

import h5py

KEYS = {"window": "crop_box", "facts": "covariates"}  # of configurations and of settings
GROUPS = {"fact": "covariate"}  # of weights: Keras names the group of a layer after its class


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
    modern = modern_settings(config)
    if modern == config:
        return None
    parts["config.json"] = json.dumps(modern).encode()
    parts["model.weights.h5"] = _with_modern_groups(parts["model.weights.h5"])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return made.getvalue()


def _with_modern_groups(data):
    """The bytes of a weights file with its groups, such as `fact_1`, named as today's layers are."""
    stored = io.BytesIO(data)
    with h5py.File(stored, "r+") as file:
        found = []
        file.visit(lambda name: found.append(name) if re.sub(r"_\d+$", "", name.split("/")[-1]) in GROUPS else None)
        for name in found:
            folder, _, last = name.rpartition("/")
            word, _, number = last.partition("_")
            file.move(name, f"{folder}/{GROUPS[word]}{'_' if number else ''}{number}")
    return stored.getvalue()
