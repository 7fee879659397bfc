"""What real files do besides the plain case: functional groups, padding, other modalities, headers
that are written otherwise than the standard says, streams of more bits than are stored.
"""

import io
import struct

import imagecodecs
import numpy as np
import pydicom
import pytest
from helpers_dicom import SYNTAXES, dataset, naive_window, pattern, set_pixels, to_bytes
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames, itemize_fragment

from pipeline.run.config import ConvertConfig
from pipeline.slices import dicom, geometry, window
from pipeline.slices.dicom_header import read_header
from pipeline.slices.readers import Unreadable

PIXELS = 1 << 20
PLAIN = naive_window(pattern(12))
ENHANCED, LEGACY = (f"1.2.840.10008.5.1.4.1.1.2.{n}" for n in (1, 2))


def picture(data: bytes, careful: bool = False) -> np.ndarray:
    """The windowed picture that one file becomes."""
    return window.grey(dicom.picture(data, PIXELS, careful)[0])


def refusal(data: bytes) -> str:
    """Why a file is put into quarantine."""
    with pytest.raises(Unreadable) as fault:
        picture(data)
    return str(fault.value)


def element(data: bytes, tag: int) -> tuple[int, int]:
    """Begin and end of a short element of an explicit file."""
    at = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF), 132)
    return at, at + 8 + struct.unpack_from("<H", data, at + 6)[0]


def rewritten(tag: int, vr: str, value: bytes, **tags: object) -> bytes:
    """A plain explicit file in which one short element has another VR and value."""
    data = to_bytes(dataset(pattern(12), **tags))
    at, end = element(data, tag)
    return data[: at + 4] + vr.encode() + struct.pack("<H", len(value)) + value + data[end:]


# --- functional groups


def item(**values: object) -> Dataset:
    """One item of a sequence."""
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def enhanced(syntax: str = "explicit", frames: int | None = 1, groups: int = 1, **tags) -> Dataset:
    """An Enhanced CT whose picture, position and spacing are those of `dataset`, in groups."""
    ds = dataset(pattern(12), 12, False, syntax, **tags)
    for keyword in (
        "RescaleIntercept",
        "RescaleSlope",
        "PixelSpacing",
        "ImageOrientationPatient",
        "ImagePositionPatient",
    ):
        delattr(ds, keyword)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED
    if frames is not None:
        ds.NumberOfFrames = frames
    ds.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(SliceThickness=5, PixelSpacing=[0.6, 0.9])],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, -1, 0])],
            FrameVOILUTSequence=[item(WindowCenter=40, WindowWidth=400)],
            PixelValueTransformationSequence=[
                item(RescaleIntercept=-1000, RescaleSlope=2, RescaleType="HU")
            ],
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[-4, -5, 200 + k])])
        for k in range(groups)
    ]
    return ds


def set_lengths(ds: Dataset, undefined: bool) -> None:
    """Write all sequences and items of a data set with or without their lengths."""
    for one in ds:
        if one.VR == "SQ":
            one.is_undefined_length = undefined
            for inner in one.value:
                inner.is_undefined_length_sequence_item = undefined
                set_lengths(inner, undefined)


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big", "deflated", "rle"])
def test_an_enhanced_ct_of_one_frame_is_read_from_its_functional_groups(
    syntax, undefined, tmp_path
):
    for frames in (1, None, 0):
        ds = enhanced(syntax, frames)
        set_lengths(ds, undefined)
        path = tmp_path / "7.dcm"
        path.write_bytes(to_bytes(ds))
        read = dicom.read(str(path), 0, ConvertConfig(), False)
        expected = naive_window(pattern(12), 2, -1000)[::-1]
        assert np.array_equal(window.grey(read.pixels), expected)
        assert read.spacing == (0.6, 0.9)
        assert read.placement.position == (-4, -5, 200)
        assert read.placement.orientation == (1, 0, 0, 0, -1, 0)


def test_the_group_of_the_frame_counts_before_the_shared_one_and_that_before_the_header():
    ds = enhanced(RescaleSlope=3)
    ds.RescaleIntercept = 77
    transformation = item(RescaleIntercept=-900, RescaleSlope=1, RescaleType="HU")
    frame = ds.PerFrameFunctionalGroupsSequence[0]
    frame.PixelValueTransformationSequence = [transformation]
    assert np.array_equal(picture(to_bytes(ds)), naive_window(pattern(12), 1, -900))
    del frame.PixelValueTransformationSequence
    assert np.array_equal(picture(to_bytes(ds)), naive_window(pattern(12), 2, -1000))


def test_several_frames_are_refused_also_where_their_number_is_missing():
    assert refusal(to_bytes(enhanced(frames=2, groups=2))) == "multi-frame: 2 frames"
    assert refusal(to_bytes(enhanced(frames=None, groups=3))).startswith("multi-frame")


def test_functional_groups_that_hold_each_other_end():
    data = to_bytes(dataset(pattern(12)))
    at = data.index(b"\xe0\x7f\x10\x00")
    group = b""
    for _ in range(3000):
        body = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(group)) + group
        group = b"\x00\x52\x29\x92SQ\0\0" + struct.pack("<I", len(body)) + body
    assert np.array_equal(picture(data[:at] + group + data[at:]), PLAIN)


# --- how many bits count


def stream(words: np.ndarray, syntax: str) -> bytes:
    """`words` as a stream of 16 bits that knows no sign, as DCMTK and GDCM write it."""
    encoders = {
        "jpegls": lambda: imagecodecs.jpegls_encode(words, level=0),
        "jpegls near": lambda: imagecodecs.jpegls_encode(words, level=1),
        "j2k": lambda: imagecodecs.jpeg2k_encode(words, level=0, codecformat="j2k"),
        "jpeg": lambda: imagecodecs.ljpeg_encode(words, bitspersample=16),
        "htj2k": lambda: imagecodecs.htj2k_encode(words, reversible=True),
    }
    try:
        return encoders[syntax]()
    except (AttributeError, ImportError):
        pytest.skip(f"this imagecodecs writes no {syntax}")


STREAM_SYNTAXES = {
    **SYNTAXES,
    "jpegls near": "1.2.840.10008.1.2.4.81",
    "htj2k": "1.2.840.10008.1.2.4.201",
}
KINDS = ("explicit", "big", "rle", "jpeg", "jpegls", "jpegls near", "j2k", "htj2k")


def of_sixteen_bits(words: np.ndarray, bits: int, signed: bool, syntax: str) -> bytes:
    """A file that says `bits` are stored and holds `words` as they are."""
    kind = syntax if syntax in ("explicit", "big", "rle") else "explicit"
    ds = dataset(words, bits, signed, kind, RescaleIntercept=0)
    if kind != syntax:
        ds.PixelData = encapsulate([stream(words, syntax)])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = STREAM_SYNTAXES[syntax]
    return to_bytes(ds)


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("syntax", KINDS)
@pytest.mark.parametrize("bits", [12, 13])
def test_the_sign_is_where_bits_stored_says_whoever_decodes(syntax, bits, careful):
    """Values about 0 of either sign: above the sign bit there are zeros, or copies of it."""
    values = np.arange(-600, 600).reshape(30, 40)
    near = 1 if syntax == "jpegls near" else 0
    values[0, :4] = -1, 0, near - (1 << (bits - 1)), (1 << (bits - 1)) - 1 - near
    expected = naive_window(values, 1, 0)
    for words in (values & ((1 << bits) - 1), values & 0xFFFF):
        found = picture(of_sixteen_bits(words.astype("<u2"), bits, True, syntax), careful)
        assert np.abs(found.astype(int) - expected).max() <= near
        unsigned = picture(of_sixteen_bits(words.astype("<u2"), 16, False, syntax), careful)
        assert np.abs(unsigned.astype(int) - naive_window(words, 1, 0)).max() <= near


@pytest.mark.parametrize("bits", [12, 16])
def test_high_throughput_jpeg_2000_is_decoded(bits):
    words = pattern(bits)
    for number in (201, 202, 203):
        ds = dataset(words, bits)
        ds.PixelData = encapsulate([stream(words, "htj2k")])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.4.{number}"
        assert np.array_equal(picture(to_bytes(ds)), naive_window(words))


def test_high_bit_counts_where_the_pixels_lie_there_and_not_where_it_is_wrong():
    high = pattern(12) << 4
    for syntax in ("explicit", "rle"):
        ds = dataset(pattern(12), 12, False, syntax, HighBit=15)
        assert np.array_equal(picture(to_bytes(ds)), PLAIN)
        set_pixels(ds, high, syntax)
        assert np.array_equal(picture(to_bytes(ds)), PLAIN)


def test_bits_stored_that_cannot_be_counts_as_all():
    words = pattern(16)
    for bits in (0, 17, 255):
        data = to_bytes(dataset(words, 16, True, BitsStored=bits, RescaleIntercept=0))
        assert np.array_equal(picture(data), naive_window(words.view("<i2"), 1, 0))


def test_bytes_behind_the_pixels_do_not_matter():
    ds = dataset(pattern(12))
    ds.PixelData += b"\0\1\2\3"
    assert np.array_equal(picture(to_bytes(ds)), PLAIN)
    assert np.array_equal(picture(to_bytes(ds)[:-1]), PLAIN)


def test_8_bit_pixels_in_swapped_words_are_put_in_order():
    """Big endian in words (OW) of two pixels, as pydicom reads it; in bytes (OB) nothing swaps."""
    words = pattern(8).astype("u1")
    ds = dataset(pattern(8), 8, False, "big", BitsAllocated=8, RescaleIntercept=0)
    for vr, stored in (("OB", words), ("OW", words.ravel().view("<u2").astype(">u2"))):
        ds.PixelData = stored.tobytes()
        ds["PixelData"].VR = vr
        assert np.array_equal(picture(to_bytes(ds)), naive_window(words, 1, 0))


def test_a_stream_that_has_no_end_needs_its_delimiter():
    """Cut between two fragments, a picture is not there as a whole."""
    ds = dataset(pattern(12), 12, False, "j2k")
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    half = len(frame) // 4 * 2
    ds.PixelData = b"".join(map(itemize_fragment, (b"", frame[:half], frame[half:])))
    data = to_bytes(ds)
    assert np.array_equal(picture(data), PLAIN)
    assert refusal(data[: data.index(frame[:half]) + half]).startswith("pixel data too short")


# --- a JPEG that says something else than it can mean


def test_a_lossy_jpeg_whose_scan_header_is_zero_is_read():
    """Ten files of DICOM's public compression set say that the last coefficient is 0, not 63."""
    y, x = np.mgrid[:64, :64]
    words = (1000 + 200 * np.sin(x / 9) * np.cos(y / 7)).astype("<u2")
    try:
        good = imagecodecs.jpeg_encode(words, level=98, bitspersample=12)
    except Exception:
        pytest.skip("this imagecodecs writes no JPEG of 12 bits")
    scan = good.index(b"\xff\xda")
    assert good[scan + 7 : scan + 10] == b"\x00\x3f\x00"
    shown = []
    for frame in (good, good[: scan + 8] + b"\x00" + good[scan + 9 :]):
        ds = dataset(words, 12)
        ds.PixelData = encapsulate([frame])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", "1.2.840.10008.1.2.4.51"
        shown.append(picture(to_bytes(ds)))
    assert np.array_equal(*shown)
    assert np.abs(shown[0].astype(int) - naive_window(words)).max() <= 4


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_lossy_jpeg_is_refused_although_others_make_noise_of_it():
    words = (pattern(12) // 8 + 1000).astype("<u2")
    try:
        good = imagecodecs.jpeg_encode(words, level=98, bitspersample=12)
    except Exception:
        pytest.skip("this imagecodecs writes no JPEG of 12 bits")
    scan = good.index(b"\xff\xda") + 10
    frame = good[: scan + 40] + b"\xff\xc4\xff" * 9 + good[scan + 67 :]
    ds = dataset(words, 12)
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", "1.2.840.10008.1.2.4.51"
    assert refusal(to_bytes(ds)).startswith("undecodable")


@pytest.mark.parametrize("syntax", ["jpegls", "j2k", "jpeg"])
def test_tags_that_pydicom_wants_may_be_missing_or_of_another_vr(syntax):
    whole = to_bytes(dataset(pattern(12), 12, False, syntax))
    bare = dataset(
        pattern(12),
        12,
        False,
        syntax,
        SamplesPerPixel=None,
        PhotometricInterpretation=None,
        PixelRepresentation=None,
    )
    at, end = element(whole, 0x00280010)
    rows = whole[: at + 4] + b"IS\4\x0032.0" + whole[end:]
    for data in (to_bytes(bare), rows):
        assert np.array_equal(picture(data, careful=True), PLAIN)


def test_jpeg_ls_that_pydicom_refuses_is_asked_of_another(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no plug-in")

    data = to_bytes(dataset(pattern(12), 12, False, "jpegls"))
    monkeypatch.setattr(dicom, "_decode_pydicom", refuse)
    assert np.array_equal(picture(data, careful=True), PLAIN)
    assert dicom.picture(data, PIXELS, True)[2] == "imagecodecs"
    damaged = bytearray(data)
    damaged[data.index(b"\xff\xda") + 100 : -20] = bytes(len(data) - data.index(b"\xff\xda") - 120)
    with pytest.raises(Unreadable, match="pydicom raises RuntimeError"):
        picture(bytes(damaged), careful=True)


# --- padding


def padded(value: int, limit: int | None = None, vr: str = "US", **tags) -> bytes:
    """A file in whose first rows padding is stored, and which says so by tags of any VR."""
    words = tags.pop("words")
    ds = dataset(words, **tags)
    for tag, number in ((0x00280120, value), (0x00280121, limit)):
        if number is not None:
            ds.add_new(tag, vr, number)
    return to_bytes(ds)


def with_padding(*rows: int) -> np.ndarray:
    """Words of tissue, about 1100, with one value of padding in each of the first rows."""
    words = (pattern(12) // 20 + 1000).astype("<u2")
    for k, value in enumerate(rows):
        words[k] = value & 0xFFFF
    return words


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("bits", "signed", "vr", "value"),
    [
        (16, False, "US", 63536),
        (16, False, "SS", -2000),
        (12, False, "US", 63536),  # more bits than are stored
        (12, False, "US", 4095),
        (16, True, "SS", -2000),
        (16, True, "US", 63536),
        (12, True, "SS", -2000),
        (16, True, "SS", 30000),
    ],
)
def test_padding_is_air(bits, signed, vr, value, kind):
    words = with_padding(value)
    data = padded(
        value, None, vr, words=words, bits=bits, signed=signed, PhotometricInterpretation=kind
    )
    plain = naive_window(words, inverted=kind == "MONOCHROME1")
    found = picture(data)
    assert (found[0] == 0).all()
    assert np.array_equal(found[1:], plain[1:])
    assert len(np.unique(plain[1:])) > 50


def test_padding_may_be_a_range_of_either_direction():
    words = with_padding(63000, 63536, 63300, 62999)
    for value, limit in ((63536, 63000), (63000, 63536)):
        found = picture(padded(value, limit, words=words, bits=16))
        assert (found[:3] == 0).all()
        assert (found[3] == 255).all()
    assert (picture(padded(63536, None, words=words, bits=16))[[0, 2, 3]] == 255).all()


def test_padding_that_is_also_tissue_counts_only_where_it_reaches_the_border():
    """0 HU declared as padding is water inside the body."""
    words = with_padding(1024, 1024)
    words[10, 10] = words[20, 5:9] = 1024
    found = picture(padded(1024, None, words=words, bits=16))
    assert (found[:2] == 0).all()
    assert np.array_equal(found[2:], naive_window(words)[2:])
    assert found[10, 10] == 96


def test_a_limit_that_would_make_padding_of_tissue_is_not_believed():
    words = with_padding(63536)
    found = picture(padded(63536, 1024, words=words, bits=16))
    assert (found[0] == 0).all()
    assert np.array_equal(found[1:], naive_window(words)[1:])


# --- what is no CT


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "CT"}, ""),
        ({"Modality": "ct "}, ""),
        ({"Modality": ""}, ""),
        ({"SOPClassUID": ENHANCED}, ""),
        ({"SOPClassUID": LEGACY, "Modality": "CT"}, ""),
        ({"SOPClassUID": "1.3.12.2.1107.5.9.1", "Modality": "CT"}, ""),
        ({"Modality": "MR"}, "not CT: Modality MR"),
        ({"Modality": "PT"}, "not CT: Modality PT"),
        ({"Modality": "SEG", "BitsAllocated": 1, "NumberOfFrames": 9}, "not CT: Modality SEG"),
        ({"Modality": "OT"}, "not CT: Modality OT"),
        ({"Modality": "Mrs^Seen 7"}, "not CT: Modality unknown"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "CT"}, "secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, "not CT: secondary capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "SOP class 1.2.840.10008.5.1.4.1.1.4"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, "not CT: SOP class"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_ct_is_refused_by_name(tags, reason):
    data = to_bytes(dataset(pattern(12), **tags))
    if reason:
        assert reason in refusal(data)
    else:
        assert np.array_equal(picture(data), PLAIN)


def test_where_the_header_says_no_class_that_of_the_file_counts():
    ds = dataset(pattern(12))
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.128"
    ds.SOPClassUID = ""
    assert refusal(to_bytes(ds)).startswith("not CT: SOP class")


def test_what_has_no_pixels_is_named_by_its_modality_too():
    ds = dataset(pattern(12), Modality="RTSTRUCT")
    del ds.PixelData
    assert refusal(to_bytes(ds)) == "not CT: Modality RTSTRUCT"
    del ds.Modality
    assert refusal(to_bytes(ds)) == "no pixel data"


# --- rescaling and sizes


@pytest.mark.parametrize("slope", ["", "0", "0.0"])
def test_a_slope_that_is_empty_or_zero_is_one(slope):
    assert np.array_equal(picture(to_bytes(dataset(pattern(12), RescaleSlope=slope))), PLAIN)


@pytest.mark.parametrize("value", [b"nan ", b"inf ", b"1\\2 ", b"1,024 ", b"x "])
def test_a_rescaling_that_is_no_one_number_is_refused_by_name(value):
    for tag, name in ((0x00281053, "slope"), (0x00281052, "intercept")):
        reason = refusal(rewritten(tag, "DS", value))
        assert reason == f"damaged header: the rescale {name} is no number"


def test_a_modality_lut_is_refused_by_name_and_an_empty_one_is_none():
    lut = item(LUTDescriptor=[4096, 0, 16], ModalityLUTType="HU", LUTData=bytes(8192))
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    ds = dataset(pattern(12))
    for undefined in (False, True):
        for sequence, taken in (([lut], False), ([], True)):
            ds.ModalityLUTSequence = sequence
            set_lengths(ds, undefined)
            if taken:
                assert np.array_equal(picture(to_bytes(ds)), PLAIN)
            else:
                assert refusal(to_bytes(ds)).startswith("not HU: ")


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({}, (0.7, 0.8)),
        ({"PixelSpacing": "", "ImagerPixelSpacing": [0.5, 0.6]}, (0.5, 0.6)),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.5, 0.6]}, (0.5, 0.6)),
        ({"ImagerPixelSpacing": [0.5, 0.6]}, (0.7, 0.8)),
        ({"PixelSpacing": [0, 0.8]}, (None, None)),
        ({"PixelSpacing": "0.9"}, (0.9, 0.9)),
    ],
)
def test_a_spacing_is_positive_or_unknown(tags, spacing, tmp_path):
    path = tmp_path / "1.dcm"
    path.write_bytes(to_bytes(dataset(pattern(12), **tags)))
    assert dicom.read(str(path), 0, ConvertConfig(), False).spacing == spacing


# --- headers that pydicom reads


def changed(old: bytes, new: bytes, syntax: str = "explicit") -> bytes:
    """A plain file in which one text stands for another."""
    data = to_bytes(dataset(pattern(12), 12, False, syntax))
    assert data.count(old) == 1
    return data.replace(old, new)


def private(value: bytes, length: int = 0xFFFFFFFF, vr: bytes = b"UN") -> bytes:
    """A plain file with one private element more, behind the name."""
    data = to_bytes(dataset(pattern(12)))
    at = data.index(b"\x28\x00\x02\x00")
    return (
        data[:at] + b"\x09\0\x01\x10" + vr + b"\0\0" + struct.pack("<I", length) + value + data[at:]
    )


ITEM, ITEM_END, END = (bytes.fromhex(text) for text in ("feff00e0", "feff0de0", "feffdde0"))
DIALECTS = {
    "implicit, it says, and is explicit": changed(
        b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"
    ),
    "explicit, it says, and is implicit": to_bytes(
        dataset(pattern(12), 12, False, "implicit")
    ).replace(b"UI\x12\x001.2.840.10008.1.2\0", b"UI\x14\x001.2.840.10008.1.2.1\0"),
    "an unknown sequence with explicit items": private(
        ITEM + b"\xff" * 4 + b"\x08\0\x60\0CS\x02\0MR" + ITEM_END + bytes(4) + END + bytes(4)
    ),
    "an unknown sequence with explicit items of a length": private(
        ITEM + b"\x0a\0\0\0" + b"\x08\0\x60\0CS\x02\0MR" + END + bytes(4)
    ),
    "bytes of undefined length": private(b"\1\2\3\4" * 5 + END + bytes(4), vr=b"OB"),
    "a private element of a length": private(b"\1\2\3\4", 4),
    "a group length": private(b"").replace(
        b"\x09\0\x01\x10UN\0\0" + b"\xff" * 4, b"\x28\0\0\0UL\x04\0\x07\0\0\0"
    ),
    "a VR that is not known": private(b"").replace(
        b"\x09\0\x01\x10UN\0\0" + b"\xff" * 4, b"\x09\0\x01\x10ZZ\x02\0ab"
    ),
    "an intercept of FL": rewritten(0x00281052, "FL", struct.pack("<f", -1024)),
    "an intercept of FD": rewritten(0x00281052, "FD", struct.pack("<d", -1024)),
    "an intercept of SS": rewritten(0x00281052, "SS", struct.pack("<h", -1024)),
    "an intercept of IS": rewritten(0x00281052, "IS", b"-1024 "),
    "an intercept of LO": rewritten(0x00281052, "LO", b" -1024.000"),
    "an intercept of UN": rewritten(0x00281052, "UN", b"-1024 ").replace(
        b"UN\x06\0-1024 ", b"UN\0\0\x06\0\0\0-1024 "
    ),
    "an intercept with a decimal comma": rewritten(0x00281052, "DS", b"-1024,0 "),
    "an intercept given twice": rewritten(0x00281052, "DS", b"-1024\\-1024.0"),
    "an intercept padded with zeros": rewritten(0x00281052, "DS", b"-1.024e3\0\0"),
    "rows of UL": rewritten(0x00280010, "UL", struct.pack("<I", 32)),
    "rows of IS": rewritten(0x00280010, "IS", b"32.0"),
    "a sign of SS": rewritten(0x00280103, "SS", b"\0\0"),
    "the end is cut": to_bytes(dataset(pattern(12), 12, False, "rle"))[:-4],
    "the end is missing": to_bytes(dataset(pattern(12), 12, False, "rle"))[:-8],
    "the end of JPEG 2000 is missing": to_bytes(dataset(pattern(12), 12, False, "j2k"))[:-8],
    "no prefix, big endian": (lambda data: data[data.index(b"\0\x08\0\x16UI") :])(
        to_bytes(dataset(pattern(12), 12, False, "big"))
    ),
    "no prefix, begins with the picture": (lambda data: data[data.index(b"\x28\0\2\0US") :])(
        to_bytes(dataset(pattern(12)))
    ),
}


@pytest.mark.parametrize("data", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.filterwarnings("ignore")
def test_what_pydicom_reads_is_read(data):
    assert np.array_equal(picture(data), PLAIN)
    ds = pydicom.dcmread(io.BytesIO(data), force=True)
    # it wants to be told the syntax, and leaves out pixels without an end
    if "TransferSyntaxUID" in ds.file_meta and "PixelData" in ds:
        assert np.array_equal(naive_window(ds.pixel_array), PLAIN)


@pytest.mark.parametrize("syntax", ["rle", "j2k"])
def test_fragments_may_have_a_declared_length(syntax):
    data = to_bytes(dataset(pattern(12), 12, False, syntax))
    at = data.rindex(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff")
    for end in (len(data), len(data) - 8):
        length = struct.pack("<I", end - at - 12)
        found = data[: at + 8] + length + data[at + 12 : end]
        assert np.array_equal(picture(found), PLAIN)
        assert dicom.picture(found, PIXELS)[2] != "dicomsdl"  # it crashes over them


def test_a_number_is_a_number_in_any_vr_and_a_bad_one_counts_as_missing():
    for vr, value, number in (
        ("IS", b"7.0 ", 7),
        ("DS", b"7", 7),
        ("US", b"\7\0", 7),
        ("FL", struct.pack("<f", 7), 7),
        ("IS", b"x ", None),
        ("IS", b"1\\2 ", None),
        ("FD", struct.pack("<d", float("nan")), None),
    ):
        assert read_header(rewritten(0x00200013, vr, value), PIXELS).instance == number


# --- nearly nothing in the picture


def test_specks_are_no_body_that_is_cut():
    specks = np.zeros((512, 512), np.uint8)
    specks[252, 300] = 3
    specks[100:120, 40] = 90
    assert not geometry.is_cut(specks)
    cut = np.zeros((512, 512), np.uint8)
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    cut[(x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = 120
    assert not geometry.is_cut(cut)
    cut[:, 300:] = 0
    assert geometry.is_cut(cut)
