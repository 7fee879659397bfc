"""What docs/notebook.md shows runs as it stands there."""

import re

import pytest
from helpers_stages import ROOT

import pipeline
from pipeline.competition.targets import COLUMNS

PAGE = ROOT / "docs" / "notebook.md"


@pytest.mark.slow
def test_the_notebooks_code_pretrains_trains_and_predicts(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    own = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(own) < 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})  # noqa: S102 (our own page)
    found = eval(capsys.readouterr().out.splitlines()[-1])  # noqa: S307 (our own dictionary)
    assert list(found) == list(COLUMNS)
    assert found["liver_healthy"] + found["liver_low"] + found["liver_high"] == pytest.approx(1)


def test_what_the_package_offers_is_there_and_named_in_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for name in pipeline.__all__:
        assert callable(getattr(pipeline, name)), name
        assert f"`{name}`" in page or f"pipeline.{name}(" in page, name
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        pipeline.pretrian  # noqa: B018
