"""A wheel holds all of the library, and works far from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('../wheel')"
USE = """
import importlib, pkgutil, sys
from pathlib import Path

import pipeline

folder = Path(sys.argv[1])
names = [found.name for found in pkgutil.walk_packages(pipeline.__path__, "pipeline.")]
for name in names:
    assert folder in Path(importlib.import_module(name).__file__).parents, name

from pipeline.run.presets import load_config

assert load_config("demo").name == "demo"
print(len(names))
"""


def files(folder: Path) -> set[str]:
    """Names of all files below a folder's `pipeline/`, compiled ones left out."""
    paths = [path for path in (folder / "pipeline").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)) for path in paths if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A folder that holds what a wheel of this checkout does; built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "pipeline", source / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (folder / "wheel").mkdir()
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = (folder / "wheel").glob("voco2d-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_wheel_holds_every_file_of_the_library_and_nothing_else(unpacked):
    held = files(unpacked)
    assert held == files(ROOT)
    assert {"pipeline/configs/demo.yaml", "pipeline/report/report.html.j2"} <= held
    others = {path.name for path in unpacked.iterdir()} - {"pipeline"}
    assert len(others) == 1
    assert others.pop().endswith(".dist-info")


def test_every_module_of_a_wheel_is_imported_far_from_the_checkout(unpacked, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", USE, str(unpacked)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= sum(name.endswith(".py") for name in files(ROOT)) - 1
