"""Write the phantom as a data set in the competition's layout: real DICOM with the quirks of real files, and all tables.

Quirks are dealt from decks to shuffled series, so each appears in a small data set too and none depends on a label.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import PhantomConfig
from .phantom import PHASES, Scan, make_scan
from .targets import ANY_INJURY, COLUMNS, TARGETS

TRAIN, TEST, UNLABELLED = 0, 1, 2
FOLDERS = ("train_images", "test_images", "unlabelled")
TABLES = (
    "train.csv",
    "train_series_meta.csv",
    "image_level_labels.csv",
    "test_series_meta.csv",
    "sample_submission.csv",
    "phantom_truth.csv",
)
SLICE_LABELS = {"bowel": "Bowel", "extravasation": "Active_Extravasation"}
# (bits stored, signed, intercept, slope): stored = (HU - intercept) / slope
STORAGE = {
    "u12": (12, 0, -1024, 1.0), "s16": (16, 1, 0, 1.0), "s12": (12, 1, 0, 1.0), "s13": (13, 1, 0, 1.0), "u16-8192": (16, 0, -8192, 1.0),
    "u16": (16, 0, -1024, 1.0), "s14": (14, 1, -1024, 1.0), "u16-32768": (16, 0, -32768, 1.0), "no_bits": (16, 1, 0, 1.0),
    "half": (16, 1, -1024, 0.5),
    "mono1": (12, 0, -1024, 1.0), "s15": (15, 1, -8192, 1.0),
}  # fmt: skip
ENCODINGS = ("rle",) * 4 + ("j2k",) + ("rle",) * 4 + ("deflated",) + ("rle",) * 4 + ("explicit",) + ("rle",) * 4 + ("implicit",)
HEADERS = (
    "",
    "windows",
    "flip_x",
    "no_window",
    "",
    "flip_y",
    "no_sop_class",
    "bare",
    "ascending",
    "",
    "flip_xy",
    "no_position",
    "ffs",
    "gap",
)
FAULTS = (
    ("",) * 3
    + ("partial",)
    + ("",) * 2
    + ("truncated",)
    + ("",) * 2
    + ("duplicate",)
    + ("",) * 2
    + ("resized",)
    + ("",) * 2
    + ("rle_header", "rows")
)


@dataclass(frozen=True)
class SeriesPlan:
    """One series: its place, contrast phase and quirks (names out of the decks above)."""

    series_id: str
    phase: str
    encoding: str
    storage: str
    header: str
    fault: str
    nifti: bool = False


@dataclass(frozen=True)
class PatientPlan:
    """One patient: `split` and `index` seed the anatomy; `labels` are class numbers by target."""

    split: int
    index: int
    patient_id: str
    labels: dict[str, int]
    series: tuple[SeriesPlan, ...]


def _draw_labels(config: PhantomConfig, count: int, rng: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Class numbers of `count` patients: prevalences met exactly after rounding, at least two of each class from 24 patients on.

    Extravasation falls twice as often on a patient with an injured organ.
    """

    def number(share: float) -> int:
        return max(round(share * count), 2 if count >= 24 and share > 0 else 0)

    labels = {}
    for organ in ("kidney", "liver", "spleen"):
        low, high = number(config.organ_low), number(config.organ_high)
        labels[organ] = rng.permutation(np.repeat([0, 1, 2], [max(count - low - high, 0), low, high])[:count])
    labels["bowel"] = rng.permutation(np.arange(count) < number(config.bowel)).astype(int)
    odds = 1.0 + (sum(labels[organ] for organ in ("kidney", "liver", "spleen")) > 0)
    chosen = rng.choice(count, number(config.extravasation), replace=False, p=odds / odds.sum())
    labels["extravasation"] = np.isin(np.arange(count), chosen).astype(int)
    return labels


def make_plan(config: PhantomConfig, seed: int) -> list[PatientPlan]:
    """Who there is, with which labels, series and quirks. Ids are random numbers; decks are dealt in shuffled order."""
    counts = (config.train_patients, config.test_patients, config.unlabelled_patients)
    rng = np.random.default_rng([seed, 99, 0])
    ids = iter(rng.choice(90_000, sum(counts), replace=False) + 10_000)
    several = [rng.random(count) < config.second_series for count in counts]
    several[UNLABELLED][:] = False
    total = sum(counts) + sum(int(mask.sum()) for mask in several)
    series_ids = iter(rng.choice(65_000, total, replace=False) + 1)
    decks = [iter(_deal(deck, total, rng)) for deck in (tuple(PHASES), ENCODINGS, tuple(STORAGE), HEADERS, FAULTS)]
    nifti = set(rng.choice(counts[UNLABELLED], -(-counts[UNLABELLED] // 10), replace=False)) if counts[UNLABELLED] else set()
    plans = []
    for split, count in enumerate(counts):
        labels = _draw_labels(config, count, np.random.default_rng([seed, 99, 1 + split]))
        for index in range(count):
            first = _series(next(series_ids), decks, nifti=split == UNLABELLED and index in nifti)
            series = [first, _series(next(series_ids), decks, other=first.phase)] if several[split][index] else [first]
            chosen = {name: int(values[index]) for name, values in labels.items()}
            plans.append(PatientPlan(split, index, str(next(ids)), chosen, tuple(series)))
    return plans


def _deal(deck: tuple[str, ...], count: int, rng: np.random.Generator) -> NDArray[np.str_]:
    return rng.permutation(list(islice(cycle(deck), count)))


def _series(number: int, decks: list[Any], nifti: bool = False, other: str = "") -> SeriesPlan:
    phase, encoding, storage, header, fault = (str(next(deck)) for deck in decks)
    if phase == other:
        phase = tuple(PHASES)[(tuple(PHASES).index(phase) + 1) % len(PHASES)]
    if fault == "rle_header":
        encoding = "rle"
    return SeriesPlan(str(number), phase, encoding, storage, header, fault, nifti)


def stored_values(hu: NDArray[np.int16], storage: str) -> NDArray[np.uint16]:
    """The 16-bit words of a slice: (HU - intercept) / slope in `bits` bits, the unused high bits zero even where signed.

    MONOCHROME1 files store the complement, 2^bits - 1 - value.
    """
    bits, _, intercept, slope = STORAGE[storage]
    words = np.rint((hu.astype(np.float64) - intercept) / slope).astype(np.int64)
    if storage == "mono1":
        words = 2**bits - 1 - words
    return (words & (2**bits - 1)).astype("<u2")


def write_series(folder: Path, scan: Scan, plan: SeriesPlan, rng: np.random.Generator) -> NDArray[np.int64]:
    """Write one DICOM file a slice into `folder`; returns the instance number of each slice of `scan`."""
    depth, (dz, _, _) = len(scan.hu), scan.spacing
    folder.mkdir(parents=True)
    first, top, series_uid = int(rng.choice([1, 1, 2, 37, 120, 401])), rng.uniform(-900, 100), _uid(rng)
    order = np.arange(depth)[::-1] if plan.header == "ascending" else np.arange(depth)
    step = 2 if plan.header == "gap" else 1
    instances = first + step * order
    odd = int(rng.integers(depth // 4, depth - depth // 4))  # the slice that a fault hits
    for k in range(depth):
        z = top - dz * (k - (plan.fault == "duplicate" and k == odd))
        hit = plan.fault if k == odd or (plan.fault == "partial" and k == odd + 1) else ""
        data = _encode(scan.hu[k], scan.spacing, plan, hit, instances[k], z, (series_uid, _uid(rng)))
        (folder / f"{instances[k]}.dcm").write_bytes(_damage(data, hit))
    return instances


def _uid(rng: np.random.Generator) -> str:
    return f"2.25.{int.from_bytes(rng.bytes(15), 'big')}"


def _encode(hu: NDArray[np.int16], spacing: tuple[float, float, float], plan: SeriesPlan, fault: str, instance: int,
            z: float, uids: tuple[str, str]) -> bytes:  # fmt: skip
    """One slice as the bytes of a DICOM file."""
    import io

    from pydicom.encaps import encapsulate
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

    syntaxes = {"rle": RLELossless, "j2k": JPEG2000Lossless, "deflated": DeflatedExplicitVRLittleEndian,
                "explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian}  # fmt: skip
    pitch = spacing[1]
    if fault == "partial":
        hu = hu.copy()
        hu[:, int(0.55 * hu.shape[1]) :] = -1024
    if fault == "resized":
        hu, pitch = _resized(hu, 1.25), pitch / 1.25
    ds = _header(hu, plan, instance, pitch, abs(spacing[0]), z, uids)
    flip = plan.header.removeprefix("flip_") if plan.header.startswith("flip_") else ""
    hu = hu[:: -1 if "y" in flip else 1, :: -1 if "x" in flip else 1]
    words = stored_values(hu, plan.storage)
    ds.file_meta.TransferSyntaxUID = syntaxes[plan.encoding]
    if plan.encoding == "rle":
        from rle.utils import encode_pixel_data

        ds.PixelData = encapsulate([encode_pixel_data(words.tobytes(), ds, "<")])
    elif plan.encoding == "j2k":
        bits, signed, _, _ = STORAGE[plan.storage]
        values = words.astype(np.int64)
        values -= (values >> (bits - 1)) * 2**bits * signed
        ds.compress(
            JPEG2000Lossless, values.astype(np.int16 if signed else np.uint16), encoding_plugin="pylibjpeg", generate_instance_uid=False
        )
    else:
        ds.PixelData = words.tobytes()
    ds["PixelData"].VR = "OW" if plan.encoding in ("explicit", "implicit", "deflated") else "OB"
    if plan.storage == "no_bits":
        del ds.BitsStored, ds.HighBit
    if fault == "rows":
        ds.Rows = 65535
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=plan.header != "no_sop_class", implicit_vr=plan.encoding == "implicit", little_endian=True)
    return buffer.getvalue()


def _header(hu: NDArray[np.int16], plan: SeriesPlan, instance: int, pitch: float, dz: float, z: float, uids: tuple[str, str]) -> Any:
    """The tags of one slice, without pixels: no name, no date."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage

    bits, signed, intercept, slope = STORAGE[plan.storage]
    rows, columns = hu.shape
    ds, quirk = Dataset(), plan.header
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uids[1]
    if quirk != "no_sop_class":
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.SeriesInstanceUID, ds.Modality, ds.InstanceNumber = uids[0], "CT", int(instance)
    if quirk != "bare":
        ds.SliceThickness, ds.KVP, ds.PatientPosition = f"{dz:.4f}", "120", "FFS" if quirk == "ffs" else "HFS"
    flip_x, flip_y = quirk in ("flip_x", "flip_xy"), quirk in ("flip_y", "flip_xy")
    if quirk != "no_position":
        corner = [(c - 1) / 2 * pitch * (1 if flip else -1) for c, flip in ((columns, flip_x), (rows, flip_y))]
        ds.ImagePositionPatient = [f"{corner[0]:.4f}", f"{corner[1]:.4f}", f"{z:.4f}"]
    ds.ImageOrientationPatient = [-1 if flip_x else 1, 0, 0, 0, -1 if flip_y else 1, 0]
    ds.PixelSpacing = [f"{pitch:.6f}", f"{pitch:.6f}"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME1" if plan.storage == "mono1" else "MONOCHROME2"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = rows, columns, 16, bits, bits - 1, signed
    ds.RescaleIntercept, ds.RescaleSlope = str(intercept), str(slope)
    if quirk not in ("no_window", "bare"):
        ds.WindowCenter, ds.WindowWidth = ([40, 300], [400, 1500]) if quirk == "windows" else (50, 400)
    return ds


def _resized(hu: NDArray[np.int16], factor: float) -> NDArray[np.int16]:
    from scipy.ndimage import zoom

    return np.rint(zoom(hu.astype(np.float32), factor, order=1)).astype(np.int16)


def _damage(data: bytes, fault: str) -> bytes:
    """Break a file in a way that no reader can mend: cut it, or let its RLE header point beyond its end."""
    if fault == "truncated":
        return data[: int(0.6 * len(data))]
    if fault == "rle_header":
        at = data.index(b"\xfe\xff\x00\xe0", data.index(b"\xfe\xff\x00\xe0") + 4) + 8  # second item: the frame
        return data[: at + 4] + b"\xff\xff\xff\x7f" * 2 + data[at + 12 :]
    return data


def write_nifti(path: Path, scan: Scan) -> None:
    """Write a volume as NIfTI (FLARE style): int16 HU, axes x, y, z from the patient's left, back and feet (RAS affine)."""
    import nibabel

    dz, dy, dx = scan.spacing
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.ascontiguousarray(scan.hu[::-1].transpose(2, 1, 0)), np.diag([-dx, -dy, dz, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def write_patient(config: PhantomConfig, seed: int, root: Path, plan: PatientPlan) -> list[dict[str, Any]]:
    """Make and write all series of a patient; returns one record a series for the tables."""
    records = []
    for number, series in enumerate(plan.series):
        scan = make_scan(config, plan.labels, (seed, plan.split, plan.index), number, series.phase)
        folder = root / FOLDERS[plan.split] / plan.patient_id / series.series_id
        if series.nifti:
            write_nifti(folder.parent.with_name(f"{plan.patient_id}.nii.gz"), scan)
            instances = np.arange(len(scan.hu))
        else:
            instances = write_series(folder, scan, series, np.random.default_rng([seed, plan.split, plan.index, 3, number]))
        shown = {
            SLICE_LABELS[name]: sorted(instances[mask].tolist()) for name, mask in (("bowel", scan.bowel), ("extravasation", scan.blush))
        }
        records.append({"series_id": series.series_id, "aortic_hu": scan.aortic_hu, "slices": len(scan.hu), "shown": shown})
    return records


def one_hot(labels: dict[str, int]) -> list[int]:
    """The 13 columns of the tables for class numbers by target."""
    return [int(labels[target.name] == k) for target in TARGETS for k in range(len(target.classes))]


def write_dataset(config: PhantomConfig, seed: int, root: Path, jobs: int,
                  report: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items) -> dict[str, Any]:  # fmt: skip
    """Write the whole data set below `root` with `jobs` processes; returns counts for the manifest. `report` shows progress."""
    from joblib import Parallel, delayed

    plans = make_plan(config, seed)
    work = Parallel(n_jobs=jobs, batch_size=4, return_as="generator")(delayed(write_patient)(config, seed, root, plan) for plan in plans)
    records = list(report(work, len(plans)))
    write_tables(root, plans, records)
    train = [plan for plan in plans if plan.split == TRAIN]
    prevalence = dict(zip(COLUMNS, np.mean([one_hot(plan.labels) for plan in train], axis=0).round(4).tolist(), strict=True))
    series = [record for found in records for record in found]
    return {"patients": len(plans), "series": len(series), "slices": sum(record["slices"] for record in series), "prevalence": prevalence}


def write_tables(root: Path, plans: list[PatientPlan], records: list[list[dict[str, Any]]]) -> None:
    """All tables, sorted by the (random) ids as the competition's are."""
    pairs = sorted(zip(plans, records, strict=True), key=lambda pair: int(pair[0].patient_id))
    train, test = ([pair for pair in pairs if pair[0].split == split] for split in (TRAIN, TEST))
    prior = [1 / len(target.classes) for target in TARGETS for _ in target.classes]
    tables = {
        "train.csv": (["patient_id", *COLUMNS, ANY_INJURY],
                      [[p.patient_id, *one_hot(p.labels), int(any(p.labels.values()))] for p, _ in train]),
        "train_series_meta.csv": (["patient_id", "series_id", "aortic_hu", "incomplete_organ"],
                                  [[p.patient_id, r["series_id"], r["aortic_hu"], 0] for p, found in train for r in found]),
        "image_level_labels.csv": (["patient_id", "series_id", "instance_number", "injury_name"],
                                   [[p.patient_id, r["series_id"], instance, name] for p, found in train for r in found
                                    for name, instances in r["shown"].items() for instance in instances]),
        "test_series_meta.csv": (["patient_id", "series_id", "aortic_hu"],
                                 [[p.patient_id, r["series_id"], r["aortic_hu"]] for p, found in test for r in found]),
        "sample_submission.csv": (["patient_id", *COLUMNS], [[p.patient_id, *prior] for p, _ in test]),
        "phantom_truth.csv": (["patient_id", *COLUMNS], [[p.patient_id, *one_hot(p.labels)] for p, _ in test]),
    }  # fmt: skip
    for name, (columns, rows) in tables.items():
        with open(root / name, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, lineterminator="\n").writerows([columns, *rows])
