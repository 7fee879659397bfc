"""Does the pretraining help the segmenter of stage 05? `python tests/benchmarks/organs.py --out
outputs/demo [--seeds 1 2 3] [--steps 50 150] [--masks 8]`.

On the volumes, folds, backbone and laid masks of a finished run of the demo every fold is trained
with `organs.init` voco2d and scratch, everything else alike, and with each seed. Dice is out of
fold, the mean over patients; its intervals, and those of the paired difference, are of 2,000
resamples of patients, each patient the mean over seeds. `--masks` trains on so many series a fold.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import torch

from pipeline.organs.data import Masked
from pipeline.organs.find import label_volume, without_islands
from pipeline.organs.loss import dice_scores
from pipeline.organs.masks import ORGANS
from pipeline.organs.train import OrganFold, train_organs
from pipeline.run import layout
from pipeline.run.presets import derive, load_config

INITS, RESAMPLES = ("voco2d", "scratch"), 2000


def masked_series(out: Path) -> list[tuple[int, Masked]]:
    """(fold, series) of every mask that stage 05 has laid on its volume."""
    folds = pl.read_csv(
        out / layout.FOLDS / layout.FOLD_TABLE, schema_overrides={"patient_id": pl.String}
    )
    index = pl.read_parquet(out / layout.VOLUMES / layout.INDEX).join(folds, on="patient_id")
    masks = out / layout.ORGANS / layout.MASKS
    return [
        (
            row["fold"],
            Masked(
                row["patient_id"],
                row["series_id"],
                out / layout.VOLUMES / row["path"],
                masks / row["path"],
            ),
        )
        for row in index.iter_rows(named=True)
        if (masks / row["path"]).is_file()
    ]


def dice_of(config, series: list[tuple[int, Masked]], backbone: Path | None, most: int) -> dict:
    """Dice by (patient, organ) out of fold, of organs that the mask shows: the mean over a
    patient's series.
    """
    found: dict[tuple[str, str], list[float]] = {}
    device = torch.device("cpu")
    for fold in sorted({fold for fold, _ in series}):
        train = [one for other, one in series if other != fold]
        chosen = np.random.default_rng((config.seed, fold)).permutation(len(train))[:most]
        data = OrganFold(fold, [train[k] for k in sorted(chosen)])
        with tempfile.TemporaryDirectory() as folder:
            model = train_organs(config, data, Path(folder), device, backbone)
        for _, one in (pair for pair in series if pair[0] == fold):
            volume = np.load(one.volume)
            labels = without_islands(label_volume([model], volume, config.organs, device))
            mask = np.load(one.mask)
            scores = dice_scores(labels, mask, len(ORGANS))
            for number, (organ, score) in enumerate(zip(ORGANS, scores, strict=True), 1):
                if score is not None and (mask == number).any():  # else it may be in one run alone
                    found.setdefault((one.patient_id, organ), []).append(score)
    return {key: float(np.mean(values)) for key, values in found.items()}


def text(values: np.ndarray, digits: str = ".3f") -> str:
    """Mean of (patients,) with its 95 percent interval."""
    rng = np.random.default_rng(0)
    draws = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{values.mean():{digits}} ({low:{digits}} to {high:{digits}})"


def main() -> None:
    """Print one Markdown table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--steps", type=int, nargs="+", default=[300])
    flags.add_argument("--masks", type=int, default=10_000)
    options = flags.parse_args()
    series = masked_series(options.out)
    print(f"{len(series)} masked series, seeds {options.seeds}, at most {options.masks} a fold\n")
    print("| steps | organ | voco2d | scratch | difference |\n|---|---|---|---|---|")
    for steps in options.steps:
        cells = {}
        for init in INITS:
            backbone = options.out / layout.VOCO / layout.BACKBONE if init == "voco2d" else None
            settings = {"organs.init": init, "organs.steps": steps}
            runs = [
                dice_of(
                    derive(load_config("demo"), {**settings, "seed": seed}, "the seeds"),
                    series,
                    backbone,
                    options.masks,
                )
                for seed in options.seeds
            ]
            cells[init] = {key: np.mean([one[key] for one in runs]) for key in runs[0]}
        for organ in ORGANS:
            keys = [key for key in cells["voco2d"] if key[1] == organ and key in cells["scratch"]]
            a, b = (np.array([cells[init][key] for key in keys]) for init in INITS)
            print(f"| {steps} | {organ} | {text(a)} | {text(b)} | {text(a - b, '+.3f')} |")


if __name__ == "__main__":
    main()
