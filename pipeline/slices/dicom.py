"""One DICOM file to what it stores of one slice: the decoders, after the gate of `dicom_header`.
Who decodes what:

| pixel data | decoder | why |
|---|---|---|
| uncompressed, deflated | numpy | a view of bytes whose number was checked |
| RLE Lossless | imagecodecs | checks its bounds, where dicomsdl writes out of them |
| lossless JPEG, JPEG-LS, JPEG 2000 | dicomsdl, then pydicom | called in a process that may die |
| lossy JPEG, JPEG-LS, JPEG 2000, HTJ2K | pydicom | its rounding is the reference |
| streams of 8 bits at most in files of 16 | pydicom | dicomsdl fills it byte by byte |
| JPEG-LS that pydicom refuses | imagecodecs | another library, which finds damage |

Whoever decodes, `BitsStored` says how many low bits count, and where the sign is (`_counting`).
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

import cv2
import dicomsdl
import imagecodecs
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from ..run.config import ConvertConfig
from .dicom_header import (
    BIG_ENDIAN,
    HTJ2K,
    ITEM,
    JPEG,
    JPEG_2000,
    JPEG_LS,
    LOSSLESS,
    NATIVE,
    RLE,
    SEQUENCE_END,
    SPARE_BYTES,
    UNDEFINED,
    Header,
    check,
    element,
    read_header,
)
from .geometry import Placement, is_transposed, orient
from .readers import SliceRead, Unreadable, instance_of
from .window import Stored

CUT = "pixel data too short: a fragment is damaged or cut off"
SCAN = 0xDA  # JPEG's marker of a scan
SIZE_DIFFERS = "segment decodes to another size than the picture's"


def _frame(header: Header) -> memoryview:
    """The compressed picture: all fragments behind the offset table, each checked to lie inside the
    file; one alone is not copied. The delimiter behind them may be missing where the picture itself
    shows its end.
    """
    parts: list[memoryview] = []
    at, data = header.start, memoryview(header.data)
    data = data if header.length == UNDEFINED else data[: at + header.length]
    whole = False
    while not whole and at + 8 <= len(data):
        tag, _, at, length = element(data, at, False, "<")
        whole = tag == SEQUENCE_END
        if not whole and (tag != ITEM or at + length > len(data)):
            raise Unreadable(CUT)
        parts.append(data[at : at + length])
        at += length
    frame = parts[1] if len(parts) - whole == 2 else memoryview(b"".join(parts[1:]))
    ended = header.transfer_syntax == RLE or bytes(frame[-64:]).rstrip(b"\0").endswith(b"\xff\xd9")
    if not (whole or len(parts) > 1 and ended):
        raise Unreadable(CUT)
    return frame


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
    # zeros behind the data may decode too: a pair of them is a run of one zero
    if len(plane) != size and not size < len(plane) <= size + (
        (len(segment) - len(bytes(segment).rstrip(b"\0"))) // 2
    ):
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


def _segments(frame: bytes) -> Iterator[tuple[int, int]]:
    """Marker and offset of each segment of a JPEG or JPEG-LS stream, up to where its bits begin."""
    at = 2
    while at + 4 < len(frame) and frame[at] == 0xFF:
        if frame[at + 1] == 0xFF:  # any number of them may fill the space before a marker
            at += 1
            continue
        marker, length = struct.unpack_from(">BH", frame, at + 1)
        yield marker, at
        if marker == SCAN:
            return
        at += 2 + length


def _codestream(frame: bytes, syntax: str) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits a sample that a JPEG, JPEG-LS or JPEG 2000 stream
    declares; ValueError where it does not.
    """
    if syntax in (*JPEG_2000, *HTJ2K):
        at = frame.index(b"\xff\x4f\xff\x51")
        (x1, y1, x0, y0), (components, depth) = (
            struct.unpack_from(">4I", frame, at + 8),
            struct.unpack_from(">HB", frame, at + 40),
        )
        return y1 - y0, x1 - x0, components, (depth & 0x7F) + 1
    for marker, at in _segments(frame):
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, rows, cols, components = struct.unpack_from(">BHHB", frame, at + 4)
            return rows, cols, components, depth
    raise ValueError("no frame header")


def _mended(frame: bytes) -> bytes:
    """A sequential JPEG of one component whose scan header says what it can only say (ITU T.81,
    table B.3): all 64 coefficients at once. Some writers leave zeros there.
    """
    markers = dict(_segments(frame))
    at = markers.get(SCAN, 0)
    if not markers.keys() & {0xC0, 0xC1} or frame[at + 4 : at + 5] != b"\x01":
        return frame
    return frame[: at + 7] + b"\x00\x3f\x00" + frame[at + 10 :]


def _decode_pydicom(header: Header, frame: bytes) -> np.ndarray:
    """What pydicom makes of a compressed picture, by whichever of its plug-ins does.

    It sees nothing else of the file, whose header it may read otherwise, or not at all.
    """
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(header.transfer_syntax)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = header.rows, header.cols, 1
    dataset.BitsAllocated, dataset.BitsStored = header.bits_allocated, header.bits_stored
    dataset.HighBit = header.bits_stored - 1
    dataset.PixelRepresentation = int(header.signed == 1)
    dataset.PhotometricInterpretation = header.photometric
    dataset.PixelData = encapsulate([_mended(frame)])
    return dataset.pixel_array


def _decode_safely(header: Header, frame: bytes) -> tuple[np.ndarray, str]:
    """Bit patterns (rows, cols) by pydicom, else by imagecodecs, and whose they are.

    imagecodecs is asked for JPEG-LS only: of other streams, which have no checksums, it makes
    noise where they are damaged, and pydicom's plug-ins do not.
    """
    try:
        pixels, name = _decode_pydicom(header, frame), "pydicom"
    except MemoryError:
        raise
    # pydicom's plug-ins raise what they like, and the text may hold values of tags
    except Exception as fault:
        reason = f"undecodable: pydicom raises {type(fault).__name__}"
        if header.transfer_syntax not in JPEG_LS:
            raise Unreadable(reason) from None
        try:
            pixels, name = np.asarray(imagecodecs.jpegls_decode(frame)), "imagecodecs"
        except imagecodecs.JpeglsError:
            raise Unreadable(reason) from None
    size = header.bits_allocated // 8
    if pixels.shape != (header.rows, header.cols) or pixels.dtype.itemsize > size:
        raise Unreadable("undecodable: the decoded picture has another shape than the header says")
    return pixels.view(f"u{pixels.dtype.itemsize}").astype(f"u{size}", copy=False), name


def _counting(words: np.ndarray, header: Header, depth: int) -> int:
    """How many low bits of bit patterns (rows, cols) count: `BitsStored`, whoever decoded them.

    A JPEG-LS or JPEG 2000 stream of fewer bits has no more. One of more bits that uses them, for
    other than the sign, proves BitsStored wrong; lossy ones stray a little from the range.
    """
    bits, lossy = header.bits_stored, header.transfer_syntax not in (*LOSSLESS, *HTJ2K[:2])
    if depth <= bits:
        return depth
    margin = 1 << bits >> 2 if lossy else 0
    top = (1 << depth) - (1 << bits >> 1) - margin if header.signed == 1 else 1 << depth
    used = words & np.uint16((1 << depth) - 1)
    return depth if ((used >= (1 << bits) + margin) & (used < top)).any() else bits


def _aligned(words: np.ndarray, header: Header) -> np.ndarray:
    """Bit patterns whose lowest bit is bit 0. `HighBit` may say that they lie higher, and is
    believed where nothing lies below and something above `BitsStored`: many files have a wrong one.
    """
    shift = (header.high_bit or 0) + 1 - header.bits_stored
    if not 0 < shift <= header.bits_allocated - header.bits_stored:
        return words
    low = words & ((1 << shift) - 1)
    return words if low.any() or not (words >> header.bits_stored).any() else words >> shift


def _decode_native(header: Header) -> np.ndarray:
    """Bit patterns (rows, cols) of what is not compressed."""
    big, size = header.transfer_syntax == BIG_ENDIAN, header.bits_allocated // 8
    count = header.rows * header.cols
    words = np.frombuffer(header.data, f"{'>' if big else '<'}u{size}", count, header.start)
    if big and size == 1 and header.pixel_vr == b"OW":  # two pixels in a swapped word
        even = count + count % 2
        raw = header.data[header.start : header.start + even].ljust(even, b"\0")
        words = np.frombuffer(raw, "u1").reshape(-1, 2)[:, ::-1].ravel()[:count]
    return words.reshape(header.rows, header.cols).astype(f"u{size}", copy=False)


def decode(header: Header, careful: bool) -> tuple[np.ndarray, int, str]:
    """Stored bit patterns (rows, cols) as uint8 or uint16, how many low bits of them count, and the
    decoder's name.

    With `careful` (a process died or failed over this file) dicomsdl is not asked. An exception
    other than Unreadable is dicomsdl's: the process must be given up, for its heap can't be trusted
    any more.
    """
    shape, syntax = (header.rows, header.cols), header.transfer_syntax
    if syntax in NATIVE:
        return _aligned(_decode_native(header), header), header.bits_stored, "numpy"
    frame = _frame(header)
    if syntax == RLE:
        return _aligned(_decode_rle(header, frame), header), header.bits_stored, "imagecodecs"
    try:
        *declared, depth = _codestream(bytes(frame), syntax)
    except (ValueError, struct.error):
        raise Unreadable("damaged: the compressed picture has no header") from None
    if declared != [*shape, 1] or depth > header.bits_allocated:
        raise Unreadable("damaged: header and compressed picture contradict each other")
    # 8 bits, or fragments of a declared length: dicomsdl is wrong, or crashes
    unusual = depth <= 8 and header.bits_allocated == 16 or header.length != UNDEFINED
    if careful or unusual or syntax not in LOSSLESS:
        stored, name = _decode_safely(header, bytes(frame))
    else:
        stored, name = np.empty(shape, f"u{header.bits_allocated // 8}"), "dicomsdl"
        dicomsdl.open_memory(header.data, False).copyFrameData(0, stored)
    stored = _aligned(stored, header)
    bits = header.bits_stored if syntax in JPEG else _counting(stored, header, depth)
    return stored, bits, name


def picture(data: bytes, max_pixels: int, careful: bool = False) -> tuple[Stored, Header, str]:
    """The picture that one file stores (rows, cols), its header, and the name of its decoder.

    WindowCenter and WindowWidth are never read.

    Raises:
        Unreadable: with the reason for the quarantine.
    """
    header = check(read_header(data, 4 * max_pixels + SPARE_BYTES), max_pixels)
    words, bits, decoder = decode(header, careful)
    stored = Stored(
        words,
        bits,
        header.signed == 1,
        header.slope or 1.0,  # 0 would make one value of all
        header.intercept,
        header.photometric == "MONOCHROME1",
        _padding_range(header),
    )
    return stored, header, decoder


def _padding_range(header: Header) -> tuple[int, int] | None:
    """PixelPaddingValue and PixelPaddingRangeLimit, of the sign that the pixels have, whatever VR
    they were written with; None where there are none.
    """
    value = header.padding
    if value is None:
        return None
    limit = value if header.padding_limit is None else header.padding_limit
    sign = 1 << 16 if header.signed == 1 else 0
    return value - sign * (value >> 15), limit - sign * (limit >> 15)


def _spacing(header: Header) -> tuple[float | None, ...]:
    """(y, x) of a pixel in mm; the detector's where the picture's own is not said, else none."""
    said = (header.spacing, header.detector_spacing)
    return next((spacing for spacing in said if spacing and min(spacing) > 0), (None, None))


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
    number, spacing = instance_of(os.path.basename(file)), _spacing(header)
    return SliceRead(
        stored._replace(words=words),
        spacing[::-1] if is_transposed(orientation) else spacing,
        Placement(
            header.instance if number is None else number, header.position, orientation, position
        ),
        decoder,
        header.transfer_syntax,
    )
