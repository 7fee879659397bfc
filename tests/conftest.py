"""Runs of the whole path on the smoke preset, shared by all tests that need their artifacts."""

import os
from pathlib import Path

import pytest
from helpers_faults import copy, run
from helpers_stages import ORGAN_KEYS, run_all

from pipeline.run import layout
from pipeline.system.console import show_log

show_log()  # the tests read lines as a stage prints them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses a run of the whole path, through whatever fixture, is slow."""
    for item in items:
        if "smoke" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run of the smoke preset; tests only read it. VOCO2D_SMOKE names
    one that is there already.
    """
    if "VOCO2D_SMOKE" in os.environ:
        return Path(os.environ["VOCO2D_SMOKE"])
    out = tmp_path_factory.mktemp("smoke") / "run"
    done = run_all(out)
    assert done.returncode == 0, done.stderr[-4000:]
    (out.parent / "stdout.txt").write_text(done.stdout)
    return out


@pytest.fixture(scope="session")
def organ_run(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smoke preset whose targets look at their organs (`ORGAN_KEYS`); tests only read
    it. Its segmenters have seen too little to find all of them.
    """
    later = (layout.CLASSIFIERS, layout.SCORES, layout.SUBMISSION)
    folder = copy(smoke, tmp_path_factory.mktemp("run") / "organs", *later)
    for stage in ("06", "07", "08"):
        code, text = run(stage, folder, *ORGAN_KEYS)
        assert code == 0, text
    return folder
