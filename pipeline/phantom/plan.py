"""Who is in the phantom data set: labels, series, and the quirks of real files that each has.

Quirks are dealt from decks to shuffled series: each appears in a small data set too and none
depends on a label.
"""

from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from ..run.config import PhantomConfig
from .tissues import PHASES

TRAIN, TEST, UNLABELLED = 0, 1, 2

# name: bits stored, signed, intercept, slope of stored x slope + intercept = HU
STORAGE = {
    "u12": (12, 0, -1024, 1.0),
    "s16": (16, 1, 0, 1.0),
    "s12": (12, 1, 0, 1.0),
    "s13": (13, 1, 0, 1.0),
    "s14": (14, 1, -1024, 1.0),
    "s15": (15, 1, -8192, 1.0),
    "u16": (16, 0, -8192, 1.0),
    "deep": (16, 0, -32768, 1.0),
    "half": (16, 1, -1024, 0.5),
    "no_bits": (16, 1, 0, 1.0),
    "mono1": (12, 0, -1024, 1.0),
}

SYNTAXES = {
    "rle": "RLELossless",
    "j2k": "JPEG2000Lossless",
    "deflated": "DeflatedExplicitVRLittleEndian",
    "explicit": "ExplicitVRLittleEndian",
    "implicit": "ImplicitVRLittleEndian",
}

_RLE = 5 * ("rle",)

ENCODINGS = (*_RLE, "j2k", *_RLE, "deflated", *_RLE, "explicit", *_RLE, "implicit")

HEADERS = (
    "plain",
    "windows",
    "flip_x",
    "no_window",
    "plain",
    "flip_y",
    "no_sop_class",
    "bare",
    "ascending",
    "plain",
    "flip_xy",
    "no_position",
    "ffs",
    "gap",
)

_NONE = 3 * ("none",)

FAULTS = (
    *_NONE,
    "partial",
    *_NONE,
    "truncated",
    *_NONE,
    "duplicate",
    *_NONE,
    "resized",
    *_NONE,
    "rle_header",
    *_NONE,
    "rows",
)


@dataclass(frozen=True)
class SeriesPlan:
    """One series: contrast phase and quirks, names out of the decks above."""

    series_id: str
    phase: str
    encoding: str
    storage: str
    header: str
    fault: str
    nifti: bool = False


@dataclass(frozen=True)
class PatientPlan:
    """One patient: `split` and `index` seed the body, `labels` are class numbers by target."""

    split: int
    index: int
    patient_id: str
    labels: dict[str, int]
    series: tuple[SeriesPlan, ...]


def draw_labels(
    config: PhantomConfig, count: int, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """Class numbers of `count` patients: each prevalence met exactly after rounding, at least two
    of a class from 24 patients on.

    Extravasation is twice as likely in a patient with an injured organ.
    """

    def number(share: float) -> int:
        return max(round(share * count), 2 if count >= 24 and share else 0)

    low, high = number(config.organ_low), number(config.organ_high)
    grades = (np.arange(count) < low + high).astype(int) + (np.arange(count) < high)
    labels = {organ: rng.permutation(grades) for organ in ("kidney", "liver", "spleen")}
    odds = 1.0 + (np.sum(list(labels.values()), axis=0) > 0)
    chosen = rng.choice(count, number(config.extravasation), replace=False, p=odds / odds.sum())
    labels["bowel"] = rng.permutation(np.arange(count) < number(config.bowel)).astype(int)
    labels["extravasation"] = np.isin(np.arange(count), chosen).astype(int)
    return labels


def _deal(numbers: list[int], rng: np.random.Generator) -> list[SeriesPlan]:
    """A series of each number, with quirks from shuffled decks as long as all series together."""
    decks = [
        rng.permutation(list(islice(cycle(deck), len(numbers)))).tolist()
        for deck in (tuple(PHASES), ENCODINGS, tuple(STORAGE), HEADERS, FAULTS)
    ]
    dealt = [
        SeriesPlan(str(number), *quirks) for number, *quirks in zip(numbers, *decks, strict=True)
    ]
    return [
        replace(series, encoding="rle") if series.fault == "rle_header" else series
        for series in dealt
    ]


def make_plan(config: PhantomConfig, seed: int) -> list[PatientPlan]:
    """Who there is, with which labels, series and quirks. Ids are random numbers; labels have a
    random stream of their own.
    """
    counts = (config.train_patients, config.test_patients, config.unlabelled_patients)
    rng = np.random.default_rng([seed, 99, 0])
    ids = iter(rng.choice(90_000, sum(counts), replace=False) + 10_000)
    pairs = [
        rng.random(count) < (config.second_series if split != UNLABELLED else 0)
        for split, count in enumerate(counts)
    ]
    nifti = np.arange(counts[UNLABELLED]) < -(-counts[UNLABELLED] // 10)
    total = sum(counts) + int(np.concatenate(pairs).sum())
    numbers = rng.choice(65_000, total, replace=False) + 1
    dealt = iter(_deal(numbers.tolist(), rng))
    plans = []
    for split, count in enumerate(counts):
        labels = (
            draw_labels(config, count, np.random.default_rng([seed, 99, 1 + split]))
            if count
            else {}
        )
        for index in range(count):
            series = [replace(next(dealt), nifti=bool(split == UNLABELLED and nifti[index]))]
            if pairs[split][index]:
                other = [phase for phase in PHASES if phase != series[0].phase]
                series.append(replace(next(dealt), phase=other[int(rng.integers(2))]))
            plans.append(
                PatientPlan(
                    split,
                    index,
                    str(next(ids)),
                    {k: int(v[index]) for k, v in labels.items()},
                    tuple(series),
                )
            )
    return plans
