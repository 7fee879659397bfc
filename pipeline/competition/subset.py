"""A part of the patients that is like all of them."""

import numpy as np
import polars as pl

from .strict_table import KEY
from .targets import COLUMNS

SEED = 0  # whatever the run's: runs with other seeds use the same patients


def label_subset(patients: list[str], labels: np.ndarray, fraction: float, seed: int) -> set[str]:
    """The share `fraction` of `patients` (N,), stratified by their labels (N, 13); for one seed a
    smaller share is part of a larger one.

    Patients are taken one by one: of a random order the first that keeps the class counts nearest
    to what so many should have.
    """
    order = np.random.default_rng([seed, 13]).permutation(np.argsort(patients))
    rows, share = labels[order].astype(np.float64), labels.mean(axis=0, dtype=np.float64)
    weight, counts, left, taken = (
        1 / np.maximum(share, 1e-9),
        np.zeros_like(share),
        np.ones(len(order), bool),
        [],
    )
    for number in range(1, max(1, round(fraction * len(order))) + 1):
        distance = ((counts + rows - number * share) ** 2 * weight).sum(axis=1)
        taken.append(int(np.where(left, distance, np.inf).argmin()))
        counts, left[taken[-1]] = counts + rows[taken[-1]], False
    return {patients[k] for k in order[taken]}


def first_patients(labels: pl.DataFrame, series: pl.DataFrame, limit: int) -> set[str]:
    """`limit` patients of those with a series, stratified by their labels; fewer are part of
    more.
    """
    seen = labels.join(series, on=KEY, how="semi").sort(KEY)
    if limit >= len(seen):
        return set(seen[KEY])
    matrix = seen.select(COLUMNS).to_numpy()
    return label_subset(seen[KEY].to_list(), matrix, limit / len(seen), SEED)
