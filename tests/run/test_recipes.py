"""The presets: all load; `kaggle` and `kaggle_t4` fit together, into their cards and disk, and keep
the liver where it is; what recipes cost is counted right.
"""

import sys
from functools import cache

import pytest
import torch
from helpers_stages import ROOT
from torch import nn

from pipeline.classifier.stage import train_folds
from pipeline.competition.tables import read_sample_submission
from pipeline.competition.targets import COLUMNS
from pipeline.evaluation.stage import score_oof
from pipeline.folds import make_folds
from pipeline.organs.stage import segment_organs
from pipeline.run import layout, room
from pipeline.run.presets import PRESETS, load_config
from pipeline.submission.stage import predict_test
from pipeline.submission.writer import check_submission
from pipeline.voco.stage import pretrain_voco2d
from pipeline.volumes.stage import build_volumes

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import recipe_count  # noqa: E402

GIB, SERIES = 2**30, 4711
RECIPES = ("kaggle", "kaggle_t4")
# cuDNN's workspace, the context and gradients of maps are not counted
ROOM_GIB = {"kaggle": 0.8 * 24, "kaggle_t4": 0.8 * 16}


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_bears_its_name(path):
    config = load_config(path.stem)
    assert config.name == path.stem
    assert config.organs.enabled or not config.train.needs_organs


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_moves_no_liver(name):
    """No mirroring in x, in training and in prediction, and no crop of pretraining turned."""
    config = load_config(name)
    assert not config.train.augment.flip_x
    assert not config.train.augment.quarter_turn
    assert not config.pretrain.turn
    assert not any("x" in flip for flip in config.predict.flips)


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_of_the_recipe_are_on(name):
    config = load_config(name)
    train = config.train
    assert (train.regions, train.channels, train.init) == ("organs", 3, "voco2d")
    assert config.pretrain.init == "imagenet"
    parts = (train.slice_loss, train.visible_loss, train.rarity, train.mixup, train.ema)
    assert all(parts + (train.positive_slices, train.slice_weight - 1))
    assert all((train.augment.blur, train.augment.noise, train.augment.elastic))
    assert config.predict.phases == 2
    assert config.predict.time_budget_h < 9
    assert not config.convert.keep_png


@cache
def counted(name: str) -> list[recipe_count.Counted]:
    """The networks of stages 04, 05 and 06."""
    config = load_config(name)
    return [
        recipe_count.count_pretraining(config),
        recipe_count.count_segmenter(config),
        recipe_count.count_classifier(config),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step_fits_its_card(name):
    # float32 copies of the parameters: weights, gradients, moments, averages or a teacher
    for one, copies in zip(counted(name), (6, 4, 5), strict=True):
        taken = (one.kept + 4 * copies * one.parameters) / GIB
        assert 0.1 < taken < ROOM_GIB[name]

    if name == "kaggle_t4":
        disk_of_a_session(*(one.parameters for one in counted(name)))


def disk_of_a_session(pretraining, segmenter, classifier):
    """Volumes, checkpoints of stage 04 and the models of 05 and 06 within 20 GB."""
    config = load_config("kaggle_t4")
    taken = room.volume_bytes(config.volume, SERIES)
    taken += room.checkpoint_bytes(pretraining, config.pretrain)
    taken += config.folds.count * 4 * (4 * segmenter + 5 * classifier)
    assert 15e9 < taken < 20e9


def test_maps_that_are_kept_and_multiplications_are_counted():
    """By hand: the picture and the convolution's output in two bytes, and the mask of the ReLU none
    of its own, since its output is kept for the sum of squares too.
    """

    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU())

    found = recipe_count.count(make, lambda net: net(torch.zeros(2, 3, 10, 12)).sum(), 2)
    assert found.parameters == 8 * 3 * 3 * 3
    assert found.macs == 2 * 8 * 10 * 12 * 3 * 3 * 3
    assert found.picture_macs == found.macs / 2
    picture, weights, output = 2 * 3 * 10 * 12, found.parameters, 2 * 8 * 10 * 12
    assert found.kept == 2 * (picture + weights + output)


SMALL = (
    *("volume.depth=12", "volume.height=48", "volume.width=48", "folds.count=2"),
    *("model.backbone=test_efficientnet", "pretrain.init=scratch", "pretrain.steps=3"),
    *("pretrain.batch=2", "pretrain.slices=4", "pretrain.image_size=48", "pretrain.grid=2"),
    *("pretrain.random_crops=1", "pretrain.width=32", "pretrain.warmup=1", "pretrain.holdout=4"),
    *("pretrain.eval_every=3", "pretrain.workers=0", "pretrain.settle=2"),
    *("organs.steps=2", "organs.batch=2", "organs.image_size=48", "organs.width=4"),
    *("organs.workers=0", "train.slices=2", "train.image_size=48", "train.hidden=16"),
    *("train.epochs=1", "train.accumulate=2", "train.workers=0"),
    *("score.bootstrap=20", "score.nested_folds=2"),
)


def test_the_recipe_runs_from_volumes_to_a_submission_in_small(smoke, tmp_path):
    """Every key that is not a size is `kaggle`'s own."""
    config, data = load_config("kaggle", SMALL), smoke / "data" / "phantom"
    how = {"out": tmp_path, "data": data, "jobs": 1, "device": "cpu"}
    for stage in (
        *(build_volumes, make_folds, pretrain_voco2d, segment_organs),
        *(train_folds, score_oof, predict_test),
    ):
        stage(config, **how)
    path = tmp_path / layout.SUBMISSION / layout.SUBMISSION_TABLE
    table = check_submission(path, read_sample_submission(data))
    assert table.select(COLUMNS).n_unique() == table.height == 4
