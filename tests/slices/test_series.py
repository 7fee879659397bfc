"""Order, orientation and flags; NIfTI against DICOM."""

import csv
import errno
import gzip
import time

import cv2
import nibabel as nib
import numpy as np
import polars as pl
import pytest
from helpers_dicom import dataset, fingerprints, to_bytes

from pipeline.run.config import ConvertConfig, VolumeConfig
from pipeline.slices import convert, nifti
from pipeline.slices.convert import decode_series_files, pictures
from pipeline.slices.dicom_header import Unreadable
from pipeline.slices.geometry import Placement, arrange, is_cut, is_transposed, orient
from pipeline.slices.sources import Listing, list_files, plan
from pipeline.slices.store import convert_all
from pipeline.slices.window import Stored, grey
from pipeline.system.contained import Failure
from pipeline.system.errors import InputError
from pipeline.volumes.store import build_all

AXIAL = [1, 0, 0, 0, 1, 0]
NOTHING = pl.DataFrame({"patient_id": [], "series_id": []})


def at(instance, z, orientation=AXIAL, **more):
    return Placement(instance, None if z is None else [0.0, 0.0, z], orientation, **more)


def orders(slices, **more):
    return [place.order for place in arrange(slices, **more)]


def test_superior_first_whatever_the_numbers_say():
    assert orders([at(1, -5.0), at(2, 0.0), at(3, 5.0)]) == [2, 1, 0]
    assert orders([at(1, 5.0), at(2, 0.0), at(3, -5.0)]) == [0, 1, 2]
    assert [place.z_mm for place in arrange([at(1, -5.0), at(2, 7.5)])] == [-5.0, 7.5]


@pytest.mark.parametrize(
    "orientation",
    [
        AXIAL,
        [-1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, -1, 0],
        [-1, 0, 0, 0, -1, 0],
        [0, 1, 0, 1, 0, 0],
        None,
    ],
)
def test_flipped_directions_do_not_turn_the_order(orientation):
    assert orders([at(k, -3.0 * k, orientation) for k in range(5)]) == [0, 1, 2, 3, 4]


def test_a_tilted_gantry_is_ordered_along_its_normal():
    tilt = np.deg2rad(20)
    column = [0, np.cos(tilt), np.sin(tilt)]
    normal = np.cross([1, 0, 0], column)
    slices = [
        Placement(
            k,
            (normal * -2.5 * k + [0, 30.0 * k, 0] * (np.array([1, 0, 0]))).tolist(),
            [1, 0, 0, *column],
        )
        for k in range(6)
    ]
    places = arrange(slices)
    assert [place.order for place in places] == [0, 1, 2, 3, 4, 5]
    assert np.allclose(np.diff([place.z_mm for place in places]), -2.5, atol=0.01)
    assert {place.flags for place in places} == {""}


def test_no_positions_fall_back_to_numbers_and_single_gaps_are_filled():
    assert arrange([at(10, None), at(9, None)]) == [(1, None, ""), (0, None, "")]
    places = arrange([at(1, 30.0), at(2, None), at(3, 10.0), at(4, 0.0)])
    assert [place.order for place in places] == [0, 1, 2, 3]
    assert places[1].z_mm == 20.0
    assert arrange([]) == []


@pytest.mark.parametrize("wrong", [3000.0, -3000.0, 150.0, 1e308])
@pytest.mark.parametrize("k", [1, 7, 18])
def test_a_position_that_cannot_be_meant_counts_as_missing(wrong, k):
    slices = [at(n, -3.0 * n) for n in range(20)]
    expected = arrange(slices)
    slices[k] = at(k, wrong)
    expected[k] = expected[k]._replace(flags="unplaced")
    assert arrange(slices) == expected


def test_wrong_positions_at_the_ends_and_side_by_side_count_as_missing_too():
    wrong = {0: 2500.0, 1: -900.0, 8: 1e5, 9: -4000.0, 19: 1e308}
    places = arrange([at(n, wrong.get(n, -3.0 * n)) for n in range(20)])
    assert [place.order for place in places] == list(range(20))
    assert [place.z_mm for place in places] == [-3.0 * n for n in range(20)]
    assert {k for k, place in enumerate(places) if place.flags == "unplaced"} == set(wrong)
    assert [place.z_mm for place in arrange([at(1, 1e308), at(2, 0.0), at(3, -3.0)])] == [
        3.0,
        0.0,
        -3.0,
    ]


@pytest.mark.parametrize("up", [-5.0, 5.0])
@pytest.mark.parametrize(
    "lost",
    [{0: None}, {39: None}, {39: 9999.0}, dict.fromkeys(range(30, 40)), dict.fromkeys(range(10))],
)
def test_positions_lost_at_the_ends_go_on_by_the_median_step(up, lost):
    """They were once all put at the last known place, where numbers that rise towards the head come
    out backwards.
    """
    places = arrange([at(n, lost.get(n, up * n)) for n in range(40)])
    assert [place.order for place in places] == (
        list(range(40)) if up < 0 else list(range(39, -1, -1))
    )
    assert [place.z_mm for place in places] == [up * n for n in range(40)]
    assert {k for k, place in enumerate(places) if place.flags == "unplaced"} == set(lost)


def test_one_place_for_all_is_no_place():
    places = arrange([at(n, 0.0) for n in (3, 1, 2, 4)])
    assert places == [(2, None, ""), (0, None, ""), (1, None, ""), (3, None, "")]
    assert [place.flags for place in arrange([at(1, 0.0), at(2, 0.0)])] == [
        "",
        "duplicate",
    ], "two may be one slice sent twice"


@pytest.mark.parametrize(
    "heights",
    [
        [*range(0, -60, -3), *range(-400, -460, -3)],  # a gap between two slabs
        [300, *range(0, -60, -3), -400],  # single slices before and behind the slab
        [*range(0, -60, -3), *range(0, -60, -3)],  # two phases, one behind the other
        [*(z for k in range(10) for z in (-3 * k, -600 - 3 * k))],  # two slabs, number by number
        [0, -1, -2, -4, -8, -16, -32, -64, -128, -256, -512],  # steps that grow
        [0, -200, -400],
        [0, -3, -6, -2000],
        [0, 0, 0, -90, -90, -180],
    ],
)
def test_real_gaps_and_uneven_steps_are_kept(heights):
    assert [
        place.z_mm for place in arrange([at(k, float(z)) for k, z in enumerate(heights)])
    ] == heights


def test_duplicates_are_kept_behind_the_first_and_flagged():
    places = arrange([at(1, 0.0), at(3, -3.0), at(2, -3.0), at(4, -6.0)])
    assert [place.order for place in places] == [0, 2, 1, 3]
    assert [place.flags for place in places] == ["", "duplicate", "", ""]


def test_a_scout_view_is_flagged_and_makes_no_slice_a_duplicate():
    places = arrange([at(1, 0.0, [0, 1, 0, 0, 0, -1]), at(2, 0.0), at(3, -3.0), at(4, -6.0)])
    assert [place.flags for place in places] == ["tilted", "", "", ""]


def test_an_orientation_of_zeros_is_none():
    slices = [at(k, -3.0 * k, [0.0] * 6 if k == 2 else AXIAL) for k in range(5)]
    assert [place.flags for place in arrange(slices)] == [""] * 5
    assert not is_transposed([0.0] * 6)


def test_a_scout_view_far_away_keeps_its_position():
    places = arrange([at(0, 900.0, [0, 1, 0, 0, 0, -1]), *(at(k, -3.0 * k) for k in range(1, 20))])
    assert (places[0].z_mm, places[0].flags) == (900.0, "tilted")


def test_patient_position_only_counts_when_asked_for():
    feet = [at(1, 5.0, patient_position="FFS"), at(2, 0.0, patient_position="FFS")]
    assert orders(feet) == [0, 1]
    assert orders(feet, flip_hfs=True) == [1, 0]
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for position, turned in (
        ("HFS", image),
        ("FFS", image[:, ::-1]),
        ("HFP", image[::-1, ::-1]),
        ("FFP", image[::-1]),
    ):
        assert np.array_equal(orient(image, AXIAL, position), image)
        assert np.array_equal(orient(image, AXIAL, position, flip_hfs=True), turned)


def test_every_orientation_shows_the_same_patient():
    """Draw a patient in millimetres, sample it along 8 orientations, and get one picture back."""
    # [y to the back, x to the left]
    world = np.random.default_rng(0).integers(0, 255, (6, 6), np.uint8)
    for row in ([1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]):
        for column in ([0, 1, 0], [0, -1, 0], [1, 0, 0], [-1, 0, 0]):
            if row[0] * column[0] + row[1] * column[1]:
                continue
            centre = np.array([2.5, 2.5, 0])
            image = np.empty((6, 6), np.uint8)
            for r in range(6):
                for c in range(6):
                    x, y, _ = centre + np.array(row) * (c - 2.5) + np.array(column) * (r - 2.5)
                    image[r, c] = world[int(y), int(x)]
            assert np.array_equal(orient(image, [*row, *column]), world)
            assert is_transposed([*row, *column]) == (row[0] == 0)


def test_a_transposed_picture_swaps_its_spacing_too(tmp_path):
    folder = tmp_path / "unlabelled" / "a" / "1"
    folder.mkdir(parents=True)
    words = np.arange(1000, 1000 + 24 * 20, dtype="<u2").reshape(24, 20)
    for k, orientation in enumerate((AXIAL, [0, 1, 0, 1, 0, 0])):
        tags = {
            "ImageOrientationPatient": orientation,
            "ImagePositionPatient": [0, 0, -k],
            "PixelSpacing": [0.7, 0.8],
        }
        ds = dataset(words, InstanceNumber=k + 1, **tags)
        (folder / f"{k + 1}.dcm").write_bytes(to_bytes(ds))
    slices, _ = decode_series_files(list_files(folder, tmp_path), ConvertConfig())
    shapes = {
        item.instance_number: (item.rows, item.cols, item.spacing_y_mm, item.spacing_x_mm)
        for item in slices
    }
    assert shapes == {1: (24, 20, 0.7, 0.8), 2: (20, 24, 0.8, 0.7)}


def body(rows=96, cols=96, power=2.0, a=0.42, b=0.33):
    y, x = np.mgrid[:rows, :cols]
    inside = (
        abs((x - cols / 2) / (a * cols)) ** power + abs((y - rows / 2) / (b * rows)) ** power < 1
    )
    return np.where(inside, 120, 0).astype(np.uint8)


@pytest.mark.parametrize("power", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("size", [64, 96, 512])
def test_a_body_outline_is_no_cut(power, size):
    assert not is_cut(body(size, size, power))
    assert not is_cut(body(size, size, power, a=0.6))
    assert not is_cut(np.zeros((size, size), np.uint8))


@pytest.mark.parametrize("size", [96, 512])
def test_black_columns_through_the_body_are_a_cut(size):
    for columns in (
        slice(int(0.55 * size), None),
        slice(None, int(0.4 * size)),
        slice(size // 2, size // 2 + size // 16),
    ):
        image = body(size, size)
        image[:, columns] = 0
        assert is_cut(image)


def test_cuts_in_most_slices_are_the_field_of_view():
    few = arrange([at(k, -k, cut=k == 3) for k in range(6)])
    assert [place.flags for place in few] == ["", "", "", "partial", "", ""]
    assert {place.flags for place in arrange([at(k, -k, cut=k != 3) for k in range(6)])} == {""}


def volume(rng):
    """HU of a (slice, row, column) volume: superior first, anterior at top, patient's right at
    left. One row of air.
    """
    hu = rng.integers(-300, 400, (5, 20, 24)).astype(np.int16)
    hu[:, 0] = -1000
    return hu


def write_dicom_series(folder, hu, flip):
    folder.mkdir(parents=True)
    for k, plane in enumerate(hu):
        x = -1 if flip else 1
        words = (plane[:, ::x].astype(np.int64) + 1024).astype("<u2")
        corner = [(-8.0 + 0.8 * 23) if flip else -8.0, 4.0, 50.0 - 2.5 * k]
        ds = dataset(
            words,
            InstanceNumber=k + 1,
            ImagePositionPatient=corner,
            ImageOrientationPatient=[x, 0, 0, 0, 1, 0],
            PixelSpacing=[0.7, 0.8],
        )
        (folder / f"{k + 1}.dcm").write_bytes(to_bytes(ds))


def write_nifti(path, hu, axes, slope=1.0, inter=0.0, kind=np.int16):
    """The same volume stored with other axes: `axes` as nibabel's codes, e.g. RAS."""
    affine = np.diag([-0.8, -0.7, -2.5, 1.0])
    # array axes: to the left, to the back, down; world: right, front, up
    affine[:3, 3] = [8.0, -4.0, 50.0]
    stored = ((hu.transpose(2, 1, 0) - inter) / slope).astype(kind)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LPI"), nib.orientations.axcodes2ornt(axes)
    )
    image = nib.Nifti1Image(
        nib.orientations.apply_orientation(stored, turn),
        affine @ nib.orientations.inv_ornt_aff(turn, stored.shape),
        dtype=kind,
    )
    image.header.set_slope_inter(slope, inter)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "RPI", "SRA", "PIR"])
def test_nifti_gives_what_dicom_gives(axes, tmp_path):
    hu = volume(np.random.default_rng(1))
    write_dicom_series(tmp_path / "unlabelled" / "a" / "1", hu, flip=axes[0] == "R")
    write_nifti(tmp_path / "unlabelled" / "b.nii.gz", hu, axes)
    dicom, bad = decode_series_files(
        list_files(tmp_path / "unlabelled" / "a" / "1", tmp_path), ConvertConfig()
    )
    other, worse = decode_series_files(
        list_files(tmp_path / "unlabelled" / "b.nii.gz", tmp_path), ConvertConfig()
    )
    assert bad == worse == []
    assert len(dicom) == len(other) == len(hu)
    for mine, its, plane in zip(dicom, other, hu, strict=True):
        expected = np.clip(np.rint((plane.astype(np.float64) + 150) * 255 / 400), 0, 255)
        assert np.array_equal(mine.image, expected)
        assert np.array_equal(its.image, expected)
        assert (mine.order, mine.z_mm, mine.flags, mine.rows, mine.cols) == (
            its.order,
            its.z_mm,
            its.flags,
            its.rows,
            its.cols,
        )
        assert np.allclose(
            [mine.spacing_y_mm, mine.spacing_x_mm], [its.spacing_y_mm, its.spacing_x_mm]
        )


def stages_01_and_02(data, out):
    """All volumes (by file name) that conversion and resampling make of `data/unlabelled`, and the
    quarantine's rows.
    """
    tasks = plan(data, NOTHING)
    convert_all(tasks, fingerprints(tasks, data), data, out / "slices", ConvertConfig())
    build_all(out / "slices", out / "volumes", VolumeConfig(depth=4, height=16, width=20), 1)
    with open(out / "slices" / "quarantine.csv", encoding="utf-8") as handle:
        return {path.name: np.load(path) for path in (out / "volumes").glob("*.npy")}, list(
            csv.reader(handle)
        )[1:]


def test_nifti_and_dicom_give_equal_volumes(tmp_path):
    hu = volume(np.random.default_rng(4))
    write_dicom_series(tmp_path / "unlabelled" / "a" / "1", hu, flip=True)
    for axes in ("RAS", "PIR"):
        write_nifti(tmp_path / "unlabelled" / f"{axes}.nii.gz", hu, axes)
    volumes, quarantined = stages_01_and_02(tmp_path, tmp_path / "out")
    assert quarantined == []
    assert sorted(volumes) == [
        "unlabelled-PIR_nifti.npy",
        "unlabelled-RAS_nifti.npy",
        "unlabelled-a_1.npy",
    ]
    for array in volumes.values():
        assert len(np.unique(array)) > 50
        assert np.array_equal(array, volumes["unlabelled-a_1.npy"])


@pytest.mark.slow
def test_damaged_nifti_is_quarantined_and_good_files_beside_it_are_not(tmp_path):
    folder, rng = tmp_path / "unlabelled", np.random.default_rng(5)
    write_nifti(folder / "good.nii.gz", volume(rng), "RAS")
    good = (folder / "good.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(good[: len(good) // 2])
    (folder / "tail.nii.gz").write_bytes(good[:-3])
    # single flipped bits behind the header: many decompress to other values, which only the
    # checksum tells
    for k in range(20):
        data, at = bytearray(good), int(rng.integers(800, len(good)))
        data[at] ^= 1 << int(rng.integers(8))
        (folder / f"flipped{k}.nii.gz").write_bytes(data)
    volumes, quarantined = stages_01_and_02(tmp_path, tmp_path / "out")
    assert sorted(volumes) == ["unlabelled-good_nifti.npy"]
    assert len(quarantined) == 22
    assert {path for path, _ in quarantined} == {
        f"unlabelled/{path.name}" for path in folder.iterdir()
    } - {"unlabelled/good.nii.gz"}
    assert all(reason.startswith("NIfTI: not readable (") for _, reason in quarantined)


def test_compressed_nifti_without_end_is_refused(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", volume(np.random.default_rng(6)), "RAS")
    with gzip.open(tmp_path / "a.nii.gz", "ab") as handle:
        handle.write(bytes(3 << 20))
    monkeypatch.setattr(nifti, "MAX_BYTES", 1 << 16)
    monkeypatch.setattr(nifti, "SPARE_BYTES", 1 << 20)
    with pytest.raises(Unreadable, match="has no end"):
        nifti.nifti_slice(tmp_path / "a.nii.gz", 0, 1 << 16)


def test_nifti_is_found_one_folder_deeper_and_useless_folders_are_named(tmp_path, capsys):
    folder, hu = tmp_path / "unlabelled", volume(np.random.default_rng(8))
    for name in ("a.nii", "imagesTr/a.nii.gz", "imagesTs/a.nii.gz", "labelsTr/a.nii.gz"):
        write_nifti(folder / name, hu, "RAS")
    write_dicom_series(folder / "b" / "1", hu, flip=False)
    write_dicom_series(folder / "one-off", hu, flip=False)
    tasks = plan(tmp_path, NOTHING)
    assert [task.name for task in tasks] == [
        "unlabelled-b/1",
        "unlabelled-a/nifti",
        "unlabelled-imagesTr-a/nifti",
        "unlabelled-imagesTs-a/nifti",
    ]
    line, maps, strays = capsys.readouterr().err.splitlines()
    assert (
        "warning: 1 folders have neither <series>/*.dcm nor NIfTI images and are ignored, e.g."
        f" {folder}/one-off" in line
    )
    assert (
        "warning: 1 files or folders are label maps by their names and are ignored, e.g."
        f" {folder}/labelsTr/a.nii.gz" in maps
    )
    assert f"warning: not recognised and ignored: 5 .dcm, e.g. {folder}/one-off/1.dcm" in strays
    volumes, quarantined = stages_01_and_02(tmp_path, tmp_path / "out")
    assert quarantined == []
    assert len({array.tobytes() for array in volumes.values()}) == 1
    assert len(volumes) == 4


def test_two_series_never_share_a_volume_file(tmp_path):
    for name in ("a_b/c", "a/b_c"):
        write_dicom_series(
            tmp_path / "unlabelled" / name, volume(np.random.default_rng(9))[:1], flip=False
        )
    with pytest.raises(
        InputError, match=r"two inputs would share a name, .*a/b_c and .*a_b/c, rename"
    ):
        plan(tmp_path, NOTHING)


def test_a_fourth_axis_of_one_is_no_other_volume(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", volume(np.random.default_rng(10)), "PIR")
    image = nib.load(tmp_path / "a.nii.gz")
    for name, shape in (("b.nii.gz", (1,)), ("c.nii", (1, 1))):
        nib.save(
            nib.Nifti1Image(np.asarray(image.dataobj).reshape(*image.shape, *shape), image.affine),
            tmp_path / name,
        )
        assert nifti.count_slices(tmp_path / name, 1 << 16) == 5
        for k in (0, 3):
            one, other = (
                nifti.nifti_slice(tmp_path / file, k, 1 << 16) for file in ("a.nii.gz", name)
            )
            assert np.array_equal(one[0], other[0])
            assert one[1:] == other[1:]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "not readable: OSError"),
        (MemoryError(), "not readable: MemoryError"),
        (OSError("Expected 100 bytes, got 90 bytes from file"), r"NIfTI: not readable \(OSError\)"),
    ],
)
def test_trouble_of_the_machine_is_told_from_damage(fault, reason, tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", volume(np.random.default_rng(11)), "RAS")
    monkeypatch.setattr(nifti, "_stored", lambda *_: (_ for _ in ()).throw(fault))
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        nifti.nifti_slice(tmp_path / "a.nii.gz", 0, 1 << 16)


@pytest.mark.slow
def test_a_nifti_that_takes_too_long_is_not_tried_slice_by_slice(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a.nii.gz", volume(np.random.default_rng(12)), "RAS")
    monkeypatch.setattr(nifti, "nifti_slice", lambda *_: time.sleep(60))
    deaths, file = [], str(tmp_path / "a.nii.gz")
    answers = list(
        pictures(Listing([file], [], 0, ""), ConvertConfig(timeout_s=0.2), deaths=deaths)
    )
    assert answers == [(file, Failure("took longer than 0.2 s"))] * 5
    assert deaths == ["SIGALRM"] * 4, "one to find the slice, three to be sure"


def test_two_volumes_of_one_name_are_an_error(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        write_nifti(tmp_path / "unlabelled" / name, volume(np.random.default_rng(7)), "RAS")
    with pytest.raises(
        InputError, match=r"two inputs would share a name, .*a\.nii and .*a\.nii\.gz, rename"
    ):
        plan(tmp_path, NOTHING)


def test_a_nifti_that_is_written_again_is_read_again(tmp_path):
    """In one process, as a notebook and a worker are: a mask that was mended, another scan."""
    path = tmp_path / "a.nii"
    path.write_bytes(b"cut")
    for _ in range(2):
        with pytest.raises(Unreadable):
            nifti.read_labels(path, 1 << 20, 5)
    for label in (3, 4):
        write_nifti(path, np.full((6, 5, 4), label), "RAS")
        assert (nifti.read_labels(path, 1 << 20, 5)[0] == label).all()
        assert (nifti.nifti_slice(path, 2, 1 << 20)[0] == label).all()
    path.unlink()
    with pytest.raises(Unreadable, match="not readable: FileNotFoundError"):
        nifti.nifti_slice(path, 2, 1 << 20)


def test_nifti_scale_factors_and_floats(tmp_path):
    hu = volume(np.random.default_rng(2))
    write_nifti(tmp_path / "s.nii", hu, "RAS", slope=0.5, inter=-1024.0)
    write_nifti(tmp_path / "f.nii.gz", hu, "LPS", kind=np.float32)
    for name in ("s.nii", "f.nii.gz"):
        pixels, position, orientation, spacing = nifti.nifti_slice(tmp_path / name, 2, 1 << 20)
        assert np.allclose(position, [-8.0, 4.0, 45.0])
        assert np.allclose(orientation, AXIAL)
        assert np.allclose(spacing, (0.7, 0.8))
        assert np.array_equal(
            grey(pixels), np.clip(np.rint((hu[2].astype(float) + 150) * 255 / 400), 0, 255)
        )


def test_bad_nifti_is_refused_with_the_reason(tmp_path):
    hu = volume(np.random.default_rng(3))
    write_nifti(tmp_path / "good.nii.gz", hu, "RAS")
    raw = gzip.decompress((tmp_path / "good.nii.gz").read_bytes())
    (tmp_path / "cut.nii").write_bytes(raw[:-100])
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:-200])
    (tmp_path / "junk.nii").write_bytes(b"x" * 1000)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "four.nii")
    nib.save(
        nib.Nifti1Image(np.full((4, 4, 4), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii"
    )
    nib.save(nib.Nifti1Image(np.zeros((400, 400, 1), np.int16), np.eye(4)), tmp_path / "large.nii")
    for name, reason in (
        ("cut.nii", "not readable"),
        ("cut.nii.gz", "not readable"),
        ("junk.nii", "not readable"),
        ("four.nii", "scalar"),
        ("nan.nii", "finite"),
        ("large.nii", "too large"),
    ):
        with pytest.raises(Unreadable, match=reason):
            nifti.nifti_slice(tmp_path / name, 0, 1 << 16)


def flags(slices):
    return [place.flags for place in arrange(slices)]


@pytest.mark.parametrize("number", [999, 9001, 10**11, 25, 0])
def test_a_file_without_a_position_is_no_slice_where_others_have_one(number):
    slices = [at(k, 200.0 - 5 * k) for k in range(1, 21)]
    places = arrange([*slices, at(number, None)])
    assert [place.flags for place in places] == [""] * 20 + ["unplaced"]
    assert [place.z_mm for place in places[:20]] == [200.0 - 5 * k for k in range(1, 21)]
    invented = places[20].z_mm
    assert invented is None if number > 900 else invented == 200.0 - 5 * number
    assert [place.order for place in places[:20]] == [k + (number == 0) for k in range(20)]


def test_two_strays_do_not_vouch_for_each_other():
    places = arrange([at(999, None), at(1000, None), *(at(k, -5.0 * k) for k in range(20))])
    assert [(place.z_mm, place.flags) for place in places[:2]] == [(None, "unplaced")] * 2


def test_one_position_among_many_that_have_none_orders_nothing():
    places = arrange([at(k, 70.0 if k == 3 else None) for k in range(6)])
    assert places == [(k, None, "") for k in range(6)]


def test_a_made_up_number_is_no_place_where_only_numbers_order():
    slices = [at(k, None) for k in range(6)]
    assert flags([*slices, at(6, None)._replace(numbered=False)]) == [""] * 6 + ["unplaced"]
    assert flags([item._replace(numbered=False) for item in slices]) == [""] * 6


@pytest.mark.parametrize("second", [range(30), range(29, -1, -1)], ids=["same way", "way back"])
@pytest.mark.parametrize("shift", [0.0, 0.9])
def test_of_two_passes_over_the_same_heights_one_stays(second, shift):
    slices = [at(k, -3.0 * k) for k in range(30)]
    again = [at(100 + n, -3.0 * k - shift) for n, k in enumerate(second)]
    found = flags([*slices, *again])
    assert found[:30] == [""] * 30
    beyond = [item.position[2] < -87.0 for item in again]
    assert found[30:] == ["" if outside else "duplicate" for outside in beyond]


def test_a_pass_that_goes_on_where_the_other_ends_is_kept():
    found = flags(
        [*(at(k, -5.0 * k) for k in range(30)), *(at(50 + k, -142.0 - 5 * k) for k in range(20))]
    )
    assert found == [""] * 30 + ["duplicate"] + [""] * 19


def test_numbers_in_no_order_are_no_passes():
    order = np.random.default_rng(0).permutation(40)
    assert flags([at(int(n), -3.0 * k) for k, n in enumerate(order)]) == [""] * 40
    swapped = [at({7: 8, 8: 7}.get(k, k), -3.0 * k) for k in range(20)]
    assert flags(swapped) == [""] * 20


@pytest.mark.parametrize("place", [-30.0, 60.0], ids=["within", "above"])
def test_bolus_tracking_is_left_out_and_the_slice_at_its_place_is_not(place):
    tracking = [at(k, place) for k in range(12)]
    assert flags([*tracking, *(at(20 + k, -3.0 * k) for k in range(30))]) == (
        ["duplicate"] * 12 + [""] * 30
    )


def test_a_slice_that_is_not_parallel_to_the_others_is_tilted():
    turned = [1, 0, 0, 0, np.cos(0.3), np.sin(0.3)]
    places = [at(k, -3.0 * k, turned if k == 4 else AXIAL) for k in range(10)]
    assert [k for k, flag in enumerate(flags(places)) if flag] == [4]


def ct_words(seed=0, size=96):
    """Stored words (intercept -1024) of a body in air."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    hu = np.where(x**2 / 0.5 + y**2 / 0.3 < 1, 60.0, -1000.0)
    hu += np.random.default_rng(seed).normal(0, 5, hu.shape)
    return (hu + 1024).clip(0).astype("<u2")


def write_ct(folder, count=12, words=ct_words, **tags):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        mine = {name: value(k) if callable(value) else value for name, value in tags.items()}
        at = {"InstanceNumber": k + 1, "ImagePositionPatient": [0, 0, -5.0 * k], **mine}
        (folder / f"{k + 1}.dcm").write_bytes(to_bytes(dataset(words(k), **at)))


def slices_of(folder, data):
    return decode_series_files(list_files(folder, data), ConvertConfig())[0]


def test_two_pixel_spacings_in_a_series_are_brought_to_one(tmp_path):
    folder = tmp_path / "unlabelled" / "a" / "1"

    def zoomed(k):  # the same body, 1.25 times as large in pixels
        if k < 7:
            return ct_words(k)
        turn = np.float32([[1.25, 0, -0.125 * 96], [0, 1.25, -0.125 * 96]])
        return cv2.warpAffine(ct_words(k), turn, (96, 96), borderValue=24)

    write_ct(folder, words=zoomed, PixelSpacing=lambda k: [4.0, 4.0] if k < 7 else [3.2, 3.2])
    assert [item.flags for item in slices_of(folder, tmp_path)] == [""] * 7 + ["rescaled"] * 5
    tasks = plan(tmp_path, NOTHING)
    convert_all(tasks, fingerprints(tasks, tmp_path), tmp_path, tmp_path / "s", ConvertConfig())
    build_all(tmp_path / "s", tmp_path / "v", VolumeConfig(depth=12, height=96, width=96), 1)
    table = pl.read_parquet(tmp_path / "v" / "index.parquet", glob=False)
    assert table.select("slices_used", "slices_left_out", "slices_resized").rows() == [(12, 0, 5)]
    array = np.load(tmp_path / "v" / table["path"][0])
    widths = (array > 60).any(1).sum(1)
    assert np.ptp(widths[[0, 5, 8, 11]]) <= 2


@pytest.mark.parametrize(("factor", "unit"), [(1e-3, "metres"), (1e3, "micrometres")])
def test_lengths_in_another_unit_become_millimetres(factor, unit, tmp_path):
    write_ct(
        tmp_path / "unlabelled" / "a" / "1",
        PixelSpacing=[0.8 * factor] * 2,
        ImagePositionPatient=lambda k: [0, 0, -5.0 * k * factor],
    )
    slices = slices_of(tmp_path / "unlabelled" / "a" / "1", tmp_path)
    assert [item.z_mm for item in slices] == [-5.0 * k for k in range(12)], unit
    assert {round(item.spacing_y_mm, 6) for item in slices} == {0.8}
    assert {item.flags for item in slices} == {""}


SOURCES = {
    "a windowed export": {"words": lambda k: np.minimum(ct_words(k) // 8, 255), "intercept": 0},
    "a lost intercept": {"words": ct_words, "intercept": 0},
    "a label map": {"words": lambda k: (ct_words(k) > 900).astype("<u2"), "intercept": 0},
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_series_without_air_is_no_ct(name, tmp_path, capsys):
    source, folder = SOURCES[name], tmp_path / "unlabelled" / "a"
    write_ct(folder / "1", words=source["words"], RescaleIntercept=source["intercept"])
    write_ct(folder / "2")
    write_ct(folder / "3", signed=True, bits=16, RescaleIntercept=-1024)
    volumes, quarantined = stages_01_and_02(tmp_path, tmp_path / "out")
    assert sorted(volumes) == ["unlabelled-a_2.npy", "unlabelled-a_3.npy"]
    assert quarantined == []
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "below -500" in text]
    assert "warning: 1 series hold no value below -500 HU" in line
    assert line.endswith("unlabelled-a/1")


LAYOUTS = {
    "KiTS": ("case_00000/imaging.nii.gz", "case_00000/segmentation.nii.gz"),
    "KiTS23": ("case_00000/imaging.nii.gz", "case_00000/instances/kidney_1_annotation-1.nii.gz"),
    "LiTS": ("LiTS/volume-0.nii", "LiTS/segmentation-0.nii"),
    "BTCV": ("RawData/Training/img/img0001.nii.gz", "RawData/Training/label/label0001.nii.gz"),
    "FLARE": ("imagesTr/FLARE_0001_0000.nii.gz", "labelsTr/FLARE_0001.nii.gz"),
    "MSD": ("Task03_Liver/imagesTr/liver_1.nii.gz", "Task03_Liver/labelsTr/liver_1.nii.gz"),
    "side by side": ("a/ct.nii.gz", "a/ct_seg.nii.gz"),
    "capitals": ("A/CT.NII.GZ", "A/CT-LABEL.NII.GZ"),
    "words run together": ("b/Ct.Nii.Gz", "b/LiverMask.Nii.Gz"),
    "masks": ("c/ct.nii", "masks/c.nii"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_maps_stay_out_by_name(layout, tmp_path, capsys):
    image, label = (tmp_path / "unlabelled" / name for name in LAYOUTS[layout])
    hu = volume(np.random.default_rng(20))
    for path in (image, label):
        write_nifti(
            tmp_path / "x" / f"a{'.nii.gz' if path.suffix.lower() == '.gz' else '.nii'}", hu, "RAS"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        next((tmp_path / "x").iterdir()).rename(path)
    tasks = plan(tmp_path, NOTHING)
    assert [task.path for task in tasks] == [str(image)]
    lines = capsys.readouterr().err.splitlines()
    assert f"1 files or folders are label maps by their names and are ignored, e.g. {label}" in (
        " ".join(lines)
    )
    (picture, *_), bad = decode_series_files(list_files(image, tmp_path), ConvertConfig())
    assert bad == []
    assert np.array_equal(
        picture.image, np.clip(np.rint((hu[0].astype(np.float64) + 150) * 255 / 400), 0, 255)
    )


def test_words_that_only_hold_such_a_word_are_no_label_maps(tmp_path):
    for name in ("labeled_cases/a.nii.gz", "masked/b.nii.gz", "segovia/c.nii.gz"):
        write_nifti(tmp_path / "unlabelled" / name, volume(np.random.default_rng(21)), "RAS")
    assert len(plan(tmp_path, NOTHING)) == 3


def test_what_is_not_recognised_is_counted_by_kind(tmp_path, capsys):
    write_ct(tmp_path / "train_images" / "007" / "1", 3)
    for name in (
        "train_images/007/1/Thumbs.db",
        "train_images/007/1/IM0001",
        "train_images/007/note.txt",
        "unlabelled/scan.mha",
        "unlabelled/deep/er/x.nrrd",
        "old/1.txt",
        "README.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    tasks = plan(tmp_path, pl.DataFrame({"patient_id": ["007"], "series_id": ["1"]}))
    text = capsys.readouterr().err
    assert "not recognised and ignored: 1 .mha, 1 .nrrd, e.g." in text
    assert "not recognised and ignored: 1 .txt, 1 folder, e.g." in text
    counts = convert_all(
        tasks, fingerprints(tasks, tmp_path), tmp_path, tmp_path / "o", ConvertConfig()
    )
    assert counts["not_recognised"] == {".db": 1, "without ending": 1}
    assert [task.patient_id for task in tasks] == ["007"]


def test_links_lead_to_their_place_at_every_level_and_in_no_circle(tmp_path):
    data, real = tmp_path / "data", tmp_path / "disk" / "unlabelled"
    write_ct(real / "p" / "1", 3)
    write_nifti(real / "set" / "a.nii.gz", volume(np.random.default_rng(22)), "RAS")
    data.mkdir()
    (data / "unlabelled").symlink_to(real)
    (real / "q").symlink_to(real / "p")
    (real / "p" / "2").symlink_to(real / "p" / "1")
    (real / "set" / "b.nii.gz").symlink_to(real / "set" / "a.nii.gz")
    (real / "set" / "round").symlink_to(real)
    tasks = plan(data, NOTHING)
    assert [task.name for task in tasks] == [
        "unlabelled-p/1",
        "unlabelled-p/2",
        "unlabelled-q/1",
        "unlabelled-q/2",
        "unlabelled-set-a/nifti",
        "unlabelled-set-b/nifti",
    ]
    assert all(list_files(task.path, data).files for task in tasks)


def test_brackets_and_stars_in_folders_are_no_patterns(tmp_path):
    data = tmp_path / "a [1] * ?"
    write_ct(data / "unlabelled" / "p[1]" / "s*", 3)
    write_nifti(data / "unlabelled" / "x[0-9].nii.gz", volume(np.random.default_rng(23)), "RAS")
    volumes, quarantined = stages_01_and_02(data, data / "out [2]")
    assert sorted(volumes) == ["unlabelled-p[1]_s*.npy", "unlabelled-x[0-9]_nifti.npy"]
    assert quarantined == []


@pytest.mark.parametrize(
    ("hu", "inverted", "air"),
    [
        (-1000, False, True),
        (-400, False, False),
        (1100, False, False),
        (1100, True, True),
        (500, True, False),
        (-1000, True, True),
    ],
)
def test_air_of_a_picture_shown_inverted_may_lie_at_the_other_end(hu, inverted, air):
    words = np.full((16, 16), 1064, np.uint16)
    words[5, 5] = hu + 1024
    assert convert._holds_air(Stored(words, 12, False, 1.0, -1024.0, inverted)) == air


def test_nan_around_the_body_is_air_and_proves_none(tmp_path):
    hu = volume(np.random.default_rng(24)).astype(np.float32)
    hu[:, :, :3] = np.nan
    write_nifti(tmp_path / "unlabelled" / "a.nii", hu, "RAS", kind=np.float32)
    hu[:, 0] = np.nan
    write_nifti(tmp_path / "unlabelled" / "b.nii", hu, "RAS", kind=np.float32)
    for name, found in (("a", ""), ("b", "no air")):
        slices = slices_of(tmp_path / "unlabelled" / f"{name}.nii", tmp_path)
        assert len(slices) == 5
        assert {item.flags for item in slices} == {found}
        assert not slices[0].image[:, :3].any()
        hu_read = nifti.nifti_slice(tmp_path / "unlabelled" / f"{name}.nii", 0, 1 << 20)[0]
        assert (hu_read[:, :3] == -500).all()


def test_a_nifti_without_a_form_is_refused_by_name(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", volume(np.random.default_rng(25)), "RAS")
    image = nib.load(tmp_path / "a.nii.gz")
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "b.nii.gz")
    with pytest.raises(Unreadable, match=r"orientation unknown \(qform_code and sform_code are 0"):
        nifti.count_slices(tmp_path / "b.nii.gz", 1 << 20)
    image.set_qform(image.affine, 1)
    nib.save(image, tmp_path / "c.nii.gz")
    assert nifti.count_slices(tmp_path / "c.nii.gz", 1 << 20) == 5


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_a_scale_of_nothing_scales_nothing(slope, tmp_path):
    hu = volume(np.random.default_rng(26))
    write_nifti(tmp_path / "a.nii", hu, "RAS")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([slope, 7.0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    pixels, *_ = nifti.nifti_slice(tmp_path / "a.nii", 0, 1 << 20)
    assert np.array_equal(pixels, hu[0])
