"""How long stage 07 takes for OOF files that someone else made, as a user calls it: `python
tests/benchmarks/score.py`.

Makes `--models` tables of 4,711 series of 3,147 patients (the sizes of the competition's training
set, prevalences near its own, every model overconfident), then blends, calibrates nested,
bootstraps and draws by `stages/07_score_oof.py --oof ...`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.competition.metric import value_frame
from pipeline.competition.targets import TARGETS
from pipeline.evaluation.calibration import softmax
from pipeline.system.console import timed

ROOT = Path(__file__).resolve().parents[2]
PATIENTS, SERIES = 3147, 4711
SHARES = {
    "bowel": (0.98, 0.02),
    "extravasation": (0.936, 0.064),
    "kidney": (0.942, 0.037, 0.021),
    "liver": (0.897, 0.082, 0.021),
    "spleen": (0.888, 0.063, 0.049),
}


def draw_labels(rng: np.random.Generator) -> np.ndarray:
    """One-hot labels (patients, 13)."""
    return np.concatenate(
        [rng.multinomial(1, SHARES[target.name], PATIENTS) for target in TARGETS], axis=1
    ).astype(np.float64)


def write_tables(folder: Path, models: int) -> list[Path]:
    """`train.csv` and one OOF CSV a model: posteriors of much the same noisy evidence, twice too
    sure.
    """
    rng = np.random.default_rng(0)
    labels = draw_labels(rng)
    ids = pl.DataFrame({"patient_id": [str(10_000 + k) for k in range(PATIENTS)]})
    ids.hstack(value_frame(labels.astype(np.int8))).write_csv(folder / "train.csv")
    owner = np.concatenate(
        [np.arange(PATIENTS), rng.choice(PATIENTS, SERIES - PATIENTS, replace=False)]
    )
    series = ids[owner].with_columns(series_id=pl.Series([str(k) for k in range(SERIES)]))
    paths = [folder / f"model{k}.csv" for k in range(models)]
    common = rng.normal(size=(SERIES, labels.shape[1]))
    for path in paths:
        evidence = labels[owner] + 0.9 * common + 0.45 * rng.normal(size=common.shape)
        series.hstack(value_frame(softmax(2 * (np.log(labels.mean(axis=0)) + evidence)))).write_csv(
            path
        )
    return paths


def main() -> None:
    """Print the score table of the last round and the wall times."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--models", type=int, default=4)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("overrides", nargs="*", help="config overrides")
    options = flags.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_tables(folder, options.models)
        command = [
            sys.executable,
            ROOT / "stages" / "07_score_oof.py",
            "--config",
            "paper",
            "--data",
            folder,
            "--out",
            folder / "out",
            "--force",
            *options.overrides,
            "--oof",
            *paths,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}

        def stage() -> str:
            return subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            ).stdout

        found = [timed(stage) for _ in range(options.rounds)]
    print(found[-1][0])
    times = [seconds for _, seconds in found]
    print(
        f"{options.models} x {SERIES} rows: median {statistics.median(times):.1f} s"
        f" ({', '.join(f'{t:.1f}' for t in times)})"
    )


if __name__ == "__main__":
    main()
