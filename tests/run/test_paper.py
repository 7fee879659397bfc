"""The preset `paper` is the published configuration: every value of it, listed."""

import pytest

from pipeline.run.config import decisive
from pipeline.run.presets import load_config

PAPER = {
    "seed": 42,
    "phantom": None,
    "volume": {
        "depth": 96,
        "height": 256,
        "width": 256,
        "aspect": "stretch",
        "margin_mm": 4.0,
    },
    "folds": {"count": 5},
    "model": {"backbone": "efficientnetv2_rw_s", "weights": None},
    "pretrain": {
        "steps": 60_000,
        "batch": 4,
        "depth": 64,
        "slices": 32,
        "image_size": 192,
        "grid": 3,
        "random_crops": 2,
        "pool": "clip",
        "width": 2048,
        "dropout": 0.2,
        "dropout_at": "slices",
        "intra": 1.0,
        "inter": 1.0,
        "regularisation": 1.0,
        "ema_momentum": 0.9,
        "ema_final": None,
        "lr": 1e-4,
        "weight_decay": 1e-2,
        "amsgrad": True,
        "warmup": 5000,
        "clip": 1.0,
        "init": "imagenet",
        "augment": False,
        "jitter": True,
        "turn": 0.2,
        "intensity": 0.5,
        "unlabelled": 1.0,
        "labelled": True,
        "holdout": 64,
        "eval_every": 1000,
        "checkpoint_every": 1000,
        "keep": 3,
        "log_every": 10,
        "collapse_std": 0.02,
        "collapse_patience": 500,
        "settle": 32,
        "amp": True,
    },
    "train": {
        "targets": ["bowel", "extravasation", "kidney", "liver", "spleen"],
        "init": "voco2d",
        "label_fraction": 1.0,
        "slices": 48,
        "image_size": 192,
        "crop": 0.0,
        "crop_size": 192,
        "map_pool": "mean",
        "backbone_dropout": 0.1,
        "sequence": "lstm",
        "pool": "max",
        "hidden": 128,
        "shortcut": False,
        "layers": 1,
        "dropout": 0.0,
        "freeze_backbone": False,
        "epochs": 20,
        "batch": 4,
        "accumulate": 4,
        "lr": 1.25e-4,
        "backbone_lr": 1.0,
        "weight_decay": 1e-5,
        "warmup": 0.0,
        "lr_final": 1.25e-5,
        "cosine_steps": 5000,
        "clip": 1.0,
        "slice_loss": 0.0,
        "ema": 0.0,
        "patience": 0,
        "amp": True,
        "augment": {
            "probability": 0.0,
            "flip_x": True,
            "flip_y": True,
            "flip_z": True,
            "rotate_deg": 10.0,
            "scale": 0.1,
            "shift": 0.05,
            "brightness": 0.1,
            "contrast": 0.1,
            "cutout": 0.0,
            "quarter_turn": 0.25,
            "grey_curve": 0.05,
            "boxes": 0.1,
            "z_jitter": False,
        },
    },
    "predict": {"time_budget_h": None, "flips": ["zyx", "zy", "zx", "yx"], "flush_every": 16},
}


@pytest.mark.parametrize("section", PAPER)
def test_paper_is_the_published_configuration(section):
    """All keys but those that say how the work is done."""
    assert decisive(getattr(load_config("paper"), section)) == PAPER[section]


@pytest.mark.parametrize(
    "name", ["demo", "smoke", "ablation_quick", "ablation_long", "ablation_more", "ablation_full"]
)
def test_no_other_preset_has_what_the_publication_has(name):
    config = load_config(name)
    assert config.train.augment.flip_x is False, "it moves the liver to the left"
    new = {
        "pretrain": {"depth", "dropout_at"},
        "train": {
            "crop_size",
            "map_pool",
            "backbone_dropout",
            "shortcut",
            "lr_final",
            "cosine_steps",
        },
    }
    for section, keys in new.items():
        assert not keys & set(decisive(getattr(config, section))), "finished folders stay"
