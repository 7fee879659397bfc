"""How far the seed of training, and another phantom, move a preset's score: `python
tests/benchmarks/seeds.py [--config demo] [--seeds 1 2 3 4 5] [--phantoms 11 12]`.

Stages 00 to 02 run once below `--out`; each of `--seeds` then draws its own folds and trains its
own backbone and classifiers on that phantom. Each of `--phantoms` draws another phantom and trains
on it. What is up to date is not run again. Prints, for every target, each run, mean and standard
deviation over the seeds, the baselines' means, and the interval in which 95 of 100 such runs on as
many other patients are expected.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.competition.targets import SCORE_KEYS  # noqa: E402
from pipeline.run import layout  # noqa: E402

BESIDE = ("weighted_means", "histogram", "thumbnail")


def run(number: str, out: Path, *arguments: str) -> None:
    """One stage as a user calls it; its log stands in `out`."""
    script = next((ROOT / "stages").glob(f"{number}_*.py"))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{number}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, str(script), "--out", str(out), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def numbers(first: str, last: str) -> list[str]:
    """Numbers of the stages from `first` to `last`."""
    names = sorted(path.name[:2] for path in (ROOT / "stages").glob("[0-9][0-9]_*.py"))
    return [name for name in names if first[:2] <= name <= last[:2]]


def seeded(config: str, base: Path, out: Path, seed: int, keys: list[str]) -> Path:
    """Train on the phantom below `base` with another seed; volumes are shared by hard links."""
    for name in (layout.SLICES, layout.VOLUMES):
        if not (out / name).exists():
            shutil.copytree(base / name, out / name, copy_function=os.link)
    data = ["--data", str(base / layout.PHANTOM)]
    for number in numbers(layout.FOLDS, layout.SCORES):
        run(number, out, "--config", config, *data, f"seed={seed}", *keys)
    return out


def redrawn(config: str, out: Path, seed: int, keys: list[str]) -> Path:
    """Draw another phantom and train on it."""
    for number in numbers("00", layout.SCORES):
        run(number, out, "--config", config, f"seed={seed}", *keys)
    return out


def read_scores(out: Path) -> dict:
    """`scores.json` of a run."""
    return json.loads((out / layout.SCORES / "scores.json").read_text(encoding="utf-8"))


def expected(values: np.ndarray, error: float) -> tuple[float, float]:
    """Interval of another run's score: values (K,) of K seeds on the same patients, `error` the
    standard error over patients.
    """
    K = len(values)
    seeds = stats.t.ppf(0.975, K - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / K)
    half = np.hypot(seeds, stats.norm.ppf(0.975) * error)
    return values.mean() - half, values.mean() + half


def table(title: str, runs: dict[str, dict]) -> None:
    """Markdown: a row a run, then what the runs say together."""
    print(f"\n| {title} | {' | '.join(SCORE_KEYS)} |")
    print("|---" * (1 + len(SCORE_KEYS)) + "|")

    def row(name: str, values: list[str]) -> None:
        print(f"| {name} | {' | '.join(values)} |")

    found = {key: np.array([one["nested"][key] for one in runs.values()]) for key in SCORE_KEYS}
    for k, name in enumerate(runs):
        row(name, [f"{found[key][k]:.3f}" for key in SCORE_KEYS])
    row("mean", [f"{found[key].mean():.3f}" for key in SCORE_KEYS])
    if len(runs) > 1:
        row("standard deviation", [f"{found[key].std(ddof=1):.3f}" for key in SCORE_KEYS])
        spans = []
        for key in SCORE_KEYS:
            parts = [one["intervals"]["nested"][key] for one in runs.values()]
            error = np.mean([part["high"] - part["low"] for part in parts]) / 3.92
            spans.append("{:.3f} to {:.3f}".format(*expected(found[key], error)))
        row("another run, other patients", spans)
    for name in BESIDE:
        floors = [one["floors"][name] for one in runs.values()]
        row(
            f"{name.replace('_', ' ')}, mean",
            [f"{np.mean([floor[key] for floor in floors]):.3f}" for key in SCORE_KEYS],
        )


def main() -> None:
    """Run what is missing and print the tables."""
    flags = argparse.ArgumentParser(description=__doc__.split(":")[0])
    flags.add_argument("--config", default="demo")
    flags.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    flags.add_argument("--phantoms", type=int, nargs="*", default=[])
    flags.add_argument("--out", type=Path, default=ROOT / "outputs" / "seeds")
    options, keys = flags.parse_known_args()
    out, config = options.out.resolve(), options.config
    base = out / "base"
    for number in numbers("00", layout.VOLUMES):
        run(number, base, "--config", config, *keys)
    runs = {
        f"seed {seed}": read_scores(seeded(config, base, out / f"seed{seed}", seed, keys))
        for seed in options.seeds
    }
    table("one phantom", runs)
    others = {
        f"phantom {seed}": read_scores(redrawn(config, out / f"phantom{seed}", seed, keys))
        for seed in options.phantoms
    }
    if others:
        table("redrawn phantoms", others)


if __name__ == "__main__":
    main()
