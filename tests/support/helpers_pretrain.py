"""Volumes made by hand, and runs of stage 04's loop on them."""

import json

import numpy as np
import polars as pl
import torch

from pipeline.learning.distributed import World
from pipeline.learning.log import read_log
from pipeline.run import layout
from pipeline.run.manifest import SCHEMA
from pipeline.run.presets import load_config
from pipeline.voco.data import VocoSamples
from pipeline.voco.step import start

ALONE = World(0, 1, torch.device("cpu"))
TINY = ("model.backbone=test_resnet", "pretrain.batch=4", "pretrain.holdout=2", "pretrain.lr=1e-3")


def volumes_of(run):
    """The folder 02_volumes below `run`: twelve volumes with a gradient and a bright organ, so that
    places differ.
    """
    folder = run / layout.VOLUMES
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    y, x = np.mgrid[0:48, 0:48] / 48
    for n in range(12):
        plane = 90 * y + 60 * x + 80 * ((y - 0.3) ** 2 + (x - 0.7) ** 2 < 0.04)
        np.save(
            folder / f"p{n}_0.npy",
            np.clip(plane + rng.normal(0, 10, (12, 48, 48)), 0, 255).astype(np.uint8),
        )
        rows.append(
            {
                "patient_id": f"p{n}",
                "series_id": "0",
                "source": "train" if n % 3 else "unlabelled",
                "path": f"p{n}_0.npy",
            }
        )
    pl.DataFrame(rows).write_parquet(folder / "index.parquet")
    (folder / "manifest.json").write_text(
        json.dumps({"schema": SCHEMA, "fingerprint": "made by hand", "outputs": {}})
    )
    return folder


def numbers(folder):
    """The log without what the clock says."""
    return [
        {k: v for k, v in record.items() if k not in ("samples_per_s", "waiting")}
        for record in read_log(folder / "log.jsonl")
    ]


def trained(*overrides, volumes):
    """A tiny run of the smoke preset at step 0, and its samples."""
    config = load_config("smoke", (*TINY, *overrides))
    paths = sorted(path.name for path in volumes.glob("*.npy"))
    run = start(config, ALONE)
    return run, VocoSamples(volumes, paths, config.pretrain, config.seed, pairs=run.method.pairs)
