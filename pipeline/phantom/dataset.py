"""Write the phantom as a data set in the competition's layout: DICOM with the quirks of real files,
NIfTI, and all tables.

Quirks are dealt from decks to shuffled series: each appears in a small data set too and none
depends on a label.
"""

import csv
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..competition.targets import ANY_INJURY, COLUMNS, TARGETS
from ..run.config import PhantomConfig
from ..system.contained import Failure
from ..system.errors import InputError
from ..system.pool import spread
from .anatomy import PHASES, Scan, make_scan

TRAIN, TEST, UNLABELLED = 0, 1, 2
FOLDERS = ("train_images", "test_images", "unlabelled")
SLICE_LABELS = {"bowel": "Bowel", "extravasation": "Active_Extravasation"}
WINDOW_CENTRE = 50  # HU, of the fixed window
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
# What differs from file to file of a series, as even-sized placeholders in its header: number,
# height, then two UIDs.
PLACES = ("-77777", "-66666.66666", "2.25." + "9" * 39, "2.25." + "8" * 39)


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
    odds = 1.0 + (sum(labels.values()) > 0)
    chosen = rng.choice(count, number(config.extravasation), replace=False, p=odds / odds.sum())
    labels["bowel"] = rng.permutation(np.arange(count) < number(config.bowel)).astype(int)
    labels["extravasation"] = np.isin(np.arange(count), chosen).astype(int)
    return labels


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
    decks = [
        rng.permutation(list(islice(cycle(deck), total)))
        for deck in (tuple(PHASES), ENCODINGS, tuple(STORAGE), HEADERS, FAULTS)
    ]
    dealt = (
        SeriesPlan(str(number), *map(str, quirks))
        for number, *quirks in zip(numbers, *decks, strict=True)
    )
    dealt = (
        replace(series, encoding="rle") if series.fault == "rle_header" else series
        for series in dealt
    )
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


def write_series(folder: Path, scan: Scan, plan: SeriesPlan, rng: np.random.Generator) -> list[int]:
    """Write one DICOM file a plane into `folder`; returns the instance numbers of the planes."""
    folder.mkdir(parents=True, exist_ok=True)  # a worker killed here is done again
    depth, dz, top, series_uid = len(scan.hu), scan.spacing[0], rng.uniform(-900, 100), _uid(rng)
    order = np.arange(depth)[:: -1 if plan.header == "ascending" else 1] * (
        2 if plan.header == "gap" else 1
    )
    instances = (int(rng.choice([1, 1, 2, 37, 120, 401])) + order).tolist()
    odd = int(rng.integers(depth // 4, depth - depth // 4))  # the plane that a fault hits
    headers: dict[tuple[int, ...], tuple[bytes, bytes]] = {}
    for k, number in enumerate(instances):
        fault = plan.fault if k == odd or (plan.fault == "partial" and k == odd + 1) else "none"
        hu, pitch = _spoilt(scan.hu[k], scan.spacing[1], fault)
        if hu.shape not in headers:
            headers[hu.shape] = _header(hu.shape, pitch, dz, plan)
        z = top - dz * (odd - 1 if fault == "duplicate" else k)
        values = (f"{number:<6d}", f"{z:<12.4f}", series_uid, _uid(rng))
        data = _file(*(_filled(part, values) for part in headers[hu.shape]), hu, plan, fault)
        (folder / f"{number}.dcm").write_bytes(data)
    return instances


def _uid(rng: np.random.Generator) -> str:
    return f"2.25.1{int.from_bytes(rng.bytes(15), 'big'):038d}"


def _filled(header: bytes, values: tuple[str, ...]) -> bytes:
    for place, value in zip(PLACES, values, strict=True):
        header = header.replace(place.encode(), value.encode())
    return header


def _spoilt(hu: NDArray[np.int16], pitch: float, fault: str) -> tuple[NDArray[np.int16], float]:
    """One plane and its pixel size after faults of the picture: black columns, or another size."""
    if fault == "partial":
        return np.where(np.arange(hu.shape[1]) < 0.55 * hu.shape[1], hu, np.int16(-1024)), pitch
    if fault == "resized":
        import cv2

        larger = cv2.resize(hu, None, fx=1.25, fy=1.25, interpolation=cv2.INTER_LINEAR)
        return larger, pitch * hu.shape[0] / larger.shape[0]
    return hu, pitch


def _signs(plan: SeriesPlan) -> tuple[int, int]:
    """Direction of the columns (x) and of the rows (y): -1 where flipped."""
    return -1 if plan.header in ("flip_x", "flip_xy") else 1, -1 if plan.header in (
        "flip_y",
        "flip_xy",
    ) else 1


def _header(
    shape: tuple[int, int], pitch: float, dz: float, plan: SeriesPlan
) -> tuple[bytes, bytes]:
    """Preamble with meta, and all tags before the pixels, with `PLACES` still to fill. No name, no
    date.
    """
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset, write_file_meta_info

    bits, signed, intercept, slope = STORAGE[plan.storage]
    quirk, signs, ds, meta = plan.header, _signs(plan), Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.CTImageStorage, PLACES[3]
    meta.TransferSyntaxUID = getattr(uid, SYNTAXES[plan.encoding])
    ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber, ds.Modality = (
        PLACES[3],
        PLACES[2],
        PLACES[0],
        "CT",
    )
    if quirk != "no_sop_class":
        ds.SOPClassUID = uid.CTImageStorage
    if quirk != "bare":
        ds.SliceThickness, ds.KVP, ds.PatientPosition = (
            f"{dz:.4f}",
            "120",
            "FFS" if quirk == "ffs" else "HFS",
        )
    if quirk not in ("no_window", "bare"):
        ds.WindowCenter, ds.WindowWidth = (
            ([40, 300], [400, 1500]) if quirk == "windows" else (50, 400)
        )
    if quirk != "no_position":
        corner = [
            f"{-sign * (count - 1) / 2 * pitch:.4f}"
            for sign, count in zip(signs, shape[::-1], strict=True)
        ]
        ds.ImagePositionPatient = [*corner, PLACES[1]]
    ds.ImageOrientationPatient, ds.PixelSpacing = (
        [signs[0], 0, 0, 0, signs[1], 0],
        [f"{pitch:.6f}"] * 2,
    )
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (
        1,
        "MONOCHROME1" if plan.storage == "mono1" else "MONOCHROME2",
    )
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.PixelRepresentation = *shape, 16, signed
    if plan.storage != "no_bits":
        ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.RescaleIntercept, ds.RescaleSlope = str(intercept), str(slope)
    head, body = DicomBytesIO(), DicomBytesIO()
    for buffer in (head, body):
        buffer.is_little_endian, buffer.is_implicit_VR = (
            True,
            plan.encoding == "implicit" and buffer is body,
        )
    write_file_meta_info(head, meta)
    write_dataset(body, ds)
    return b"\0" * 128 + b"DICM" + head.getvalue(), body.getvalue()


def _file(meta: bytes, tags: bytes, hu: NDArray[np.int16], plan: SeriesPlan, fault: str) -> bytes:
    """A whole file: filled header and pixels in the planned encoding, damaged past mending where
    `fault` says so.
    """
    columns, rows = _signs(plan)
    values = stored_values(hu[::rows, ::columns], plan.storage)
    bits = STORAGE[plan.storage][0]
    # unused high bits are 0 even where signed, as in real files
    words = (values & (2**bits - 1)).astype("<u2")
    if fault == "rows":
        at = tags.index(b"\x28\x00\x10\x00") + 8
        tags = tags[:at] + b"\xff\xff" + tags[at + 2 :]
    if plan.encoding in ("rle", "j2k"):
        frame = _compressed(words if plan.encoding == "rle" else values, plan)
        if fault == "rle_header":  # segments that begin beyond the end
            frame = frame[:4] + b"\xff\xff\xff\x7f" * 2 + frame[12:]
        parts = (b"", frame + b"\0" * (len(frame) % 2))  # an empty offset table comes first
        items = b"".join(
            b"\xfe\xff\x00\xe0" + len(part).to_bytes(4, "little") + part for part in parts
        )
        tags += b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + items + b"\xfe\xff\xdd\xe0\0\0\0\0"
    else:
        kind = b"" if plan.encoding == "implicit" else b"OW\0\0"
        tags += b"\xe0\x7f\x10\x00" + kind + words.nbytes.to_bytes(4, "little") + words.tobytes()
    if plan.encoding == "deflated":
        packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        tags = packer.compress(tags) + packer.flush()
        tags += b"\0" * (len(tags) % 2)
    data = meta + tags
    return data[: int(0.6 * len(data))] if fault == "truncated" else data


def stored_values(hu: NDArray[np.int16], storage: str) -> NDArray[np.int64]:
    """(HU - intercept) / slope; MONOCHROME1 files hold HU mirrored about the window's centre, so
    that the inverted picture looks right.
    """
    bits, _, intercept, slope = STORAGE[storage]
    if storage == "mono1":
        return np.clip(2 * WINDOW_CENTRE - hu.astype(np.int64) - intercept, 0, 2**bits - 1)
    return ((hu.astype(np.int64) - intercept) / slope).astype(np.int64)


def _compressed(values: NDArray[Any], plan: SeriesPlan) -> bytes:
    """One frame: RLE of 16-bit words, or JPEG 2000 lossless of the stored values."""
    from pydicom import uid
    from pydicom.pixels import get_encoder

    bits, signed, _, _ = STORAGE[plan.storage] if plan.encoding == "j2k" else (16, 0, 0, 0)
    options = {
        "rows": len(values),
        "columns": values.shape[1],
        "samples_per_pixel": 1,
        "number_of_frames": 1,
        "bits_allocated": 16,
        "bits_stored": bits,
        "pixel_representation": signed,
        "photometric_interpretation": "MONOCHROME2",
    }
    encoder = get_encoder(getattr(uid, SYNTAXES[plan.encoding]))
    return encoder.encode(
        values.astype(np.int16 if signed else np.uint16), encoding_plugin="pylibjpeg", **options
    )


def write_nifti(path: Path, scan: Scan) -> None:
    """Write a volume as NIfTI (FLARE style): int16 HU; x runs to the patient's left, y to the back,
    z up (affine in RAS).
    """
    import nibabel

    dz, dy, dx = scan.spacing
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(
        np.ascontiguousarray(scan.hu[::-1].transpose(2, 1, 0)), np.diag([-dx, -dy, dz, 1.0])
    )
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_patient(
    config: PhantomConfig, seed: int, root: Path, plan: PatientPlan
) -> list[dict[str, Any]]:
    """Make and write all series of a patient; returns one record a series for the tables."""
    records = []
    for number, series in enumerate(plan.series):
        scan = make_scan(config, plan.labels, (seed, plan.split, plan.index), number, series.phase)
        folder = root / FOLDERS[plan.split]
        if series.nifti:
            write_nifti(folder / f"{plan.patient_id}.nii.gz", scan)
            instances = list(range(len(scan.hu)))
        else:
            stream = np.random.default_rng([seed, plan.split, plan.index, 3, number])
            instances = write_series(
                folder / plan.patient_id / series.series_id, scan, series, stream
            )
        shown = [
            (instance, SLICE_LABELS[name])
            for name, planes in scan.shown.items()
            for instance in np.array(instances)[planes].tolist()
        ]
        organs = [
            (instance, name)
            for name, planes in scan.organs.items()
            for instance in np.array(instances)[planes].tolist()
        ]
        records.append(
            {
                "ids": [plan.patient_id, series.series_id],
                "aortic_hu": scan.aortic_hu,
                "slices": len(scan.hu),
                "shown": shown,
                "organs": organs,
            }
        )
    return records


def one_hot(labels: dict[str, int]) -> list[int]:
    """The 13 columns of the tables for class numbers by target."""
    return [int(labels[target.name] == k) for target in TARGETS for k in range(len(target.classes))]


def tables(
    plans: list[PatientPlan], records: list[list[dict[str, Any]]]
) -> dict[str, list[list[Any]]]:
    """Rows (header first) of every table, sorted by the random ids as the competition's are."""
    order = sorted(range(len(plans)), key=lambda k: int(plans[k].patient_id))
    train, test = ([plans[k] for k in order if plans[k].split == split] for split in (TRAIN, TEST))
    series, test_series = (
        [r for k in order if plans[k].split == split for r in records[k]] for split in (TRAIN, TEST)
    )
    prior = [1 / len(target.classes) for target in TARGETS for _ in target.classes]
    keys, columns = ["patient_id", "series_id"], ["patient_id", *COLUMNS]
    return {
        "train.csv": [
            [*columns, ANY_INJURY],
            *([p.patient_id, *one_hot(p.labels), int(any(p.labels.values()))] for p in train),
        ],
        "train_series_meta.csv": [
            [*keys, "aortic_hu", "incomplete_organ"],
            *([*r["ids"], r["aortic_hu"], 0] for r in series),
        ],
        "image_level_labels.csv": [
            [*keys, "instance_number", "injury_name"],
            *([*r["ids"], *one] for r in series for one in r["shown"]),
        ],
        "test_series_meta.csv": [
            [*keys, "aortic_hu"],
            *([*r["ids"], r["aortic_hu"]] for r in test_series),
        ],
        "sample_submission.csv": [columns, *([p.patient_id, *prior] for p in test)],
        "phantom_organs.csv": [
            [*keys, "instance_number", "organ"],
            *([*r["ids"], *one] for r in series for one in r["organs"]),
        ],
        "phantom_truth.csv": [columns, *([p.patient_id, *one_hot(p.labels)] for p in test)],
    }


def write_dataset(
    config: PhantomConfig,
    seed: int,
    root: Path,
    jobs: int,
    report: Callable[[Iterable[Any], int], Iterator[Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Write the whole data set below `root` with `jobs` processes; `report(items, total)` shows
    progress.

    Returns counts for the manifest and the names of all files.
    """
    plans = make_plan(config, seed)
    records: list[Any] = [None] * len(plans)
    for k, answer in report(
        spread(partial(write_patient, config, seed, root), plans, jobs), len(plans)
    ):
        if isinstance(answer, Failure):
            raise InputError(
                answer.reason,
                f"patient {plans[k].patient_id}",
                "free some memory or give --jobs 1, then run again",
            )
        records[k] = answer
    written = tables(plans, records)
    for name, rows in written.items():
        with open(root / name, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, lineterminator="\n").writerows(rows)
    share = np.mean([one_hot(plan.labels) for plan in plans if plan.split == TRAIN], axis=0).round(
        4
    )
    flat = [record for found in records for record in found]
    counts = {
        "patients": len(plans),
        "series": len(flat),
        "slices": sum(record["slices"] for record in flat),
    }
    return {**counts, "prevalence": dict(zip(COLUMNS, share.tolist(), strict=True))}, _files(root)


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
