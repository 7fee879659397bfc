"""The auxiliary loss of organs: masks that go where the pictures go, the loss against float64
loops, series without masks that say nothing, a decoder that no prediction needs.
"""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_faults import copy, refused, run_here
from pydantic import ValidationError
from scipy import ndimage

from pipeline.classifier.data import Series, SeriesDataset, collated
from pipeline.classifier.dice import OrganDecoder
from pipeline.classifier.fold import FoldData
from pipeline.classifier.model import CnnLstm
from pipeline.classifier.predict import load_classifier
from pipeline.classifier.train import FoldTrainer, train_fold
from pipeline.competition.targets import TARGETS
from pipeline.learning.backbone import Taps, create_backbone, feature_shape
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.organs.find import organ_boxes
from pipeline.organs.model import pyramid
from pipeline.run import layout
from pipeline.run.config import AugmentConfig, TrainConfig
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import load_config

CPU = torch.device("cpu")
SHAPE, GREY = (24, 48, 48), 60
TINY = TrainConfig(init="scratch", slices=4, image_size=32, hidden=8, dropout=0.0, dice_loss=0.5)
# everything that moves pixels, and everything that changes greys
MOVES = {"flip_x": True, "flip_y": True, "flip_z": True, "quarter_turn": 0.7, "elastic": 0.5}
GREYS = {"cutout": 1, "grey_curve": 1, "boxes": 1, "blur": 1, "noise": 1, "brightness": 0.5}


def label_map():
    """Four blocks, of which none is like its mirror image."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:14, 4:28, 22:44] = 1
    labels[4:20, 26:44, 4:20] = 2
    labels[10:22, 6:20, 6:16] = 3
    labels[1:23, 30:46, 26:46] = 4
    return labels


@pytest.fixture
def series(tmp_path):
    """A series whose volume is made from its mask."""
    paths = tmp_path / "volume.npy", tmp_path / "mask.npy"
    for path, array in zip(paths, (GREY * label_map(), label_map()), strict=True):
        np.save(path, array)
    labels = np.concatenate([np.eye(len(t.classes), dtype=np.float32)[1] for t in TARGETS])
    planes, organs = np.zeros((24, 2), np.float32), tuple(organ_boxes(label_map()))
    return Series("1", "s", paths[0], labels, planes, np.ones(2, np.float32), organs, paths[1])


def changed(**keys):
    return TINY.model_copy(update=keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"crop_size": 32},
        {"crop_size": 32, "channels": 3},
        {"crop": 0.1, "image_size": 64},
        {"channels": 3, "image_size": 64},
        {"regions": "organs"},
        {"regions": "organs", "abdomen_slices": 5},
    ],
    ids=str,
)
def test_masks_go_where_the_pictures_go(series, keys):
    """Through crop, window and size, turns, flips and deformation: within an organ and outside of
    all a picture still is what its mask says, without a change of size everywhere.
    """
    exact, seen = "crop_size" in keys, set()
    moves = {**MOVES, "elastic": 0} if exact else {**MOVES, "rotate_deg": 20, "scale": 0.2}
    augment = AugmentConfig(probability=0 if exact else 1, brightness=0, contrast=0, **moves)
    config = changed(augment=augment, **keys)
    dataset = SeriesDataset([series], config, seed=3, augment=True)
    for epoch in range(12):
        sample = dataset[epoch, 0]
        size, organs = config.image_size, sample["organs"]
        assert organs.shape == (config.sample_slices, size, size)
        assert organs.dtype == np.uint8
        own = sample["slices"].reshape(-1, config.channels, size, size)[:, config.channels // 2]
        # what is as near to another organ or to the border may be mixed with it in the picture
        how = {"size": (1, 1, 1) if exact else (1, 11, 11), "mode": "constant", "cval": 255}
        inner = ndimage.minimum_filter(organs, **how) == ndimage.maximum_filter(organs, **how)
        np.testing.assert_array_equal(own[inner], GREY * organs[inner])
        assert inner.all() or not exact
        seen |= set(organs[inner].tolist())
    assert len(seen) >= 4


def test_changes_of_grey_leave_masks_as_they_are(series):
    quiet = {"rotate_deg": 0, "scale": 0, "shift": 0, "z_jitter": False}
    config = changed(augment=AugmentConfig(probability=1, **quiet, **GREYS), image_size=48)
    dataset = SeriesDataset([series], config, augment=True)
    for epoch in range(4):
        sample = dataset[epoch, 0]
        np.testing.assert_array_equal(sample["organs"], label_map()[[3, 9, 15, 21]])
        assert not np.array_equal(sample["slices"], GREY * sample["organs"])


def test_pictures_are_drawn_as_without_masks(series):
    config = changed(augment=AugmentConfig(**MOVES, **GREYS), crop_size=32, channels=3)
    masked = SeriesDataset([series], config, augment=True)
    others = (
        SeriesDataset([replace(series, mask=None)], config, augment=True),
        SeriesDataset([series], config.model_copy(update={"dice_loss": 0.0}), augment=True),
    )
    for epoch in range(4):
        for other in others:
            sample = other[epoch, 0]
            assert "organs" not in sample
            np.testing.assert_array_equal(sample["slices"], masked[epoch, 0]["slices"])
    assert "organs" not in SeriesDataset([series], config)[0, 0], "held out"


def test_a_batch_holds_the_masks_there_are(series):
    bare = replace(series, mask=None)
    dataset = SeriesDataset([bare, series, bare, series], TINY, augment=True)
    batch = collated([dataset[0, k] for k in range(4)])
    assert batch["masked"].tolist() == [False, True, False, True]
    expected = np.stack([dataset[0, k]["organs"] for k in (1, 3)])
    np.testing.assert_array_equal(batch["organs"].numpy(), expected)
    assert {"organs", "masked"}.isdisjoint(collated([dataset[0, 0], dataset[0, 2]]))


def make(config=TINY):
    """A classifier and its decoder in their evaluation modes: batch norm sees the batch."""
    torch.manual_seed(0)
    backbone = create_backbone("mobilenetv3_small_050")
    model = CnnLstm(backbone, feature_shape(backbone, config.image_size)[0], config)
    return model.eval(), OrganDecoder(backbone, config).eval()


def truths(masked, size=32, seed=0):
    """What a batch says of masks: organs in all places, another one missing in each series."""
    rng = np.random.default_rng(seed)
    organs = rng.integers(0, 5, (sum(masked), 4, size, size)).astype(np.uint8)
    for k, own in enumerate(organs):
        own[own == k % 4 + 1] = 0
    return {"masked": torch.tensor(masked), "organs": torch.from_numpy(organs)}


def slow_loss(logits, labels, used):
    """Dice and cross-entropy of logits (S, 5, h, w) at the pixels `used` (h, w), one by one."""
    places = [(s, y, x) for s, y, x in np.ndindex(labels.shape) if used[y, x]]
    counts = [sum(labels[place] == k for place in places) for k in range(5)]
    both, sizes, entropy, weight = [0.0] * 5, [0.0] * 5, 0.0, 0.0
    for s, y, x in places:
        values = [math.exp(v) for v in logits[s, :, y, x].tolist()]
        truth = int(labels[s, y, x])
        for k, value in enumerate(values):
            share = value / sum(values)
            both[k] += share * (truth == k)
            sizes[k] += share + (truth == k)
        own = counts[truth] ** -0.5
        entropy, weight = entropy - own * math.log(values[truth] / sum(values)), weight + own
    dice = [(2 * both[k] + 1) / (sizes[k] + 1) for k in range(1, 5)]
    return 1 - sum(dice) / 4 + entropy / weight


@pytest.mark.parametrize("mixed", ["not", "added", "cut"])
@pytest.mark.parametrize("count", [4, 1])
def test_the_loss_equals_float64_loops(mixed, count):
    """Of a volume mixed with the next both masks count, by their shares; of a cut one each in its
    own pixels. What no mask speaks of gets no gradient.
    """
    masked = [True, False, False, True][:count]
    box = (slice(2, 5), slice(0, 4)) if mixed == "cut" else None
    share = {"not": 1.0, "added": 0.3, "cut": 1 - 12 / 48}[mixed]
    logits = torch.randn(4 * count, 5, 6, 8, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    batch = {"masked": torch.tensor(masked), "organs": truths(masked, 8)["organs"][:, :, :6]}
    decoder = OrganDecoder(create_backbone("mobilenetv3_small_050"), TINY)
    decoder.taps = SimpleNamespace(maps=lambda size: [logits])
    decoder.decode = lambda maps, size: maps[0]
    found = decoder(batch, share, box)
    found.backward()
    inside = np.zeros((6, 8), bool)
    inside[box or (slice(None),) * 2] = True
    outside = ~inside if box else inside
    places = {b: k for k, b in enumerate(b for b in range(count) if masked[b])}
    values, total, told = logits.detach().double().numpy().reshape(count, 4, 5, 6, 8), 0.0, set()
    for b in range(count):
        pairs = ((b, share, outside), ((b + 1) % count, 1 - share, inside))
        for source, part, used in pairs if share < 1 else pairs[:1]:
            if masked[source]:
                labels = batch["organs"][places[source]].numpy()
                total += part * slow_loss(values[b], labels, used)
                told.add(b)
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)
    for b, gradient in enumerate(logits.grad.unflatten(0, (count, 4))):
        assert bool(gradient.any()) == (b in told)


def test_series_without_masks_say_exactly_nothing():
    model, decoder = make()
    volumes = torch.randn(2, 4, 32, 32)
    for batch in ({}, {"masked": torch.tensor([False] * 2), "organs": torch.zeros(0, 4, 32, 32)}):
        model(volumes)
        found = decoder(batch)
        assert float(found) == 0
        assert not found.requires_grad
    one = truths([False, True])
    model(volumes)
    alone = decoder(one)
    volumes[0] = torch.randn(4, 32, 32)
    model(volumes)
    assert float(decoder(one).detach()) == pytest.approx(float(alone.detach()), rel=1e-5)


def test_micro_batches_sum_to_the_large_batch():
    masked, volumes = [True, False, True, False, False, True], torch.randn(6, 4, 32, 32)
    model, decoder = make()
    every = truths(masked)
    parameters = [*model.backbone.parameters(), *decoder.parameters()]

    def gradients(parts):
        for p in parameters:
            p.grad = None
        total = 0.0
        for first, end in parts:
            model(volumes[first:end])
            organs = every["organs"][sum(masked[:first]) : sum(masked[:end])]
            loss = decoder({"masked": every["masked"][first:end], "organs": organs})
            total += float(loss.detach())
            if loss.requires_grad:
                loss.backward()
        return total, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    (large, whole), (small, parts) = gradients([(0, 6)]), gradients([(0, 3), (3, 5), (5, 6)])
    assert small == pytest.approx(large, rel=1e-4)
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "vit_tiny_patch16_224"])
def test_maps_come_from_the_one_pass(name):
    """They are those that stage 05 asks timm for, the coarsest the backbone's own; a pass without
    gradients leaves none.
    """
    backbone, passes = create_backbone(name, size=64).eval(), []
    backbone.register_forward_hook(lambda *given: passes.append(given[2]))
    taps, images = Taps(backbone), torch.randn(2, 1, 64, 64)
    own = backbone(images)
    maps = taps.maps(64)
    assert len(passes) == 1
    assert maps[0] is own
    with torch.no_grad():
        known = pyramid(backbone, images)
        backbone(images)
    assert len(maps) == len(known)
    for one, other in zip(maps[1:], known[1:], strict=True):
        torch.testing.assert_close(one, other)
    assert taps.maps(64) == [], "given once, and without gradients none"


@pytest.mark.slow
def test_maps_are_found_in_a_compiled_backbone_too():
    torch.manual_seed(0)
    parts = torch.nn.Conv2d(1, 3, 2, 2), torch.nn.ReLU(), torch.nn.Conv2d(3, 4, 2, 2)
    backbone = torch.nn.Sequential(*parts)
    vars(backbone)["feature_info"] = [{"module": "1"}, {"module": "none"}]
    taps, images = Taps(backbone), torch.randn(2, 1, 8, 8)
    plain = [backbone(images), *taps.maps(8)]
    backbone.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        found = [backbone(images), *taps.maps(8)]
        assert [tuple(one.shape[1:]) for one in found] == [(4, 2, 2), (4, 2, 2), (3, 4, 4)]
        assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
        assert found[2].requires_grad
    with torch.no_grad():
        backbone(images)
    assert taps.maps(8) == []


@pytest.fixture
def data(tmp_path):
    """Four training series, two of them with masks, and two held-out ones; organs can be seen."""
    found, rng = [], np.random.default_rng(0)
    for k in range(6):
        labels = np.roll(label_map(), 2 * k, 2)
        paths = tmp_path / f"{k}.npy", tmp_path / f"mask{k}.npy"
        noise = rng.integers(0, 20, SHAPE).astype(np.uint8)
        for path, array in zip(paths, (50 * labels + noise, labels), strict=True):
            np.save(path, array)
        one = np.concatenate([np.eye(len(t.classes), dtype=np.float32)[k % 2] for t in TARGETS])
        zeros, known = np.zeros((24, 2), np.float32), np.ones(2, np.float32)
        mask = paths[1] if k % 2 else None
        found.append(Series(str(k), f"s{k}", paths[0], one, zeros, known, mask=mask))
    return FoldData(0, found[:4], found[4:])


KEYS = ("train.init=scratch", "train.slice_loss=0", "train.image_size=32", "train.batch=2")
LEARNS = (*KEYS, "train.epochs=10", "train.lr=0.01", "train.warmup=0", "train.dice_loss=1")


@pytest.mark.slow
def test_it_learns_and_no_prediction_needs_it(data, tmp_path):
    out = tmp_path / "fold"
    train_fold(load_config("smoke", LEARNS), data, out, CPU, None)
    rows = [json.loads(line) for line in (out / layout.LOG).read_text().splitlines()]
    assert all(list(row["terms"])[-1] == "dice" for row in rows)
    assert rows[-1]["terms"]["dice"] < 0.9 * rows[0]["terms"]["dice"]
    model, _ = load_classifier(out / layout.MODEL)
    state = load_checkpoint(out / layout.LAST)
    assert state["model"].keys() == model.state_dict().keys()
    assert state["decoder"].keys() == OrganDecoder(model.backbone, TINY).state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_a_stopped_training_goes_on_with_its_decoder(data, tmp_path, averaged):
    keys = (*KEYS, "train.epochs=2", "train.dice_loss=0.3", *["train.ema=0.5"][: int(averaged)])
    runs = []
    for name in ("whole", "cut", "cut"):
        (tmp_path / name).mkdir(exist_ok=True)
        runs.append(FoldTrainer(load_config("smoke", keys), data, tmp_path / name, CPU, None))
    whole, first, second = runs
    whole.run()
    first.history.append(first.train_epoch())
    first.epoch += 1
    first.save()
    second.run()
    assert [row["terms"] for row in second.history] == [row["terms"] for row in whole.history]
    for one, other in ((whole.decoder, second.decoder), (whole.final_model, second.final_model)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_without_the_key_masks_change_nothing(data, tmp_path):
    """Nor does the decoder move what the classifier starts from."""
    bare = replace(data, train=[replace(one, mask=None) for one in data.train])
    config, states = load_config("smoke", (*KEYS, "train.epochs=1")), []
    for name, given in (("masks", data), ("none", bare)):
        (tmp_path / name).mkdir()
        run = FoldTrainer(config, given, tmp_path / name, CPU, None)
        assert run.decoder is None
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.run()
        states.append(run.model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    other = FoldTrainer(load_config("smoke", LEARNS), data, tmp_path, CPU, None)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_frozen_backbone_learns_nothing_from_it():
    assert TINY.needs_organs
    with pytest.raises(ValidationError, match="dice_loss teaches the backbone"):
        TrainConfig(dice_loss=1.0, freeze_backbone=True)


STAGE = ("train.dice_loss=1", "train.epochs=4", "train.lr=0.003", "train.warmup=0")


def test_stages_05_and_06_with_the_key(smoke, tmp_path):
    """With one line where there are no masks."""
    out = copy(smoke, tmp_path / "run", layout.ORGANS, *layout.FORMER)
    refused(*run_here("06", out, *STAGE), "stage 05 lays", "masks", "train.dice_loss=0")
    assert run_here("05", out)[0] == 0
    code, text = run_here("06", out, *STAGE)
    assert code == 0, text
    for fold in "01":
        log = (out / layout.CLASSIFIERS / f"fold{fold}" / layout.LOG).read_text().splitlines()
        terms = [json.loads(row)["terms"]["dice"] for row in log]
        assert all(0 < term < 10 for term in terms), "few masks an epoch: it need not fall"
    masks = f"{layout.ORGANS}/{layout.MASKS}"
    assert {layout.ORGANS, masks} <= read_manifest(out / layout.CLASSIFIERS)["inputs"].keys()
    assert "06_folds: up to date" in run_here("06", out, *STAGE)[1]
    shutil.rmtree(out / masks)
    refused(*run_here("06", out, *STAGE), "stage 05 lays", masks)
