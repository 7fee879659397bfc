"""Runs as versions made them whose stages after 04 had a number less."""

import json
from pathlib import Path

from pipeline.run import layout

OLD = {
    "06_folds": "05_folds",
    "07_oof": "06_oof",
    "08_submission": "07_submission",
    "09_report": "08_report",
    "10_ablation": "09_ablation",
}


def make_old(folder: Path) -> Path:
    """Give a finished run the names, in folders and manifests, of before."""
    for path in folder.rglob(layout.MANIFEST):
        manifest = json.loads(path.read_text())
        text = {name: renamed(name) for name in manifest["inputs"]}
        manifest["inputs"] = {text[name]: value for name, value in manifest["inputs"].items()}
        manifest["stage"] = renamed(manifest["stage"])
        path.write_text(json.dumps(manifest))
    for new, old in OLD.items():
        if (folder / new).is_dir():
            (folder / new).rename(folder / old)
    return folder


def renamed(name: str) -> str:
    stage, slash, rest = name.partition("/")
    return OLD.get(stage, stage) + slash + rest
