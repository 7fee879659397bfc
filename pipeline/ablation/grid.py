"""Which cells an ablation declares: every variant with every seed, and the pretraining that each
needs.
"""

from dataclasses import dataclass

from ..run.config import Config, decisive
from ..run.manifest import digest
from ..run.presets import derive
from ..run.stage import Stage
from ..system.errors import InputError


@dataclass(frozen=True, eq=False)
class Cell:
    """One variant with one seed; `config` is the whole config that it runs with, `backbone` the key
    of its pretraining.
    """

    variant: str
    seed: int
    config: Config
    backbone: str | None

    @property
    def name(self) -> str:
        """Its folder below `10_ablation`."""
        return f"{self.variant}/seed{self.seed}"

    @property
    def start(self) -> str:
        """What its first training, be it pretraining, starts from."""
        return self.config.pretrain.init if self.backbone else self.config.train.init


def declared_cells(config: Config) -> list[Cell]:
    """The whole grid, seed by seed, so that a stopped run has whole comparisons.

    Raises:
        InputError: no variants, or one that is no valid config.
    """
    options = config.ablation
    if not options.variants:
        raise InputError(
            "no variants to compare",
            f"ablation.variants of config '{config.name}'",
            "use --config ablation_quick",
        )
    cells = []
    for seed in options.seeds:
        for variant, changes in options.variants.items():
            own = derive(config, {**changes, "seed": seed}, f"ablation.variants.{variant}")
            cells.append(
                Cell(
                    variant, seed, own, pretraining_key(own) if own.train.init == "voco2d" else None
                )
            )
    return cells


def trained_folds(config: Config) -> tuple[int, ...]:
    """Numbers of the folds that each cell trains without and is judged on.

    Raises:
        InputError: `ablation.folds` names one that the run does not have.
    """
    folds = tuple(range(config.folds.count))
    for fold in config.ablation.folds:
        if fold not in folds:
            raise InputError(f"there is no fold {fold}", "ablation.folds", f"choose of {[*folds]}")
    return config.ablation.folds or folds


def pretraining_key(config: Config) -> str:
    """Cells with the same key share one pretraining."""
    sections = ("seed", "model", "pretrain")
    return digest({name: decisive(getattr(config, name)) for name in sections})[:12]


def pretrainings(cells: list[Cell]) -> dict[str, Cell]:
    """The first cell of each distinct pretraining, by key."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.backbone:
            found.setdefault(cell.backbone, cell)
    return found


def part_with(stage: Stage, name: str, config: Config) -> Stage:
    """A sub-folder of the stage with a config of its own."""
    part = stage.part(name)
    part.config = config
    return part


def backbone_part(stage: Stage, cell: Cell) -> Stage:
    """Where the cell's pretraining lies."""
    return part_with(stage, f"pretrained/{cell.backbone}", cell.config)
