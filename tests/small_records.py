"""What a stage of a run writes down of itself, as small as it may be."""

import json

from ldm.training import settings as schema


def manifest(**others):
    """What `dataset.Source.manifest` says of three people."""
    names = {"train": "001", "validate": "002", "test": "003"}
    splits = {split: {"people": 1, "images": 4, "cases": [name]} for split, name in names.items()}
    about = {"source": "slices.zip", "kind": "oasis", "images": 12, "labels": ["AD", "NC"], "z": [0, 3]}
    return {**about, "splits": splits, **others}


def record(stage, settings=None, data=None, **others):
    """A record of a stage: settings over the defaults, and what else is said of its data and of itself."""
    settings = schema.merged(schema.defaults(), settings or {})
    return {"stage": stage, "settings": settings, "versions": {}, "data": manifest(**(data or {})), **others}


def write_record(run, stage, settings=None, data=None, **others):
    (run / f"{stage}.json").write_text(json.dumps(record(stage, settings, data, **others)))
