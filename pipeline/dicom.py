"""One DICOM file to an 8-bit picture: a bounds-checked header reader, a gate, the decoders and the fixed window.

Nothing is decoded before `read_header` and `check` found the file whole and plausible. Only the tags in `FIELDS` are read, so no
identifying value can reach an artifact. Who decodes what:

| pixel data | decoder | why |
|---|---|---|
| uncompressed, deflated | numpy | a view of bytes whose number was checked |
| RLE Lossless | pylibjpeg (Rust) | memory-safe; dicomsdl writes out of bounds, and no check short of decoding bounds it |
| lossless JPEG, JPEG-LS, JPEG 2000 | dicomsdl, then pydicom | C libraries: only called in a process that may die |
| lossy JPEG, JPEG-LS, JPEG 2000 | pydicom | its rounding is the reference |
| streams of 8 bits at most in files of 16 | pydicom | dicomsdl fills the 16-bit picture byte by byte |
"""

import functools
import io
import math
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

import cv2
import dicomsdl
import numpy as np
import pydicom
from rle.utils import decode_segment

LOW_HU, HIGH_HU = -150.0, 250.0
SPARE_BYTES = 64 << 20  # header and offset tables: allowed on top of the pixels
IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2"))
NATIVE, RLE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN), "1.2.840.10008.1.2.5"
JPEG, JPEG_LS, JPEG_2000 = (tuple(f"1.2.840.10008.1.2.4.{n}" for n in numbers) for numbers in ((57, 70, 50, 51), (80, 81), (90, 91)))
LOSSLESS = (*JPEG[:2], JPEG_LS[0], JPEG_2000[0])
FIELDS = {
    0x00280010: ("rows", "US"), 0x00280011: ("cols", "US"), 0x00280100: ("bits_allocated", "US"), 0x00280101: ("bits_stored", "US"),
    0x00280103: ("signed", "US"), 0x00280002: ("samples", "US"), 0x00280004: ("photometric", "CS"), 0x00280008: ("frames", "IS"),
    0x00281053: ("slope", "DS"), 0x00281052: ("intercept", "DS"), 0x00280030: ("spacing", "DS2"), 0x00200032: ("position", "DS3"),
    0x00200037: ("orientation", "DS6"), 0x00185100: ("patient_position", "CS"), 0x00200013: ("instance", "IS"),
}  # fmt: skip
PIXEL_DATA, TRANSFER_SYNTAX = 0x7FE00010, 0x00020010
ITEM, ITEM_END, SEQUENCE_END, UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_HEAD, _WORD, _SHORT = ({order: struct.Struct(order + form).unpack_from for order in "<>"} for form in ("HH2sH", "I", "H"))


class Unreadable(Exception):
    """This file becomes no picture. The text is `KIND: DETAIL`, never a value of an identifying tag."""


@dataclass(frozen=True)
class Header:
    """What section 5 needs of one file. PixelData's value is `data[start:start + length]` (length UNDEFINED: fragments)."""

    transfer_syntax: str
    data: bytes
    start: int
    length: int
    rows: int = 0
    cols: int = 0
    bits_allocated: int = 0
    bits_stored: int = 0
    signed: int = 0
    samples: int = 1
    frames: int = 1
    photometric: str = "MONOCHROME2"
    slope: float = 1.0
    intercept: float = 0.0
    spacing: tuple[float, ...] | None = None
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    patient_position: str = ""
    instance: int | None = None


def _element(data: bytes, at: int, explicit: bool, order: str) -> tuple[int, bytes, int, int]:
    """Tag, VR, offset and length of the value of the element at `at`; what has no VR is read as implicit, as pydicom does."""
    group, element, vr, length = _HEAD[order](data, at)
    if explicit and group != 0xFFFE:
        if vr in LONG_VRS:
            return group << 16 | element, vr, at + 12, _WORD[order](data, at + 8)[0]
        if vr.isalpha() and vr.isupper():
            return group << 16 | element, vr, at + 8, length
    return group << 16 | element, b"", at + 8, _WORD[order](data, at + 4)[0]


def _after(data: bytes, vr: bytes, at: int, length: int, explicit: bool, order: str, depth: int = 0) -> int:
    """Offset of what follows the value at `at`; a value of undefined length is a sequence of items."""
    if length != UNDEFINED:
        if at + length > len(data):
            raise Unreadable("cut off: a header element runs past the end of the file")
        return at + length
    if depth > 32:
        raise Unreadable("damaged header: sequences nested more than 32 deep")
    explicit = explicit and vr != b"UN"
    while True:
        tag, _, at, length = _element(data, at, False, order)
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            raise Unreadable("damaged header: a sequence holds something else than items")
        at += length if length != UNDEFINED else 0
        while length == UNDEFINED:
            tag, vr, at, size = _element(data, at, explicit, order)
            if tag == ITEM_END:
                break
            at = _after(data, vr, at, size, explicit, order, depth + 1)


def _value(raw: bytes, kind: str, order: str) -> Any:
    """The value of a wanted element, None where it is empty; ValueError where it is not what its kind says."""
    if kind == "US":
        return _SHORT[order](raw)[0] if len(raw) >= 2 else None
    text = raw.decode("ascii", "replace").strip(" \0")
    if not text or kind == "CS":
        return text or None
    numbers = tuple(float(part) for part in text.split("\\"))
    if len(numbers) != int(kind[2:] or 1) or not all(map(math.isfinite, numbers)):
        raise ValueError(kind)
    if kind == "IS" and not -(2**31) <= numbers[0] < 2**31:  # the standard's range; more fits no column of the index
        raise ValueError(kind)
    return int(numbers[0]) if kind == "IS" else numbers if kind[2:] else numbers[0]


def _start(data: bytes) -> tuple[str, int]:
    """Transfer syntax and offset of the data set. Prefix and syntax may be missing: then the first element must be a likely one."""
    if data[128:132] != b"DICM" and data[:2] not in (b"\x02\x00", b"\x08\x00"):
        raise Unreadable("not DICOM: neither prefix nor a likely first element")
    at, syntax = 132 if data[128:132] == b"DICM" else 0, ""
    while data[at : at + 2] == b"\x02\x00":
        tag, vr, start, length = _element(data, at, True, "<")
        at = _after(data, vr, start, length, True, "<")
        if tag == TRANSFER_SYNTAX:
            syntax = _value(data[start:at], "CS", "<") or ""
    return syntax or (EXPLICIT if data[at + 4 : at + 6].isalpha() else IMPLICIT), at


def read_header(data: bytes, max_bytes: int) -> Header:
    """Read the header of a whole file held in memory: explicit, implicit, big endian or deflated (to at most `max_bytes`).

    Raises:
        Unreadable: not DICOM, cut off, damaged, or without pixel data.
    """
    found: dict[str, Any] = {}
    try:
        syntax, at = _start(data)
        if syntax == DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data, at = inflate.decompress(data[at:], max_bytes), 0
            if not inflate.eof:
                raise Unreadable("cut off: the deflated data set has no end, or is too large")
        explicit, order = syntax != IMPLICIT, ">" if syntax == BIG_ENDIAN else "<"
        while at < len(data):
            tag, vr, start, length = _element(data, at, explicit, order)
            if tag == PIXEL_DATA:
                return Header(syntax, data, start, length, **found)
            at = _after(data, vr, start, length, explicit, order)
            if tag in FIELDS:
                name, kind = FIELDS[tag]
                try:
                    value = _value(data[start:at], kind, order)
                except ValueError:
                    if name in ("slope", "intercept"):
                        raise Unreadable(f"damaged header: the rescale {name} is no number") from None
                    value = None
                if value is not None:
                    found[name] = value
    except struct.error:
        raise Unreadable("cut off: the file ends inside its header") from None
    except zlib.error:
        raise Unreadable("damaged: the deflated data set does not inflate") from None
    raise Unreadable("no pixel data")


def check(header: Header, max_pixels: int) -> Header:
    """The header with `BitsStored` made good; Unreadable for what is not one plausible grey picture of 8 or 16 bits."""
    h, size = header, header.rows * header.cols
    needed, there = size * h.bits_allocated // 8, min(h.length, len(h.data) - h.start)
    native = h.transfer_syntax in NATIVE
    for wrong, reason in (
        (size == 0, "damaged header: no Rows or Columns"),
        (size > max_pixels, f"too large: {h.rows} x {h.cols} pixels are more than convert.max_pixels"),
        (h.samples != 1 or h.photometric not in ("MONOCHROME1", "MONOCHROME2"), "colour: not one grey sample a pixel"),
        (h.frames != 1, f"multi-frame: {h.frames} frames"),
        (h.bits_allocated not in (8, 16), f"{h.bits_allocated}-bit: only 8 and 16 bits a pixel are converted"),
        (not native and h.transfer_syntax not in (RLE, *JPEG, *JPEG_LS, *JPEG_2000), "unknown transfer syntax"),
        (native == (h.length == UNDEFINED), "damaged header: pixel data are in fragments where they must not, or not where they must"),
        (native and there < needed, f"pixel data too short: {there} of {needed} bytes"),
    ):
        if wrong:
            raise Unreadable(reason)
    return h if 0 < h.bits_stored <= h.bits_allocated else replace(h, bits_stored=h.bits_allocated)


def _frame(header: Header) -> bytes:
    """The compressed picture: all fragments behind the offset table, each checked to lie inside the file."""
    parts, at, data = [], header.start, header.data
    while at + 8 <= len(data):
        tag, _, at, length = _element(data, at, False, "<")
        if tag == SEQUENCE_END:
            return b"".join(parts[1:])
        if tag != ITEM or at + length > len(data):
            break
        parts.append(data[at : at + length])
        at += length
    raise Unreadable("pixel data too short: a fragment is damaged or cut off")


def _padding(segment: bytes) -> int:
    """Bytes that zeros behind the data of an RLE segment may decode to: a pair of zeros is a run of one zero."""
    return (len(segment) - len(segment.rstrip(b"\0"))) // 2


def _decode_rle(header: Header, frame: bytes) -> np.ndarray:
    """PackBits planes, most significant byte first; every segment must lie in the frame and decode to one plane.

    Some encoders pad segments with zeros, which are cut off as pydicom does. What decodes to more than padding explains has runs too
    many somewhere, and its pixels may be shifted.
    """
    size, planes = header.rows * header.cols, header.bits_allocated // 8
    count, *starts = struct.unpack_from(f"<{planes + 1}I", frame.ljust(64, b"\0"))
    bounds = [*starts, len(frame)]
    if count != planes or starts[0] < 64 or any(not 0 < b - a <= 2 * size + 64 for a, b in zip(bounds, bounds[1:], strict=False)):
        raise Unreadable("damaged RLE: implausible segment header")
    segments = [frame[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    try:
        decoded = [decode_segment(segment) for segment in segments]
    except ValueError:
        raise Unreadable("damaged RLE: a run is cut off") from None
    excess = [len(plane) - size for plane in decoded]
    if any(more and not 0 < more <= _padding(segment) for more, segment in zip(excess, segments, strict=True)):
        raise Unreadable("damaged RLE: a segment decodes to another size than the picture's")
    arrays = [np.frombuffer(plane, np.uint8, size).reshape(header.rows, header.cols) for plane in reversed(decoded)]
    return arrays[0] if planes == 1 else cv2.merge(arrays).view("<u2")[..., 0]


def _codestream(frame: bytes, syntax: str) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits a sample that a JPEG, JPEG-LS or JPEG 2000 stream declares; ValueError where it does not."""
    if syntax in JPEG_2000:
        at = frame.index(b"\xff\x4f\xff\x51")
        (x1, y1, x0, y0), (components, depth) = struct.unpack_from(">4I", frame, at + 8), struct.unpack_from(">HB", frame, at + 40)
        return y1 - y0, x1 - x0, components, (depth & 0x7F) + 1
    at = 2
    while at + 4 < len(frame) and frame[at] == 0xFF:
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
    except Exception as fault:  # pydicom's plug-ins raise what they like, and the text may hold values of tags
        raise Unreadable(f"undecodable: pydicom raises {type(fault).__name__}") from None
    if pixels.shape != (header.rows, header.cols) or pixels.dtype.itemsize * 8 != header.bits_allocated:
        raise Unreadable("undecodable: the decoded picture has another shape than the header says")
    return pixels.view(f"u{pixels.dtype.itemsize}")


def decode(header: Header, careful: bool) -> tuple[np.ndarray, int, str]:
    """Stored bit patterns (rows, cols) as uint8 or uint16, how many low bits of them count, and the decoder's name.

    With `careful` (a process died or failed over this file) dicomsdl is not asked. An exception other than Unreadable is
    dicomsdl's: the process must be given up, for its heap can't be trusted any more.
    """
    shape, kind = (header.rows, header.cols), f"u{header.bits_allocated // 8}"
    if header.transfer_syntax in NATIVE:
        order = ">" if header.transfer_syntax == BIG_ENDIAN else "<"
        stored = np.frombuffer(header.data, order + kind, shape[0] * shape[1], header.start).reshape(shape)
        return stored.astype(kind, copy=False), header.bits_stored, "numpy"
    frame = _frame(header)
    if header.transfer_syntax == RLE:
        return _decode_rle(header, frame), header.bits_stored, "pylibjpeg"
    try:
        *declared, depth = _codestream(frame, header.transfer_syntax)
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


def window(hu: np.ndarray) -> np.ndarray:
    """HU to 0..255: `clip(rint((HU + 150) * 255 / 400), 0, 255)` in float64, halves to even."""
    return np.clip(np.rint((np.asarray(hu, np.float64) - LOW_HU) * 255 / (HIGH_HU - LOW_HU)), 0, 255).astype(np.uint8)


@functools.lru_cache(64)
def lookup(size: int, bits: int, signed: bool, slope: float, intercept: float, inverted: bool) -> np.ndarray:
    """Window values of all `size` (256 or 65536) bit patterns: only the low `bits` count, sign-extended where `signed`."""
    values = np.arange(size) & ((1 << bits) - 1)
    if signed:
        values -= (values >> (bits - 1)) << bits
    table = window(values * np.float64(slope) + intercept)
    return 255 - table if inverted else table


@functools.cache
def _wide_lut() -> bool:
    """True where this OpenCV looks up 16-bit values, twice as fast as numpy does."""
    try:
        return cv2.LUT(np.full((1, 1), 65535, np.uint16), np.arange(65536).astype(np.uint8))[0, 0] == 255
    except cv2.error:
        return False


def picture(data: bytes, max_pixels: int, careful: bool = False) -> tuple[np.ndarray, Header, str]:
    """The windowed picture of one file: uint8 (rows, cols) as stored, its header, and the name of its decoder.

    HU = stored x slope + intercept of this file. MONOCHROME1 is inverted after the window: 255 minus the value. WindowCenter and
    WindowWidth are never read.

    Raises:
        Unreadable: with the reason for the quarantine.
    """
    header = check(read_header(data, 4 * max_pixels + SPARE_BYTES), max_pixels)
    stored, bits, decoder = decode(header, careful)
    table = lookup(256**stored.itemsize, bits, header.signed == 1, header.slope, header.intercept, header.photometric == "MONOCHROME1")
    return cv2.LUT(stored, table) if stored.itemsize == 1 or _wide_lut() else table[stored], header, decoder
