"""One series to files, as scanners and exports write them: DICOM with its quirks and faults, or
NIfTI.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .anatomy import Scan
from .plan import STORAGE, SYNTAXES, SeriesPlan

# HU about which MONOCHROME1 files are mirrored: the middle of the window as it is by default
WINDOW_CENTRE = 50

# What differs from file to file of a series, as even-sized placeholders in its header: number,
# height, then two UIDs.
PLACES = ("-77777", "-66666.66666", "2.25." + "9" * 39, "2.25." + "8" * 39)


def write_series(folder: Path, scan: Scan, plan: SeriesPlan, rng: np.random.Generator) -> list[int]:
    """Write one DICOM file a plane into `folder`; returns the instance numbers of the planes."""
    folder.mkdir(parents=True, exist_ok=True)  # a worker killed here is done again
    depth, dz, top, series_uid = len(scan.hu), scan.spacing[0], height(rng), _uid(rng)
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
        meta, tags = (_filled(part, values) for part in headers[hu.shape])
        data = _file(meta, tags, hu, plan, fault)
        (folder / f"{number}.dcm").write_bytes(data)
    return instances


def height(rng: np.random.Generator) -> float:
    """Position (mm) of the uppermost plane: the first number of a series' stream."""
    return rng.uniform(-900, 100)


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

        larger: Any = cv2.resize(hu, None, fx=1.25, fy=1.25, interpolation=cv2.INTER_LINEAR)
        return larger, pitch * hu.shape[0] / larger.shape[0]
    return hu, pitch


def _signs(plan: SeriesPlan) -> tuple[int, int]:
    """Direction of the columns (x) and of the rows (y): -1 where flipped."""
    x, y = (-1 if plan.header in (f"flip_{axis}", "flip_xy") else 1 for axis in "xy")
    return x, y


def _header(
    shape: tuple[int, ...], pitch: float, dz: float, plan: SeriesPlan
) -> tuple[bytes, bytes]:
    """Preamble with meta, and all tags before the pixels, with `PLACES` still to fill."""
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset, write_file_meta_info

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid.UID(PLACES[3])
    meta.TransferSyntaxUID = getattr(uid, SYNTAXES[plan.encoding])
    head, body = DicomBytesIO(), DicomBytesIO()
    for buffer in (head, body):
        buffer.is_little_endian = True
        buffer.is_implicit_VR = plan.encoding == "implicit" and buffer is body
    write_file_meta_info(head, meta)
    write_dataset(body, _tags(shape, pitch, dz, plan))
    return b"\0" * 128 + b"DICM" + head.getvalue(), body.getvalue()


def _tags(shape: tuple[int, ...], pitch: float, dz: float, plan: SeriesPlan) -> Any:
    """The data set of one size of picture, without the pixels. No name, no date."""
    from pydicom import uid
    from pydicom.dataset import Dataset

    bits, signed, intercept, slope = STORAGE[plan.storage]
    quirk, signs, ds = plan.header, _signs(plan), Dataset()
    ds.InstanceNumber, ds.SeriesInstanceUID, ds.SOPInstanceUID = PLACES[0], PLACES[2], PLACES[3]
    ds.Modality = "CT"
    if quirk != "no_sop_class":
        ds.SOPClassUID = uid.CTImageStorage
    if quirk != "bare":
        ds.SliceThickness, ds.KVP = f"{dz:.4f}", "120"
        ds.PatientPosition = "FFS" if quirk == "ffs" else "HFS"
    if quirk not in ("no_window", "bare"):
        two = quirk == "windows"
        ds.WindowCenter, ds.WindowWidth = ([40, 300], [400, 1500]) if two else (50, 400)
    if quirk != "no_position":
        corner = [
            f"{-sign * (count - 1) / 2 * pitch:.4f}"
            for sign, count in zip(signs, shape[::-1], strict=True)
        ]
        ds.ImagePositionPatient = [*corner, PLACES[1]]
    ds.ImageOrientationPatient = [signs[0], 0, 0, 0, signs[1], 0]
    ds.PixelSpacing = [f"{pitch:.6f}"] * 2
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME1" if plan.storage == "mono1" else "MONOCHROME2"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.PixelRepresentation = *shape, 16, signed
    if plan.storage != "no_bits":
        ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.RescaleIntercept, ds.RescaleSlope = str(intercept), str(slope)
    return ds


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
        from pydicom.encaps import encapsulate

        items = encapsulate([frame], has_bot=False)
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
    _write(path, scan.hu[::-1].transpose(2, 1, 0), scan, 1, 0.0)


def write_masks(path: Path, scan: Scan, top: float) -> None:
    """Write the label map as the competition's segmentations are stored: x to the patient's left, y
    to the front, z up, so that rows are upside down beside the images unless the affine is heeded.

    The uppermost plane lies at `top` mm, as in the DICOM files.
    """
    _write(path, scan.masks[::-1, ::-1].transpose(2, 1, 0), scan, -1, top)


def _write(path: Path, values: NDArray[Any], scan: Scan, back: int, top: float) -> None:
    """NIfTI of values (x, y, z), centred in the plane; x runs to the patient's left, y to the back
    where `back` is 1, to the front where it is -1.
    """
    import nibabel

    dz, dy, dx = scan.spacing
    steps = np.array([-dx, -back * dy, dz])
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = [
        *(-steps[:2] * (np.array(values.shape[:2]) - 1) / 2),
        top - dz * (len(scan.hu) - 1),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(np.ascontiguousarray(values), affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
