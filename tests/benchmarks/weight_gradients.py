"""What the weight gradients of `pipeline/learning/fast_layers.py` save: `python
tests/benchmarks/weight_gradients.py [--rounds 40] [key=value ...]`.

Steps of the demo's classifier on random pictures, one core, in turn: all layers by the library;
depthwise layers on maps below their filter by products; the first convolution by a product too.
Prints median and fastest step of each.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.classifier.predict import build_model  # noqa: E402
from pipeline.learning import fast_layers  # noqa: E402
from pipeline.learning.optimise import adamw, parameter_groups  # noqa: E402
from pipeline.run.presets import load_config  # noqa: E402
from pipeline.system.machine import pick_device  # noqa: E402

# (how a depthwise layer computes, how a first convolution)
WAYS = {
    "the library's": (nn.Conv2d.forward, nn.Conv2d.forward),
    "depthwise layers": (fast_layers.Depthwise.forward, nn.Conv2d.forward),
    "and the first convolution": (fast_layers.Depthwise.forward, fast_layers.Stem.forward),
}


def main() -> None:
    """Time the steps and print a Markdown table."""
    flags = argparse.ArgumentParser(description=__doc__.split(":")[0])
    flags.add_argument("--rounds", type=int, default=40)
    flags.add_argument("overrides", nargs="*", metavar="key=value")
    options = flags.parse_intermixed_args()
    torch.set_num_threads(1)
    pick_device("cpu")
    config = load_config("demo", options.overrides)
    train = config.train
    model = build_model(config).train()
    optimiser = adamw(
        parameter_groups(model, train.backbone_lr, train.weight_decay), train.lr, train.weight_decay
    )
    planes = train.sample_slices * train.channels
    pictures = torch.rand(train.batch, planes, train.image_size, train.image_size)

    def step() -> float:
        begun = time.perf_counter()
        logits, of_slices = model(pictures)
        optimiser.zero_grad()
        sum(one.square().sum() for one in [*logits.values(), *of_slices]).backward()
        optimiser.step()
        return time.perf_counter() - begun

    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds + 1):
        for name, (depthwise, stem) in WAYS.items():
            fast_layers.Depthwise.forward, fast_layers.Stem.forward = depthwise, stem
            taken[name] += [step(), step()][1:]  # the first one finds the other way's memory
    print("| weight gradients | median step, ms | fastest, ms |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {1000 * median(seconds[1:]):.0f} | {1000 * min(seconds[1:]):.0f} |")


if __name__ == "__main__":
    main()
