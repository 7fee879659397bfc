"""One file to one picture: exactness against pydicom, the header reader, the gate."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from helpers_dicom import SYNTAXES, dataset, naive_window, pattern, to_bytes, write_series
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence

from pipeline.run.config import ConvertConfig
from pipeline.slices import dicom, dicom_header, window
from pipeline.slices import geometry as series
from pipeline.slices.convert import decode_series_files
from pipeline.slices.dicom_header import Unreadable, read_header
from pipeline.slices.sources import list_files

PIXELS = 1 << 20
DATA = Path(pydicom.__file__).parent / "data"
BUNDLED = sorted(
    path
    for path in DATA.rglob("*")
    if path.suffix == ".dcm" or (path.is_file() and path.read_bytes()[128:132] == b"DICM")
)
INTERCEPTS = (-1024, 0, -8192, -32768)
FLIPS = {"": (1, 1), "x": (-1, 1), "y": (1, -1), "xy": (-1, -1)}


def picture(data, max_pixels, careful=False):
    """What one file becomes: the windowed picture, the header and the decoder's name."""
    stored, header, decoder = dicom.picture(data, max_pixels, careful)
    return window.grey(stored), header, decoder


def reference(ds: pydicom.Dataset) -> np.ndarray:
    """What pydicom decodes, after the naive window."""
    inverted = ds.PhotometricInterpretation == "MONOCHROME1"
    return naive_window(
        ds.pixel_array,
        float(ds.get("RescaleSlope") or 1),
        float(ds.get("RescaleIntercept") or 0),
        inverted,
    )


@pytest.mark.parametrize(
    "syntax", ["rle", "j2k", "jpegls", "jpeg", "deflated", "explicit", "implicit", "big"]
)
def test_every_kind_of_pixel_equals_pydicom_after_the_window(syntax, tmp_path):
    folder, expected, narrow = tmp_path / "train_images" / "1" / "2", {}, set()
    folder.mkdir(parents=True)
    for signed in (False, True):
        for bits in (8, 12, 13, 16, 0, None):
            if (syntax, bits) == ("jpeg", 8):
                continue  # pydicom can't decode it either: see below
            ds = dataset(pattern(bits or 16), bits or 16, signed, syntax)
            decoded = pydicom.dcmread(pydicom.filebase.DicomBytesIO(to_bytes(ds))).pixel_array
            assert len(np.unique(decoded)) > 50
            if bits is None:
                del ds.BitsStored, ds.HighBit
            elif bits == 0:
                ds.BitsStored = 0
            for intercept in INTERCEPTS:
                for kind in ("MONOCHROME1", "MONOCHROME2"):
                    for x, y in FLIPS.values():
                        number = len(expected) + 1
                        ds.RescaleIntercept, ds.PhotometricInterpretation = intercept, kind
                        ds.ImageOrientationPatient = [x, 0, 0, 0, y, 0]
                        (folder / f"{number}.dcm").write_bytes(to_bytes(ds))
                        expected[number] = naive_window(
                            decoded, 1.0, intercept, kind == "MONOCHROME1"
                        )[::y, ::x]
                        if bits == 8 and syntax in ("j2k", "jpegls"):
                            narrow.add(number)
    slices, quarantined = decode_series_files(list_files(folder, tmp_path), ConvertConfig())
    assert quarantined == []
    assert len(slices) == len(expected) == 2 * (5 if syntax == "jpeg" else 6) * 4 * 2 * 4
    for item in slices:
        assert np.array_equal(item.image, expected[item.instance_number])
        usual = {
            "rle": "imagecodecs",
            "j2k": "dicomsdl",
            "jpegls": "dicomsdl",
            "jpeg": "dicomsdl",
        }.get(syntax, "numpy")
        assert item.decoder == ("pydicom" if item.instance_number in narrow else usual)


@pytest.mark.parametrize("syntax", ["jpeg", "jpegls"])
def test_fill_bytes_before_a_marker_are_no_damage(syntax):
    """JPEG (ITU T.81, B.1.1.2) lets any number of 0xFF bytes fill the space before a marker;
    dicomsdl's JPEG-LS knows none.
    """
    whole = dataset(pattern(12), 12, False, syntax)
    stream = next(generate_frames(whole.PixelData, number_of_frames=1))
    filled = dataset(
        pattern(12),
        12,
        False,
        syntax,
        PixelData=encapsulate([stream[:2] + b"\xff\xff" + stream[2:]]),
    )
    assert np.array_equal(
        picture(to_bytes(filled), PIXELS, careful=syntax == "jpegls")[0],
        picture(to_bytes(whole), PIXELS)[0],
    )


def test_lossless_jpeg_of_8_bits_in_a_file_of_16_is_refused_as_by_pydicom():
    data = to_bytes(dataset(pattern(8), 8, False, "jpeg"))
    with pytest.raises(Unreadable, match="pydicom raises ValueError"):
        picture(data, PIXELS)
    with pytest.raises(ValueError, match="broadcast"):
        _ = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data)).pixel_array


@pytest.mark.parametrize("syntax", ["j2k", "jpegls", "jpeg"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [12, 13, 16, None])
def test_pydicom_gives_the_same_picture_where_dicomsdl_must_not(syntax, signed, bits):
    data = to_bytes(dataset(pattern(bits or 16), bits, signed, syntax))
    fast, _, first = picture(data, PIXELS)
    safe, _, second = picture(data, PIXELS, careful=True)
    assert (first, second) == ("dicomsdl", "pydicom")
    assert np.array_equal(fast, safe)


@pytest.mark.slow
@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.relative_to(DATA).as_posix())
@pytest.mark.filterwarnings("ignore")
def test_bundled_files_equal_pydicom_or_are_refused_for_the_right_reason(
    path, tmp_path, monkeypatch
):
    monkeypatch.setattr(dicom_header, "not_ct", lambda *_: "")  # most are other modalities
    folder = tmp_path / "train_images" / "1" / "2"
    folder.mkdir(parents=True)
    (folder / "1.dcm").write_bytes(path.read_bytes())
    slices, quarantined = decode_series_files(list_files(folder, tmp_path), ConvertConfig())
    assert len(slices) + len(quarantined) == 1
    ds = pydicom.dcmread(path, force=True)
    if slices:
        if path.stem == "JPEG-lossy":  # pydicom stumbles over its scan header
            stream = next(generate_frames(ds.PixelData, number_of_frames=1))
            expected = naive_window(imagecodecs.jpeg_decode(stream), 1, 0)
            difference = slices[0].image.astype(int) - expected
            assert np.abs(difference).max() <= 1
            return
        assert np.array_equal(
            slices[0].image, series.orient(reference(ds), ds.get("ImageOrientationPatient"))
        )
        return
    reason = quarantined[0][1]
    grey = ds.get("SamplesPerPixel", 1) == 1 and str(
        ds.get("PhotometricInterpretation", "MONOCHROME2")
    ).startswith("MONOCHROME")
    if "PixelData" not in ds or "Rows" not in ds:
        assert reason.startswith(
            ("no pixel data", "not DICOM", "cut off", "damaged header: no Rows")
        )
    elif not grey:
        assert reason.startswith(("colour", "not DICOM"))
    elif path.stem != "badVR" and int(ds.get("NumberOfFrames", 1) or 1) > 1:
        assert reason.startswith("multi-frame")
    elif ds.BitsAllocated not in (8, 16):
        assert reason.startswith(f"{ds.BitsAllocated}-bit")
    elif path.stem == "MR_truncated":
        assert reason == "pixel data too short: 8130 of 8192 bytes"
    else:
        assert reason.startswith(("not DICOM", "damaged", "undecodable"))
        with pytest.raises(Exception):  # noqa: B017, PT011 (pydicom can't either: whatever it raises)
            _ = pydicom.dcmread(path).pixel_array


def test_the_bundled_files_are_not_all_refused(monkeypatch):
    monkeypatch.setattr(dicom_header, "not_ct", lambda *_: "")
    good = 0
    for path in BUNDLED:
        try:
            picture(path.read_bytes(), PIXELS, careful=True)
            good += 1
        except Unreadable:
            pass
    assert good >= 15


def test_window_rounds_halves_to_even_at_every_integer_hu():
    hu = np.arange(-2000, 4000)
    exact = [min(max(round(Fraction((int(value) + 150) * 255, 400)), 0), 255) for value in hu]
    assert window.window(hu).tolist() == exact
    assert (window.window(np.array([-150.0, 250.0, -151.0, 251.0])) == [0, 255, 0, 255]).all()


@pytest.mark.parametrize(
    ("bits", "signed", "slope", "intercept"),
    [(12, True, 1.0, 0.0), (13, True, 0.5, -8192.0), (16, False, 2.5, -32768.0)],
)
def test_lookup_ignores_the_unused_bits_and_extends_the_sign(bits, signed, slope, intercept):
    table = window.lookup(65536, bits, signed, slope, intercept, False)
    for word in (0, 1, 2047, 2048, 4095, 4096, 8191, 32767, 32768, 65535, 1174, 3096):
        value = word % (1 << bits)
        value -= (1 << bits) if signed and value >= 1 << (bits - 1) else 0
        assert table[word] == naive_window(np.array([value]), slope, intercept)[0]


def test_wide_lookup_and_numpy_agree(monkeypatch):
    data = to_bytes(dataset(pattern(16), 16, syntax="rle"))
    fast = picture(data, PIXELS)[0]
    monkeypatch.setattr(window, "_wide_lut", lambda: False)
    assert np.array_equal(picture(data, PIXELS)[0], fast)


def test_unused_high_bits_do_not_count():
    words = pattern(12)
    clean, dirty = (
        picture(to_bytes(dataset(w, 12, True)), PIXELS)[0] for w in (words, words | 0xF000)
    )
    assert np.array_equal(clean, dirty)


@pytest.mark.parametrize(
    ("syntax", "signed"), [("j2k", False), ("j2k", True), ("jpegls", False), ("jpegls", True)]
)
def test_the_codestream_says_how_many_bits_count(syntax, signed):
    """A stream of 16 bits in a file that says 12 are stored: what pydicom makes of it."""
    ds = dataset(pattern(16), 16, signed, syntax)
    ds.BitsStored, ds.HighBit, ds.RescaleSlope, ds.RescaleIntercept = 12, 11, 0.01, 0
    data = to_bytes(ds)
    expected = reference(pydicom.dcmread(pydicom.filebase.DicomBytesIO(data)))
    assert len(np.unique(expected)) > 50
    assert np.array_equal(picture(data, PIXELS)[0], expected)


def test_windows_are_never_read_and_optional_tags_may_be_missing():
    plain = picture(to_bytes(dataset(pattern(12))), PIXELS)[0]
    windows = dataset(pattern(12), WindowCenter=[40, 300], WindowWidth=[400, 1500])
    bare = dataset(
        pattern(12),
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        PixelSpacing=None,
        InstanceNumber=None,
        SOPInstanceUID=None,
    )
    empty = dataset(pattern(12), ImagePositionPatient="", PixelSpacing="", RescaleSlope="")
    for ds in (windows, bare, empty):
        assert np.array_equal(picture(to_bytes(ds), PIXELS)[0], plain)
    header = read_header(to_bytes(bare), PIXELS)
    assert (header.position, header.orientation, header.spacing, header.instance) == (
        None,
        None,
        None,
        None,
    )
    no_class = dataset(pattern(12), SOPClassUID=None)
    del no_class.file_meta.MediaStorageSOPClassUID
    assert np.array_equal(picture(_save_as_is(no_class), PIXELS)[0], plain)


def test_whole_numbers_out_of_range_count_as_missing():
    for text, number in (
        ("1e99", None),
        ("2147483648", None),
        ("-2147483649", None),
        ("-2147483648", -(1 << 31)),
        ("7", 7),
    ):
        data = to_bytes(dataset(pattern(12), InstanceNumber=1234567890))
        value = text.encode().ljust(12)
        data = data.replace(b"IS\x0a\x001234567890", b"IS\x0c\x00" + value)
        assert read_header(data, PIXELS).instance == number


def _save_as_is(ds: pydicom.Dataset) -> bytes:
    buffer = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=False)
    return buffer.getvalue()


def test_file_without_prefix_or_meta_group_is_read():
    ds = dataset(pattern(12))
    data, at = to_bytes(ds), 0
    assert np.array_equal(picture(data[132:], PIXELS)[0], picture(data, PIXELS)[0])
    at = data.index(b"\x08\x00\x16\x00UI")
    assert np.array_equal(picture(data[at:], PIXELS)[0], picture(data, PIXELS)[0])


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big", "deflated"])
def test_sequences_before_the_pixels_are_skipped_whatever_their_length_form(syntax):
    inner = pydicom.Dataset()
    inner.Rows, inner.RescaleIntercept = 7, 5
    deep = pydicom.Dataset()
    deep.ReferencedImageSequence = Sequence([inner])
    ds = dataset(pattern(12), 12, False, syntax, ReferencedImageSequence=Sequence([deep, inner]))
    expected = naive_window(pattern(12))
    for undefined in (False, True):
        ds["ReferencedImageSequence"].is_undefined_length = undefined
        deep.is_undefined_length_sequence_item = inner.is_undefined_length_sequence_item = undefined
        assert np.array_equal(picture(to_bytes(ds), PIXELS)[0], expected)


def test_an_unknown_sequence_of_undefined_length_holds_implicit_items():
    item = b"\x08\x00\x60\x00\x04\x00\x00\x00CT  " + b"\xfe\xff\x0d\xe0\0\0\0\0"
    unknown = (
        b"\x08\x00\x50\x11UN\0\0\xff\xff\xff\xff"
        + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
        + item
        + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )
    # a length that reads like a VR
    odd = unknown.replace(b"\x04\x00\x00\x00CT  ", b"UN\0\0" + b"x" * 0x4E55)
    data = to_bytes(dataset(pattern(12)))
    at = data.index(b"\x10\x00\x10\x00PN")
    for element in (unknown, odd):
        assert np.array_equal(
            picture(data[:at] + element + data[at:], PIXELS)[0], naive_window(pattern(12))
        )


def test_nesting_without_end_is_refused():
    bottomless = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = to_bytes(dataset(pattern(12)))
    at = data.index(b"\x10\x00\x10\x00PN")
    with pytest.raises(Unreadable, match="nested"):
        picture(data[:at] + bottomless * 5000 + data[at:], PIXELS)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big", "deflated", "rle"])
def test_any_cut_is_refused_cleanly(syntax):
    data = to_bytes(dataset(pattern(12), 12, False, syntax))
    for end in range(0, len(data) - 10, 3):
        with pytest.raises(Unreadable):
            picture(data[:end], PIXELS)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big", "deflated", "rle"])
def test_any_flipped_bytes_give_a_picture_or_a_clean_refusal(syntax):
    good = to_bytes(dataset(pattern(12), 12, False, syntax))
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for at in rng.integers(128, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        try:
            image, header, _ = picture(bytes(data), PIXELS)
            assert image.shape == (header.rows, header.cols)
        except Unreadable:
            refused += 1
    assert refused > 20


def test_absurd_sizes_are_refused_without_decoding(monkeypatch):
    monkeypatch.setattr(dicom, "decode", lambda *_: pytest.fail("decoded"))
    for tags in (
        {"Rows": 65535, "Columns": 65535},
        {"Rows": 0},
        {"Columns": None},
        {"NumberOfFrames": "2"},
        {"BitsAllocated": 32},
    ):
        with pytest.raises(Unreadable):
            picture(to_bytes(dataset(pattern(12), syntax="rle", **tags)), PIXELS)
    monkeypatch.undo()
    with pytest.raises(Unreadable, match="contradict"):
        picture(to_bytes(dataset(pattern(12), 12, False, "j2k", Rows=500)), PIXELS)


def test_a_deflated_bomb_is_not_inflated(monkeypatch):
    data = to_bytes(dataset(pattern(12), 12, False, "deflated"))
    start = data.index(b"\x02\x00\x10\x00UI")
    start += 8 + struct.unpack_from("<H", data, start + 6)[0]
    while data[start : start + 2] == b"\x02\x00":
        start += 8 + struct.unpack_from("<H", data, start + 6)[0]
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = (
        data[:start]
        + deflate.compress(b"\x08\x00\x08\x00CS\x02\x00A " * (1 << 22))
        + deflate.flush()
    )
    monkeypatch.setattr(dicom, "SPARE_BYTES", 1 << 16)
    with pytest.raises(Unreadable, match="too large"):
        picture(bomb, 1 << 10)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 13, 15, 16])
@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(1, -1024), (1, 0), (1, 24), (2, -1024), (0.5, -512), (1.3, -900.7), (1, -8192)],
)
def test_arithmetic_and_table_give_the_same_for_every_pattern(signed, bits, slope, intercept):
    """Also where bits that do not count are set: such a picture takes the table."""
    every = np.arange(65536).astype(np.uint16).reshape(256, 256)
    sign = every >> (bits - 1) & 1 if signed else 0 * every
    meant = every.astype(int) & (1 << bits) - 1
    # properly extended: takes the arithmetic
    proper = every[every.astype(int) == (meant - (sign.astype(int) << bits)) % 65536][None]
    for stored in (every, proper):
        found = window.windowed(stored, bits, signed, float(slope), float(intercept), False)
        value = (stored.astype(int) & (1 << bits) - 1).astype(float)
        value -= (value >= 1 << (bits - 1)) * float(1 << bits) if signed else 0
        assert np.array_equal(
            found, np.clip(np.rint((value * slope + intercept + 150) * 255 / 400), 0, 255)
        )
    assert proper.size == 1 << bits


def test_the_usual_files_take_the_arithmetic():
    for bits, shift, intercept in (
        (12, 0, -1024),
        (16, 0, -1024),
        (12, 2048, 0),
        (16, 32768, 0),
        (16, 32768, -1024),
        (16, 0, -8192),
    ):
        assert window._scaling(bits, shift, 1.0, float(intercept))


def test_rle_segments_must_lie_in_the_frame_and_fill_their_plane_exactly():
    ds = dataset(pattern(12), syntax="rle")
    frame = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)

    def refused(changed: bytes) -> str:
        ds.PixelData = pydicom.encaps.encapsulate([changed])
        with pytest.raises(Unreadable) as fault:
            picture(to_bytes(ds), PIXELS)
        return str(fault.value)

    first, second = struct.unpack_from("<2I", frame, 4)
    for words in (
        (3, first, second),
        (2, second, first),
        (2, 10, second),
        (2, first, len(frame) + 1),
        (2, first, 0xFFFFFFFF),
    ):
        assert "implausible" in refused(struct.pack("<3I", *words) + frame[12:])
    assert "another size" in refused(frame + b"\x81\x00" * 4) or "cut off" in refused(
        frame + b"\x81\x00" * 4
    )
    short = struct.pack("<3I", 2, first, second) + frame[12 : len(frame) - 20]
    assert refused(short).startswith("damaged RLE")


@pytest.mark.filterwarnings("ignore:The decoded RLE segment contains non-conformant padding")
def test_rle_segments_may_be_padded_with_zeros():
    ds = dataset(pattern(12), syntax="rle")
    frame, plain = (
        pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1),
        picture(to_bytes(ds), PIXELS)[0],
    )
    first, second = struct.unpack_from("<2I", frame, 4)
    for pad in (1, 2, 3, 4, 7, 16):
        parts = [frame[first:second] + bytes(pad), frame[second:] + bytes(pad)]
        ds.PixelData = pydicom.encaps.encapsulate(
            [struct.pack("<3I", 2, first, second + pad) + frame[12:64] + b"".join(parts)]
        )
        assert np.array_equal(picture(to_bytes(ds), PIXELS)[0], plain)
        assert np.array_equal(reference(ds), plain)
    for run in (b"\x00\x07", b"\xff\x07", b"\x00\x00"):  # pixels behind it would be shifted
        ds.PixelData = pydicom.encaps.encapsulate([frame[:second] + run + frame[second:]])
        with pytest.raises(Unreadable, match="another size"):
            picture(to_bytes(ds), PIXELS)


@pytest.mark.filterwarnings("ignore:The decoded RLE segment contains non-conformant padding")
def test_rle_segments_may_be_padded_with_many_zeros():
    """20,000 of them decode to 10,000 pixels more than the picture has, once refused as another
    size.
    """
    ds = dataset(np.tile(pattern(12), (8, 8)), syntax="rle")
    frame, plain = (
        pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1),
        picture(to_bytes(ds), PIXELS)[0],
    )
    assert plain.size > 10_000
    ds.PixelData = pydicom.encaps.encapsulate([frame + bytes(20_000)])
    assert np.array_equal(picture(to_bytes(ds), PIXELS)[0], plain)
    assert np.array_equal(reference(ds), plain)


def test_a_good_series_is_read_in_order(tmp_path):
    write_series(tmp_path / "train_images" / "1" / "2", 4, syntax="explicit", first=9)
    slices, quarantined = decode_series_files(
        list_files(tmp_path / "train_images" / "1" / "2", tmp_path), ConvertConfig()
    )
    assert [item.instance_number for item in slices] == [9, 10, 11, 12]
    assert [item.order for item in slices] == [0, 1, 2, 3]
    assert [item.z_mm for item in slices] == [0.0, -3.0, -6.0, -9.0]
    assert {(item.spacing_y_mm, item.spacing_x_mm) for item in slices} == {(0.7, 0.8)}
    assert {item.transfer_syntax for item in slices} == {SYNTAXES["explicit"]}
    assert quarantined == []
