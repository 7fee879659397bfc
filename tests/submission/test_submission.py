"""The submission equals the sample in columns, order and patients at every moment, and holds
probabilities only.
"""

import re

import numpy as np
import polars as pl
import pytest
from helpers_scores import PATIENTS, PRIOR, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.competition.targets import COLUMNS, group_slices
from pipeline.submission.writer import SubmissionWriter, check_submission
from pipeline.system.errors import InputError


def waiting(writer):
    """Patients that still have the prior, in the sample's order."""
    return [patient for patient, row in writer.rows.items() if not writer.predicted[row]]


def test_everyone_has_the_prior_until_predicted(tmp_path):
    writer = SubmissionWriter(sample(), PRIOR)
    writer.write(tmp_path / "submission.csv")
    found = check_submission(tmp_path / "submission.csv", sample())
    np.testing.assert_allclose(found.select(COLUMNS).to_numpy(), np.repeat(PRIOR[None], 3, axis=0))
    assert waiting(writer) == PATIENTS
    assert writer.update("7", np.arange(1, 14))
    assert waiting(writer) == ["50046", "63706"]
    writer.write(tmp_path / "submission.csv")
    found = check_submission(tmp_path / "submission.csv", sample())
    assert found["patient_id"].to_list() == PATIENTS
    assert found.row(1)[1:3] == pytest.approx((1 / 3, 2 / 3))
    assert found.row(0)[1:] == pytest.approx(PRIOR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission.csv"], (
        "no temporary file is left"
    )


def test_columns_follow_the_sample(tmp_path):
    odd = sample(tuple(reversed(COLUMNS)))
    writer = SubmissionWriter(odd, PRIOR)
    writer.write(tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text().startswith("patient_id,spleen_high,spleen_low")
    found = check_submission(tmp_path / "submission.csv", odd)
    assert found["bowel_healthy"].to_list() == pytest.approx([0.9] * 3)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    updates=st.lists(
        st.tuples(
            st.sampled_from([*PATIENTS, "stranger"]),
            st.lists(
                st.floats(width=64) | st.sampled_from([0.0, 0.5, 1.0]), min_size=13, max_size=13
            ),
        )
    )
)
def test_no_update_can_make_it_wrong(tmp_path_factory, updates):
    path = tmp_path_factory.mktemp("submission") / "submission.csv"
    writer = SubmissionWriter(sample(), PRIOR)
    taken = {patient for patient, values in updates if writer.update(patient, np.array(values))}
    writer.write(path)
    check_submission(path, sample())
    assert set(waiting(writer)) == set(PATIENTS) - taken


def test_refused_values_keep_the_last_good_ones():
    writer = SubmissionWriter(sample(), PRIOR)
    assert writer.update("7", PRIOR[::-1])
    before = writer.table()
    for bad in (np.nan, np.inf, -0.1):
        values = PRIOR.copy()
        values[5] = bad
        assert not writer.update("7", values)
    zeros = PRIOR.copy()
    zeros[group_slices()["liver"]] = 0
    assert not writer.update("7", zeros)
    assert not writer.update("stranger", PRIOR)
    assert writer.table().equals(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[::-1], "patients or their order are not the sample's"),
        (lambda f: f[:2], "patients or their order are not the sample's"),
        (lambda f: f.select(f.columns[::-1]), "columns or their order are not the sample's"),
        (lambda f: f.with_columns(extra=1), "columns or their order are not the sample's"),
        (lambda f: f.drop("liver_low"), "column 'liver_low' is missing"),
        (
            lambda f: f.with_columns(liver_low=0.9),
            "the liver columns do not sum to 1, {path} row 2 column liver_healthy",
        ),
        (
            lambda f: f.with_columns(liver_low=-0.2),
            "'-0.2' is negative, {path} row 2 column liver_low",
        ),
        (
            lambda f: f.with_columns(liver_low=pl.lit("x")),
            "'x' is not a number, {path} row 2 column liver_low",
        ),
    ],
)
def test_check_names_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "submission.csv"
    change(SubmissionWriter(sample(), PRIOR).table()).write_csv(path)
    with pytest.raises(InputError, match=re.escape(message.format(path=path))):
        check_submission(path, sample())
