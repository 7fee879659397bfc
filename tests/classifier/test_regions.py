"""Regions: what is looked at of an organ, the same when training and predicting, each target by its
own; slices by the visible share, against float64 loops.
"""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.classifier.data import Series, SeriesDataset, positive_share
from pipeline.classifier.loss import InjuryLoss
from pipeline.classifier.model import CnnLstm
from pipeline.classifier.predict import as_batch, logits_of, predict_volume
from pipeline.classifier.regions import region_windows, visible_shares
from pipeline.competition.targets import TARGETS, group_slices
from pipeline.learning.backbone import create_backbone, feature_shape, standardise
from pipeline.organs.find import organ_boxes
from pipeline.run.config import AugmentConfig, TrainConfig
from pipeline.run.room import train_batch_bytes

CPU = torch.device("cpu")
SHAPE = (24, 40, 48)
ORGANS = ("liver", "spleen", "kidney", "bowel")
QUIET = AugmentConfig(probability=0, z_jitter=False)
REGIONS = TrainConfig(
    init="scratch",
    regions="organs",
    region_margin=0,
    slices=4,
    image_size=32,
    hidden=8,
    dropout=0.0,
    amp=False,
    slice_loss=0.5,
    visible_loss=0.7,
)
MORE = REGIONS.model_copy(update={"abdomen_slices": 6})


def label_map():
    """Liver, spleen and kidney as boxes, no bowel."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:10, 4:20, 30:46] = 1
    labels[4:9, 6:14, 4:12] = 2
    labels[8:10, 22:30, 8:16] = labels[8:14, 22:30, 30:40] = 3
    return labels


@pytest.fixture
def series(tmp_path):
    path = tmp_path / "volume.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8))
    labels = np.concatenate([np.eye(len(t.classes), dtype=np.float32)[1] for t in TARGETS])
    planes = np.zeros((24, 2), np.float32)
    planes[3, 0] = planes[20, 1] = 1
    organs = tuple(organ_boxes(label_map()))
    return Series("1", "s", path, labels, planes, np.ones(2, np.float32), organs)


def windows_of(organs, config):
    names, windows = config.region_names, region_windows(organs, SHAPE, config)
    found = zip(names, windows, strict=True)
    return {name: tuple((part.start, part.stop) for part in window) for name, window in found}


def test_a_target_looks_at_its_organ_bowel_and_extravasation_at_all_of_them(series):
    """By hand: the sides in the plane are the same share of the plane's, whole pixels outwards; the
    abdomen's rows, 34 of 40 about the 17th, are moved inside.
    """
    assert windows_of(series.organs, REGIONS) == {
        "abdomen": ((2, 14), (0, 35), (4, 46)),
        "kidney": ((8, 14), (12, 40), (8, 40)),
        "liver": ((2, 10), (4, 20), (28, 48)),
        "spleen": ((4, 9), (6, 14), (3, 13)),
    }
    one = REGIONS.model_copy(update={"targets": ("liver",), "slice_loss": 0.0})
    assert windows_of(series.organs, one.model_copy(update={"region_margin": 0.25})) == {
        "liver": ((0, 12), (0, 24), (19, 48))
    }
    assert one.model_copy(update={"slice_loss": 1.0}).region_names == ("liver", "abdomen")
    assert region_windows(series.organs, SHAPE, TrainConfig()) == [None]


def test_an_organ_that_was_not_found_is_looked_for_in_the_whole_volume(series):
    whole = ((0, 24), (0, 40), (0, 48))
    absent = [one._replace(voxels=0) if one.name == "spleen" else one for one in series.organs]
    found = windows_of(absent, REGIONS)
    assert found["spleen"] == whole
    assert found["liver"] == ((2, 10), (4, 20), (28, 48))
    assert set(windows_of((), REGIONS).values()) == {whole}


def test_a_low_region_is_widened_to_as_many_planes_as_slices(series):
    many = REGIONS.model_copy(update={"slices": 10})
    assert windows_of(series.organs, many)["spleen"][0] == (1, 12)
    assert windows_of(series.organs, REGIONS.model_copy(update={"slices": 24}))["liver"][0] == (
        0,
        24,
    )


def seen(volume, window, config, count):
    """Slices of a window one by one."""
    (z0, z1), rows, columns = window
    depth, planes = z1 - z0, []
    for k in range(count):
        bin_planes = [p for p in range(depth) if p * count // depth == k]
        middle = int((k + 0.5) * depth / count)
        planes.append(z0 + min(bin_planes, key=lambda p, middle=middle: abs(p - middle)))
    small = min(rows[1] - rows[0], columns[1] - columns[0]) < config.image_size
    how = cv2.INTER_LINEAR if small else cv2.INTER_AREA
    size = (config.image_size, config.image_size)
    return planes, [
        cv2.resize(volume[k, slice(*rows), slice(*columns)], size, interpolation=how)
        for k in planes
    ]


@pytest.mark.parametrize("config", [REGIONS, MORE], ids=["alike", "more of the abdomen"])
def test_samples_are_the_regions_slices_with_their_own_truths(series, config):
    volume, found = np.load(series.path), series.organs
    sample = SeriesDataset([series], config)[0, 0]
    windows = windows_of(found, config)
    abdomen = config.abdomen_slices or 4
    expected = {
        name: seen(volume, window, config, abdomen if name == "abdomen" else 4)
        for name, window in windows.items()
    }
    np.testing.assert_array_equal(
        sample["slices"], np.concatenate([pictures for _, pictures in expected.values()])
    )
    assert sample["planes"].tolist() == [[1, 0]] + [[0, 0]] * (abdomen - 1), "20 lies outside"
    for row, name in zip(sample["visible"], ("kidney", "liver", "spleen"), strict=True):
        counts = (label_map() == ORGANS.index(name) + 1).sum((1, 2))
        np.testing.assert_allclose(row, counts[expected[name][0]] / counts.max(), rtol=1e-6)
    assert np.array_equal(as_batch(volume, config, CPU, 1, found)[0].numpy(), sample["slices"])
    assert positive_share([series], config).tolist() == pytest.approx([1 / abdomen, 0])
    assert visible_shares((), 24, config).tolist() == [[0] * 24] * 3
    assert config.sample_slices == 12 + abdomen


@pytest.mark.parametrize(("regions", "more"), [("whole", None), ("organs", None), ("organs", 6)])
def test_training_draws_each_region_alike_and_turns_its_truths(series, regions, more):
    """A draw of one region is that of the same region alone, with the same seed; a flip in z turns
    slices and shares, found here by their grey values.
    """
    path = series.path.with_name("greys.npy")
    np.save(path, np.arange(24, dtype=np.uint8)[:, None, None] * 10 + np.zeros(SHAPE, np.uint8))
    series, orders = replace(series, path=path), set()
    augment = AugmentConfig(probability=0, z_jitter=True, flip_z=True)
    changes = {"regions": regions, "abdomen_slices": more, "augment": augment}
    config = REGIONS.model_copy(update=changes)
    dataset = SeriesDataset([series], config, augment=True)
    shares = visible_shares(series.organs, 24, config)
    for epoch in range(12):
        sample = dataset[epoch, 0]
        edges = np.cumsum(config.region_slices)[:-1]
        planes = np.split(sample["slices"][:, 5, 5] // 10, edges)
        names = config.region_names
        for row, organ in enumerate(("kidney", "liver", "spleen")):
            own = planes[names.index(organ) if regions == "organs" else 0]
            assert len(own) == 4
            np.testing.assert_array_equal(sample["visible"][row], shares[row, own])
        falls = {bool(steps[0] > steps[-1]) for steps in (one.astype(int) for one in planes)}
        assert len(falls) == 1, "all regions are turned or none"
        orders |= falls
        again = dataset[epoch, 0]["slices"]
        assert np.array_equal(again, sample["slices"])
    assert orders == {True, False}
    hard = config.model_copy(
        update={"augment": AugmentConfig(probability=1, flip_x=True), "abdomen_slices": None}
    )
    every = SeriesDataset([replace(series, organs=())], hard, augment=True)[3, 0]["slices"]
    parts = every.reshape(len(config.region_names), 4, 32, 32)
    assert all(np.array_equal(part, parts[0]) for part in parts), "the same draw for each region"


def make(config):
    torch.manual_seed(0)
    backbone = create_backbone("mobilenetv3_small_050")
    model = CnnLstm(backbone, feature_shape(backbone, config.image_size)[0], config)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(model.slice_head.weight)
    return model.eval()


@pytest.mark.parametrize("config", [REGIONS, MORE], ids=["alike", "more of the abdomen"])
def test_each_head_reads_its_own_regions_sequence(config):
    """Against the model of whole volumes with the same weights, given one region after the
    other.
    """
    abdomen = config.abdomen_slices or 4
    model, volumes = make(config), torch.randn(2, abdomen + 12, 32, 32)
    whole = make(REGIONS.model_copy(update={"regions": "whole"}))
    whole.load_state_dict(model.state_dict())
    logits, slices = model(volumes)
    parts = volumes.split([abdomen, 4, 4, 4], 1)
    regions = dict(zip(("abdomen", "kidney", "liver", "spleen"), parts, strict=True))
    one = {name: whole(part) for name, part in regions.items()}
    columns = [(2, "abdomen"), (3, "kidney"), (3, "liver"), (3, "spleen")]
    for target in TARGETS:
        expected = one[target.region][0][target.name]
        assert torch.allclose(logits[target.name], expected, atol=1e-5), target.name
    for k, (part, (width, region)) in enumerate(zip(slices, columns, strict=True)):
        assert part.shape == (2, abdomen if region == "abdomen" else 4, width)
        assert torch.allclose(part, one[region][1][k], atol=1e-5), region


@pytest.mark.parametrize("config", [REGIONS, MORE], ids=["alike", "more of the abdomen"])
def test_views_are_turned_within_each_region(config):
    """By hand: the regions of the turned view stay in their order."""
    abdomen = config.abdomen_slices or 4
    model = make(config)
    slices = torch.randint(0, 256, (1, abdomen + 12, 32, 32), dtype=torch.uint8)
    (found,) = logits_of([model], slices, False, ["zx"])
    turned = torch.cat([part.flip(1, 3) for part in slices.split([abdomen, 4, 4, 4], 1)], 1)
    plain, other = (model(standardise(one))[0] for one in (slices, turned))
    for name, value in found.items():
        expected = (plain[name] + other[name]) / 2
        assert torch.allclose(value.float(), expected, atol=1e-5), name


def test_the_visible_loss_equals_float64_loops():
    """Injured by the share in the slice, else healthy; an injured patient whose organ was not found
    says nothing, a healthy one does; mean over slices, the sample weight of the class.
    """
    rng, B = np.random.default_rng(1), 6
    config = REGIONS.model_copy(update={"targets": ("bowel", "liver", "spleen")})
    labels, train = (
        np.concatenate(
            [np.eye(len(t.classes))[rng.integers(len(t.classes), size=count)] for t in TARGETS], 1
        ).astype(np.float32)
        for count in (B, 30)
    )
    columns = group_slices()
    labels[:2, columns["liver"]] = [[1, 0, 0], [0, 0, 1]]
    visible = rng.random((B, 2, 4)).astype(np.float32)
    visible[:2, 0] = 0  # the liver of a healthy and of an injured patient was not found
    scores = rng.normal(size=(B, 4, 8))
    total, names = 0.0, ("liver", "spleen")
    for k, target in enumerate(t for t in TARGETS if t.name in names):
        where = columns[target.name]
        scale = np.mean([np.dot(target.weights, row[where]) for row in train])
        for b in range(B):
            truth = int(labels[b, where].argmax())
            if truth and not visible[b, k].any():
                continue
            for s in range(4):
                values = [math.exp(v) for v in scores[b, s, 2 + 3 * k : 5 + 3 * k]]
                share = float(visible[b, k, s])
                wanted = [0.0, 0.0, 0.0]
                wanted[truth] += share
                wanted[0] += 1 - share
                for weight, p, q in zip(target.weights, values, wanted, strict=True):
                    total -= weight * q * math.log(p / sum(values)) / (4 * scale)
    logits = {t.name: torch.zeros(B, 1 if t.binary else 3) for t in TARGETS}
    given = {
        "labels": torch.from_numpy(labels),
        "planes": torch.zeros(B, 4, 2),
        "known": torch.ones(B, 2),
        "visible": torch.from_numpy(visible),
    }
    outputs = logits, list(torch.tensor(scores, dtype=torch.float32).split([2, 3, 3], -1))
    terms = InjuryLoss(config, train)(outputs, **given, batch=B)
    assert list(terms) == ["bowel", "liver", "spleen", "slices", "visible"]
    assert float(terms["visible"]) == pytest.approx(0.7 * total / B, rel=1e-5)
    alone = config.model_copy(update={"slice_loss": 0.0})
    terms = InjuryLoss(alone, train)((logits, outputs[1][1:]), **given, batch=B)
    assert float(terms["visible"]) == pytest.approx(0.7 * total / B, rel=1e-5)
    halves = [
        InjuryLoss(config, train)(
            ({n: v[part] for n, v in logits.items()}, [one[part] for one in outputs[1]]),
            **{name: value[part] for name, value in given.items()},
            batch=B,
        )["visible"]
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert float(sum(halves)) == pytest.approx(0.7 * total / B, rel=1e-5)


def test_a_volume_without_organs_is_looked_at_whole(series):
    model, volume = make(REGIONS), np.load(series.path)
    box = organ_boxes(np.ones(SHAPE, np.uint8))[0]
    every = [box._replace(name=name) for name in ORGANS]
    plain = predict_volume(model, volume, REGIONS)
    assert plain == predict_volume(model, volume, REGIONS, organs=every)
    assert plain != predict_volume(model, volume, REGIONS, organs=series.organs)


def test_memory_counts_all_regions():
    one = REGIONS.model_copy(update={"regions": "whole"})
    assert train_batch_bytes(REGIONS) == 4 * train_batch_bytes(one)
    assert REGIONS.sample_slices == 16
    assert 2 * train_batch_bytes(MORE) == 9 * train_batch_bytes(one)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"regions": "organs", "crop": 0.1}, "cut whole planes"),
        ({"regions": "organs", "crop_size": 32}, "cut whole planes"),
        ({"visible_loss": 1.0, "targets": ("bowel", "extravasation")}, "targets has n"),
        ({"abdomen_slices": 12}, "abdomen_slices are of a region: set regions=organs"),
    ],
)
def test_keys_that_contradict_regions_are_refused(keys, words):
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**keys)
