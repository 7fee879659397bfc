"""Stage 10's probes: each backbone's a part of its own, shared out over the ranks of torchrun, and
skipped where it is up to date, as the cells are.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ..folds import run_folds
from ..run import layout
from ..run.config import Config, decisive
from ..run.manifest import digest
from ..run.stage import Stage
from ..system.console import log
from ..system.errors import InputError
from ..system.files import write_text
from .cells import wait_for
from .grid import Cell, backbone_part, part_with, pretrainings

if TYPE_CHECKING:
    from .probe_cases import Case

SCHEMA = {
    **dict.fromkeys(("backbone", "statistics", "question", "probe", "figure"), pl.String),
    **{"hospital": pl.String, "seed": pl.Int64, "value": pl.Float64, "patients": pl.Int64},
}


@dataclass(frozen=True, eq=False)
class Probed:
    """A backbone that is probed: `path` is its file, without one it is as training starts from
    `start`. Without a `start` either it stands for what needs no network. `key` is its folder below
    `10_ablation/probes`.
    """

    name: str
    key: str
    config: Config
    start: str = ""
    path: Path | None = None


def probed(config: Config, cells: Iterable[Cell], stage: Stage) -> Iterator[Probed]:
    """What needs no network, each seed's start and its pretrained backbones; nothing with
    `ablation.probes: false`.
    """
    if not config.ablation.probes:
        return
    cells = [*cells]
    yield Probed("baselines", "baselines", config)
    found, seen = pretrainings(cells), set()
    asked = [*found.values()] or cells
    several = len({cell.config.model.backbone for cell in asked}) > 1
    for cell in asked:
        network = f"_{cell.config.model.backbone}" if several else ""
        key = digest([cell.seed, decisive(cell.config.model), cell.start])[:12]
        if key not in seen:
            seen.add(key)
            yield Probed(f"start_{cell.start}{network}", f"start_{key}", cell.config, cell.start)
    for key, cell in found.items():
        path = backbone_part(stage, cell).folder / layout.BACKBONE
        yield Probed(cell.variant, key, cell.config, "scratch", path)


class Probes:
    """The probes of an ablation whose cells are there: `run` makes what is missing of this rank's
    share, `join` one table of them all.
    """

    def __init__(self, stage: Stage, cells: Iterable[Cell]) -> None:
        self.stage, self.all = stage, [*probed(stage.config, cells, stage)]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What all of them depend on."""
        if not self.all:
            return {}
        from ..organs.files import mask_files
        from ..organs.stage import mask_inputs

        names = ("train.csv", "image_level_labels.csv", "phantom_organs.csv")
        tables = [self.stage.data / name for name in names]
        masks = mask_inputs(self.stage, mask_files(self.stage.data))
        return masks | self.stage.inputs(layout.FOLDS, files=tables)

    @cached_property
    def cases(self) -> "list[Case] | None":
        """What they are asked about; None, and one line, where nobody knows where organs are."""
        from .probe_cases import read_cases

        stage, config = self.stage, self.stage.config
        folds = dict(run_folds(stage).iter_rows())
        volumes, sides = stage.upstream(layout.VOLUMES), (config.train.slices, self.side)
        try:
            return read_cases(stage.data, volumes, folds, *sides, stage.labels())
        except InputError as fault:
            log(f"probes: skipped, {fault}")
            return None

    @property
    def side(self) -> int:
        """Of a plane, pixels."""
        return self.stage.config.pretrain.image_size

    def part(self, one: Probed) -> Stage:
        """Where its rows lie."""
        return part_with(self.stage, f"probes/{one.key}", one.config)

    def current(self, part: Stage, one: Probed) -> bool:
        """Whether its rows are up to date."""
        options = self.stage.config
        how = [options.train.slices, self.side, options.ablation.neighbours, one.start]
        own = {"how": how, "backbone": one.path and digest(one.path)}
        return part.current({**self.inputs, **own}, ("seed", "model"))

    def run(self) -> None:
        """Probe what is not up to date; the writing rank waits until the others have too."""
        mine = self.stage.share(self.all)
        for one in mine:
            part = self.part(one)
            with part.lock():
                if self.current(part, one):
                    continue
                if self.cases is None:
                    (part.folder / layout.PROBES).unlink(missing_ok=True)
                    continue
                table = pl.DataFrame(self._rows(one), schema=SCHEMA)
                write_text(part.folder / layout.PROBES, table.write_csv())
                part.finish({}, [layout.PROBES])
        for one in self.all if self.stage.writer else ():
            if one in mine:
                continue
            part = self.part(one)
            part.writer = False  # it removes nothing
            if not self.current(part, one) and self.cases is not None:
                wait_for(part, partial(self.current, one=one))

    def _rows(self, one: Probed) -> list[dict[str, Any]]:
        from ..learning.backbone import placed
        from ..system.machine import pick_device
        from .probes import frozen_backbone, judge_backbone, judge_baselines

        cases, neighbours = self.cases or [], self.stage.config.ablation.neighbours
        if not one.start:
            return judge_baselines(cases, neighbours)
        seed = one.config.seed
        backbone = frozen_backbone(one.config.model, one.start, one.path, self.side, seed)
        device = pick_device(self.stage.device_name, int(os.environ.get("LOCAL_RANK", 0)))
        return judge_backbone(one.name, seed, placed(backbone, device), cases, neighbours)

    def join(self) -> str:
        """Write the rows of all of them into one table; returns its name."""
        paths = [self.part(one).folder / layout.PROBES for one in self.all]
        tables = [pl.read_csv(path, schema=SCHEMA) for path in paths if path.exists()]
        rows = pl.concat(tables) if tables else pl.DataFrame(schema=SCHEMA)
        write_text(self.stage.folder / layout.PROBES, rows.write_csv())
        return layout.PROBES
