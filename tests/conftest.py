"""Runs of the whole path on the smoke preset, shared by all tests that need their artifacts."""

import gc
import os
from pathlib import Path

import pytest
from helpers_faults import copy, run_here
from helpers_shared import made_once
from helpers_stages import ORGAN_KEYS, run_all

from pipeline.run import layout
from pipeline.system.console import show_log

show_log()  # the tests read lines as a stage prints them


def uses_the_run(item: pytest.Item) -> bool:
    """Whether a test uses a run of the whole path, through whatever fixture."""
    return "smoke" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses a run of the whole path is slow, and comes first: of several test processes one
    makes the run while the others are at other tests.
    """
    for item in filter(uses_the_run, items):
        item.add_marker(pytest.mark.slow)
    items.sort(key=uses_the_run, reverse=True)


def pytest_sessionstart() -> None:
    """Libraries make a million objects that stay: the collector would go through them again and
    again while they are imported, and after `pytest_collection_finish` at every full collection.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # a library that counts its objects at the end takes frozen ones for leaks


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Output folder of a finished run of the smoke preset; tests only read it. VOCO2D_SMOKE names
    one that is there already.
    """
    if "VOCO2D_SMOKE" in os.environ:
        return Path(os.environ["VOCO2D_SMOKE"])

    def make(out: Path) -> None:
        done = run_all(out)
        assert done.returncode == 0, done.stderr[-4000:]
        (out.parent / "stdout.txt").write_text(done.stdout)

    return made_once(tmp_path_factory, worker_id, "smoke", make)


@pytest.fixture(scope="session")
def organ_run(smoke: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run of the smoke preset whose targets look at their organs (`ORGAN_KEYS`); tests only read
    it. Its segmenters have seen too little to find all of them.
    """

    def make(out: Path) -> None:
        copy(smoke, out, layout.CLASSIFIERS, layout.SCORES, layout.SUBMISSION)
        for stage in ("06", "07", "08"):
            code, text = run_here(stage, out, *ORGAN_KEYS)
            assert code == 0, text

    return made_once(tmp_path_factory, worker_id, "organs", make)
