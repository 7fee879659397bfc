"""What docs/notebook.md shows runs as it stands there."""

import os
import re
import subprocess
import sys

import pytest
from helpers_stages import ROOT, environment

import pipeline
from pipeline.competition.targets import COLUMNS

PAGE = ROOT / "docs" / "notebook.md"


@pytest.mark.slow
def test_the_notebooks_code_pretrains_trains_and_predicts(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    own = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(own) < 20
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(PYTHONPATH=os.fspath(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = eval(done.stdout.splitlines()[-1])  # noqa: S307 (our own dictionary)
    assert list(found) == list(COLUMNS)
    assert found["liver_healthy"] + found["liver_low"] + found["liver_high"] == pytest.approx(1)


def test_what_the_package_offers_is_there_and_named_in_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for name in pipeline.__all__:
        assert callable(getattr(pipeline, name)), name
        assert f"`{name}`" in page or f"pipeline.{name}(" in page, name
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        pipeline.pretrian  # noqa: B018
