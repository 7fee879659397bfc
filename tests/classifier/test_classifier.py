"""The CNN-LSTM: shapes, heads, losses against float64, what the sequence model can see, samples and
augmentation.
"""

import math

import numpy as np
import pytest
import torch

from pipeline.classifier.augment import VolumeAugment
from pipeline.classifier.data import (
    Series,
    SeriesDataset,
    bin_labels,
    plane_labels,
    positive_share,
)
from pipeline.classifier.loss import InjuryLoss
from pipeline.classifier.mix import cut_box, mix_volumes, mixed_terms
from pipeline.classifier.model import CnnLstm, probabilities, start_at_prior
from pipeline.competition.targets import TARGETS, group_slices
from pipeline.learning.backbone import create_backbone, feature_shape
from pipeline.run.config import AugmentConfig, TrainConfig, VolumeConfig
from pipeline.volumes.build import build_volume, plane_weights
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
    assert [tuple(one.shape) for one in slices] == [(2, 4, 2)]
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
    assert {value.dtype for value in (*logits.values(), *slices)} == {torch.float32}


def test_model_starts_at_the_best_constant_prediction():
    labels = one_hot(np.random.default_rng(4), 40)
    model = make(TINY).eval()
    start_at_prior(model.heads, labels)
    values = probabilities(model(torch.randn(3, 4, 32, 32))[0]).detach().numpy()
    for target, where in zip(TARGETS, group_slices().values(), strict=True):
        share = labels[:, where].mean(0) * target.weights
        assert values[:, where] == pytest.approx(np.tile(share / share.sum(), (3, 1)), rel=1e-4)


def test_single_target_model_has_that_head_and_loss_only():
    config = TINY.model_copy(update={"targets": ("liver",), "slice_loss": 0.0})
    model = make(config)
    logits, slices = model(torch.randn(2, 4, 32, 32))
    assert list(logits) == ["liver"]
    assert slices == []
    labels = torch.from_numpy(one_hot(np.random.default_rng(0), 2))
    assert list(InjuryLoss(config, labels.numpy())((logits, slices), labels, None, None, 2)) == [
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
    terms = InjuryLoss(config, train)((logits, []), torch.from_numpy(labels), None, None, 6)
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


@pytest.mark.parametrize("slices", [3, 8, 16, 17, 40, 45, 48, 100])
def test_the_planes_that_stand_for_a_labelled_slice_are_marked(slices):
    """Thin and thick stacks as stage 02 resamples them to 16 planes: a plane stands for the slices
    whose middles lie in it, in a stack of fewer slices for the slice that most of it is made of.
    Where a slice lies as near to the next plane, that is marked too, and no other.
    """
    images = [np.full((32, 32), 100, np.uint8)] * slices
    z_mm, config = -0.8 * np.arange(slices), VolumeConfig(depth=16, height=16, width=16)
    volume = build_volume(images, slices * [(32, 32)], z_mm, (1.0, 1.0), config)
    instances = [7 + source for source in volume.plane_sources]
    weights = plane_weights(z_mm, 16)
    for k in range(slices):
        marked = set(np.flatnonzero(plane_labels(instances, [(7 + k, 1)], 16)[:, 1]).tolist())
        middle = (k + 0.5) * 16 / slices  # in planes
        if slices >= 16:
            own, reach = {math.ceil(middle - 1e-9) - 1, math.floor(middle + 1e-9)}, 16 / slices
            assert marked & own, "the plane that it lies in"
            assert all(abs(plane + 0.5 - middle) <= 0.5 + reach + 1e-9 for plane in marked)
        else:
            clear = {p for p in range(16) if weights[k, p] > 0.5 + 1e-6}
            touched = {p for p in range(16) if weights[k, p] >= 0.5 - 1e-6}
            assert clear <= marked <= touched


def test_rare_positive_slices_weigh_as_often_as_negatives_are_more():
    rng = np.random.default_rng(5)
    labels, config = one_hot(rng, 6), TINY.model_copy(update={"slice_weight": 5.0})
    planes = (rng.random((6, 4, 2)) < 0.3).astype(np.float32)
    known, logits = np.array([[1, 0]] * 2 + [[1, 1]] * 4, np.float32), rng.normal(size=(6, 4, 2))
    shares = np.array([0.3, 0.01])
    weight = [0.7 / 0.3, 5.0]  # the second, 99, is bounded
    total = 0.0
    for b, s, column in np.ndindex(6, 4, 2):
        p = 1 / (1 + math.exp(-logits[b, s, column]))
        y, w, share = planes[b, s, column], weight[column], shares[column]
        entropy = -w * math.log(p) if y else -math.log(1 - p)
        total += known[b, column] * entropy / (share * w + 1 - share)
    outputs = ({t.name: torch.zeros(6, 1 if t.binary else 3) for t in TARGETS},) + (
        [torch.tensor(logits, dtype=torch.float32)],
    )
    given = [torch.from_numpy(array) for array in (labels, planes, known)]
    terms = InjuryLoss(config, labels, shares)(outputs, *given, 6)
    assert float(terms["slices"]) == pytest.approx(0.5 * total / (4 * 6), rel=1e-5)
    plain = InjuryLoss(TINY, labels)(outputs, *given, 6)["slices"]
    off = config.model_copy(update={"slice_weight": 1.0})
    assert torch.equal(InjuryLoss(off, labels, shares)(outputs, *given, 6)["slices"], plain)


def series_of(folder, planes, known=(1, 1)):
    """A series whose plane k is of grey 5 k."""
    depth = len(planes)
    path = folder / f"{depth}.npy"
    np.save(
        path, np.arange(depth, dtype=np.uint8)[:, None, None] * 5 * np.ones((1, 32, 32), np.uint8)
    )
    return Series(
        "1", "1", path, one_hot(np.random.default_rng(0), 1)[0], planes, np.float32(known)
    )


def test_the_share_of_positive_slices_counts_known_series_alone(tmp_path):
    planes = np.zeros((8, 2), np.float32)
    planes[1, 0] = planes[2:6, 1] = 1  # of four slices: one, two
    series = [series_of(tmp_path, planes), series_of(tmp_path, 0 * planes, (1, 0))]
    assert positive_share(series, TINY).tolist() == [1 / 8, 1 / 2]
    assert positive_share(series[1:], TINY).tolist() == [0, 0]


@pytest.mark.parametrize("jitter", [False, True])
def test_positive_slices_are_shown_as_often_as_asked_for(tmp_path, jitter):
    """One positive plane of 32, between the four that are looked at: each share of the samples that
    would miss it shows it, in a place of its own bin.
    """
    planes = np.zeros((32, 2), np.float32)
    planes[14, 0] = 1
    series, seen = series_of(tmp_path, planes), {}
    quiet = AugmentConfig(probability=0, z_jitter=jitter)
    for share in (0.0, 0.5, 1.0):
        config = TINY.model_copy(update={"augment": quiet, "positive_slices": share})
        dataset = SeriesDataset([series], config, augment=True)
        samples = [dataset[epoch, 0] for epoch in range(200)]
        greys = np.stack([one["slices"][:, 4, 4] for one in samples]) // 5
        assert (greys // 8 == np.arange(4)).all(), "each within its bin"
        assert all(one["planes"][:, 0].tolist() == [0, 1, 0, 0] for one in samples)
        seen[share] = (greys == 14).any(1).mean()
    by_chance = 1 / 8 if jitter else 0
    assert seen[0.0] == pytest.approx(by_chance, abs=0.06)
    assert seen[0.5] == pytest.approx((1 + by_chance) / 2, abs=0.1)
    assert seen[1.0] == 1


def test_mixed_volumes_and_their_loss_equal_float64_loops():
    """Mixup and cutmix: pixels, and each truth with its own sample weight by its share."""
    rng, B = np.random.default_rng(6), 5
    labels, train = one_hot(rng, B), one_hot(rng, 40)
    planes = rng.integers(0, 2, (B, 4, 2)).astype(np.float32)
    known = rng.integers(0, 2, (B, 2)).astype(np.float32)
    batch = {
        name: torch.from_numpy(array)
        for name, array in (("labels", labels), ("planes", planes), ("known", known))
    }
    volumes = torch.from_numpy(rng.normal(size=(B, 6, 12, 10)).astype(np.float32))
    logits = {t.name: torch.randn(B, 1 if t.binary else 3) for t in TARGETS}
    outputs, loss = (logits, [torch.randn(B, 4, 2)]), InjuryLoss(TINY, train)
    one = {b: loss(*row(outputs, batch, b), B) for b in range(B)}
    seen = set()
    for seed in range(40):
        config = TINY.model_copy(update={"mixup": 0.8, "cutmix": 1.0})
        mixed, share, box = mix_volumes(volumes.clone(), config, np.random.default_rng(seed))
        assert 0 <= share <= 1
        terms = mixed_terms(loss, outputs, batch, share, B)
        own, other = mixed == volumes, mixed == volumes.roll(-1, 0)
        cut = bool((own | other).all())
        seen.add(cut)
        assert cut == (box is not None)
        if cut:
            assert float(own.double().mean()) == pytest.approx(share)
            inside = other[0, 0]
            assert all(torch.equal(plane, inside) for plane in other.flatten(0, 1)), "one box"
            y, x = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert inside.sum() == len(y) * len(x) == inside[box].numel()
            assert inside[box].all()
        for b in range(B):
            following = (b + 1) % B
            if not cut:
                expected = share * volumes[b].double() + (1 - share) * volumes[following].double()
                assert torch.allclose(mixed[b].double(), expected, atol=1e-5)
        for name, term in terms.items():
            total = 0.0
            for b in range(B):
                crossed = {key: value.roll(-1, 0) for key, value in batch.items()}
                total += share * float(one[b][name])
                total += (1 - share) * float(loss(*row(outputs, crossed, b), B)[name])
            assert float(term) == pytest.approx(total, rel=1e-4, abs=1e-6)
    assert seen == {True, False}
    still, share, box = mix_volumes(volumes, TINY, rng)
    assert still is volumes
    assert share == 1
    assert box is None


def row(outputs, batch, b):
    """What the loss is given of volume b alone."""
    logits = {name: value[b : b + 1] for name, value in outputs[0].items()}
    truths = [batch[name][b : b + 1] for name in ("labels", "planes", "known")]
    return (logits, [one[b : b + 1] for one in outputs[1]]), *truths


def test_a_soft_liver_has_the_loss_of_both_grades():
    """By hand: healthy (weight 1) and high (weight 4) at shares 0.3 and 0.7."""
    labels = np.zeros((2, 13), np.float32)
    labels[:, [0, 2, 4, 10]] = 1
    labels[0, 7] = labels[1, 9] = 1
    config = TINY.model_copy(update={"targets": ("liver",), "slice_loss": 0.0})
    loss, logits = InjuryLoss(config, labels), torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]])
    batch = {"labels": torch.from_numpy(labels), "planes": torch.zeros(2, 4, 2)}
    terms = mixed_terms(loss, ({"liver": logits}, []), batch | {"known": torch.ones(2, 2)}, 0.3, 2)
    minus = [[math.log(sum(map(math.exp, z))) - value for value in z] for z in logits.tolist()]
    first = 0.3 * 1 * minus[0][0] + 0.7 * 4 * minus[0][2]
    second = 0.3 * 4 * minus[1][2] + 0.7 * 1 * minus[1][0]
    assert float(terms["liver"]) == pytest.approx((first + second) / (2 * 2.5), rel=1e-5)


def test_a_cut_box_lies_anywhere_and_has_its_share():
    rng, covered = np.random.default_rng(0), np.zeros((20, 30))
    for _ in range(400):
        rows, columns = cut_box(20, 30, 0.25, rng)
        assert 0 <= rows.start < rows.stop <= 20
        assert 0 <= columns.start < columns.stop <= 30
        assert rows.stop - rows.start <= 10
        assert columns.stop - columns.start <= 15
        covered[rows, columns] += 1
    assert (covered > 0).all()
    assert cut_box(20, 30, 1.0, np.random.default_rng(1))[0].stop > 0
    rows, columns = cut_box(20, 30, 0.0, rng)
    assert (rows.stop - rows.start) * (columns.stop - columns.start) == 0


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


def test_neighbours_turn_with_their_slice(tmp_path):
    """Plane k is of grey 20 k: a flip in z turns the order of slices and of their channels."""
    np.save(
        tmp_path / "volume.npy",
        np.arange(8, dtype=np.uint8)[:, None, None] * 20 + np.zeros((8, 32, 32), np.uint8),
    )
    series = Series(
        "1",
        "1",
        tmp_path / "volume.npy",
        one_hot(np.random.default_rng(0), 1)[0],
        np.eye(8, 2, dtype=np.float32),
        np.ones(2, np.float32),
    )
    quiet = AugmentConfig(probability=0, flip_z=True, z_jitter=False)
    config = TINY.model_copy(update={"channels": 3, "augment": quiet})
    plain = [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    dataset, seen = SeriesDataset([series], config, augment=True), set()
    for epoch in range(20):
        sample = dataset[epoch, 0]
        greys = (sample["slices"][:, 9, 9] // 20).tolist()
        flipped = greys != plain
        assert greys == (plain[::-1] if flipped else plain)
        assert sample["planes"].tolist() == (
            [[0, 0], [0, 0], [0, 0], [1, 1]] if flipped else [[1, 1], [0, 0], [0, 0], [0, 0]]
        )
        seen.add(flipped)
    assert seen == {True, False}
    held_out = SeriesDataset([series], config)[0, 0]["slices"]
    assert (held_out[:, 9, 9] // 20).tolist() == plain


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


def textured(size=96):
    """Two equal slices (2, size, size) of stripes."""
    stripes = (
        128 + 100 * np.sin(np.arange(size) / 3)[None, :] * np.sin(np.arange(size) / 5)[:, None]
    )
    return np.tile(np.rint(stripes).astype(np.uint8), (2, 1, 1))


@pytest.mark.parametrize("kind", ["blur", "noise", "elastic"])
def test_blur_noise_and_elastic_are_one_draw_for_all_slices_as_often_as_asked_for(kind):
    stack, changed = textured(), 0
    augment = VolumeAugment(AugmentConfig(probability=0.0, **{kind: 0.5}), 96)
    for seed in range(60):
        moved = augment(stack, NO_LABELS, seed)[0]
        assert moved.shape == stack.shape
        assert moved.dtype == np.uint8
        assert np.array_equal(moved[0], moved[1]), "one draw"
        assert np.array_equal(moved, augment(stack, NO_LABELS, seed)[0]), "by its seed"
        changed += not np.array_equal(moved, stack)
    assert 18 < changed < 42


def test_blur_noise_and_elastic_are_as_strong_as_they_say():
    stack = textured().astype(float)
    always = {
        kind: VolumeAugment(AugmentConfig(probability=0.0, **{kind: 1.0}), 96)
        for kind in ("blur", "noise", "elastic")
    }
    flat = np.full((1, 96, 96), 128, np.uint8)
    for seed in range(10):
        blurred = always["blur"](stack.astype(np.uint8), NO_LABELS, seed)[0]
        assert np.abs(np.diff(blurred.astype(float))).mean() < np.abs(np.diff(stack)).mean()
        noise = always["noise"](flat, NO_LABELS, seed)[0] - 128.0
        assert 0.009 * 255 < noise.std() < 0.042 * 255
        assert abs(noise.mean()) < 1
        assert np.array_equal(always["blur"](flat, NO_LABELS, seed)[0], flat)
    ramp = np.tile(np.arange(96, dtype=np.uint8) * 2, (1, 96, 1))
    shifts = [
        always["elastic"](ramp, NO_LABELS, seed)[0][0, 20:76, 20:76] / 2.0 - np.arange(20, 76)
        for seed in range(20)
    ]
    rms = np.sqrt(np.mean(np.square(shifts)))
    assert rms == pytest.approx(0.015 * 96, rel=0.4)
    assert max(np.abs(np.diff(shift, axis=0)).max() for shift in shifts) < 1.5, "smooth"


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


def test_neighbours_are_the_channels_of_their_slice():
    """Slice by slice through the backbone by hand; a volume that does not change along z is seen as
    one channel saw it.
    """
    config = TINY.model_copy(update={"channels": 3})
    backbone = create_backbone("mobilenetv3_small_050", channels=3)
    model = CnnLstm(backbone, feature_shape(backbone, 32, 3)[0], config).eval()
    volumes, seen = torch.randn(2, 12, 32, 32), []
    model.norm.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    _, (slices,) = model(volumes)
    assert slices.shape == (2, 4, 2)
    for row, (b, s) in enumerate((b, s) for b in range(2) for s in range(4)):
        maps = backbone(volumes[b, 3 * s : 3 * s + 3][None])
        by_hand = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)[0]
        assert torch.allclose(seen[0][row], by_hand, atol=1e-4)


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
