"""One set of functions that choose and resize planes gives what each use of it gave before."""

import cv2
import numpy as np
import pytest

from pipeline.run.config import TrainConfig
from pipeline.volumes.sampling import (
    bins,
    even_slices,
    evenly,
    moved_to,
    resample_planes,
    slice_positions,
    take_slices,
    with_neighbours,
)


def exact_positions(depth, count):
    """The middle plane of each bin in whole numbers: no rounding anywhere."""
    bin_of = [plane * count // depth for plane in range(depth)]
    first = [bin_of.index(k) for k in range(count)]
    last = [depth - 1 - bin_of[::-1].index(k) for k in range(count)]
    middle = [(2 * k + 1) * depth // (2 * count) for k in range(count)]
    return [min(max(m, a), b) for m, a, b in zip(middle, first, last, strict=True)]


@pytest.mark.parametrize("depth", [*range(1, 40), 96, 97, 128, 1000])
def test_positions_in_floating_point_are_those_in_whole_numbers(depth):
    for count in {*range(1, min(depth, 40) + 1), depth // 2 or 1, depth}:
        assert slice_positions(depth, count).tolist() == exact_positions(depth, count)
        assert evenly(depth, count).tolist() == [
            (2 * k + 1) * depth // (2 * count) for k in range(count)
        ]


def test_evenly_alone_would_leave_a_bin():
    first, last = bins(5, 4)
    planes = evenly(5, 4)
    assert planes.tolist() == [0, 1, 3, 4]
    assert not ((first <= planes) & (planes <= last)).all()
    assert slice_positions(5, 4).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(("crop", "size"), [(0.0, 16), (0.1, 16), (0.0, 24), (0.17, 16)])
def test_taken_slices_are_cut_and_resized_by_area(crop, size):
    volume = np.random.default_rng(0).integers(0, 256, (6, 24, 24), np.uint8)
    config = TrainConfig(crop=crop, image_size=size)
    border = round(24 * crop)
    expected = [
        cv2.resize(
            volume[k, border : 24 - border, border : 24 - border],
            (size, size),
            interpolation=cv2.INTER_AREA,
        )
        for k in (1, 4)
    ]
    taken = take_slices(volume, np.array([1, 4]), config)
    assert taken.flags.c_contiguous
    assert np.array_equal(taken, expected)


def test_a_crop_is_taken_without_resizing_in_the_middle_or_where_the_generator_says():
    volume = np.random.default_rng(0).integers(0, 256, (4, 24, 20), np.uint8)
    config = TrainConfig(crop_size=16, image_size=16)
    assert np.array_equal(take_slices(volume, np.array([2]), config)[0], volume[2, 4:20, 2:18])
    places = set()
    for seed in range(400):
        taken = take_slices(volume, np.array([0, 3]), config, np.random.default_rng(seed))
        found = [
            (y, x)
            for y in range(9)
            for x in range(5)
            if np.array_equal(taken, volume[[0, 3], y : y + 16, x : x + 16])
        ]
        assert len(found) == 1, "one place for all planes"
        places |= set(found)
    assert len(places) == 9 * 5


def test_a_crop_inside_a_cut_border_is_resized_where_asked():
    volume = np.random.default_rng(0).integers(0, 256, (1, 40, 40), np.uint8)
    taken = take_slices(volume, np.array([0]), TrainConfig(crop=0.1, crop_size=32, image_size=16))
    expected = cv2.resize(volume[0, 4:36, 4:36], (16, 16), interpolation=cv2.INTER_AREA)
    assert np.array_equal(taken[0], expected)


def slow_resample(volume, depth):
    """Each source plane cut into `depth` parts: a new plane is the mean of as many parts in a row
    as there are source planes."""
    parts = np.repeat(volume.astype(float), depth, axis=0)
    return np.stack([part.mean(0) for part in np.split(parts, depth)])


@pytest.mark.parametrize(("stored", "depth"), [(96, 64), (7, 5), (5, 7), (6, 3), (4, 4), (3, 12)])
def test_planes_are_resampled_by_area(stored, depth):
    volume = np.random.default_rng(1).integers(0, 256, (stored, 6, 5), np.uint8)
    expected = slow_resample(volume, depth)
    chosen = np.random.default_rng(2).permutation(depth)
    found = resample_planes(volume, depth, chosen)
    assert found.dtype == np.uint8
    assert np.abs(found - expected[chosen]).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_slice_lies_between_the_adjacent_stored_planes(channels):
    """Whatever the distance of the samples; beyond the ends the last plane stands again."""
    volume = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
    config = TrainConfig(slices=4, image_size=16, channels=channels)
    reach = channels // 2
    expected = [
        min(max(plane + step, 0), 7) for plane in (1, 3, 5, 7) for step in range(-reach, reach + 1)
    ]
    assert with_neighbours(np.array([1, 3, 5, 7]), 8, channels).tolist() == expected
    assert even_slices(volume, config)[:, 3, 5].tolist() == expected


@pytest.mark.parametrize(("depth", "count", "phases"), [(96, 48, 2), (12, 4, 3), (7, 7, 1)])
def test_interleaved_phases_look_at_every_plane_once(depth, count, phases):
    """Plane k of a volume is of grey k: the p-th phase has every `phases`-th plane."""
    volume = np.arange(depth, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
    config = TrainConfig(slices=count, image_size=16)
    seen = even_slices(volume, config, phases)[..., 0, 0].reshape(phases, count)
    assert seen.T.tolist() == [list(range(k, k + phases)) for k in range(0, depth, phases)]


def test_phases_stay_in_their_bins_where_these_are_not_whole_planes_wide():
    for depth, count in ((64, 40), (7, 4), (97, 48)):
        first, last = bins(depth, count)
        for phase in (0.25, 0.75):
            planes = slice_positions(depth, count, phase=phase)
            assert ((first <= planes) & (planes <= last)).all()


@pytest.mark.parametrize(("depth", "count"), [(32, 12), (96, 48), (9, 2), (5, 5)])
def test_positions_are_moved_together_to_a_plane_within_their_bins(depth, count):
    first, last = bins(depth, count)
    even = slice_positions(depth, count)
    for plane in range(depth):
        moved = moved_to(even, plane, depth)
        assert plane in moved
        step = plane - even[plane * count // depth]
        expected = [min(max(k + step, a), b) for k, a, b in zip(even, first, last, strict=True)]
        assert moved.tolist() == expected
