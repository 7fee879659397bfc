"""What probes are asked about: planes of series with organ masks, or with a table of the slices
that show an organ; and what is known of each plane.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from ..competition.targets import SLICE_TARGETS, TARGETS
from ..organs import masks
from ..organs.files import FOLDER, mask_files
from ..organs.masks import ORGANS
from ..run import layout
from ..run.config import ConvertConfig, VolumeConfig
from ..run.manifest import read_manifest
from ..system.console import log
from ..system.errors import InputError
from ..system.frames import read_frame
from ..volumes.sampling import resize_planes, slice_positions
from ..volumes.store import SLICE_COLUMNS, labels_of, usable

PATIENTS = 400  # at most, the first in the order of their ids (which are random numbers)
ORGAN_TABLE = "phantom_organs.csv"  # patient_id, series_id, instance_number, organ
STRIDE = 4  # pixels along one cell of the grid on which masks are asked for
KEYS = ["patient_id", "series_id"]


@dataclass(frozen=True)
class Case:
    """S planes of one series: `images` (S, h, w) uint8, `height` (S,) 0 top to 1 bottom.

    `masks` (S, h, w) uint8 holds numbers of `ORGANS` from 1, None where there are none; `shown`
    tells by organ which planes show it, and `injured` by target which do (of a target without slice
    labels: all of an injured patient's), (S,) bool; absent is what nobody knows.
    """

    patient: str
    fold: int
    hospital: str
    images: np.ndarray
    height: np.ndarray
    masks: np.ndarray | None = None
    shown: dict[str, np.ndarray] = field(default_factory=dict)
    injured: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def cells(self) -> np.ndarray:
        """The masks on the grid (S, h / 4, w / 4): the label that fills most of each cell."""
        assert self.masks is not None
        size = self.masks.shape[1] // STRIDE
        shares = [resize_planes((self.masks == k).astype(np.float32), size) for k in LABELS]
        return np.argmax(shares, axis=0)


LABELS = range(len(ORGANS) + 1)


def read_cases(
    data: Path,
    volumes: Path,
    folds: dict[str, int],
    count: int,
    size: int,
    labels: pl.DataFrame | None = None,
    organs: Path | None = None,
) -> list[Case]:
    """The series of at most `PATIENTS` patients of `folds`, `count` planes of each, `size` pixels
    wide.

    Args:
        data: with `segmentations/`, and the competition's tables as far as there are some.
        volumes: the folder of stage 02.
        folds: by patient.
        labels: `train.csv`, for injuries.
        organs: a table of the slices that show an organ (default: the phantom's).

    Raises:
        InputError: not one series has masks that fit, or rows in the table.
    """
    if (made := read_manifest(volumes)) is None:
        what = "the volumes are missing or unfinished"
        raise InputError(what, str(volumes), f"run {layout.script(layout.VOLUMES)} first")
    config, index = VolumeConfig(**made["config"]["volume"]), read_frame(volumes / layout.INDEX)
    index = index.sort(*KEYS)
    files, shown = mask_files(data), _marks(organs or data / ORGAN_TABLE, "organ")
    known = pl.col("series_id").is_in([*files, *(series for _, series in shown)])
    index = index.filter(known & pl.col("patient_id").is_in(list(folds)))
    kept = index["patient_id"].unique().sort()[:PATIENTS].to_list()
    index = index.filter(pl.col("patient_id").is_in(kept))
    maps = _maps(files, index, volumes)
    facts = {row["patient_id"]: row for row in ([] if labels is None else labels.to_dicts())}
    injuries, hospitals = _marks(data / "image_level_labels.csv", "injury_name"), _hospitals(data)
    cases = []
    for row in index.iter_rows(named=True):
        key = row["patient_id"], row["series_id"]
        mask = _mask(*maps[key], row, config) if key in maps else None
        if mask is None and key not in shown:
            continue
        volume = np.load(volumes / row["path"], mmap_mode="r")
        at = slice_positions(len(volume), min(count, len(volume)))
        instances = np.array(row["plane_instances"])[at]
        case = Case(
            key[0],
            folds[key[0]],
            hospitals.get(key[0], ""),
            resize_planes(volume[at], size),
            (at + 0.5) / len(volume),
            None if mask is None else resize_planes(mask[at], size, cv2.INTER_NEAREST),
            _shown(mask, at, instances, shown, key),
            _injured(facts.get(key[0]), instances, injuries.get(key, {})),
        )
        cases.append(case)
    if not cases:
        what = f"no series with a volume has masks in {FOLDER}/ that fit"
        raise InputError(what, str(data), "give a data set with organ masks")
    return cases


def _maps(
    files: dict[str, Path], index: pl.DataFrame, volumes: Path
) -> dict[tuple[str, str], tuple[Path, pl.DataFrame]]:
    """The label map and the rows of the slice index by patient and series."""
    if not files:
        return {}
    table = masks.slice_table(volumes, volumes.parent / layout.SLICES)
    if not table.is_file():
        what = "the slice index that the volumes were made from is missing"
        raise InputError(what, str(table), f"run {layout.script(layout.SLICES)} again")
    found = masks.with_masks(files, index, read_frame(table, SLICE_COLUMNS))
    return {(row["patient_id"], row["series_id"]): (path, own) for path, own, row in found}


def _mask(
    path: Path, slices: pl.DataFrame, row: dict[str, Any], config: VolumeConfig
) -> np.ndarray | None:
    """A label map (D, H, W) on the grid of its volume; None, with a warning, where it does not
    fit.
    """
    try:
        labels = masks.read_mask(path, slices, ConvertConfig().max_pixels)
    except InputError as fault:
        log(f"warning: {fault}")
        return None
    return labels_of(labels, len(ORGANS), usable(slices), row, config)


def _marks(path: Path, column: str) -> dict[tuple[str, str], dict[str, list[int]]]:
    """Instance numbers by series and by what they show, from a table of slices; left and right are
    one organ.
    """
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    if path.is_file():
        text = dict.fromkeys([*KEYS, column], pl.String)
        table = pl.read_csv(path.read_bytes(), schema_overrides=text)
        for patient, series, instance, name in table.select(
            *KEYS, "instance_number", column
        ).iter_rows():
            own = found.setdefault((patient, series), {})
            own.setdefault(name.removeprefix("left ").removeprefix("right "), []).append(instance)
    return found


def _hospitals(data: Path) -> dict[str, str]:
    """Hospital by patient, where the table of the series has that column."""
    path = data / "train_series_meta.csv"
    table = pl.read_csv(path.read_bytes(), infer_schema=False) if path.is_file() else pl.DataFrame()
    if "hospital" not in table.columns:
        return {}
    return dict(table.select("patient_id", "hospital").iter_rows())


def _shown(
    mask: np.ndarray | None,
    at: np.ndarray,
    instances: np.ndarray,
    table: dict[tuple[str, str], dict[str, list[int]]],
    key: tuple[str, str],
) -> dict[str, np.ndarray]:
    if mask is not None:
        return {name: (mask[at] == k).any((1, 2)) for k, name in enumerate(ORGANS, 1)}
    asked = {name for own in table.values() for name in own}
    return {name: np.isin(instances, table[key].get(name, [])) for name in sorted(asked)}


def _injured(
    labels: dict[str, Any] | None, instances: np.ndarray, marks: dict[str, list[int]]
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    if labels is None:
        return found
    for target in TARGETS:
        injured, name = not labels[target.columns[0]], SLICE_TARGETS.get(target.name)
        if name is None or not injured:
            found[target.name] = np.full(len(instances), injured)
        elif name in marks:
            found[target.name] = np.isin(instances, marks[name])
    return found
