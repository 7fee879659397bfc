"""The five injury targets of RSNA 2023, their classes, weights and columns: the only list of them
in the project.
"""

from dataclasses import dataclass

ABDOMEN = "abdomen"  # region of the targets that no single organ holds


@dataclass(frozen=True)
class Target:
    """One column group of the competition: class names in order of severity, the metric's weight of
    each, and the organ, or `ABDOMEN`, that an injury lies in.
    """

    name: str
    classes: tuple[str, ...]
    weights: tuple[float, ...]
    region: str = ABDOMEN

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names of the tables, e.g. `liver_low`."""
        return tuple(f"{self.name}_{label}" for label in self.classes)

    @property
    def organ(self) -> bool:
        """True where one organ holds the injury."""
        return self.region != ABDOMEN

    @property
    def binary(self) -> bool:
        """True where one sigmoid output carries the target."""
        return len(self.classes) == 2


_BINARY, _ORDINAL = ("healthy", "injury"), ("healthy", "low", "high")
TARGETS: tuple[Target, ...] = (
    Target("bowel", _BINARY, (1.0, 2.0)),
    Target("extravasation", _BINARY, (1.0, 6.0)),
    Target("kidney", _ORDINAL, (1.0, 2.0, 4.0), "kidney"),
    Target("liver", _ORDINAL, (1.0, 2.0, 4.0), "liver"),
    Target("spleen", _ORDINAL, (1.0, 2.0, 4.0), "spleen"),
)
TARGET_NAMES: tuple[str, ...] = tuple(target.name for target in TARGETS)
COLUMNS: tuple[str, ...] = tuple(column for target in TARGETS for column in target.columns)
# targets that image_level_labels.csv speaks of, and what it calls them
SLICE_TARGETS: dict[str, str] = {"bowel": "Bowel", "extravasation": "Active_Extravasation"}
ANY_INJURY = "any_injury"
ANY_INJURY_WEIGHTS: tuple[float, float] = (1.0, 6.0)
SCORE_KEYS: tuple[str, ...] = (*TARGET_NAMES, ANY_INJURY, "score")


def group_slices() -> dict[str, slice]:
    """Where each target lies among the 13 `COLUMNS`."""
    slices, start = {}, 0
    for target in TARGETS:
        slices[target.name] = slice(start, start + len(target.classes))
        start += len(target.classes)
    return slices
