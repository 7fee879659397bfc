"""The CNN-LSTM: shapes, heads, losses against float64, what the sequence model can see, samples and
augmentation.
"""

import math

import numpy as np
import pytest
import torch

from pipeline.classifier.augment import VolumeAugment
from pipeline.classifier.data import Series, SeriesDataset, bin_labels, plane_labels
from pipeline.classifier.loss import InjuryLoss
from pipeline.classifier.model import CnnLstm, probabilities
from pipeline.competition.targets import TARGETS, group_slices
from pipeline.learning.backbone import create_backbone, feature_shape
from pipeline.run.config import AugmentConfig, TrainConfig
from pipeline.volumes.sampling import slice_positions, take_slices

NO_LABELS = np.zeros((0, 2), np.float32)
TINY = TrainConfig(init="scratch", slices=4, image_size=32, hidden=8, slice_loss=0.5, dropout=0.0)


def one_hot(rng, count):
    return np.concatenate(
        [np.eye(len(t.classes))[rng.integers(len(t.classes), size=count)] for t in TARGETS], 1
    ).astype(np.float32)


def make(config):
    torch.manual_seed(0)
    backbone = create_backbone("mobilenetv3_small_050")
    return CnnLstm(backbone, feature_shape(backbone, config.image_size)[0], config)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", ["lstm", "gru", "transformer", "none"])
@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
def test_every_variant_gives_all_heads_and_gradients(sequence, pool):
    model = make(TINY.model_copy(update={"sequence": sequence, "pool": pool}))
    logits, slices = model(torch.randn(2, 4, 32, 32))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        t.name: (2, 1 if t.binary else 3) for t in TARGETS
    }
    assert slices.shape == (2, 4, 2)
    labels = torch.from_numpy(one_hot(np.random.default_rng(0), 2))
    terms = InjuryLoss(TINY, labels.numpy())(
        (logits, slices), labels, torch.zeros(2, 4, 2), torch.ones(2, 2), 2
    )
    assert set(terms) == {*(t.name for t in TARGETS), "slices"}
    sum(terms.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for target in TARGETS:
        assert model.heads[target.name].weight.grad.abs().sum() > 0, f"{target.name} is trained"


def test_heads_answer_in_float32_whatever_the_rest_computes_in():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, slices = make(TINY)(torch.rand(2, 4, 32, 32))
    assert {value.dtype for value in (*logits.values(), slices)} == {torch.float32}


def test_model_starts_at_the_best_constant_prediction():
    labels = one_hot(np.random.default_rng(4), 40)
    model = make(TINY).eval()
    model.start_at_prior(labels)
    values = probabilities(model(torch.randn(3, 4, 32, 32))[0]).detach().numpy()
    for target, where in zip(TARGETS, group_slices().values(), strict=True):
        share = labels[:, where].mean(0) * target.weights
        assert values[:, where] == pytest.approx(np.tile(share / share.sum(), (3, 1)), rel=1e-4)


def test_single_target_model_has_that_head_and_loss_only():
    config = TINY.model_copy(update={"targets": ("liver",), "slice_loss": 0.0})
    model = make(config)
    logits, slices = model(torch.randn(2, 4, 32, 32))
    assert list(logits) == ["liver"]
    assert slices is None
    labels = torch.from_numpy(one_hot(np.random.default_rng(0), 2))
    assert list(InjuryLoss(config, labels.numpy())((logits, None), labels, None, None, 2)) == [
        "liver"
    ]
    table = probabilities(logits)
    assert table.shape == (2, 13)
    assert torch.equal(table[:, :2], torch.full((2, 2), 0.5, dtype=torch.float64))


def test_loss_equals_float64_loops():
    rng = np.random.default_rng(1)
    labels, train = one_hot(rng, 6), one_hot(rng, 50)
    logits = {
        t.name: torch.from_numpy(rng.normal(size=(6, 1 if t.binary else 3)).astype(np.float32))
        for t in TARGETS
    }
    config = TINY.model_copy(update={"slice_loss": 0.0})
    terms = InjuryLoss(config, train)((logits, None), torch.from_numpy(labels), None, None, 6)
    columns = group_slices()
    for target in TARGETS:
        total = 0.0
        for row in range(6):
            true = int(labels[row, columns[target.name]].argmax())
            values = logits[target.name][row].double().tolist()
            if target.binary:
                p = 1 / (1 + math.exp(-values[0]))
                p = p if true else 1 - p
            else:
                p = math.exp(values[true]) / sum(math.exp(v) for v in values)
            total += target.weights[true] * -math.log(p)
        mean_weight = sum(
            target.weights[int(row[columns[target.name]].argmax())] for row in train
        ) / len(train)
        assert float(terms[target.name]) == pytest.approx(total / (6 * mean_weight), rel=1e-5)


def test_micro_batches_sum_to_the_large_batch():
    rng = np.random.default_rng(2)
    labels, known = torch.from_numpy(one_hot(rng, 8)), torch.ones(8, 2)
    planes = torch.from_numpy(rng.integers(0, 2, (8, 4, 2)).astype(np.float32))
    # eval: batch norm is the one part that sees the batch
    model, loss = make(TINY).eval(), InjuryLoss(TINY, labels.numpy())
    images = torch.randn(8, 4, 32, 32)

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            sum(
                loss(model(images[part]), labels[part], planes[part], known[part], 8).values()
            ).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    large, small = gradients([slice(0, 8)]), gradients([slice(0, 3), slice(3, 6), slice(6, 8)])
    assert torch.allclose(large, small, rtol=1e-3, atol=1e-5 * float(large.abs().max()))


def order_task(rng, count, slices=6):
    """Bright slice above the dark one (1) or below it (0); the same slices either way, so only the
    order tells.
    """
    x = np.full((count, slices, 32, 32), 100.0, np.float32)
    y = rng.integers(0, 2, count)
    for i in range(count):
        first, second = sorted(rng.choice(slices, 2, replace=False))
        bright, dark = (first, second) if y[i] else (second, first)
        x[i, bright, 8:24, 8:24], x[i, dark, 8:24, 8:24] = 250, 0
    return torch.from_numpy(
        (x + rng.normal(0, 2, x.shape)).astype(np.float32) / 100 - 1
    ), torch.from_numpy(y)


@pytest.mark.parametrize(("sequence", "learns"), [("lstm", True), ("none", False)])
def test_only_a_sequence_model_sees_the_order_along_z(sequence, learns):
    rng = np.random.default_rng(3)
    config = TINY.model_copy(
        update={"sequence": sequence, "targets": ("bowel",), "slice_loss": 0.0, "hidden": 16}
    )
    torch.manual_seed(0)
    model = CnnLstm(
        torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Conv2d(1, 8, 1)), 8, config
    )
    model.norm = torch.nn.Identity()
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    x, y = order_task(rng, 256, 6)
    for _ in range(60):
        logits, _ = model(x)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits["bowel"][:, 0], y.float()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = order_task(rng, 256, 6)
    accuracy = float(((model(x)[0]["bowel"][:, 0] > 0) == y).float().mean())
    assert accuracy > 0.95 if learns else accuracy < 0.65


def test_slice_positions_are_even_and_jitter_stays_in_its_bin():
    assert slice_positions(96, 48).tolist() == list(range(1, 96, 2))
    assert slice_positions(5, 5).tolist() == [0, 1, 2, 3, 4]
    for seed in range(20):
        jittered = slice_positions(32, 8, np.random.default_rng(seed))
        assert (jittered // 4 == np.arange(8)).all()


@pytest.mark.parametrize(("depth", "count"), [(32, 12), (96, 40), (96, 64), (7, 1), (5, 5)])
def test_jittered_slices_carry_their_own_labels(depth, count):
    """Every plane is drawn in exactly one bin, the one whose label it gives, also where bins are
    not whole planes wide.
    """
    where = np.zeros((depth, count), bool)
    for seed in range(400):
        where[slice_positions(depth, count, np.random.default_rng(seed)), np.arange(count)] = True
    labels = (
        np.stack(
            [
                bin_labels(np.eye(depth, 2, -plane, np.float32), count)[:, 0]
                for plane in range(depth)
            ]
        )
        > 0
    )
    assert where.any(1).all()
    assert np.array_equal(where, labels)
    assert labels[slice_positions(depth, count), np.arange(count)].all()


def test_slice_labels_reach_their_bin():
    planes = plane_labels([10, 9, 8, 7, 6, 5, 4, 3], [(9, 0), (3, 1)], 8)
    assert planes[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert bin_labels(planes, 4).tolist() == [[1, 0], [0, 0], [0, 0], [0, 1]]


def slow_plane_labels(instances, labelled, depth):
    """A plane is marked where no other plane lies nearer to a labelled slice."""
    labels = np.zeros((depth, 2))
    for plane in range(depth):
        for instance, column in labelled:
            nearest = min(abs(other - instance) for other in instances)
            if abs(instances[plane] - instance) == nearest:
                labels[plane, column] = 1
    return labels


def test_every_plane_that_a_labelled_slice_became_is_marked():
    """A stack of 4 slices resampled to 10 planes: each slice is nearest to two or three."""
    instances = [14, 14, 13, 13, 13, 12, 12, 12, 11, 11]
    planes = plane_labels(instances, [(13, 0), (11, 1)], 10)
    assert planes[:, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert planes[:, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("slices", [3, 7, 16, 40])
def test_plane_labels_equal_a_slow_loop(slices):
    """Thin stacks and thick ones, labelled slices that were left out among them."""
    rng = np.random.default_rng(slices)
    for _ in range(20):
        numbers = rng.choice(np.arange(1, 4 * slices), slices, replace=False)
        numbers.sort()
        instances = numbers[(np.arange(16) + 0.5).astype(int) * slices // 16].tolist()
        labelled = [
            (int(rng.integers(1, 4 * slices)), int(rng.integers(2))) for _ in range(rng.integers(6))
        ]
        found = plane_labels(instances, labelled, 16)
        assert np.array_equal(found, slow_plane_labels(instances, labelled, 16))


def test_take_slices_crops_and_resizes():
    volume = np.zeros((6, 40, 40), np.uint8)
    volume[:, 4:36, 4:36] = 200
    out = take_slices(
        volume, np.array([0, 5]), TINY.model_copy(update={"crop": 0.1, "image_size": 16})
    )
    assert out.shape == (2, 16, 16)
    assert (out == 200).all()


def test_augmentation_is_one_draw_for_all_slices_and_repeats_by_seed():
    image = np.zeros((32, 32), np.uint8)
    image[6:20, 9:15] = 180
    stack = np.stack([image] * 5)
    augment = VolumeAugment(
        AugmentConfig(probability=1.0, rotate_deg=20, cutout=1.0, flip_x=True, flip_y=True)
    )
    first = augment(stack, NO_LABELS, 11)[0]
    assert all(np.array_equal(first[0], other) for other in first[1:]), "every slice moved alike"
    assert np.array_equal(first, augment(stack, NO_LABELS, 11)[0])
    assert not np.array_equal(first, augment(stack, NO_LABELS, 12)[0])
    assert not np.array_equal(first, stack)


def test_flip_in_z_turns_the_slice_labels_with_the_slices(tmp_path):
    """The one bright slice is the one labelled slice before and after, and both halves of a flip's
    coin come up.
    """
    volume = np.full((8, 32, 32), 40, np.uint8)
    volume[1] = 200
    np.save(tmp_path / "volume.npy", volume)
    planes = np.zeros((8, 2), np.float32)
    planes[1, 0] = 1
    series = Series(
        "1",
        "1",
        tmp_path / "volume.npy",
        one_hot(np.random.default_rng(0), 1)[0],
        planes,
        np.ones(2, np.float32),
    )
    still = {
        "rotate_deg": 0,
        "scale": 0,
        "shift": 0,
        "brightness": 0,
        "contrast": 0,
        "flip_z": True,
        "z_jitter": False,
    }
    dataset = SeriesDataset(
        [series], TINY.model_copy(update={"augment": AugmentConfig(**still)}), augment=True
    )
    places = set()
    for epoch in range(20):
        sample = dataset[epoch, 0]
        bright = sample["slices"].mean((1, 2)) > 45
        assert np.array_equal(bright, sample["planes"][:, 0] > 0)
        places |= set(np.flatnonzero(bright).tolist())
    assert places == {0, 3}


def test_laterality_is_kept_by_default():
    image = np.zeros((32, 32), np.uint8)
    image[8:24, 2:14] = 200  # the liver, at image left
    augment = VolumeAugment(AugmentConfig(probability=1.0))
    for seed in range(30):
        out = augment(np.stack([image] * 2), NO_LABELS, seed)[0][0].astype(float)
        assert out[:, :16].sum() > 2 * out[:, 16:].sum()


def still(**drawn):
    """An augmentation that does nothing but what is asked for."""
    return VolumeAugment(AugmentConfig(probability=0.0, **drawn))


def test_quarter_turns_take_one_to_three_of_them_and_keep_the_slices_together():
    stack = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    turned = {k: np.rot90(stack, k, (1, 2)) for k in range(4)}
    seen = []
    for seed in range(60):
        out = still(quarter_turn=0.5)(stack, NO_LABELS, seed)[0]
        seen.append(next(k for k, view in turned.items() if np.array_equal(out, view)))
    assert set(seen) == {0, 1, 2, 3}
    assert 18 < seen.count(0) < 42


def test_a_grey_curve_rises_and_keeps_both_ends():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (2, 1, 1))
    curves = [still(grey_curve=1.0)(ramp, NO_LABELS, seed)[0] for seed in range(40)]
    for curve in curves:
        assert np.array_equal(curve[0], curve[1]), "one draw for all slices"
        assert (np.diff(curve[0, 0].astype(int)) >= 0).all()
        assert curve[0, 0, 0] == 0
        assert curve[0, 0, 255] == 255
    middle = [int(curve[0, 0, 128]) for curve in curves]
    assert min(middle) < 90
    assert max(middle) > 150
    assert np.array_equal(still(grey_curve=0.0)(ramp, NO_LABELS, 1)[0], ramp)


def test_dropped_boxes_are_small_and_few():
    white = np.full((48, 192, 192), 255, np.uint8)
    for seed in range(5):
        dropped = still(boxes=1.0)(white, NO_LABELS, seed)[0] == 0
        assert 4 * 8 * 8 <= dropped.sum() <= 16 * 8 * 16 * 16
        assert not dropped.all(0).any(), "no box goes through all slices"
    thin = still(boxes=1.0)(white[:2, :8, :8], NO_LABELS, 0)[0]
    assert (thin == 0).all(), "of fewer pixels than a box all are dropped"


def test_the_mean_of_a_map_alone_and_no_shortcut():
    """The published head: mean-pooled features, the sequence model's states alone."""
    published = {"map_pool": "mean", "shortcut": False, "slice_loss": 0.0, "hidden": 8}
    model = make(TINY.model_copy(update=published)).eval()
    C = feature_shape(model.backbone, 32)[0]
    assert model.norm.normalized_shape == (C,)
    assert model.sequence.cell.input_size == C
    assert {head.in_features for head in model.heads.values()} == {16}
    volumes = torch.randn(1, 4, 32, 32)
    features = model.norm(model.backbone(volumes[0][:, None]).mean((2, 3)))[None]
    torch.nn.init.normal_(model.heads["liver"].weight)
    expected = model.heads["liver"](model.sequence(features).amax(1))
    assert torch.allclose(model(volumes)[0]["liver"], expected, atol=1e-5)


def test_dropout_of_the_backbone_acts_on_its_map_while_training():
    backbone = torch.nn.Conv2d(1, 64, 8, 8)
    config = TINY.model_copy(update={"backbone_dropout": 0.5, "map_pool": "mean"})
    model, seen = CnnLstm(backbone, 64, config), []
    model.norm.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    x = torch.randn(1, 4, 32, 32)
    model.eval()(x)
    expected = backbone(x[0][:, None])
    assert torch.allclose(seen[0], expected.mean((2, 3)), atol=1e-6)
    torch.manual_seed(0)
    model.train()(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(expected, 0.5)
    assert (dropped == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.allclose(seen[1], dropped.mean((2, 3)), atol=1e-6)


def test_training_crops_lie_anywhere_and_repeat_by_epoch(tmp_path):
    volume = np.arange(40 * 40, dtype=np.uint16).reshape(1, 40, 40).repeat(4, 0) // 8
    np.save(tmp_path / "volume.npy", volume.astype(np.uint8))
    labels = one_hot(np.random.default_rng(0), 1)[0]
    series = Series(
        "1", "1", tmp_path / "volume.npy", labels, np.zeros((4, 2), np.float32), np.ones(2)
    )
    config = TINY.model_copy(
        update={"crop_size": 32, "augment": AugmentConfig(probability=0.0, z_jitter=False)}
    )
    training = SeriesDataset([series], config, augment=True)
    corners = [int(training[epoch, 0]["slices"][0, 0, 0]) for epoch in range(30)]
    assert corners == [int(training[epoch, 0]["slices"][0, 0, 0]) for epoch in range(30)]
    assert len(set(corners)) > 5
    held_out = SeriesDataset([series], config)[0, 0]["slices"]
    assert np.array_equal(held_out, volume[:, 4:36, 4:36].astype(np.uint8))
