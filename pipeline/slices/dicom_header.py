"""The header of one DICOM file by a bounds-checked reader, and the gate: nothing is decoded that
did not pass both.

Only the tags in `FIELDS` are read, so no identifying value can reach an artifact.
"""

import math
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

from .readers import Unreadable

SPARE_BYTES = 64 << 20  # header and offset tables: allowed on top of the pixels
IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (
    f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2")
)
NATIVE, RLE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN), "1.2.840.10008.1.2.5"
JPEG, JPEG_LS, JPEG_2000 = (
    tuple(f"1.2.840.10008.1.2.4.{n}" for n in numbers)
    for numbers in ((57, 70, 50, 51), (80, 81), (90, 91))
)
LOSSLESS = (*JPEG[:2], JPEG_LS[0], JPEG_2000[0])
FIELDS = {
    0x00280010: ("rows", "US"),
    0x00280011: ("cols", "US"),
    0x00280100: ("bits_allocated", "US"),
    0x00280101: ("bits_stored", "US"),
    0x00280103: ("signed", "US"),
    0x00280002: ("samples", "US"),
    0x00280004: ("photometric", "CS"),
    0x00280008: ("frames", "IS"),
    0x00281053: ("slope", "DS"),
    0x00281052: ("intercept", "DS"),
    0x00280030: ("spacing", "DS2"),
    0x00200032: ("position", "DS3"),
    0x00200037: ("orientation", "DS6"),
    0x00185100: ("patient_position", "CS"),
    0x00200013: ("instance", "IS"),
}
PIXEL_DATA, TRANSFER_SYNTAX = 0x7FE00010, 0x00020010
ITEM, ITEM_END, SEQUENCE_END, UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
LONG_VRS = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
_HEAD, _WORD, _SHORT = (
    {order: struct.Struct(order + form).unpack_from for order in "<>"}
    for form in ("HH2sH", "I", "H")
)


@dataclass(frozen=True)
class Header:
    """What the conversion needs of one file. PixelData's value is `data[start:start + length]`
    (length UNDEFINED: fragments).
    """

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


def element(
    data: bytes | memoryview, at: int, explicit: bool, order: str
) -> tuple[int, bytes, int, int]:
    """Tag, VR, offset and length of the value of the element at `at`; what has no VR is read as
    implicit, as pydicom does.
    """
    group, element, vr, length = _HEAD[order](data, at)
    if explicit and group != 0xFFFE:
        if vr in LONG_VRS:
            return group << 16 | element, vr, at + 12, _WORD[order](data, at + 8)[0]
        if vr.isalpha() and vr.isupper():
            return group << 16 | element, vr, at + 8, length
    return group << 16 | element, b"", at + 8, _WORD[order](data, at + 4)[0]


def _after(
    data: bytes, vr: bytes, at: int, length: int, explicit: bool, order: str, depth: int = 0
) -> int:
    """Offset of what follows the value at `at`; a value of undefined length is a sequence of
    items.
    """
    if length != UNDEFINED:
        if at + length > len(data):
            raise Unreadable("cut off: a header element runs past the end of the file")
        return at + length
    if depth > 32:
        raise Unreadable("damaged header: sequences nested more than 32 deep")
    explicit = explicit and vr != b"UN"
    while True:
        tag, _, at, length = element(data, at, False, order)
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            raise Unreadable("damaged header: a sequence holds something else than items")
        at += length if length != UNDEFINED else 0
        while length == UNDEFINED:
            tag, vr, at, size = element(data, at, explicit, order)
            if tag == ITEM_END:
                break
            at = _after(data, vr, at, size, explicit, order, depth + 1)


def _value(raw: bytes, kind: str, order: str) -> Any:
    """The value of a wanted element, None where it is empty; ValueError where it is not what its
    kind says.
    """
    if kind == "US":
        return _SHORT[order](raw)[0] if len(raw) >= 2 else None
    text = raw.decode("ascii", "replace").strip(" \0")
    if not text or kind == "CS":
        return text or None
    numbers = tuple(float(part) for part in text.split("\\"))
    if len(numbers) != int(kind[2:] or 1) or not all(map(math.isfinite, numbers)):
        raise ValueError(kind)
    # the standard's range; more fits no column of the index
    if kind == "IS" and not -(2**31) <= numbers[0] < 2**31:
        raise ValueError(kind)
    return int(numbers[0]) if kind == "IS" else numbers if kind[2:] else numbers[0]


def _data_set_start(data: bytes) -> tuple[str, int]:
    """Transfer syntax and offset of the data set. Prefix and syntax may be missing: then the first
    element must be a likely one.
    """
    if data[128:132] != b"DICM" and data[:2] not in (b"\x02\x00", b"\x08\x00"):
        raise Unreadable("not DICOM: neither prefix nor a likely first element")
    at, syntax = 132 if data[128:132] == b"DICM" else 0, ""
    while data[at : at + 2] == b"\x02\x00":
        tag, vr, start, length = element(data, at, True, "<")
        at = _after(data, vr, start, length, True, "<")
        if tag == TRANSFER_SYNTAX:
            syntax = _value(data[start:at], "CS", "<") or ""
    return syntax or (EXPLICIT if data[at + 4 : at + 6].isalpha() else IMPLICIT), at


def read_header(data: bytes, max_bytes: int) -> Header:
    """Read the header of a whole file held in memory: explicit, implicit, big endian or deflated
    (to at most `max_bytes`).

    Raises:
        Unreadable: not DICOM, cut off, damaged, or without pixel data.
    """
    found: dict[str, Any] = {}
    try:
        syntax, at = _data_set_start(data)
        if syntax == DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data, at = inflate.decompress(data[at:], max_bytes), 0
            if not inflate.eof:
                raise Unreadable("cut off: the deflated data set has no end, or is too large")
        explicit, order = syntax != IMPLICIT, ">" if syntax == BIG_ENDIAN else "<"
        while at < len(data):
            tag, vr, start, length = element(data, at, explicit, order)
            if tag == PIXEL_DATA:
                return Header(syntax, data, start, length, **found)
            at = _after(data, vr, start, length, explicit, order)
            if tag in FIELDS:
                name, kind = FIELDS[tag]
                try:
                    value = _value(data[start:at], kind, order)
                except ValueError:
                    if name in ("slope", "intercept"):
                        raise Unreadable(
                            f"damaged header: the rescale {name} is no number"
                        ) from None
                    value = None
                if value is not None:
                    found[name] = value
    except struct.error:
        raise Unreadable("cut off: the file ends inside its header") from None
    except zlib.error:
        raise Unreadable("damaged: the deflated data set does not inflate") from None
    raise Unreadable("no pixel data")


def check(header: Header, max_pixels: int) -> Header:
    """The header with `BitsStored` made good; Unreadable for what is not one plausible grey picture
    of 8 or 16 bits.
    """
    h, size = header, header.rows * header.cols
    needed, there = size * h.bits_allocated // 8, min(h.length, len(h.data) - h.start)
    native = h.transfer_syntax in NATIVE
    for wrong, reason in (
        (size == 0, "damaged header: no Rows or Columns"),
        (
            size > max_pixels,
            f"too large: {h.rows} x {h.cols} pixels are more than convert.max_pixels",
        ),
        (
            h.samples != 1 or h.photometric not in ("MONOCHROME1", "MONOCHROME2"),
            "colour: not one grey sample a pixel",
        ),
        (h.frames != 1, f"multi-frame: {h.frames} frames"),
        (
            h.bits_allocated not in (8, 16),
            f"{h.bits_allocated}-bit: only 8 and 16 bits a pixel are converted",
        ),
        (
            not native and h.transfer_syntax not in (RLE, *JPEG, *JPEG_LS, *JPEG_2000),
            "unknown transfer syntax",
        ),
        (
            native == (h.length == UNDEFINED),
            (
                "damaged header: pixel data are in fragments where they must not, or not where they"
                " must"
            ),
        ),
        (native and there < needed, f"pixel data too short: {there} of {needed} bytes"),
    ):
        if wrong:
            raise Unreadable(reason)
    return h if 0 < h.bits_stored <= h.bits_allocated else replace(h, bits_stored=h.bits_allocated)
