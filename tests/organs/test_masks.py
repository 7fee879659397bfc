"""Masks of the competition's kind on the grid of a volume: against a loop over voxels through the
affine; those that do not fit are refused.
"""

import gzip

import nibabel
import numpy as np
import polars as pl
import pytest

from pipeline.organs.files import mask_files
from pipeline.organs.masks import ORGAN_OF_LABEL, ORGANS, read_mask, store_mask
from pipeline.run.config import VolumeConfig
from pipeline.system.errors import InputError
from pipeline.volumes.build import resample_labels
from pipeline.volumes.store import usable

ROWS, COLS, N = 20, 24, 9
STEP, PIXEL, TOP = 3.0, (0.8, 0.7), 140.0  # mm: along z, (y, x); height of the uppermost slice
MOST = 1 << 20


def slice_rows(flags=None, instances=range(1, N + 1)) -> pl.DataFrame:
    """The slice index of one series, superior first."""
    numbers = np.array(list(instances))
    return pl.DataFrame(
        {
            "patient_id": ["7"] * len(numbers),
            "series_id": ["70"] * len(numbers),
            "instance_number": numbers,
            "order": np.arange(len(numbers)),
            "z_mm": TOP - STEP * (numbers - 1.0),
            "rows": [ROWS] * len(numbers),
            "cols": [COLS] * len(numbers),
            "spacing_y_mm": [PIXEL[0]] * len(numbers),
            "spacing_x_mm": [PIXEL[1]] * len(numbers),
            "flags": flags or [""] * len(numbers),
        }
    )


def turned(labels: np.ndarray, right: int, back: int, up: int, top=TOP, step=STEP):
    """NIfTI of labels (N, rows, cols), superior first and as slices are turned. Its axes run to
    the patient's right, back and head where the sign is 1, the other way where it is -1.
    """
    stored = labels.transpose(2, 1, 0)[::-right, ::back, ::-up]
    # NIfTI's axes run to the right, to the front and to the head
    affine = np.diag([right * PIXEL[1], -back * PIXEL[0], up * step, 1.0])
    ends = np.array([-PIXEL[1], -PIXEL[0], -step]) * (np.array(stored.shape) - 1)
    affine[:3, 3] = [5.0, -3.0, top] + np.where([right < 0, back > 0, up < 0], 0, ends)
    return nibabel.Nifti1Image(np.ascontiguousarray(stored), affine)


@pytest.fixture
def labels() -> np.ndarray:
    """Blocks of the five labels, of odd sizes, none alike in any direction."""
    found = np.zeros((N, ROWS, COLS), np.uint8)
    places = ((0, 3, 2), (1, 11, 12), (4, 2, 14), (5, 10, 1), (2, 5, 8))
    for label, (z, y, x) in enumerate(places, start=1):
        found[z : z + 4, y : y + 5 + label, x : x + 8] = label
    return found


def written(folder, image, name="70.nii.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, folder / name)
    return folder / name


@pytest.mark.parametrize("axes", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
def test_a_mask_is_turned_as_its_affine_says(tmp_path, labels, axes):
    """Each voxel of the slices is looked for in the file through the affine."""
    image = turned(labels, *axes)
    found = read_mask(written(tmp_path, image), slice_rows(), MOST)
    stored, inverse = np.asarray(image.dataobj), np.linalg.inv(image.affine)
    for k in range(N):
        for r in range(ROWS):
            for c in range(COLS):
                # slices begin at the patient's right, in front and at the top
                place = [5.0 - PIXEL[1] * c, -3.0 - PIXEL[0] * r, TOP - STEP * k, 1.0]
                i, j, m = np.rint(inverse @ place).astype(int)[:3]
                assert found[k][r, c] == [0, 1, 2, 3, 3, 4][stored[i, j, m]]


def naive_grid(planes, z_mm, box, config):
    """Share of each label in each voxel of the volume, by overlap with every voxel of the slices:
    a loop in float64.
    """
    (y0, y1, x0, x1), depth = box, config.depth
    step = abs(z_mm[1] - z_mm[0])
    edges = np.append(np.abs(z_mm - z_mm[0]), len(z_mm) * step) - step / 2
    shares = np.zeros((len(ORGANS) + 1, depth, config.height, config.width))
    for d, h, w in np.ndindex(*shares.shape[1:]):
        low, high = (edges[0] + (edges[-1] - edges[0]) * e / depth for e in (d, d + 1))
        top, bottom = (y0 + (y1 - y0) * e / config.height for e in (h, h + 1))
        left, right = (x0 + (x1 - x0) * e / config.width for e in (w, w + 1))
        for k, plane in enumerate(planes):
            deep = max(0.0, min(edges[k + 1], high) - max(edges[k], low)) / (high - low)
            for r in range(int(top), int(np.ceil(bottom))) if deep else ():
                tall = (min(r + 1, bottom) - max(r, top)) / (bottom - top)
                for c in range(int(left), int(np.ceil(right))):
                    wide = (min(c + 1, right) - max(c, left)) / (right - left)
                    shares[plane[r, c], d, h, w] += deep * tall * wide
    return shares


def test_the_grid_of_the_volume_is_that_of_a_loop_over_voxels(tmp_path, labels):
    config, box = VolumeConfig(depth=4, height=16, width=17), (2, 19, 1, 23)
    slices = slice_rows()
    planes = read_mask(written(tmp_path, turned(labels, -1, -1, 1)), slices, MOST)
    z_mm = slices["z_mm"].to_numpy()
    found = resample_labels(planes, len(ORGANS), z_mm, PIXEL, box, config)
    shares = naive_grid(planes, z_mm, box, config)
    np.testing.assert_allclose(shares.sum(0), 1)
    second, first = np.sort(shares, 0)[-2:]
    clear = first - second > 1e-5
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(found[clear], shares.argmax(0)[clear])
    assert set(np.unique(found)) == {0, 1, 2, 3, 4}


def test_letterboxed_volumes_have_their_masks_in_the_middle():
    config = VolumeConfig(depth=N, height=40, width=48, aspect="letterbox")
    ones, z_mm = np.ones((N, ROWS, COLS), np.uint8), TOP - STEP * np.arange(N)
    found = resample_labels(ones, len(ORGANS), z_mm, (1.0, 1.0), (0, ROWS, 0, 12), config)
    expected = np.zeros((N, 40, 48), np.uint8)
    expected[:, :, 12:36] = 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("positions", [True, False])
def test_flagged_and_lost_slices_are_left_out_and_the_others_keep_their_planes(
    tmp_path, labels, positions
):
    """Slice 3 is in no index (its file was damaged), the fifth is cut. Without positions instance
    numbers say which is lost.
    """
    rows = slice_rows(instances=[1, 2, 4, 5, 6, 7, 8, 9])
    if not positions:
        rows = rows.with_columns(z_mm=pl.lit(None, pl.Float64))
    rows = rows.with_columns(flags=pl.Series(["", "", "", "partial", "", "", "", ""]))
    found = read_mask(written(tmp_path, turned(labels, -1, -1, 1)), rows, MOST)
    kept = [0, 1, 3, 5, 6, 7, 8]
    np.testing.assert_array_equal(np.stack(found), ORGAN_OF_LABEL[labels[kept]])


@pytest.mark.parametrize("places", ["elsewhere", "none"])
def test_masks_go_in_order_where_heights_tell_nothing(tmp_path, labels, places):
    path = written(tmp_path, turned(labels, -1, -1, 1, top=-900.0))
    slices = slice_rows()
    if places == "none":
        slices = slices.with_columns(z_mm=pl.lit(None, pl.Float64))
    found = read_mask(path, slices, MOST)
    np.testing.assert_array_equal(np.stack(found), ORGAN_OF_LABEL[labels])


def refused(path, text, slices=None):
    with pytest.raises(InputError) as fault:
        read_mask(path, slice_rows() if slices is None else slices, MOST)
    line = str(fault.value)
    assert "\n" not in line
    assert str(path) in line
    assert text in line
    assert "or remove the file" in line


def test_masks_that_do_not_fit_their_series_are_refused(tmp_path, labels):
    short = turned(labels[:-2], -1, -1, 1)
    line = "the mask's 7 planes (122.0 to 140.0 mm) are not where the 9 slices of its series are"
    refused(written(tmp_path, short), f"{line} (116.0 to 140.0 mm)")
    coarse = turned(labels[::2], -1, -1, 1, step=2 * STEP)
    refused(
        written(tmp_path / "coarse", coarse),
        "the mask's 5 planes (116.0 to 140.0 mm) are not where",
    )
    wide = turned(np.pad(labels, ((0, 0), (0, 0), (0, 3))), -1, -1, 1)
    line = "the mask's planes have 20 x 27 pixels, the slices of its series 20 x 24"
    refused(written(tmp_path / "wide", wide), line)
    nowhere = slice_rows(instances=range(1, N)).with_columns(z_mm=pl.lit(None, pl.Float64))
    line = "are not where the 8 slices of its series are (no positions)"
    whole = turned(labels, -1, -1, 1)
    refused(written(tmp_path / "whole", whole), line, nowhere)


def test_files_that_are_no_masks_are_refused(tmp_path, labels):
    refused(written(tmp_path, turned(labels + 1, 1, 1, 1)), "values other than the labels 0 to 5")
    halves = turned(labels.astype(np.float32) / 2, 1, 1, 1)
    refused(written(tmp_path / "halves", halves), "values other than the labels 0 to 5")
    path = written(tmp_path / "none", turned(labels, 1, 1, 1))
    path.write_bytes(gzip.compress(b"no NIfTI"))
    refused(path, "not readable")
    path = written(tmp_path, turned(labels, 1, 1, 1), "71.nii")
    data = bytearray(path.read_bytes())
    data[252:256] = bytes(4)  # qform_code and sform_code
    path.write_bytes(data)
    refused(path, "orientation unknown")
    nan = turned(np.where(labels, labels, np.nan).astype(np.float32), 1, 1, 1)
    refused(written(tmp_path, nan, "72.nii"), "values other than the labels 0 to 5")


def test_two_files_for_one_series_are_refused(tmp_path, labels):
    folder = tmp_path / "segmentations"
    first = written(folder, turned(labels, 1, 1, 1))
    (folder / "notes.txt").touch()
    assert mask_files(tmp_path) == {"70": first}
    written(folder, turned(labels, 1, 1, 1), "70.nii")
    with pytest.raises(InputError, match="two masks for series 70"):
        mask_files(tmp_path)
    assert mask_files(tmp_path / "nothing") == {}


def test_a_stored_mask_has_the_name_and_the_grid_of_its_volume(tmp_path, labels):
    config = VolumeConfig(depth=3, height=16, width=16)
    row = {"path": "7_70.npy", "box_y0": 0, "box_y1": ROWS, "box_x0": 0, "box_x1": COLS}
    slices = slice_rows(flags=["", "duplicate", *[""] * 7])
    path = written(tmp_path, turned(labels, -1, -1, 1))
    assert store_mask((path, slices, row), tmp_path, config, MOST) == "7_70.npy"
    planes, z_mm = read_mask(path, slices, MOST), usable(slices)["z_mm"].to_numpy()
    expected = resample_labels(planes, 4, z_mm, PIXEL, (0, ROWS, 0, COLS), config)
    np.testing.assert_array_equal(np.load(tmp_path / "7_70.npy"), expected)
    assert expected.any()
