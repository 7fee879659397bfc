"""One DICOM file to what it stores of one slice: the decoders, after the gate of `dicom_header`.
Who decodes what:

| pixel data | decoder | why |
|---|---|---|
| uncompressed, deflated | numpy | a view of bytes whose number was checked |
| RLE Lossless | imagecodecs | checks its bounds, where dicomsdl writes out of them |
| lossless JPEG, JPEG-LS, JPEG 2000 | dicomsdl, then pydicom | called in a process that may die |
| lossy JPEG, JPEG-LS, JPEG 2000 | pydicom | its rounding is the reference |
| streams of 8 bits at most in files of 16 | pydicom | dicomsdl fills it byte by byte |
"""

import io
import os
import struct
from typing import Any

import cv2
import dicomsdl
import imagecodecs
import numpy as np
import pydicom

from ..run.config import ConvertConfig
from .dicom_header import (
    BIG_ENDIAN,
    ITEM,
    JPEG,
    JPEG_2000,
    LOSSLESS,
    NATIVE,
    RLE,
    SEQUENCE_END,
    SPARE_BYTES,
    Header,
    check,
    element,
    read_header,
)
from .geometry import Placement, is_transposed, orient
from .readers import SliceRead, Unreadable, instance_of
from .window import Stored

SIZE_DIFFERS = "segment decodes to another size than the picture's"


def _frame(header: Header) -> memoryview:
    """The compressed picture: all fragments behind the offset table, each checked to lie inside the
    file; one alone is not copied.
    """
    parts: list[memoryview] = []
    at, data = header.start, memoryview(header.data)
    while at + 8 <= len(data):
        tag, _, at, length = element(data, at, False, "<")
        if tag == SEQUENCE_END:
            return parts[1] if len(parts) == 2 else memoryview(b"".join(parts[1:]))
        if tag != ITEM or at + length > len(data):
            break
        parts.append(data[at : at + length])
        at += length
    raise Unreadable("pixel data too short: a fragment is damaged or cut off")


def _padding(segment: memoryview) -> int:
    """Bytes that zeros behind the data of an RLE segment may decode to: a pair of zeros is a run of
    one zero.
    """
    return (len(segment) - len(bytes(segment).rstrip(b"\0"))) // 2


def _segment(segment: memoryview, size: int) -> np.ndarray:
    """One PackBits plane (size,): what decodes to more than padding explains has runs too many
    somewhere, and its pixels may be shifted.
    """
    try:
        # longer than a plane, so that too many runs show; the library's stubs know no arrays
        plane: Any = imagecodecs.packbits_decode(
            segment,  # type: ignore[arg-type]
            out=np.empty(size + len(segment) // 2, np.uint8),  # type: ignore[arg-type]
        )
    except imagecodecs.PackbitsError as fault:
        cut = "CORRUPT" in str(fault)
        raise Unreadable(f"damaged RLE: a {'run is cut off' if cut else SIZE_DIFFERS}") from None
    if len(plane) != size and not size < len(plane) <= size + _padding(segment):
        raise Unreadable(f"damaged RLE: a {SIZE_DIFFERS}")
    return plane[:size]


def _decode_rle(header: Header, frame: memoryview) -> np.ndarray:
    """PackBits planes, most significant byte first; every segment must lie in the frame and decode
    to one plane.

    Some encoders pad segments with zeros, which are cut off as pydicom does.
    """
    size, planes = header.rows * header.cols, header.bits_allocated // 8
    count, *starts = struct.unpack_from(f"<{planes + 1}I", bytes(frame[:64]).ljust(64, b"\0"))
    bounds = [*starts, len(frame)]
    if (
        count != planes
        or starts[0] < 64
        or any(not 0 < b - a <= 2 * size + 64 for a, b in zip(bounds, bounds[1:], strict=False))
    ):
        raise Unreadable("damaged RLE: implausible segment header")
    decoded = [
        _segment(frame[a:b], size).reshape(header.rows, header.cols)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return decoded[0] if planes == 1 else cv2.merge(decoded[::-1]).view("<u2")[..., 0]


def _codestream(frame: bytes, syntax: str) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits a sample that a JPEG, JPEG-LS or JPEG 2000 stream
    declares; ValueError where it does not.
    """
    if syntax in JPEG_2000:
        at = frame.index(b"\xff\x4f\xff\x51")
        (x1, y1, x0, y0), (components, depth) = (
            struct.unpack_from(">4I", frame, at + 8),
            struct.unpack_from(">HB", frame, at + 40),
        )
        return y1 - y0, x1 - x0, components, (depth & 0x7F) + 1
    at = 2
    while at + 4 < len(frame) and frame[at] == 0xFF:
        if frame[at + 1] == 0xFF:  # any number of them may fill the space before a marker
            at += 1
            continue
        marker, length = struct.unpack_from(">BH", frame, at + 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            depth, rows, cols, components = struct.unpack_from(">BHHB", frame, at + 4)
            return rows, cols, components, depth
        at += 2 + length
    raise ValueError("no frame header")


def _decode_pydicom(header: Header) -> np.ndarray:
    try:
        dataset = pydicom.dcmread(io.BytesIO(header.data), force=True)
        dataset.BitsStored = header.bits_stored
        pixels = dataset.pixel_array
    except MemoryError:
        raise
    # pydicom's plug-ins raise what they like, and the text may hold values of tags
    except Exception as fault:
        raise Unreadable(f"undecodable: pydicom raises {type(fault).__name__}") from None
    if (
        pixels.shape != (header.rows, header.cols)
        or pixels.dtype.itemsize * 8 != header.bits_allocated
    ):
        raise Unreadable("undecodable: the decoded picture has another shape than the header says")
    return pixels.view(f"u{pixels.dtype.itemsize}")


def decode(header: Header, careful: bool) -> tuple[np.ndarray, int, str]:
    """Stored bit patterns (rows, cols) as uint8 or uint16, how many low bits of them count, and the
    decoder's name.

    With `careful` (a process died or failed over this file) dicomsdl is not asked. An exception
    other than Unreadable is dicomsdl's: the process must be given up, for its heap can't be trusted
    any more.
    """
    shape, kind = (header.rows, header.cols), f"u{header.bits_allocated // 8}"
    if header.transfer_syntax in NATIVE:
        order = ">" if header.transfer_syntax == BIG_ENDIAN else "<"
        stored = np.frombuffer(
            header.data, order + kind, shape[0] * shape[1], header.start
        ).reshape(shape)
        return stored.astype(kind, copy=False), header.bits_stored, "numpy"
    frame = _frame(header)
    if header.transfer_syntax == RLE:
        return _decode_rle(header, frame), header.bits_stored, "imagecodecs"
    try:
        *declared, depth = _codestream(bytes(frame), header.transfer_syntax)
    except (ValueError, struct.error):
        raise Unreadable("damaged: the compressed picture has no header") from None
    if declared != [*shape, 1] or depth > header.bits_allocated:
        raise Unreadable("damaged: header and compressed picture contradict each other")
    narrow = depth <= 8 and header.bits_allocated == 16
    if careful or narrow or header.transfer_syntax not in LOSSLESS:
        return _decode_pydicom(header), header.bits_allocated, "pydicom"
    stored = np.empty(shape, kind)
    dicomsdl.open_memory(header.data, False).copyFrameData(0, stored)
    return stored, header.bits_stored if header.transfer_syntax in JPEG else depth, "dicomsdl"


def picture(data: bytes, max_pixels: int, careful: bool = False) -> tuple[Stored, Header, str]:
    """The picture that one file stores (rows, cols), its header, and the name of its decoder.

    WindowCenter and WindowWidth are never read.

    Raises:
        Unreadable: with the reason for the quarantine.
    """
    header = check(read_header(data, 4 * max_pixels + SPARE_BYTES), max_pixels)
    words, bits, decoder = decode(header, careful)
    inverted = header.photometric == "MONOCHROME1"
    stored = Stored(words, bits, header.signed == 1, header.slope, header.intercept, inverted)
    return stored, header, decoder


def _content(file: str, max_pixels: int) -> bytes:
    """A whole file, in one read; Unreadable, unread, where it is larger than any picture."""
    try:
        with open(file, "rb", buffering=0) as handle:
            if os.fstat(handle.fileno()).st_size > 4 * max_pixels + SPARE_BYTES:
                raise Unreadable(
                    "too large: the file is larger than any picture of convert.max_pixels"
                )
            return handle.read()
    except OSError as fault:
        raise Unreadable(f"not readable: {type(fault).__name__}") from None


def read(file: str, k: int, config: ConvertConfig, careful: bool) -> SliceRead:
    """The slice of one file: see `readers`. The number in its name counts before the tag's."""
    stored, header, decoder = picture(_content(file, config.max_pixels), config.max_pixels, careful)
    orientation, position = header.orientation, header.patient_position
    words = orient(stored.words, orientation, position, config.flip_hfs)
    number, spacing = instance_of(os.path.basename(file)), header.spacing or (None, None)
    return SliceRead(
        stored._replace(words=words),
        spacing[::-1] if is_transposed(orientation) else spacing,
        Placement(
            header.instance if number is None else number, header.position, orientation, position
        ),
        decoder,
        header.transfer_syntax,
    )
