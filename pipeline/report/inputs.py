"""The finished stages that a report is made from."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from ..learning.log import read_log
from ..run import layout
from ..run.config import Config
from ..run.layout import MAKERS
from ..run.manifest import broken_outputs, read_manifest
from ..system.console import log
from ..system.frames import read_frame


def read_csv(path: Path) -> pl.DataFrame:
    """A table of ours, cells as text; read here, since polars takes some paths for patterns."""
    return pl.read_csv(path.read_bytes(), infer_schema=False)


@dataclass(frozen=True)
class Run:
    """An output folder, the config, `--data` (None: the run's own phantom), the flags to repeat the
    run, the manifests of its stages.
    """

    out: Path
    config: Config
    data: Path | None
    flags: str
    manifests: dict[str, dict[str, Any]]

    def log(self, name: str) -> list[dict[str, Any]]:
        """Records of a stage's log.jsonl, none where it has none."""
        return read_log(self.out / name / layout.LOG)

    @cached_property
    def index(self) -> pl.DataFrame:
        """The volume index, empty where stage 02 has not run."""
        if layout.VOLUMES not in self.manifests:
            return pl.DataFrame(schema={"patient_id": pl.String, "source": pl.String})
        return read_frame(self.out / layout.VOLUMES / layout.INDEX)

    def conversion(self) -> tuple[str, dict[str, Any]] | None:
        """Folder and counts of the conversion: stage 01's, or stage 02's where no slices are kept;
        None where neither has run.
        """
        direct = self.manifests.get(layout.VOLUMES, {}).get("counts", {}).get("conversion")
        if direct:
            return layout.VOLUMES, direct
        made = self.manifests.get(layout.SLICES)
        return (layout.SLICES, made["counts"]) if made else None

    @cached_property
    def scores(self) -> dict[str, Any]:
        """The score tables of stage 07."""
        path = self.out / layout.SCORES / layout.SCORE_TABLE
        return json.loads(path.read_text(encoding="utf-8"))


def find_run(out: Path, config: Config, data: Path | None, flags: str) -> Run:
    """The run below `out` with the stages that have finished, each fold as a stage of its own."""
    folds = [f"{layout.CLASSIFIERS}/{layout.fold_folder(k)}" for k in range(config.folds.count)]
    names = [
        name
        for name in [*MAKERS, *folds]
        if name not in (layout.REPORT, layout.PHANTOM if data else "")
    ]
    found = {
        name: manifest
        for name in names
        if (manifest := read_manifest(out / name)) and _whole(out / name, manifest)
    }
    return Run(out, config, data, flags, found)


def _whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """False, with a warning, where a table or picture of a stage is gone; the page does without
    volumes and weights.
    """
    lost = [
        name
        for name in broken_outputs(folder, manifest)
        if not name.endswith((".npy", ".safetensors"))
    ]
    if lost:
        log(
            f"warning: {folder / lost[0]} is missing or has another size: the report leaves"
            f" {folder.name} out"
        )
    return not lost
