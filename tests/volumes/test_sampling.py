"""One set of functions that choose and resize planes gives what each use of it gave before."""

import cv2
import numpy as np
import pytest

from pipeline.run.config import TrainConfig
from pipeline.volumes.sampling import bins, evenly, slice_positions, take_slices


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
