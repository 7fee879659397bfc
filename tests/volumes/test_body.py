"""The outline of the trunk, against one found another way: from HU, by distances, with scipy."""

import numpy as np
import pytest
from scipy import ndimage

from pipeline.run.config import VolumeConfig
from pipeline.slices.window import window
from pipeline.volumes.body import body_outlines, slice_masks
from pipeline.volumes.build import build_volume

SIZE, MM, STEP_MM, COUNT = 256, 1.7, 5.0, 30


def ellipse(x_mm, y_mm, width_mm, height_mm):
    """Mask of an ellipse; its centre is given from the middle of the plane, y to the back."""
    y, x = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2) * MM
    return ((x - x_mm) / width_mm * 2) ** 2 + ((y - y_mm) / height_mm * 2) ** 2 < 1


def abdomen(table=True, arms=True):
    """HU (30, 256, 256): a trunk with lungs in the upper slices, a mattress and a table it lies on,
    and two arms 4 mm beside it.
    """
    hu = np.full((COUNT, SIZE, SIZE), -1000.0)
    y = (np.mgrid[:SIZE, :SIZE][0] - (SIZE - 1) / 2) * MM
    for k, plane in enumerate(hu):
        plane[ellipse(0, 0, 300, 210)] = -90
        plane[ellipse(0, 0, 260, 170)] = 50
        if k < 8:
            for side in (-65, 65):
                plane[ellipse(side, 0, 95, 120)] = -850
        if table:
            plane[(y > 107) & (y < 110)] = -60
            plane[(y > 125) & (y < 131)] = 300
        if arms:
            for side in (-1, 1):
                plane[ellipse(side * 190, 0, 72, 72)] = 40
    return hu + np.random.default_rng(0).normal(0, 12, hu.shape)


def breasts(hu):
    for k in range(3):
        for side in (-70, 70):
            hu[k][ellipse(side, -95, 110, 90)] = -80


def detached_breast(hu):
    """It hangs from the slices above and is an island in two below."""
    for k in range(6):
        hu[k][ellipse(-85, -95, 95, 90 if k < 4 else 50)] = -80
    hu[4:6][:, ellipse(-85, -95, 95, 90) & ~ellipse(-85, -118, 70, 42)] = -1000
    for k in (4, 5):
        hu[k][ellipse(0, 0, 300, 210)] = 40


def hips(hu):
    for k in (28, 29):
        hu[k][ellipse(0, 0, 400, 205)] = -80
        hu[k][ellipse(0, 0, 300, 170)] = 50


def hernia(hu):
    for k in (14, 15):
        hu[k][ellipse(20, -115, 60, 60)] = 20


def legs(hu):
    hu[26:] = -1000
    for side in (-80, 80):
        hu[26:, ellipse(side, 0, 150, 160)] = 30


def metal(hu):
    """Dark rays of a hip prosthesis to the right border, through which outside air runs in."""
    hu[20:] = -1000
    hu[20:, ellipse(0, 0, 460, 210)] = 40
    hu[20:, 118:126, 190:] = -900


def trunk(hu):
    """The largest part above -300 HU, what is thinner than 24 mm (table) off it, and in a plane
    what is less than 0.3 of the largest (arms); bool like `hu`.
    """
    found = np.zeros(hu.shape, bool)
    for k, plane in enumerate(hu):
        body = ndimage.binary_fill_holes(plane > -300)
        deep = ndimage.distance_transform_edt(np.pad(body, 20, mode="edge"))[20:-20, 20:-20]
        parts, count = ndimage.label(deep * MM > 12)
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        core = np.isin(parts, 1 + np.flatnonzero(areas > 0.3 * areas.max()))
        found[k] = body & (ndimage.distance_transform_edt(~core) * MM <= 18)
    return found


def outlines(hu):
    masks = np.stack([slice_masks(plane, (MM, MM)) for plane in window(hu)], 1)
    return body_outlines(masks, hu.shape[1:], (MM, MM), STEP_MM, VolumeConfig().margin_mm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda _: None, breasts, detached_breast, hips, hernia, legs],
    ids=["plain", "breasts", "detached breast", "hips", "hernia", "legs"],
)
def test_nothing_of_the_trunk_is_lost_and_table_and_arms_are_out(change):
    hu = abdomen(arms=change is not hips)  # arms lie on hips
    change(hu)
    bare = abdomen(table=False, arms=False)
    change(bare)
    found, (y0, y1, x0, x1) = outlines(hu)
    inside = trunk(bare)
    lost = (inside & (found == 0)).sum((1, 2)) / inside.sum((1, 2))
    assert lost.max() <= 0.005
    box = np.zeros(hu.shape[1:], bool)
    box[y0:y1, x0:x1] = True
    assert not (inside & ~box).sum((1, 2)).max() > 0.005 * inside.sum((1, 2)).max()
    near = np.stack([ndimage.distance_transform_edt(~plane) * MM < 8 for plane in bare > -300])
    foreign = ((hu > -150) & (found > 0) & ~near).sum((1, 2)) * MM**2
    assert foreign.max() < 50, "mm2 of table and arms"


def test_what_shows_in_two_slices_opens_the_outline_there_only():
    hu = abdomen(arms=False)
    hips(hu)
    found, _ = outlines(hu)
    wide = found.any(1).sum(1) * MM
    assert wide[29] > 395
    assert wide[:24].max() < 320


def test_the_tip_of_a_breast_is_kept_and_a_tube_in_the_air_is_not():
    tip, hu = ellipse(-115, -125, 50, 22), abdomen()
    hu[:4, ellipse(-105, -105, 110, 100)] = -80
    hu[4:6, tip] = -80
    hu[20:22, tip] = -80
    found, _ = outlines(hu)
    assert found[4:6, tip].all()
    assert not found[20:22, tip].any()


def test_a_ray_of_metal_to_the_border_takes_nothing_away():
    hu = abdomen(table=False, arms=False)
    metal(hu)
    found, _ = outlines(hu)
    assert (found[20:] > 0)[:, ellipse(0, 0, 420, 200)].all()


@pytest.mark.parametrize("circle", [False, True])
def test_lungs_open_to_a_small_field_of_view_are_kept(circle):
    """197 of 300 mm: lungs to both sides, and no lateral chest wall in the picture."""
    hu = abdomen(table=False, arms=False)[:8]
    for plane in hu:
        plane[ellipse(0, 0, 50, 90)] = 40
    small = hu[:, 70:186, 70:186]
    if circle:
        y, x = np.mgrid[-1:1:116j, -1:1:116j]
        small[:, x**2 + y**2 > 1] = -1000
    found, box = outlines(small)
    assert found[:, 20:96, 20:96].all()
    assert min(box[1] - box[0], box[3] - box[2]) > (76 if circle else 110) - 1


def test_an_implausibly_small_outline_keeps_the_plane_within_the_box():
    hu = abdomen(table=False, arms=False)
    hu[10] = -1000
    hu[10, 120:140, 120:140] = 40
    found, box = outlines(hu)
    assert found[10].all()
    assert box == outlines(abdomen(table=False, arms=False))[1]
    nothing, whole = outlines(np.full((3, SIZE, SIZE), -1000.0))
    assert nothing.all()
    assert whole == (0, SIZE, 0, SIZE)


def test_the_volume_has_the_table_in_no_plane():
    hu = abdomen()
    images = window(hu)
    config = VolumeConfig(depth=10, height=96, width=96)
    z_mm = -STEP_MM * np.arange(COUNT)
    one, other = (
        build_volume(planes, [(SIZE, SIZE)] * COUNT, z_mm, (MM, MM), config).array.astype(int)
        for planes in (images, window(abdomen(table=False, arms=False)))
    )
    assert np.abs(one - other).mean() < 1
    assert not (one[:, -4:] > 200).any()
