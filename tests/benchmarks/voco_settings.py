"""What a pretraining step costs under several settings, data included: one core, in turn.

    python tests/benchmarks/voco_settings.py outputs/demo/02_volumes "" "pretrain.image_size=102"

Each argument behind the folder of volumes is a setting: keys of the config, separated by blanks;
the first one is what the others are compared with. Prints a Markdown table of medians.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from pipeline.learning.distributed import World
from pipeline.run.presets import load_config
from pipeline.voco.data import VocoSamples
from pipeline.voco.step import start, train_step


def steps_of(preset: str, overrides: str, volumes: Path) -> Iterator[float]:
    """Seconds of one step after the other: its batch is read and cut, the step taken."""
    config = load_config(preset, ("pretrain.init=scratch", *overrides.split()))
    run = start(config, World(0, 1, torch.device("cpu")))
    names = sorted(path.name for path in volumes.glob("*.npy"))
    samples = VocoSamples(volumes, names, config.pretrain, config.seed, pairs=run.method.pairs)
    while True:
        begun = time.perf_counter()
        train_step(run, samples[run.step]).read()
        yield time.perf_counter() - begun


def main() -> None:
    """Time the settings and print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("volumes", type=Path)
    flags.add_argument("settings", nargs="+")
    flags.add_argument("--config", default="demo")
    flags.add_argument("--steps", type=int, default=20)
    options = flags.parse_args()
    torch.set_num_threads(1)
    running = [steps_of(options.config, one, options.volumes) for one in options.settings]
    times = [[next(steps) for steps in running] for _ in range(options.steps + 2)][2:]
    found = [median(column) for column in zip(*times, strict=True)]
    print("| setting | s a step | times the first |\n|---|---|---|")
    for setting, seconds in zip(options.settings, found, strict=True):
        print(f"| `{setting or options.config}` | {seconds:.3g} | {seconds / found[0]:.2f} |")


if __name__ == "__main__":
    main()
