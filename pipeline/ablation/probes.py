"""Probes of frozen backbones: what slice features say about organs, injuries and height, at random
start and after pretraining.

A linear and a k-nearest-neighbour probe are fitted on the slices of some folds' patients and judged
on the others'. Batch norms come `stored` (as saved) and `settled` (their statistics taken again
over these very slices).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from ..competition.targets import SLICE_TARGETS
from ..folds import read_folds
from ..learning.backbone import (
    create_backbone,
    load_backbone,
    placed,
    pool_maps,
    settle,
    standardise,
)
from ..run import layout
from ..run.config import Config
from ..run.stage import Stage
from ..system.console import log
from ..system.files import atomic_path, write_text
from ..system.frames import read_frame
from ..system.machine import pick_device, seed_everything
from ..volumes.sampling import slice_positions, take_slices
from .grid import Cell, backbone_part, pretrainings

PATIENTS = 400  # at most, the first in the order of their ids (which are random numbers)
BATCH = 256
ORGANS = "phantom_organs.csv"
HEIGHT = "height"


@dataclass(frozen=True)
class Slices:
    """N slices of labelled series: `images` (N, h, w) uint8, `height` (N,) 0 top to 1 bottom,
    `folds` (N,) of their patients.

    `questions`: name to truth (N,) bool and known (N,) bool.
    """

    images: np.ndarray
    height: np.ndarray
    folds: np.ndarray
    questions: dict[str, tuple[np.ndarray, np.ndarray]]


def read_slices(stage: Stage) -> Slices:
    """Evenly chosen slices of the labelled volumes with what is known about them: slice labels, and
    organs where the phantom tells.
    """
    folder, config, labels = (
        stage.upstream(layout.VOLUMES),
        stage.config.train,
        stage.labels(),
    )
    folds = dict(read_folds(stage.upstream(layout.FOLDS) / layout.FOLD_TABLE).iter_rows())
    index = (
        read_frame(folder / layout.INDEX)
        .filter(pl.col("source") == "train")
        .sort("patient_id", "series_id")
    )
    index = index.filter(pl.col("patient_id").is_in(sorted(folds)[:PATIENTS])).join(
        labels, on="patient_id", maintain_order="left"
    )
    marks, organs = _marks(stage.data)
    rows: list[dict[str, Any]] = []
    for series in index.iter_rows(named=True):
        volume = np.load(folder / series["path"], mmap_mode="r")
        chosen = slice_positions(len(volume), config.slices)
        instances, own = (
            np.array(series["plane_instances"])[chosen],
            marks.get((series["patient_id"], series["series_id"]), {}),
        )
        answers = {
            name: (np.isin(instances, own.get(name, ())), np.ones(len(chosen), bool))
            for name in organs
        }
        for name in SLICE_TARGETS:
            known = bool(series[f"{name}_healthy"]) or name in own
            answers[name] = np.isin(instances, own.get(name, ())), np.full(len(chosen), known)
        rows.append(
            {
                "images": take_slices(volume, chosen, config),
                "height": (chosen + 0.5) / len(volume),
                "folds": np.full(len(chosen), folds[series["patient_id"]]),
                "answers": answers,
            }
        )
    parts = {
        key: np.concatenate([row[key] for row in rows]) for key in ("images", "height", "folds")
    }
    asked = [row["answers"] for row in rows]
    questions = {
        name: (
            np.concatenate([answers[name][0] for answers in asked]),
            np.concatenate([answers[name][1] for answers in asked]),
        )
        for name in asked[0]
    }
    return Slices(**parts, questions=questions)


def _marks(data: Path) -> tuple[dict[tuple[str, str], dict[str, list[int]]], list[str]]:
    """Instance numbers by series and name, of slice labels and of the phantom's organs; and the
    organs' names.
    """
    frames = []
    for name, column in (("image_level_labels.csv", "injury_name"), (ORGANS, "organ")):
        if (data / name).is_file():
            table = pl.read_csv(
                (data / name).read_bytes(),
                schema_overrides={"patient_id": pl.String, "series_id": pl.String},
            )
            frames.append(
                table.select(
                    "patient_id", "series_id", "instance_number", pl.col(column).alias("name")
                )
            )
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    titles = {name: target for target, name in SLICE_TARGETS.items()}
    table = (
        pl.concat(frames)
        if frames
        else pl.DataFrame(schema=["patient_id", "series_id", "instance_number", "name"])
    )
    for patient, series, instance, name in table.iter_rows():
        found.setdefault((patient, series), {}).setdefault(titles.get(name, name), []).append(
            instance
        )
    return found, sorted(set(table["name"]) - set(titles))


def settle_on(backbone: nn.Module, images: np.ndarray, device: torch.device) -> None:
    """`settle` on `images` (N, h, w) uint8, every batch of them a sample of all series."""
    mixed = torch.from_numpy(np.random.default_rng(0).permutation(images))[:, None]
    settle(backbone, mixed.split(BATCH), device)


@torch.no_grad()
def slice_features(backbone: nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """(N, h, w) uint8 -> (N, 2C) float32: layer-normed mean and maximum of the feature map, what
    the classifier sees of a slice.
    """
    found = []
    for part in torch.from_numpy(images).split(BATCH):
        # (b, C, h', w')
        maps = backbone(
            standardise(part[:, None].to(device)).contiguous(memory_format=torch.channels_last)
        )
        features = pool_maps(maps)
        found.append(nn.functional.layer_norm(features, features.shape[1:]).cpu())
    return torch.cat(found).numpy()


def backbones(stage: Stage, cells: list[Cell]) -> Iterator[tuple[str, int, Config, Path | None]]:
    """Name, seed, config and file (None: as training starts) of what is probed: each seed's start
    and its pretrained backbones.
    """
    found, seen = list(pretrainings(cells).values()), set()
    for cell in found or cells:
        start = (cell.seed, cell.config.model, cell.start)
        if start not in seen:
            seen.add(start)
            yield f"start_{cell.start}", cell.seed, cell.config, None
    for cell in found:
        yield (
            cell.variant,
            cell.seed,
            cell.config,
            backbone_part(stage, cell).folder / layout.BACKBONE,
        )


def judge(features: np.ndarray, slices: Slices, neighbours: int) -> Iterator[dict[str, Any]]:
    """Both probes' answers to every question that each fold can ask: AUC of presence, R2 of height;
    means over the folds.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import r2_score, roc_auc_score
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    everything = np.ones(len(features), bool)
    for name, (truth, known) in {**slices.questions, HEIGHT: (slices.height, everything)}.items():
        pairs = (
            (Ridge(100.0), KNeighborsRegressor(neighbours))
            if name == HEIGHT
            else (LogisticRegression(C=0.01, max_iter=300), KNeighborsClassifier(neighbours))
        )
        splits = [
            (known & (slices.folds != fold), known & (slices.folds == fold))
            for fold in np.unique(slices.folds)
        ]
        if name != HEIGHT and not all(
            0 < truth[side].mean() < 1 for split in splits for side in split
        ):
            log(f"probes: {name} is left out, a fold shows it in none or all of its slices")
            continue
        for title, model in zip(("linear", "neighbours"), pairs, strict=True):
            values = []
            for fit, test in splits:
                mean, scale = features[fit].mean(0), features[fit].std(0) + 1e-6
                model.fit((features[fit] - mean) / scale, truth[fit])
                seen = (features[test] - mean) / scale
                answer = model.predict(seen) if name == HEIGHT else model.predict_proba(seen)[:, 1]
                values.append((r2_score if name == HEIGHT else roc_auc_score)(truth[test], answer))
            yield {
                "question": name,
                "probe": title,
                "figure": "R2" if name == HEIGHT else "AUC",
                "value": float(np.mean(values)),
            }


def probe_all(stage: Stage, cells: list[Cell]) -> list[str]:
    """Probe every backbone of the ablation; writes probes.csv and probes.png and returns these
    names.
    """
    slices = read_slices(stage)
    rows: list[dict[str, Any]] = []
    shown: dict[str, np.ndarray] = {}
    device = pick_device(stage.device_name, int(os.environ.get("LOCAL_RANK", 0)))
    for name, seed, config, path in backbones(stage, cells):
        seed_everything(seed)
        backbone = create_backbone(
            config.model.backbone,
            name.removeprefix("start_") if path is None else "scratch",
            config.model.weights,
            config.train.image_size,
        )
        if path is not None:
            load_backbone(backbone, path)
        backbone = placed(backbone.eval(), device)
        for statistics in ("stored", "settled"):
            if statistics == "settled":
                settle_on(backbone, slices.images, device)
            features = slice_features(backbone, slices.images, device)
            own = {"backbone": name, "seed": seed, "statistics": statistics}
            rows += [
                {**own, **row} for row in judge(features, slices, stage.config.ablation.neighbours)
            ]
        shown.setdefault(name, features)
        log(f"probes: {name}, seed {seed} done")
    write_text(stage.folder / layout.PROBES, pl.DataFrame(rows).write_csv())
    draw(shown, slices, stage.folder / "probes.png")
    return [layout.PROBES, "probes.png"]


def draw(features: Mapping[str, np.ndarray], slices: Slices, path: Path) -> None:
    """First two principal components of each backbone's features, one row each: coloured by height,
    by organs in view, by injury.
    """
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    figure = Figure((12, 4.2 * len(features)), layout="constrained")
    organs = _groups(slices, [name for name in slices.questions if name not in SLICE_TARGETS])
    injuries = _groups(slices, [name for name in SLICE_TARGETS if name in slices.questions])
    for axes, (name, values) in zip(
        figure.subplots(len(features), 3, squeeze=False), features.items(), strict=True
    ):
        points = (
            PCA(2, random_state=0)
            .fit_transform((values - values.mean(0)) / (values.std(0) + 1e-6))
            .T
        )
        dots = axes[0].scatter(*points, c=slices.height, s=4, cmap="viridis")
        figure.colorbar(dots, ax=axes[0], label="height: 0 top, 1 bottom")
        for axis, groups, legend in (
            (axes[1], organs, "organs in view"),
            (axes[2], injuries, "labelled injury"),
        ):
            for k, (group, inside) in enumerate(groups.items()):
                axis.scatter(
                    *points[:, inside],
                    s=4,
                    color=f"C{k}" if group != "none" else "0.8",
                    label=group,
                )
            axis.legend(
                title=legend,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.02),
                ncols=2,
                fontsize=7,
                title_fontsize=7,
                markerscale=3,
            )
        for axis in axes:
            axis.set(title=name, xticks=[], yticks=[])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png", metadata={"Software": None})


def _groups(slices: Slices, names: list[str]) -> dict[str, np.ndarray]:
    """Slices (N,) bool by the names that are true of them, `none` first; the commonest six
    groups.
    """
    texts = np.array(
        [
            " + ".join(name for name in names if slices.questions[name][0][k]) or "none"
            for k in range(len(slices.height))
        ]
    )
    found, counts = np.unique(texts, return_counts=True)
    common = found[np.argsort(-counts, kind="stable")][:6]
    return {str(one): texts == one for one in sorted(common, key=lambda one: one != "none")}
