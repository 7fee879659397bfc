"""The header of one DICOM file by a bounds-checked reader, and the gate: nothing is decoded that
did not pass both.

Only the tags in `FIELDS` are read, so no identifying value can reach an artifact. Of an Enhanced CT
of one frame they are read from the functional groups. What writers get wrong and pydicom reads all
the same (another VR, implicit where explicit is declared and the reverse, no prefix) is read here
too.
"""

import math
import re
import struct
import zlib
from typing import Any, NamedTuple

from .readers import Unreadable

SPARE_BYTES = 64 << 20  # header and offset tables: allowed on top of the pixels
IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN = (
    f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2")
)
NATIVE, RLE = (IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN), "1.2.840.10008.1.2.5"
JPEG, JPEG_LS, JPEG_2000, HTJ2K = (
    tuple(f"1.2.840.10008.1.2.4.{n}" for n in numbers)
    for numbers in ((57, 70, 50, 51), (80, 81), (90, 91), (201, 202, 203))
)
LOSSLESS = (*JPEG[:2], JPEG_LS[0], JPEG_2000[0])
STORAGE = "1.2.840.10008.5.1.4.1.1."
# CT, Enhanced CT, and what was converted to that
CT_CLASSES = frozenset(("", *(STORAGE + end for end in ("2", "2.1", "2.2"))))
SECONDARY_CAPTURE = STORAGE + "7"
PIXEL_DATA, MEDIA_CLASS, TRANSFER_SYNTAX = 0x7FE00010, 0x00020002, 0x00020010
# sequences (kind SQ) in which wanted tags may be: shared and per-frame functional groups, and in
# them pixel measures, plane orientation, plane position and pixel value transformation
SHARED, PER_FRAME = 0x52009229, 0x52009230
MACROS = (0x00289110, 0x00209116, 0x00209113, 0x00289145)
MODALITY_LUT = 0x00283000
FIELDS = {
    0x00080016: ("sop_class", "CS"),
    0x00080060: ("modality", "CS"),
    0x00280102: ("high_bit", "US"),
    0x00280120: ("padding", "US"),
    0x00280121: ("padding_limit", "US"),
    0x00181164: ("detector_spacing", "DS2"),
    MODALITY_LUT: ("", "SQ"),
    SHARED: ("", "SQ"),
    PER_FRAME: ("", "SQ"),
    PIXEL_DATA: ("", ""),
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
# spacing, orientation, position, slope and intercept, where macros have them
MACRO_FIELDS = (0x00280030, 0x00200037, 0x00200032, 0x00281053, 0x00281052)
ITEM, ITEM_END, SEQUENCE_END, UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
LONG_VRS = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
# the VRs whose values are numbers, and those of bytes, where what the tag should be counts
BINARY = dict(zip(b"US SS UL SL UV SV FL FD".split(), "HhIiQqfd", strict=True))
BYTES = frozenset((b"US", b"SS", b"", b"UN", b"OW", b"OB"))
VRS = LONG_VRS | BINARY.keys() | set(b"AE AS AT CS DA DS DT IS LO LT PN SH ST TM UI".split())
# 1,024 may be a decimal comma or a thousand
THOUSANDS = re.compile(r"\s*[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+\s*").fullmatch
# groups of the first element of what has no prefix, in either order of bytes
LIKELY = {order for n in (2, 8, 16, 24, 32, 40) for order in (bytes((n, 0)), bytes((0, n)))}
_HEAD, _WORD, _SHORT = (
    {order: struct.Struct(order + form).unpack_from for order in "<>"}
    for form in ("HH2sH", "I", "H")
)


class Header(NamedTuple):
    """What the conversion needs of one file. PixelData's value is `data[start:start + length]`
    (length UNDEFINED: fragments), of the VR `pixel_vr`. `padding` and `padding_limit` are 16-bit
    patterns.
    """

    transfer_syntax: str
    data: bytes
    start: int
    length: int
    pixel_vr: bytes = b""
    rows: int = 0
    cols: int = 0
    bits_allocated: int = 0
    bits_stored: int = 0
    high_bit: int | None = None
    signed: int = 0
    samples: int = 1
    frames: int = 1
    frame_groups: int = 0
    photometric: str = "MONOCHROME2"
    slope: float = 1.0
    intercept: float = 0.0
    modality_lut: bool = False
    padding: int | None = None
    padding_limit: int | None = None
    spacing: tuple[float, ...] | None = None
    detector_spacing: tuple[float, ...] | None = None
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    patient_position: str = ""
    instance: int | None = None
    modality: str = ""
    sop_class: str = ""


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
        if vr in VRS or vr.isalpha() and vr.isupper():
            return group << 16 | element, vr, at + 8, length
    return group << 16 | element, b"", at + 8, _WORD[order](data, at + 4)[0]


def _looks_explicit(data: bytes, at: int, order: str) -> bool:
    """True where the element at `at` has a VR, not the length that stands there without one."""
    vr = data[at + 4 : at + 6]
    if vr not in VRS or vr in LONG_VRS and data[at + 6 : at + 8] != b"\0\0":
        return False
    _, _, start, length = element(data, at, True, order)
    return length == UNDEFINED or start + length <= len(data)


def _after(
    data: bytes, vr: bytes, at: int, length: int, explicit: bool, order: str, depth: int = 0
) -> int:
    """Offset of what follows the value at `at`; a value of undefined length is a sequence of
    items, or bytes up to a delimiter.
    """
    if length != UNDEFINED:
        if at + length > len(data):
            raise Unreadable("cut off: a header element runs past the end of the file")
        return at + length
    if depth > 32:
        raise Unreadable("damaged header: sequences nested more than 32 deep")
    if vr not in (b"SQ", b"UN") and element(data, at, False, order)[0] not in (ITEM, SEQUENCE_END):
        at = data.find(struct.pack(order + "HH", SEQUENCE_END >> 16, SEQUENCE_END & 0xFFFF), at)
        if at < 0:
            raise Unreadable("damaged header: a value of undefined length has no end")
        return at + 8
    while True:
        tag, _, at, length = element(data, at, False, order)
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            raise Unreadable("damaged header: a sequence holds something else than items")
        # of VR UN they are implicit, says the standard; some are not
        spelt = explicit and (vr != b"UN" or _looks_explicit(data, at, order))
        at += length if length != UNDEFINED else 0
        while length == UNDEFINED:
            tag, inner, at, size = element(data, at, spelt, order)
            if tag == ITEM_END:
                break
            at = _after(data, inner, at, size, spelt, order, depth + 1)


def _value(raw: bytes, vr: bytes, kind: str, order: str) -> Any:
    """The value of a wanted element, None where it is empty; ValueError where it is not what its
    kind says. A VR that says another type of number is believed.
    """
    if kind == "US" and vr in BYTES:
        return _SHORT[order](raw)[0] if len(raw) >= 2 else None
    if vr in BINARY and kind != "CS":
        form = struct.Struct(order + BINARY[vr])
        whole = raw[: len(raw) // form.size * form.size]
        return _checked([value for (value,) in form.iter_unpack(whole)], kind) if whole else None
    text = raw.decode("ascii", "replace").strip(" \0\\")
    if not text or kind == "CS":
        return text or None
    return _checked(_decimals(text.split("\\")), kind)


def _decimals(parts: list[str]) -> list[float]:
    """Decimal strings, also with a decimal comma; ValueError where they are none."""
    try:
        return [float(part) for part in parts]
    except ValueError:
        if any(map(THOUSANDS, parts)):
            raise
        return [float(part.replace(",", ".")) for part in parts]


def _checked(numbers: list[float], kind: str) -> Any:
    """The number or numbers that `kind` wants, ValueError where they are others; the same one
    several times is one.
    """
    count = int(kind[2:] or 1)
    if len(numbers) != count and len(set(numbers)) == 1 and count <= 2:
        numbers = numbers[:1] * count
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(kind)
    if kind[:2] == "DS":
        return tuple(numbers) if count > 1 else numbers[0]
    # the standard's ranges; more fits no column of the index
    if not -(2**31 if kind == "IS" else 2**15) <= numbers[0] < 2 ** (31 if kind == "IS" else 16):
        raise ValueError(kind)
    return int(numbers[0]) if kind == "IS" else int(numbers[0]) & 0xFFFF


def _data_set_start(data: bytes) -> tuple[str, str, int]:
    """Transfer syntax, SOP class and offset of the data set. Prefix, syntax and class may be
    missing: then the first element must be a likely one.
    """
    prefix = data[128:132] == b"DICM"
    if not prefix and data[:2] not in LIKELY:
        raise Unreadable("not DICOM: neither prefix nor a likely first element")
    at, found = 132 if prefix else 0, {TRANSFER_SYNTAX: "", MEDIA_CLASS: ""}
    while data[at : at + 2] == b"\x02\x00":
        tag, vr, start, length = element(data, at, True, "<")
        at = _after(data, vr, start, length, True, "<")
        if tag in found:
            found[tag] = _value(data[start:at], vr, "CS", "<") or ""
    big = data[at : at + 1] == b"\0"
    guess = BIG_ENDIAN if big else EXPLICIT
    guess = guess if _looks_explicit(data, at, ">" if big else "<") else IMPLICIT
    return found[TRANSFER_SYNTAX] or guess, found[MEDIA_CLASS], at


def _take(found: dict[str, Any], field: tuple[str, str], raw: bytes, vr: bytes, order: str) -> None:
    """Put the value of the wanted element `field` into `found`, if it has a proper one."""
    name, kind = field
    try:
        value = _value(raw, vr, kind, order)
    except ValueError:
        if name in ("slope", "intercept"):
            raise Unreadable(f"damaged header: the rescale {name} is no number") from None
        return
    if value is not None:
        found[name] = value


def _take_items(
    found: dict[str, Any],
    data: bytes,
    sequence: int,
    at: int,
    end: int,
    form: Any,
) -> None:
    """Put what is wanted of a sequence's items into `found`: of functional groups the elements of
    their macros, and how many frames have one.
    """
    items = 0
    while at < end:
        tag, _, at, length = element(data, at, False, form[1])
        if tag != ITEM:
            break
        items, stop = items + 1, end if length == UNDEFINED else min(at + length, end)
        while at < stop:
            tag, vr, start, size = element(data, at, *form)
            if tag == ITEM_END:
                at = start
                break
            at = _after(data, vr, start, size, *form)
            if sequence in MACROS and tag in MACRO_FIELDS:
                _take(found, FIELDS[tag], data[start:at], vr, form[1])
            elif sequence in (SHARED, PER_FRAME) and tag in MACROS:
                _take_items(found, data, tag, start, at, form)
    if sequence == PER_FRAME:
        found["frame_groups"] = items
    elif sequence == MODALITY_LUT:
        found["modality_lut"] = items > 0


def read_header(data: bytes, max_bytes: int) -> Header:
    """Read the header of a whole file held in memory: explicit, implicit, big endian or deflated
    (to at most `max_bytes`).

    Raises:
        Unreadable: not DICOM, cut off, damaged, or without pixel data.
    """
    found: dict[str, Any] = {}
    try:
        syntax, found["sop_class"], at = _data_set_start(data)
        if syntax == DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data, at = inflate.decompress(data[at:], max_bytes), 0
            if not inflate.eof:
                raise Unreadable("cut off: the deflated data set has no end, or is too large")
        order = ">" if syntax == BIG_ENDIAN else "<"
        explicit = syntax != IMPLICIT or _looks_explicit(data, at, order)
        size = len(data)
        while at < size:
            tag, vr, start, length = element(data, at, explicit, order)
            at = start + length
            if at > size and tag != PIXEL_DATA:  # or of undefined length
                at = _after(data, vr, start, length, explicit, order)
            if tag not in FIELDS:
                continue
            field = FIELDS[tag]
            if field[1] == "SQ":
                _take_items(found, data, tag, start, at, (explicit, order))
            elif tag == PIXEL_DATA:
                return Header(syntax, data, start, length, vr, **found)
            else:
                _take(found, field, data[start:at], vr, order)
    except struct.error:
        raise Unreadable("cut off: the file ends inside its header") from None
    except zlib.error:
        raise Unreadable("damaged: the deflated data set does not inflate") from None
    raise Unreadable(
        not_ct(found.get("modality", ""), found.get("sop_class", "")) or "no pixel data"
    )


def not_ct(modality: str, sop_class: str) -> str:
    """The reason why a file is no CT, '' where it is one or says nothing of it.

    What a modality and a SOP class are called identifies nobody; a value that is no name is not
    repeated.
    """
    kinds = modality.upper().replace(" ", "").split("\\")
    if modality and "CT" not in kinds:
        known = re.fullmatch("[A-Z]{2,16}", kinds[0])
        return f"not CT: Modality {kinds[0] if known else 'unknown'}"
    if f"{sop_class}.".startswith(f"{SECONDARY_CAPTURE}."):
        return "not CT: secondary capture"
    if sop_class.startswith(STORAGE) and sop_class not in CT_CLASSES:
        known = re.fullmatch("[0-9.]{1,64}", sop_class)
        return f"not CT: SOP class {sop_class if known else 'unknown'}"
    return ""


def check(header: Header, max_pixels: int) -> Header:
    """The header with `BitsStored` made good; Unreadable for what is not one plausible grey picture
    of 8 or 16 bits.
    """
    h, size = header, header.rows * header.cols
    needed, there = size * h.bits_allocated // 8, min(h.length, len(h.data) - h.start)
    native, foreign = h.transfer_syntax in NATIVE, not_ct(h.modality, h.sop_class)
    for wrong, reason in (
        (foreign, foreign),
        (size == 0, "damaged header: no Rows or Columns"),
        (
            size > max_pixels,
            f"too large: {h.rows} x {h.cols} pixels are more than convert.max_pixels",
        ),
        (
            h.samples != 1 or h.photometric not in ("MONOCHROME1", "MONOCHROME2"),
            "colour: not one grey sample a pixel",
        ),
        (h.frames > 1, f"multi-frame: {h.frames} frames"),
        (h.modality_lut, "not HU: stored values go through a Modality LUT Sequence"),
        (
            h.bits_allocated not in (8, 16),
            f"{h.bits_allocated}-bit: only 8 and 16 bits a pixel are converted",
        ),
        (h.frame_groups > 1, f"multi-frame: functional groups of {h.frame_groups} frames"),
        (
            not native and h.transfer_syntax not in (RLE, *JPEG, *JPEG_LS, *JPEG_2000, *HTJ2K),
            "unknown transfer syntax",
        ),
        (
            native and h.length == UNDEFINED,
            "damaged header: pixel data are in fragments where they must not",
        ),
        (native and there < needed, f"pixel data too short: {there} of {needed} bytes"),
    ):
        if wrong:
            raise Unreadable(reason)
    return h if 0 < h.bits_stored <= h.bits_allocated else h._replace(bits_stored=h.bits_allocated)
