"""Who is in the phantom data set: labels, series, and the quirks of real files that each has.

Quirks are dealt from decks to shuffled series: each appears in a small data set too and none
depends on a label.
"""

from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from ..run.config import PhantomConfig
from .hospitals import HOSPITALS, Hospital
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


# Shares of the classes but healthy among the competition's 3,147 training patients, and the odds
# ratios between injuries there, each given the other three injuries: a log-linear model with all
# pairs fitted to its public train.csv.
PREVALENCE: dict[str, tuple[float, ...]] = {
    "bowel": (0.020,),
    "extravasation": (0.064,),
    "kidney": (0.037, 0.021),
    "liver": (0.082, 0.020),
    "spleen": (0.063, 0.049),
}

ODDS_RATIOS = {
    ("bowel", "extravasation"): 5.2,
    ("bowel", "kidney"): 0.9,
    ("bowel", "liver"): 2.1,
    ("bowel", "spleen"): 2.0,
    ("extravasation", "kidney"): 2.4,
    ("extravasation", "liver"): 1.5,
    ("extravasation", "spleen"): 2.7,
    ("kidney", "liver"): 3.9,
    ("kidney", "spleen"): 2.7,
    ("liver", "spleen"): 1.2,
}


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
    masks: bool = False  # segmented by an expert


@dataclass(frozen=True)
class PatientPlan:
    """One patient: `split` and `index` seed the body, `labels` are class numbers by target."""

    split: int
    index: int
    patient_id: str
    labels: dict[str, int]
    series: tuple[SeriesPlan, ...]
    hospital: Hospital = HOSPITALS[0]


def shares(config: PhantomConfig) -> dict[str, tuple[float, ...]]:
    """Prevalence of each class but healthy, by target."""
    if config.prevalence == "real":
        return PREVALENCE
    grades = (config.organ_low, config.organ_high)
    return {
        **dict.fromkeys(PREVALENCE, grades),
        "bowel": (config.bowel,),
        "extravasation": (config.extravasation,),
    }


def joint_table(injured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability (2, 2, 2, 2, 2) of each pattern of injured targets (order of `PREVALENCE`) with
    the margins `injured` and the odds ratios of `ODDS_RATIOS`, by iterative proportional fitting.
    """
    names, table = list(PREVALENCE), np.ones((2,) * len(PREVALENCE))
    for pair, ratio in ODDS_RATIOS.items():
        both = np.ix_(*([1] if name in pair else [0, 1] for name in names))
        table[both] *= ratio
    injured = np.clip(injured, 1e-9, 1 - 1e-9)
    for _ in range(100):
        for axis, share in enumerate(injured):
            others = tuple(k for k in range(table.ndim) if k != axis)
            now = table.sum(axis=others, keepdims=True)
            wanted = np.array([1 - share, share]).reshape(now.shape)
            table = table * wanted / now
    return table


def draw_labels(
    config: PhantomConfig, count: int, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """Class numbers of `count` patients: each prevalence met exactly after rounding, at least two
    of a class from 24 patients on. Injuries go together as in `ODDS_RATIOS`.
    """

    def number(share: float) -> int:
        return max(round(share * count), 2 if count >= 24 and share else 0)

    wanted = {name: [number(share) for share in row] for name, row in shares(config).items()}
    table = joint_table(np.array([sum(row) / count for row in wanted.values()]))
    drawn = rng.choice(table.size, count, p=table.ravel())
    patterns = np.stack(np.unravel_index(drawn, table.shape))
    labels = {}
    for injured, (name, numbers) in zip(patterns, wanted.items(), strict=True):
        # so many that the numbers are met: the injured first, both groups in random order
        order = np.lexsort((rng.random(count), 1 - injured))[: sum(numbers)]
        grades = np.repeat(np.arange(len(numbers)) + 1, numbers)[: len(order)]
        labels[name] = np.zeros(count, np.int64)
        labels[name][rng.permutation(order)] = grades
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
    hospitals = iter(rng.permutation(np.arange(sum(counts)) % len(HOSPITALS)).tolist())
    segmented = iter(rng.permutation(np.arange(total) < config.masks * total).tolist())
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
            series = [replace(one, masks=next(segmented) and split == TRAIN) for one in series]
            plans.append(
                PatientPlan(
                    split,
                    index,
                    str(next(ids)),
                    {k: int(v[index]) for k, v in labels.items()},
                    tuple(series),
                    HOSPITALS[next(hospitals)],
                )
            )
    return plans
