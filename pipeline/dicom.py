"""One DICOM file to an 8-bit picture: a bounds-checked header reader, a gate, the decoders and the fixed window.

Nothing is decoded before `read_header` and `check` found the file whole and plausible. Only the tags in `WANTED` are looked at,
so no identifying value can reach an artifact. Decoders, by transfer syntax:

| pixel data | decoder | why |
|---|---|---|
| uncompressed, deflated | numpy | a view of bytes whose number was checked |
| RLE Lossless | pylibjpeg (Rust) | memory-safe; dicomsdl writes out of bounds, and no check short of decoding bounds it |
| JPEG lossless, JPEG-LS, JPEG 2000, all lossless | dicomsdl, then pydicom | both are C: only called in a worker that may die |
| lossy JPEG, JPEG 2000 and JPEG-LS | pydicom | its result is the reference |
"""

import functools
import io
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from rle.utils import decode_segment

LOW_HU, HIGH_HU = -150.0, 250.0
EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
JPEG, JPEG_LS, JPEG_2000 = (tuple(f"1.2.840.10008.1.2.4.{n}" for n in numbers) for numbers in ((50, 51, 57, 70), (80, 81), (90, 91)))
LOSSLESS = (*JPEG[2:], JPEG_LS[0], JPEG_2000[0])
ROWS, COLUMNS, ALLOCATED, STORED, SIGNED, SAMPLES = 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280103, 0x00280002
PHOTOMETRIC, FRAMES, SPACING, SLOPE, INTERCEPT = 0x00280004, 0x00280008, 0x00280030, 0x00281053, 0x00281052
INSTANCE, POSITION, ORIENTATION, PATIENT_POSITION = 0x00200013, 0x00200032, 0x00200037, 0x00185100
WANTED = frozenset((ROWS, COLUMNS, ALLOCATED, STORED, SIGNED, SAMPLES, PHOTOMETRIC, FRAMES, SPACING, SLOPE, INTERCEPT,
                    INSTANCE, POSITION, ORIENTATION, PATIENT_POSITION))  # fmt: skip
PIXEL_DATA, TRANSFER_SYNTAX = 0x7FE00010, 0x00020010
ITEM, ITEM_END, SEQUENCE_END, UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
_HEAD = {order: struct.Struct(order + "HH2sH").unpack_from for order in "<>"}
_WORD = {order: struct.Struct(order + "I").unpack_from for order in "<>"}


class Unreadable(Exception):
    """This file becomes no picture. The text is `KIND: DETAIL`, never a value of an identifying tag."""


@dataclass(frozen=True, slots=True)
class Header:
    """What section 5 needs of one file. `data[start:start + length]` is the value of PixelData (length UNDEFINED: fragments)."""

    transfer_syntax: str
    rows: int
    cols: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    samples: int
    frames: int
    photometric: str
    slope: float
    intercept: float
    spacing: tuple[float, ...] | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    patient_position: str
    instance: int | None
    data: bytes
    start: int
    length: int


def _element(data: bytes, at: int, explicit: bool, order: str) -> tuple[int, bytes, int, int]:
    """Tag, VR, offset and length of the value of the element at `at`; an unknown VR is read as implicit, as pydicom does."""
    group, element, vr, length = _HEAD[order](data, at)
    if explicit and group != 0xFFFE:
        if vr in LONG_VRS:
            return group << 16 | element, vr, at + 12, _WORD[order](data, at + 8)[0]
        if vr.isalpha() and vr.isupper():
            return group << 16 | element, vr, at + 8, length
    return group << 16 | element, b"", at + 8, _WORD[order](data, at + 4)[0]


def _after(data: bytes, vr: bytes, start: int, length: int, explicit: bool, order: str, depth: int = 0) -> int:
    """Offset of what follows a value."""
    if length == UNDEFINED:
        return _after_items(data, start, explicit and vr != b"UN", order, depth + 1)
    if start + length > len(data):
        raise Unreadable("cut off: a header element runs past the end of the file")
    return start + length


def _after_items(data: bytes, at: int, explicit: bool, order: str, depth: int) -> int:
    """Offset of what follows a sequence of undefined length."""
    if depth > 32:
        raise Unreadable("damaged header: sequences nested more than 32 deep")
    while True:
        tag, _, at, length = _element(data, at, False, order)
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            raise Unreadable("damaged header: a sequence holds something else than items")
        if length != UNDEFINED:
            at += length
            continue
        while True:
            tag, vr, at, length = _element(data, at, explicit, order)
            if tag == ITEM_END:
                break
            at = _after(data, vr, at, length, explicit, order, depth)


def _syntax(data: bytes) -> tuple[str, int]:
    """Transfer syntax from the file meta group, and the offset of the data set; guessed from the first VR where it is not said."""
    if data[128:132] != b"DICM" and data[:2] not in (b"\x02\x00", b"\x08\x00"):  # the prefix may be missing, the group may not
        raise Unreadable("not DICOM: neither DICM prefix nor a first element")
    at, syntax = 132 if data[128:132] == b"DICM" else 0, ""
    while at + 8 <= len(data) and data[at : at + 2] == b"\x02\x00":
        tag, vr, start, length = _element(data, at, True, "<")
        at = _after(data, vr, start, length, True, "<")
        if tag == TRANSFER_SYNTAX:
            syntax = _text(data[start:at])
    return syntax or (EXPLICIT if data[at + 4 : at + 6].isalpha() else IMPLICIT), at


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace").strip(" \0")


def _numbers(value: bytes | None, count: int) -> tuple[float, ...] | None:
    """`count` finite decimal numbers, None where the value is anything else."""
    try:
        numbers = tuple(float(part) for part in _text(value or b"").split("\\"))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _factor(values: dict[int, bytes], tag: int, default: float) -> float:
    if not _text(values.get(tag, b"")):
        return default
    numbers = _numbers(values[tag], 1)
    if numbers is None:
        raise Unreadable("damaged header: RescaleSlope or RescaleIntercept is no number")
    return numbers[0]


def read_header(data: bytes, max_bytes: int) -> Header:
    """Read the header of a whole file held in memory: explicit, implicit, big endian or deflated (to at most `max_bytes`).

    Raises:
        Unreadable: not DICOM, cut off, damaged, or without pixel data.
    """
    try:
        syntax, at = _syntax(data)
        if syntax == DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data, at = inflate.decompress(data[at:], max_bytes), 0
            if not inflate.eof:
                raise Unreadable("damaged: the deflated data set is cut off or too large")
        explicit, order = syntax != IMPLICIT, ">" if syntax == BIG_ENDIAN else "<"
        values: dict[int, bytes] = {}
        while at < len(data):
            tag, vr, start, length = _element(data, at, explicit, order)
            if tag == PIXEL_DATA:
                return _header(syntax, order, values, data, start, length)
            at = _after(data, vr, start, length, explicit, order)
            if tag in WANTED:
                values[tag] = data[start:at]
    except struct.error:
        raise Unreadable("cut off: the file ends inside its header") from None
    except zlib.error:
        raise Unreadable("damaged: the deflated data set does not inflate") from None
    raise Unreadable("no pixel data")


def _header(syntax: str, order: str, values: dict[int, bytes], data: bytes, start: int, length: int) -> Header:
    def number(tag: int, default: int = 0) -> int:
        value = values.get(tag, b"")
        return struct.unpack_from(order + "H", value)[0] if len(value) >= 2 else default

    frames, instance = _numbers(values.get(FRAMES), 1), _numbers(values.get(INSTANCE), 1)
    allocated, stored = number(ALLOCATED), number(STORED)
    return Header(
        syntax, number(ROWS), number(COLUMNS), allocated, stored if 0 < stored <= allocated else allocated, number(SIGNED) == 1,
        number(SAMPLES, 1), int(frames[0]) if frames else 1, _text(values.get(PHOTOMETRIC, b"")) or "MONOCHROME2",
        _factor(values, SLOPE, 1.0), _factor(values, INTERCEPT, 0.0), _numbers(values.get(SPACING), 2),
        _numbers(values.get(POSITION), 3), _numbers(values.get(ORIENTATION), 6), _text(values.get(PATIENT_POSITION, b"")),
        int(instance[0]) if instance else None, data, start, length,
    )  # fmt: skip


def check(header: Header, max_pixels: int) -> None:
    """Raise Unreadable, with the reason, for what is not one grey picture of 8 or 16 bits and plausible size."""
    if header.rows * header.cols == 0:
        raise Unreadable("damaged header: no Rows or Columns")
    if header.rows * header.cols > max_pixels:
        raise Unreadable(f"too large: {header.rows} x {header.cols} pixels are more than convert.max_pixels")
    if header.samples != 1 or header.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unreadable("colour: not one grey sample a pixel")
    if header.frames != 1:
        raise Unreadable(f"multi-frame: {header.frames} frames")
    if header.bits_allocated not in (8, 16):
        raise Unreadable(f"{header.bits_allocated}-bit: only 8 and 16 bits a pixel are converted")
    needed = header.rows * header.cols * header.bits_allocated // 8
    if header.transfer_syntax in (EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED):
        there = min(header.length, len(header.data) - header.start)
        if there < needed:
            raise Unreadable(f"pixel data too short: {there} of {needed} bytes")
    elif header.transfer_syntax not in (RLE, *JPEG, *JPEG_LS, *JPEG_2000):
        raise Unreadable("unknown transfer syntax")
    elif header.length != UNDEFINED:
        raise Unreadable("damaged: compressed pixel data without fragments")


def fragments(header: Header) -> bytes:
    """The compressed frame: all fragments behind the offset table, each checked to lie inside the file."""
    parts, at, data = [], header.start, header.data
    while at + 8 <= len(data):
        tag, _, at, length = _element(data, at, False, "<")
        if tag == SEQUENCE_END:
            return parts[1] if len(parts) == 2 else b"".join(parts[1:])
        if tag != ITEM or at + length > len(data):
            break
        parts.append(data[at : at + length])
        at += length
    raise Unreadable("pixel data too short: a fragment is damaged or cut off")


def _decode_rle(header: Header, frame: bytes) -> np.ndarray:
    """PackBits planes, most significant byte first; every segment must lie in the frame and decode to exactly one plane."""
    size, planes = header.rows * header.cols, header.bits_allocated // 8
    if len(frame) < 64:
        raise Unreadable("damaged RLE: no segment header")
    count, *offsets = struct.unpack_from(f"<{planes + 1}I", frame)
    bounds = [*offsets, len(frame)]
    if count != planes or bounds[0] < 64 or any(a >= b or b - a > 2 * size + 64 for a, b in zip(bounds, bounds[1:], strict=False)):
        raise Unreadable("damaged RLE: implausible segment header")
    try:
        decoded = [decode_segment(frame[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    except ValueError:
        raise Unreadable("damaged RLE: a run is cut off") from None
    if any(len(plane) != size for plane in decoded):
        raise Unreadable("damaged RLE: a segment decodes to another size than the image")
    arrays = [np.frombuffer(plane, np.uint8).reshape(header.rows, header.cols) for plane in reversed(decoded)]
    return arrays[0] if planes == 1 else cv2.merge(arrays).view("<u2")[..., 0]


def codestream(frame: bytes, syntax: str) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits a sample that a JPEG, JPEG-LS or JPEG 2000 stream declares; Unreadable where it does not."""
    try:
        if syntax in JPEG_2000:
            at = frame.index(b"\xff\x4f\xff\x51")
            x1, y1, x0, y0 = struct.unpack_from(">4I", frame, at + 8)
            components, depth = struct.unpack_from(">HB", frame, at + 40)
            return y1 - y0, x1 - x0, components, (depth & 0x7F) + 1
        at = 2
        while frame[at] == 0xFF:
            marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
                depth, rows, cols, components = struct.unpack_from(">BHHB", frame, at + 4)
                return rows, cols, components, depth
            at += 2 + length
    except (ValueError, IndexError, struct.error):
        pass
    raise Unreadable("damaged: the compressed picture has no header")


def _decode_dicomsdl(header: Header) -> np.ndarray:
    import dicomsdl

    stored = np.empty((header.rows, header.cols), np.uint16 if header.bits_allocated == 16 else np.uint8)
    dicomsdl.open_memory(header.data, False).copyFrameData(0, stored)
    return stored


def _decode_pydicom(header: Header) -> np.ndarray:
    import pydicom

    try:
        dataset = pydicom.dcmread(io.BytesIO(header.data), force=True)
        dataset.BitsStored = header.bits_stored
        pixels = dataset.pixel_array
    except Exception as fault:  # pydicom and its plug-ins raise whatever they like; the text may hold values of tags
        raise Unreadable(f"undecodable: pydicom says {type(fault).__name__}") from None
    if pixels.shape != (header.rows, header.cols) or pixels.dtype.itemsize * 8 != header.bits_allocated:
        raise Unreadable("undecodable: the decoded picture has another shape than the header says")
    return pixels.view(f"u{pixels.dtype.itemsize}")


def decode(header: Header, careful: bool) -> tuple[np.ndarray, int, str]:
    """Stored bit patterns (rows, cols) as uint8 or uint16, the number of bits that count, and the decoder's name.

    `careful` means that a worker died or failed over this file: dicomsdl is not asked again. An exception other than
    Unreadable is dicomsdl's: the process must be given up, for its heap can't be trusted any more.
    """
    syntax, size = header.transfer_syntax, header.rows * header.cols
    if syntax in (EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED):
        kind = (">" if syntax == BIG_ENDIAN else "<") + ("u1" if header.bits_allocated == 8 else "u2")
        stored = np.frombuffer(header.data, kind, size, header.start).reshape(header.rows, header.cols)
        return stored.astype(kind.replace(">", "<"), copy=False), header.bits_stored, "numpy"
    frame = fragments(header)
    if syntax == RLE:
        return _decode_rle(header, frame), header.bits_stored, "pylibjpeg"
    rows, cols, components, depth = codestream(frame, syntax)
    if (rows, cols, components) != (header.rows, header.cols, 1) or depth > header.bits_allocated:
        raise Unreadable("damaged: header and compressed picture contradict each other")
    if careful or syntax not in LOSSLESS:
        return _decode_pydicom(header), header.bits_allocated, "pydicom"
    return _decode_dicomsdl(header), header.bits_stored if syntax in JPEG else depth, "dicomsdl"


def window(hu: np.ndarray) -> np.ndarray:
    """HU to 0..255: `clip(rint((HU + 150) * 255 / 400), 0, 255)` in float64, halves to even."""
    return np.clip(np.rint((np.asarray(hu, np.float64) - LOW_HU) * 255 / (HIGH_HU - LOW_HU)), 0, 255).astype(np.uint8)


@functools.lru_cache(64)
def lookup(size: int, bits: int, signed: bool, slope: float, intercept: float, inverted: bool) -> np.ndarray:
    """Table of `size` (256 or 65536) window values, one a stored bit pattern: only the low `bits` count, sign-extended where signed."""
    values = np.arange(size, dtype=np.int64) & ((1 << bits) - 1)
    if signed:
        values -= (values >> (bits - 1)) << bits
    table = window(values * np.float64(slope) + intercept)
    return 255 - table if inverted else table


@functools.cache
def _wide_lut() -> bool:
    """True where this OpenCV looks up 16-bit values (twice as fast as numpy)."""
    try:
        return cv2.LUT(np.full((1, 2), 65535, np.uint16), np.arange(65536, dtype=np.uint32).astype(np.uint8)).tolist() == [[255, 255]]
    except cv2.error:
        return False


def picture(data: bytes, max_pixels: int, careful: bool) -> tuple[np.ndarray, Header, str]:
    """The windowed picture of one file: uint8 (rows, cols) as stored, its header, and the decoder that was used.

    MONOCHROME1 is inverted after the window: 255 minus the value. WindowCenter and WindowWidth are never read.

    Raises:
        Unreadable: with the reason for the quarantine.
    """
    header = read_header(data, 4 * max_pixels + (64 << 20))
    check(header, max_pixels)
    stored, bits, decoder = decode(header, careful)
    table = lookup(1 << 8 * stored.itemsize, bits, header.signed, header.slope, header.intercept, header.photometric == "MONOCHROME1")
    wide = stored.itemsize == 1 or _wide_lut()
    return cv2.LUT(stored, table) if wide else np.take(table, stored, mode="clip"), header, decoder


def facts(header: Header, decoder: str) -> dict[str, Any]:
    """The part of a header that ordering and the index need, as plain values."""
    spacing = header.spacing or (None, None)
    return {"instance": header.instance, "position": header.position, "orientation": header.orientation,
            "patient_position": header.patient_position, "spacing": spacing, "decoder": decoder,
            "transfer_syntax": header.transfer_syntax}  # fmt: skip
