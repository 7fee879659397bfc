"""The segmenter and its loop: transferred features stay as they are, a stopped run equals one that
was not stopped, samples are functions of their keys.
"""

import json
import signal

import numpy as np
import pytest
import torch

from pipeline.learning.backbone import create_backbone, load_backbone, save_backbone, standardise
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.log import read_log
from pipeline.organs.data import Masked, PlaneDataset, drawn_plane, planes_showing
from pipeline.organs.find import OrganFinder, label_volume, organ_boxes, without_islands
from pipeline.organs.loss import dice_scores
from pipeline.organs.model import (
    OrganNet,
    build_segmenter,
    inflate_stem,
    load_segmenter,
    pyramid,
)
from pipeline.organs.train import OrganFold, OrganTrainer, train_organs
from pipeline.run import layout
from pipeline.run.config import OrganConfig
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError

CPU = torch.device("cpu")
TINY = ("organs.steps=6", "organs.log_every=3", "organs.checkpoint_every=100")


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> list[Masked]:
    """Two small volumes with a bright and a middling box, and their masks."""
    folder, found = tmp_path_factory.mktemp("masked"), []
    rng = np.random.default_rng(0)
    for k in range(2):
        volume = rng.integers(20, 60, (8, 48, 48)).astype(np.uint8)
        mask = np.zeros_like(volume)
        mask[2:7, 5 + k : 25, 4:22], mask[1:5, 26:44, 28:45] = 1, 2
        volume[mask == 1] += 150
        volume[mask == 2] += 80
        paths = [folder / f"{name}{k}.npy" for name in ("volume", "mask")]
        for path, array in zip(paths, (volume, mask), strict=True):
            np.save(path, array)
        found.append(Masked(f"p{k}", f"s{k}", *paths))
    return found


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "vit_tiny_patch16_224"])
def test_transferred_features_are_those_of_the_middle_plane(name):
    torch.manual_seed(0)
    backbone = create_backbone(name, size=64).eval()
    planes = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = pyramid(backbone, planes[:, 1:2])
        after = pyramid(inflate_stem(backbone, 3), planes)
    assert len(before) == len(after) >= 1
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
    sides = [one.shape[-1] for one in before]
    assert sides == sorted(set(sides)), "one map of each size, coarsest first"


def test_the_decoder_gives_logits_of_every_pixel_whatever_the_backbone():
    for name, levels in (("mobilenetv3_small_050", 4), ("vit_tiny_patch16_224", 0)):
        config = OrganConfig(image_size=64, width=4)
        net = OrganNet(create_backbone(name, size=64), config)
        assert len(net.ups) == levels
        assert net(torch.randn(2, 3, 64, 64)).shape == (2, 5, 64, 64)


def test_weights_of_stage_04_are_transferred_strictly_and_reported(tmp_path, caplog):
    config, path = load_config("smoke"), tmp_path / "backbone.safetensors"
    torch.manual_seed(3)
    source = create_backbone(config.model.backbone, size=48)
    save_backbone(source, path, {})
    with caplog.at_level("INFO", "voco2d"):
        net = build_segmenter(config, pretrained=path)
    count = len(source.state_dict())
    assert f"organs: {count} of {count} tensors matched ({path})" in caplog.text
    own = net.backbone.state_dict()
    for name, tensor in source.state_dict().items():
        kept = own[name][:, 1:2] if own[name].shape != tensor.shape else own[name]
        assert torch.equal(kept, tensor), name
    save_backbone(create_backbone("resnet18", size=48), path, {})
    with pytest.raises(InputError, match="missing"):
        build_segmenter(config, pretrained=path)
    assert load_backbone(create_backbone("resnet18", size=48), path)


def test_samples_are_functions_of_their_keys_and_labels_move_with_images(masked):
    options = OrganConfig(image_size=48, contrast=0.0, rotate_deg=10, scale=0.1, shift=0.1)
    one, other = (PlaneDataset(masked, options, seed) for seed in (5, 6))
    keys = [(step, k) for step in range(4) for k in range(3)]
    first, again = ([one[key] for key in order] for order in (keys, keys[::-1]))
    for a, b in zip(first, again[::-1], strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(
        not np.array_equal(a["image"], other[key]["image"])
        for a, key in zip(first, keys, strict=True)
    )
    assert len({sample["image"].tobytes() for sample in first}) > 8
    bright = np.concatenate([s["image"][1][s["label"] == 1] for s in first])
    dark = np.concatenate([s["image"][1][s["label"] == 0] for s in first])
    assert np.median(bright) > 160 > 100 > np.median(dark)


def test_planes_of_small_organs_are_drawn_more_often():
    """An organ of four in two planes of twenty: half of the draws are of any plane, a quarter of
    the others of these two, and the rest of any again, as the other organs are nowhere.
    """
    mask = np.zeros((20, 4, 4), np.uint8)
    mask[5:7, 1, 1] = 3
    rng = np.random.default_rng(0)
    showing = planes_showing(mask)
    found = np.array([drawn_plane(showing, rng) for _ in range(4000)])
    expected = 0.5 * 0.1 + 0.5 * (0.25 + 0.75 * 0.1)
    assert np.isin(found, [5, 6]).mean() == pytest.approx(expected, abs=0.02)
    assert set(found) == set(range(20))


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 3, 5])  # the steps 2 and 5 end rows of the log
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(masked, tmp_path, last):
    config, data = load_config("smoke", TINY), OrganFold(1, masked, "x")
    whole = OrganTrainer(config, data, tmp_path / "whole", CPU)
    whole.folder.mkdir()
    whole.run()
    parts = OrganTrainer(config, data, tmp_path / "parts", CPU)
    parts.folder.mkdir()
    step = parts.step

    def stopping(number, batch):
        parts.stop.signum = signal.SIGTERM if number == last else 0
        return step(number, batch)

    parts.step = stopping
    with pytest.raises(SystemExit):
        parts.run()
    assert load_checkpoint(parts.folder / layout.LAST)["step"] == last + 1
    parts = OrganTrainer(config, data, tmp_path / "parts", CPU)
    parts.run()
    assert parts.done == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name
    rows = [read_log(folder / layout.LOG) for folder in (whole.folder, parts.folder)]
    assert [row["terms"] for row in rows[0]] == [row["terms"] for row in rows[1]]
    assert [row["step"] for row in rows[0]] == [3, 6]


@pytest.mark.parametrize(
    ("change", "kept"),
    [("organs.lr=0.5", False), ("organs.checkpoint_every=7", True), ("seed=4", False)],
)
def test_a_checkpoint_of_another_config_is_not_taken_up(masked, tmp_path, change, kept):
    data = OrganFold(0, masked, "x")
    first = OrganTrainer(load_config("smoke", TINY), data, tmp_path, CPU)
    first.done = 2
    first.save()
    second = OrganTrainer(load_config("smoke", [*TINY, change]), data, tmp_path, CPU)
    second.resume()
    assert second.done == (2 if kept else 0)
    third = OrganTrainer(load_config("smoke", TINY), OrganFold(0, masked, "y"), tmp_path, CPU)
    third.resume()
    assert third.done == 0, "other inputs"


@pytest.mark.slow
def test_it_learns_and_what_is_saved_finds_the_organs(masked, tmp_path):
    settings = ("organs.steps=60", "organs.batch=6", "organs.lr=0.01", "organs.width=8")
    config = load_config("smoke", settings)
    model = train_organs(config, OrganFold(0, masked), tmp_path, CPU)
    log = read_log(tmp_path / layout.LOG)
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    volume, truth = np.load(masked[0].volume), np.load(masked[0].mask)
    labels = label_volume([model], volume, config.organs, CPU)
    liver, spleen, *_ = dice_scores(labels, truth, 4)
    assert liver > 0.8
    assert spleen > 0.8
    finder = OrganFinder([tmp_path / layout.MODEL] * 2, CPU)
    found = finder(volume)
    for one, other in zip(found, organ_boxes(without_islands(labels)), strict=True):
        assert one[:3] == other[:3]
        np.testing.assert_array_equal(one.visible, other.visible)
    loaded, trained = load_segmenter(tmp_path / layout.MODEL)
    assert trained.organs == config.organs
    planes = standardise(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    with torch.no_grad():
        assert torch.equal(loaded(planes), model(planes))


def test_weights_of_another_kind_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    save_backbone(create_backbone("resnet18", size=64), path, {"model": json.dumps({})})
    with pytest.raises(InputError, match="not a segmenter of organs"):
        load_segmenter(path)
