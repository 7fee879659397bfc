"""`tests/tools/mutate.py` takes guards out of the product: each row must name what is there."""

import sys

import pytest
from helpers_stages import ROOT

sys.path.insert(0, str(ROOT / "tests" / "tools"))
from mutate import GUARDS  # noqa: E402


@pytest.mark.parametrize("row", GUARDS, ids=lambda row: f"{row[0]}:{' '.join(row[1].split())[:40]}")
def test_a_guard_is_there_once_and_its_test_exists(row):
    file, guard, without, test = row
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.count(guard) == 1
    if file.endswith(".py"):
        compile(text.replace(guard, without), file, "exec")
    path, _, name = test.partition("::")
    assert name.partition("[")[0] in (ROOT / "tests" / path).read_text(encoding="utf-8")
