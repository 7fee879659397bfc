"""From probabilities to organs: Dice, islands, boxes and shares against slow references, volumes
batch by batch.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from pipeline.organs import find
from pipeline.organs.data import resized, with_neighbours
from pipeline.organs.find import (
    label_volume,
    millilitres,
    organ_boxes,
    rows_of,
    without_islands,
)
from pipeline.organs.loss import dice_scores, organ_terms, soft_dice
from pipeline.organs.masks import ORGANS
from pipeline.run.config import OrganConfig

CPU = torch.device("cpu")
LIVER, SPLEEN, KIDNEY, BOWEL = 1, 2, 3, 4


def test_dice_is_that_of_sets_of_voxels():
    rng = np.random.default_rng(1)
    found, truth = (rng.choice([0, 0, 1, 3, 4], size=(4, 5, 6)).astype(np.uint8) for _ in "ab")
    expected = []
    for organ in range(1, 5):
        a, b = (set(zip(*np.nonzero(one == organ), strict=True)) for one in (found, truth))
        expected.append(2 * len(a & b) / (len(a) + len(b)) if a or b else None)
    assert dice_scores(found, truth, 4) == expected
    assert expected[1] is None, "no spleen in either"
    truth[truth == KIDNEY] = 0
    assert dice_scores(found, truth, 4)[2] == 0, "found where there is none"


def test_soft_dice_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 5, 4, 6, generator=generator)
    labels = torch.randint(0, 5, (3, 4, 6), generator=generator).to(torch.uint8)
    shares, scores = logits.double().softmax(1), []
    for organ in range(1, 5):
        both = size = 0.0
        for n in range(3):
            for y in range(4):
                for x in range(6):
                    is_it, p = float(labels[n, y, x] == organ), float(shares[n, organ, y, x])
                    both, size = both + is_it * p, size + is_it + p
        scores.append((2 * both + 1) / (size + 1))
    assert soft_dice(logits, one_hot(labels.long(), 5)).item() == pytest.approx(
        1 - sum(scores) / 4, rel=1e-5
    )


def test_a_rare_organ_weighs_by_the_root_of_its_pixels():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 8, 8, generator=generator)
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[0, 2:6, 2:6], labels[1, 0, 0] = LIVER, KIDNEY  # no spleen, no bowel
    shares = logits.double().softmax(1)
    counts = {0: 128 - 17, LIVER: 16, KIDNEY: 1}
    total = weight = 0.0
    for n in range(2):
        for y in range(8):
            for x in range(8):
                label = int(labels[n, y, x])
                own = counts[label] ** -0.5
                total -= own * float(shares[n, label, y, x].log())
                weight += own
    terms = organ_terms(logits, labels)
    assert terms["entropy"].item() == pytest.approx(total / weight, rel=1e-5)
    assert terms["dice"] == soft_dice(logits, one_hot(labels.long(), 5))


def test_islands_go_and_second_parts_of_kidney_and_bowel_stay():
    labels = np.zeros((8, 20, 20), np.uint8)
    labels[1:5, 1:8, 1:8] = LIVER
    labels[6, 15:17, 15:17] = LIVER  # an island
    labels[1:3, 10:14, 1:4] = KIDNEY
    labels[1:3, 10:14, 16:19] = KIDNEY
    labels[6, 18, 1] = KIDNEY
    labels[5:7, 1:4, 10:13] = BOWEL
    labels[5:7, 6:8, 10:13] = BOWEL
    labels[5:7, 9:11, 10:13] = BOWEL
    labels[0, 0, 19] = BOWEL
    expected = labels.copy()
    expected[6, 15:17, 15:17] = expected[6, 18, 1] = expected[0, 0, 19] = 0
    np.testing.assert_array_equal(without_islands(labels), expected)
    assert labels[6, 18, 1] == KIDNEY, "what it was given stays as it was"
    specks = np.zeros((10, 100, 100), np.uint8)  # an organ has at least 10 of these voxels
    specks[2, 3, 3:12], specks[2, 8, 3:13] = SPLEEN, LIVER
    assert set(np.unique(without_islands(specks))) == {0, LIVER}
    corner = np.zeros((2, 3, 3), np.uint8)
    corner[0, 0, 0] = corner[1, 1, 1] = SPLEEN  # joined by a corner
    np.testing.assert_array_equal(without_islands(corner), corner)


def test_boxes_and_shares_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    labels = (rng.choice([0] * 30 + [1, 3, 4], size=(6, 9, 10))).astype(np.uint8)
    for number, organ in enumerate(organ_boxes(labels), start=1):
        places = [place for place in np.ndindex(*labels.shape) if labels[place] == number]
        assert organ.name == ORGANS[number - 1]
        assert organ.voxels == len(places)
        if number == SPLEEN:
            assert organ.box == (0,) * 6
            assert not organ.visible.any()
            continue
        box = []
        for axis, side in enumerate(labels.shape):
            along = [place[axis] for place in places]
            box += [min(along) / side, (max(along) + 1) / side]
        assert organ.box == pytest.approx(box)
        counts = [sum(place[0] == z for place in places) for z in range(6)]
        np.testing.assert_allclose(organ.visible, np.array(counts) / len(places))
        assert organ.visible.sum() == pytest.approx(1)


def test_rows_are_plain_values_in_millilitres():
    labels = np.zeros((4, 10, 20), np.uint8)
    labels[1:3, 5:, :5] = LIVER
    liver, spleen, *_ = rows_of(organ_boxes(labels), (5.0, 2.0, 1.0))
    assert liver == {
        "organ": "liver",
        **{"z0": 0.25, "z1": 0.75, "y0": 0.5, "y1": 1.0, "x0": 0.0, "x1": 0.25},
        "voxels": 50,
        "ml": 0.5,
        "visible": [0.0, 0.5, 0.5, 0.0],
    }
    assert spleen["voxels"] == 0
    assert spleen["visible"] == [0.0] * 4
    assert millilitres(50, (None, 2.0, 1.0)) is millilitres(50, (float("nan"), 2.0, 1.0)) is None


def test_each_plane_lies_between_its_neighbours():
    volume = np.arange(5 * 2 * 2).reshape(5, 2, 2).astype(np.uint8)
    found = with_neighbours(volume, np.array([0, 2, 4]))
    assert found.shape == (3, 2, 2, 3)
    for own, planes in zip(found, ([0, 0, 1], [1, 2, 3], [3, 4, 4]), strict=True):
        for channel, plane in enumerate(planes):
            np.testing.assert_array_equal(own[..., channel], volume[plane])


class Thresholds(nn.Module):
    """Says `organ` where the middle plane is bright, surer the brighter it is."""

    def __init__(self, organ: int, sure: float) -> None:
        super().__init__()
        self.organ, self.sure = organ, sure

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(planes), 5, *planes.shape[2:])
        logits[:, 0], logits[:, self.organ] = 0.5, self.sure * planes[:, 1]
        return logits


def test_a_volume_is_labelled_batch_by_batch_by_the_mean_of_the_models(monkeypatch):
    rng = np.random.default_rng(4)
    volume = rng.integers(0, 256, (7, 32, 32)).astype(np.uint8)
    options = OrganConfig(image_size=32, amp=False)
    models = [Thresholds(LIVER, 1.0), Thresholds(SPLEEN, 3.0)]
    whole = label_volume(models, volume, options, CPU)
    monkeypatch.setattr(find, "PLANES_AT_ONCE", 2 * 32 * 32)
    np.testing.assert_array_equal(label_volume(models, volume, options, CPU), whole)
    grey = (volume / 255 - 0.449) / 0.226
    shares = np.zeros((5, *volume.shape))
    for organ, sure in ((LIVER, 1.0), (SPLEEN, 3.0)):
        logits = np.zeros((5, *volume.shape))
        logits[0], logits[organ] = 0.5, sure * grey
        shares += np.exp(logits) / np.exp(logits).sum(0) / 2
    second, first = np.sort(shares, 0)[-2:]
    clear = first - second > 1e-4
    np.testing.assert_array_equal(whole[clear], shares.argmax(0)[clear])
    assert set(np.unique(whole[clear])) >= {0, SPLEEN}


def test_planes_of_another_size_are_labelled_at_the_volumes_own():
    volume = np.zeros((3, 48, 64), np.uint8)
    volume[:, :24, 32:] = 255
    found = label_volume([Thresholds(LIVER, 9.0)], volume, OrganConfig(image_size=32), CPU)
    assert found.shape == volume.shape
    assert (found[:, :20, 36:] == LIVER).all()
    assert not (found[:, 28:] == LIVER).any()
    assert resized(volume[0], 32).shape == (32, 32)
