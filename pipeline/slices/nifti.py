"""Unlabelled NIfTI volumes (FLARE 2023 style) as the same oriented slices that DICOM series are."""

import functools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel import orientations

from ..run.config import ConvertConfig
from .dicom_header import SPARE_BYTES
from .geometry import Placement
from .readers import SliceRead, Unreadable
from .window import AIR_HU

MAX_BYTES = 4 << 30
# NIfTI counts x to the right and y to the front, DICOM to the left and to the back
TO_LPS = np.array([-1.0, -1.0, 1.0])


def _refusal(fault: Exception) -> Unreadable:
    """What a library's error means: the machine's trouble (system calls fail with a number) or the
    file's. Its text may hold values.
    """
    machine = (
        isinstance(fault, (FileNotFoundError, MemoryError))
        or getattr(fault, "errno", None) is not None
    )
    return Unreadable(
        f"not readable: {type(fault).__name__}"
        if machine
        else f"NIfTI: not readable ({type(fault).__name__})"
    )


def _open(path: Path) -> Any:
    """nibabel's image; from a file map where it does not know the ending (`.Nii.Gz`)."""
    if path.suffix in (path.suffix.lower(), path.suffix.upper()):
        return nib.load(path, mmap=False)
    return _of_holder(nib.Nifti1Image, nib.fileholders.FileHolder(str(path)))


def _of_holder(kind: Any, holder: Any) -> Any:
    return kind.from_file_map({"header": holder, "image": holder}, mmap=False)


def _open_image(path: Path, max_pixels: int) -> tuple[Any, np.ndarray]:
    """The image, nothing but its header read, and the turn of its axes to left, back and down
    (nibabel's orientation array).

    Where neither form says how the patient lies, nibabel makes up an orientation, and half of such
    files would be mirrored: they are refused.
    """
    try:
        image: Any = _open(path)
        if (
            len(image.shape) < 3
            or max(image.shape[3:], default=1) != 1
            or image.get_data_dtype().kind not in "iuf"
        ):
            raise Unreadable("NIfTI: not one scalar volume")
        if not image.header["qform_code"] and not image.header["sform_code"]:
            raise Unreadable("NIfTI: orientation unknown (qform_code and sform_code are 0)")
        turn = orientations.ornt_transform(
            orientations.io_orientation(image.affine), orientations.axcodes2ornt("LPI")
        )
    except Unreadable:
        raise
    except Exception as fault:  # nibabel raises many kinds
        raise _refusal(fault) from None
    pixels = np.prod(
        [image.shape[int(axis)] for axis in np.argsort(turn[:, 0])[:2]], dtype=np.int64
    )
    if (
        not 0 < pixels <= max_pixels
        or not 0
        < np.prod(image.shape, dtype=np.float64) * image.get_data_dtype().itemsize
        <= MAX_BYTES
    ):
        raise Unreadable("too large: NIfTI dimensions are implausible")
    return image, turn


def count_slices(path: Path, max_pixels: int) -> int:
    """Number of axial slices of a NIfTI file, from its header.

    Raises:
        Unreadable: no NIfTI, not one scalar volume, absurd size, or an affine that is no
        orientation.
    """
    image, turn = _open_image(path, max_pixels)
    return int(image.shape[int(np.argsort(turn[:, 0])[2])])


def _stored(path: Path, image: Any) -> np.ndarray:
    """All stored values of `image`, in the file's order of axes; a `.nii.gz` is read to its end,
    for its checksum lies there and nibabel stops before it.
    """
    if not path.name.lower().endswith(".gz"):
        return image.dataobj.get_unscaled()
    with igzip.open(path) as stream:
        holder = nib.fileholders.FileHolder(fileobj=stream)
        stored = _of_holder(type(image), holder).dataobj.get_unscaled()
        while stream.read(1 << 20):
            if stream.tell() > MAX_BYTES + SPARE_BYTES:
                raise Unreadable("too large: the compressed NIfTI has no end")
    return stored


@functools.lru_cache(1)
def _load(
    path: Path, max_pixels: int, state: tuple[int, int]
) -> tuple[np.ndarray, float, float, np.ndarray] | Unreadable:
    """Stored values (x to the left, y to the back, z down), slope, intercept, and the affine of
    these axes to LPS millimetres; `state` is when the file was written and its size.

    What is wrong with a damaged file is returned, not raised, and so found once, not for each
    slice.
    """
    try:
        image, turn = _open_image(path, max_pixels)
        stored = orientations.apply_orientation(
            _stored(path, image).reshape(image.shape[:3], order="F"), turn
        )
    except Unreadable as fault:
        return fault
    except Exception as fault:  # nibabel and the decompressor raise many kinds
        return _refusal(fault)
    affine = image.affine @ orientations.inv_ornt_aff(turn, image.shape[:3])
    affine[:3] *= TO_LPS[:, None]
    return stored, float(image.dataobj.slope), float(image.dataobj.inter), affine


def _loaded(path: Path, max_pixels: int) -> tuple[np.ndarray, float, float, np.ndarray]:
    """What `_load` gives, anew where the file has been written again meanwhile.

    Raises:
        Unreadable: damaged data.
    """
    try:
        found = path.stat()
    except OSError as fault:
        raise _refusal(fault) from None
    loaded = _load(path, max_pixels, (found.st_mtime_ns, found.st_size))
    if isinstance(loaded, Unreadable):
        raise loaded
    return loaded


def nifti_slice(
    path: Path, k: int, max_pixels: int
) -> tuple[np.ndarray, list[float], list[float], tuple[float, float]]:
    """Slice `k`, counted from the most superior: HU (rows, cols) float64; position, orientation
    and spacing (y, x) as DICOM has them, in the file's unit of length.

    NaN around the body, as some resampling leaves it, is black; `AIR_HU` itself is no proof of air.

    Raises:
        Unreadable: damaged data, or values that are not finite.
    """
    stored, slope, intercept, affine = _loaded(path, max_pixels)
    hu = stored[:, :, k].T.astype(np.float64) * slope + intercept
    nothing = np.isnan(hu)
    if nothing.all() or np.isinf(hu).any():
        raise Unreadable("NIfTI: values that are not finite")
    hu[nothing] = AIR_HU
    steps = np.linalg.norm(affine[:3, :2], axis=0)
    orientation = (affine[:3, :2] / steps).T.ravel()
    position = affine[:3] @ [0.0, 0.0, float(k), 1.0]
    return hu, position.tolist(), orientation.tolist(), (float(steps[1]), float(steps[0]))


def read(file: str, k: int, config: ConvertConfig, careful: bool) -> SliceRead:
    """Slice `k` of a file, numbered from 1: see `readers`."""
    hu, position, orientation, spacing = nifti_slice(Path(file), k, config.max_pixels)
    return SliceRead(hu, spacing, Placement(k + 1, position, orientation), "nibabel", "NIfTI")


def read_labels(path: Path, max_pixels: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """A label map as the slices that `nifti_slice` would give, superior first: (N, rows, cols)
    uint8 with values up to `labels`, and (N,) heights of the slices along their normal, in the
    file's unit of length.

    Raises:
        Unreadable: no NIfTI, damaged, orientation unknown, or other values than 0 to `labels`.
    """
    stored, slope, intercept, affine = _loaded(path, max_pixels)
    values = stored if (slope, intercept) == (1.0, 0.0) else stored * slope + intercept
    with np.errstate(invalid="ignore"):  # NaN is no label either
        found = np.ascontiguousarray(values.transpose(2, 1, 0).astype(np.uint8))
    if (found != values.transpose(2, 1, 0)).any() or found.max() > labels:
        raise Unreadable(f"NIfTI: values other than the labels 0 to {labels}")
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal *= np.sign(normal[2]) / np.linalg.norm(normal)  # to the head, as heights of slices run
    steps = np.arange(len(found))[:, None] * affine[:3, 2]
    return found, (affine[:3, 3] + steps) @ normal
