"""One log for every loop: each record reaches every logger, a resumed run keeps what it had."""

import json
import re

import pytest
from helpers_stages import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.learning import log
from pipeline.run import layout
from pipeline.system.errors import InputError

RECORDS = [{"epoch": k, "loss": 1 / k, "terms": {"bowel": k, "liver": 2.0}} for k in (1, 2, 3)]


def scalars(folder):
    """(step, value) of every tag of all event files, the latest of each step."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def test_a_resumed_log_is_that_of_a_run_that_never_stopped(tmp_path):
    with log.open_log(tmp_path, [], "epoch") as write:
        for record in RECORDS:
            write(record)
    whole = (tmp_path / layout.LOG).read_text()
    assert [json.loads(line) for line in whole.splitlines()] == RECORDS
    with log.open_log(tmp_path, RECORDS[:1], "epoch") as write:
        assert log.read_log(tmp_path / layout.LOG) == RECORDS[:1]
        for record in RECORDS[1:]:
            write(record)
    assert (tmp_path / layout.LOG).read_text() == whole
    found = scalars(tmp_path)
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found["terms/bowel"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_the_loggers_of_the_page_on_extending_get_every_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "LOGGERS", list(log.LOGGERS))
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "LOGGERS" in code)
    exec(code, {})  # noqa: S102 (our own page)
    assert len(log.LOGGERS) == 3
    with log.open_log(tmp_path, [], "epoch") as write:
        write(RECORDS[1])
    assert capsys.readouterr().out == "2 0.5\n"
    assert len(log.read_log(tmp_path / layout.LOG)) == 1


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is where a folder should be"):
        log.open_log(tmp_path / "file" / "run", [], "epoch").__enter__()
