"""What stage 08 needs, as a user calls it: `python tests/benchmarks/predict.py speed|memory`.

speed   patients an hour at the competition's sizes: one or two RLE series of 300 slices of 512 x
512 a patient, drawn and written by
        the phantom's code, models of the paper preset with efficientnet_b0 (untrained: they take
        the same time), without
        and with a flip. The start of the stage, which is paid once, is not counted but printed
memory  peak memory of the stage's processes together (shared pages counted once) for more and more
patients of a small phantom
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from pipeline.classifier.predict import Trained, build_model
from pipeline.competition.targets import COLUMNS, TARGET_NAMES
from pipeline.evaluation.calibration import Calibration
from pipeline.learning.checkpoint import describe, save_weights
from pipeline.phantom.anatomy import Scan, make_scan
from pipeline.phantom.plan import SeriesPlan
from pipeline.phantom.scanner import write_series
from pipeline.run.config import Config, PhantomConfig
from pipeline.run.presets import load_config
from pipeline.run.runs import MODELS, runs_of
from pipeline.run.stage import Options, Stage
from pipeline.system.files import write_json
from pipeline.system.machine import seed_everything

ROOT = Path(__file__).resolve().parents[2]
COMPETITION, HOURS = 1100, 9  # patients, and the notebook's time limit
SMALL = "model.backbone=efficientnet_b0"


def draw(image_size: int, slices: int) -> Scan:
    """One healthy body."""
    config = PhantomConfig(image_size=image_size, slices_min=slices, slices_max=slices)
    return make_scan(config, dict.fromkeys(TARGET_NAMES, 0), (0,), 0, "portal")


def write_data(data: Path, scan: Scan, patients: int) -> None:
    """Test tables and images of `patients` patients, every second one with two series."""
    ids = {str(100 + k): [str(2 * k + j) for j in range(1 + k % 2)] for k in range(patients)}
    for patient, names in ids.items():
        for name in names:
            plan = SeriesPlan(name, "portal", "rle", "u12", "plain", "none")
            write_series(
                data / "test_images" / patient / name, scan, plan, np.random.default_rng(int(name))
            )
    rows = [f"{patient},{name},200" for patient, names in ids.items() for name in names]
    (data / "test_series_meta.csv").write_text(
        "\n".join(["patient_id,series_id,aortic_hu", *rows, ""])
    )
    rows = [",".join([patient, *["0.5"] * len(COLUMNS)]) for patient in ids]
    (data / "sample_submission.csv").write_text(
        "\n".join([",".join(["patient_id", *COLUMNS]), *rows, ""])
    )


def write_models(out: Path, config: Config, runs: int = 1) -> list[str]:
    """What stages 06 and 07 leave of so many runs: untrained fold models and a calibration that
    changes nothing, in `out`; returns the flags that name the runs.
    """
    folders = [out / f"run{k}" for k in range(runs)] if runs > 1 else [out]
    for k, folder in enumerate(folders):
        write_folds(folder, config, 100 * k)
    models = folders if runs > 1 else None
    scores = Stage("07_oof", config, Options(out=out, jobs=1, device="cpu", models=models))
    even = np.full((5, runs), 1 / runs)
    names = tuple(map(str, range(runs)))
    calibration = Calibration(names, "mean", even, np.ones(5), np.zeros(13), np.full(13, 0.5))
    write_json(scores.folder / "calibration.json", calibration.to_json())
    own = {MODELS: list(runs_of(scores))} if models else scores.inputs("06_folds")
    scores.current(own, [])
    scores.finish({}, ["calibration.json"])
    return ["--models", *map(str, folders)] if models else []


def write_folds(out: Path, config: Config, seed: int) -> None:
    """The untrained fold models of one run."""
    folds = Stage("06_folds", config, Options(out=out, jobs=1, device="cpu", force=True))
    names = [f"fold{k}/model.safetensors" for k in range(config.folds.count)]
    folds.current({}, [])
    for k, name in enumerate(names):
        seed_everything(seed + k)
        save_weights(
            folds.folder / name, build_model(config), describe("classifier", config, Trained)
        )
    folds.finish({}, names)


def predict(data: Path, out: Path, config: str, *overrides: str) -> tuple[dict[str, float], int]:
    """Run stage 08; returns its counts and the peak memory (bytes) of its processes."""
    command = [
        sys.executable,
        ROOT / "stages" / "08_predict_test.py",
        "--config",
        config,
        "--data",
        data,
        "--out",
        out,
        "--force",
    ]
    child = subprocess.Popen(
        [*command, *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, proportional_memory(psutil.Process(child.pid)))
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(child.stderr.read())
    return json.loads((out / "08_submission" / "manifest.json").read_text())["counts"], peak


def proportional_memory(process: psutil.Process) -> int:
    """Bytes of a process and all its children; a page that n of them share counts 1/n in each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except psutil.NoSuchProcess:  # it ended while we looked
            continue
    return total


def speed(folder: Path, patients: int) -> None:
    """One Markdown table."""
    write_data(folder, draw(512, 300), patients)
    write_models(folder / "out", load_config("paper", [SMALL]))
    print(
        f"{patients} patients\n\n| flips | start, s | patients an hour | {COMPETITION} patients, h"
        f" (of {HOURS}) |\n|---|---|---|---|"
    )
    for flips in ("[]", "[y]"):
        counts, _ = predict(folder, folder / "out", "paper", SMALL, f"predict.flips={flips}")
        rate = counts["patients_per_hour"]
        print(
            f"| {flips} | {counts['start_s']:.0f} | {rate:.0f} | {COMPETITION / rate:.1f} |",
            flush=True,
        )


def memory(folder: Path, steps: list[int], runs: int) -> None:
    """One Markdown table."""
    models = write_models(folder / "out", load_config("smoke"), runs)
    scan = draw(96, 24)
    print("| patients | peak memory, MB |\n|---|---|")
    for patients in steps:
        data = folder / str(patients)
        write_data(data, scan, patients)
        _, peak = predict(data, folder / "out", "smoke", *models)
        print(f"| {patients} | {peak / 1e6:.0f} |", flush=True)


def main() -> None:
    """Parse and run."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("what", choices=("speed", "memory"))
    flags.add_argument(
        "--patients",
        type=int,
        nargs="+",
        help="speed: how many (default 2); memory: each step (default 20 80 320)",
    )
    flags.add_argument("--runs", type=int, default=1, help="memory: how many runs predict")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.what == "speed":
            speed(Path(name), (options.patients or [2])[0])
        else:
            memory(Path(name), options.patients or [20, 80, 320], options.runs)


if __name__ == "__main__":
    main()
