"""Manifests of stage folders: fingerprints, outputs with their sizes and digests, versions."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..system.console import log
from ..system.errors import InputError
from . import layout

ROOT = Path(__file__).resolve().parents[2]


SCHEMA = 1


PACKAGES = (
    "torch",
    "timm",
    "numpy",
    "polars",
    "dicomsdl",
    "imagecodecs",
    "pydicom",
    "opencv-python-headless",
    "albumentations",
    "scikit-learn",
)


def digest(value: Any) -> str:
    """Hex digest of a JSON value, or of a file's bytes when given a Path."""
    state = hashlib.blake2b(digest_size=16)
    if isinstance(value, Path):
        with open(value, "rb") as handle:
            while block := handle.read(1 << 20):
                state.update(block)
    else:
        state.update(json.dumps(value, sort_keys=True).encode())
    return state.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished stage folder, or None where the stage did not finish or wrote
    another schema.
    """
    path = folder / layout.MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        log(f"{path} is damaged: the stage runs again")
        return None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        log(f"{path} was written by another version: the stage runs again")
        return None
    fingerprint, outputs = manifest.get("fingerprint"), manifest.get("outputs")
    if not isinstance(fingerprint, str) or not isinstance(outputs, dict):
        log(f"{path} is damaged: the stage runs again")
        return None
    if isinstance(inputs := manifest.get("inputs"), dict):  # an older version's, by former names
        manifest["inputs"] = {layout.current(name): value for name, value in inputs.items()}
    return manifest


def stage_folder(run: Path, name: str) -> Path:
    """The folder of a stage in a run's folder, by its former name where an older version made
    it.
    """
    before = run / layout.former(name)
    return before if before.is_dir() and not (run / name).exists() else run / name


def finished(folder: Path) -> dict[str, Any]:
    """The manifest of a stage folder that is known to be finished.

    Raises:
        InputError: it is not, or not any more.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError("unfinished, or being made again", str(folder), "run its stage first")
    return manifest


def broken_outputs(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of the manifest's outputs that are missing or have another size; contents are
    `pipeline.run.verify`'s to check.
    """
    return [
        name
        for name, entry in manifest["outputs"].items()
        if not (path := folder / name).is_file() or path.stat().st_size != entry["bytes"]
    ]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of the code, `None` outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def trained_files(trained: Path, name: str) -> list[Path]:
    """File `name` of every fold of the finished stage 06 in `trained`: what its manifest lists,
    whatever else lies there.
    """
    listed = (read_manifest(trained) or {"outputs": {}})["outputs"]
    return [trained / file for file in listed if file.partition("/")[2] == name]
