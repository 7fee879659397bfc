"""Probes of frozen backbones, at random start and after pretraining, beside what needs no network:
which organ lies where (`dense`: Dice), which planes show it (`planes`, `neighbours`: AUC), and who
is injured, from what lies inside the organ's mask (`inside`: AUC).

Fitted on some folds' patients and judged on the others'. Batch norms come `stored` (as saved) and
`settled` (their statistics taken again over these very slices).

`python -m pipeline.ablation.probes --data FOLDER --volumes FOLDER --backbone FILE [--backbone ...]`
probes any backbones on any data set with `segmentations/`, and prints Markdown tables.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from ..competition import tables
from ..folds import read_folds
from ..learning.backbone import create_backbone, load_backbone, placed, settle
from ..learning.weights import read_weights
from ..run import layout
from ..run.config import ModelConfig
from ..system.console import command_line, log, say, show_log
from ..system.errors import InputError
from ..system.frames import read_frame
from ..system.machine import pick_device, seed_everything
from .probe_cases import Case, read_cases
from .probe_parts import SCHEMA
from .probe_views import BASELINES, Maps, Network
from .questions import ALL, Rows, judge, judge_together

BATCH = 256
FEW = 12  # patients, up to which each is a fold of its own
PARTS = 5  # folds of more patients, where nobody made folds


def settle_on(backbone: nn.Module, images: np.ndarray, device: torch.device) -> None:
    """`settle` on `images` (N, h, w) uint8, every batch of them a sample of all series."""
    mixed = torch.from_numpy(np.random.default_rng(0).permutation(images))[:, None]
    settle(backbone, mixed.split(BATCH), device)


def frozen_backbone(
    model: ModelConfig, start: str, path: Path | None, size: int, seed: int
) -> nn.Module:
    """A backbone for planes of `size` pixels, with the weights of `path`, without one as training
    with this `seed` begins from `start`; in evaluation mode.
    """
    seed_everything(seed)
    backbone = create_backbone(model.backbone, start, model.weights, size)
    if path is not None:
        load_backbone(backbone, path)
    return backbone.eval()


def judge_baselines(cases: Sequence[Case], neighbours: int) -> Rows:
    """`judge` of what needs no network."""
    return [
        {"backbone": name, "seed": 0, "statistics": "", **row}
        for name, view in BASELINES.items()
        for row in judge(view, cases, neighbours)
    ]


def judge_backbone(
    name: str, seed: int, backbone: nn.Module, cases: Sequence[Case], neighbours: int
) -> Rows:
    """`judge` of a backbone's last map and of its maps of all scales, stored and settled."""
    rows, device = [], next(backbone.parameters()).device
    for statistics in ("stored", "settled"):
        if statistics == "settled":
            settle_on(backbone, np.concatenate([case.images for case in cases]), device)
        network = Network(backbone.eval(), device)
        titles = name, f"{name}, all scales"
        both = judge_together([Maps(network), Maps(network, scales=True)], cases, neighbours)
        for title, found in zip(titles, both, strict=True):
            own = {"backbone": title, "seed": seed, "statistics": statistics}
            rows += [{**own, **row} for row in found]
    log(f"probes: {name}, seed {seed} done")
    return rows


def markdown(rows: Rows) -> str:
    """A table of every probe, a line for each backbone or baseline; then one by hospital, where
    there are several, of the means over the questions.
    """
    table, found = pl.DataFrame(rows, schema=SCHEMA), []
    keys, line = ["probe", "figure"], pl.concat_str("backbone", "statistics", separator=" ")
    table = table.with_columns(line.str.strip_chars().alias("line"))
    for kept, column in (
        (pl.col("hospital") == ALL, "question"),
        (pl.col("hospital") != ALL, "hospital"),
    ):
        for (probe, figure), part in table.filter(kept).group_by(keys, maintain_order=True):
            wide = part.pivot(column, index="line", values="value", aggregate_function="mean")
            names = wide.columns[1:]
            found += [
                f"| {probe}, {figure} | " + " | ".join([*names, "mean"]) + " |",
                "|---" * (len(names) + 2) + "|",
                *(_line(row) for row in wide.iter_rows()),
                "",
            ]
    return "\n".join(found)


def _line(row: Sequence[Any]) -> str:
    values = [one for one in row[1:] if one is not None]
    cells = ["" if one is None else f"{one:.3f}" for one in (*row[1:], float(np.mean(values)))]
    return f"| {row[0]} | " + " | ".join(cells) + " |"


def folds_of(patients: Sequence[str], table: Path | None) -> dict[str, int]:
    """Fold by patient: of a folds table; without one each of `FEW` patients or less is a fold, more
    are dealt out into `PARTS`.
    """
    if table is not None:
        return dict(read_folds(table).iter_rows())
    ordered = sorted(set(patients))
    return {name: k if len(ordered) <= FEW else k % PARTS for k, name in enumerate(ordered)}


def probe_files(options: argparse.Namespace) -> Rows:
    """What the command line asks for."""
    networks = [(path, _timm_name(path)) for path in options.backbone]
    volumes, table = options.volumes, options.data / "train.csv"
    if not (volumes / layout.INDEX).is_file():
        what = "no volumes here"
        raise InputError(what, str(volumes), f"run {layout.script(layout.VOLUMES)} first")
    index = read_frame(volumes / layout.INDEX, ["patient_id"])
    folds = folds_of(index["patient_id"].to_list(), options.folds)
    labels = tables.read_labels(options.data) if table.is_file() else None
    cases = read_cases(
        options.data, volumes, folds, options.planes, options.size, labels, options.organs
    )
    if len({case.fold for case in cases}) < 2:
        what = "only one fold, and nobody to judge a probe on"
        raise InputError(what, str(options.folds or options.data), "give masks of more patients")
    patients = len({case.patient for case in cases})
    masked = len({case.patient for case in cases if case.masks is not None})
    log(f"{patients} patients, {masked} with masks, {len({c.fold for c in cases})} folds")
    rows, device = judge_baselines(cases, options.neighbours), pick_device(options.device)
    made: list[tuple[str, str, Path | None]] = [
        *((f"untouched {name}", name, None) for name in dict.fromkeys(n for _, n in networks)),
        *((str(path), name, path) for path, name in networks),
    ]
    for title, name, path in made:
        backbone = frozen_backbone(ModelConfig(backbone=name), "scratch", path, options.size, 0)
        backbone = placed(backbone, device)
        rows += judge_backbone(title, 0, backbone, cases, options.neighbours)
    return rows


def _timm_name(path: Path) -> str:
    metadata: Mapping[str, str] = read_weights(path)[1]
    if "backbone" not in metadata:
        raise InputError("not said which timm model this is", str(path), "give a file of stage 04")
    return metadata["backbone"]


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; exit code 2 with one line on wrong input."""
    flags = argparse.ArgumentParser(prog="python -m pipeline.ablation.probes", description=__doc__)
    flags.add_argument("--backbone", type=Path, action="append", default=[], help="of stage 04")
    flags.add_argument("--data", type=Path, required=True, help="with segmentations/")
    flags.add_argument("--volumes", type=Path, required=True, help="folder of stage 02")
    flags.add_argument("--organs", type=Path, help="table of the slices that show an organ")
    flags.add_argument(
        "--folds",
        type=Path,
        help=f"folds.csv (default: up to {FEW} patients one by one, more in {PARTS} parts)",
    )
    flags.add_argument("--planes", type=int, default=24, help="of a series (default: 24)")
    flags.add_argument("--size", type=int, default=96, help="of a plane, pixels (default: 96)")
    flags.add_argument("--neighbours", type=int, default=15)
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    show_log()
    say(markdown(probe_files(flags.parse_args(arguments))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
