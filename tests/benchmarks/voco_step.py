"""One 2D-VoCo step against the published step, same backbone, batch and crops: `python
tests/benchmarks/voco_step.py`.

The published step, written plainly: the teacher's forward pass builds a graph and its projector is
trained by gradient, student and teacher each pass over random and base crops separately, contiguous
float32 (float16 autocast on a GPU), parameters averaged one by one. Times are medians of
alternating steps in one process, peak memory is that of a process for each. `pretrain.amp=false`
compares both in float32.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import Peak, alternate, medians
from torch import nn

from pipeline.learning.backbone import standardise
from pipeline.learning.distributed import World
from pipeline.run.config import Config
from pipeline.run.presets import load_config
from pipeline.voco import step as voco_step
from pipeline.voco.data import Batch

# dense bf16 or fp16, from the makers' data sheets
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L4": 121, "T4": 65}


class PublishedStep:
    """The step as published, for comparison only: what it does wrong is part of what it costs."""

    def __init__(self, config: Config, device: torch.device) -> None:
        import timm

        options = config.pretrain
        backbone = timm.create_model(
            config.model.backbone, in_chans=1, num_classes=0, global_pool=""
        )
        side = options.image_size // options.grid
        features = backbone.eval()(torch.zeros(1, 1, side, side)).numel()
        width = options.width
        layers = [
            nn.Linear(features, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ]
        self.student = nn.ModuleList(
            [backbone.train(), nn.Sequential(*layers, nn.Linear(width, width))]
        ).to(device)
        self.teacher = copy.deepcopy(self.student)
        parameters = [*self.student.parameters(), *self.teacher[1].parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=options.lr, amsgrad=True)
        self.options, self.device = options, device
        self.half = options.amp and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def embed(self, net: nn.ModuleList, crops: torch.Tensor) -> torch.Tensor:
        """(B, P, S, h, w) float -> (B, P, E)."""
        B, P, S, h, w = crops.shape
        features = net[0](crops.reshape(B * P * S, 1, h, w)).flatten(1).view(B * P, S, -1).mean(1)
        return net[1](features).view(B, P, -1)

    def __call__(self, batch: Batch) -> float:
        crops, overlap = (
            standardise(batch["crops"].to(self.device)),
            batch["overlap"].to(self.device),
        )
        R = self.options.random_crops
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.half):
            student = [
                self.embed(self.student, part)
                for part in (crops[:, :R].contiguous(), crops[:, R:].contiguous())
            ]
            teacher = [
                self.embed(self.teacher, part)
                for part in (crops[:, :R].contiguous(), crops[:, R:].contiguous())
            ]
        loss = self.loss([z.float() for z in student], [z.float() for z in teacher], overlap)
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            for own, new in zip(
                self.teacher[0].parameters(), self.student[0].parameters(), strict=True
            ):
                own.data.mul_(0.9).add_(new.data, alpha=0.1)
        return loss.item()

    def loss(
        self, student: list[torch.Tensor], teacher: list[torch.Tensor], overlap: torch.Tensor
    ) -> torch.Tensor:
        """The three terms, volume by volume."""
        total, B = 0.0, len(overlap)
        for b in range(B):
            after = (b + 1) % B
            own = torch.cosine_similarity(
                student[0][b][:, None], teacher[1][b][None], dim=-1
            ).clamp(0, 1)
            other = torch.cosine_similarity(
                student[0][b][:, None], student[1][after][None], dim=-1
            ).clamp(0, 1)
            target = (
                torch.cosine_similarity(teacher[0][b][:, None], teacher[1][after][None], dim=-1)
                .clamp(0, 1)
                .detach()
            )
            for s, y in ((own, overlap[b]), (other, target)):
                near = -(y * torch.log(1 - (y - s).abs() + 1e-6)).sum() / (y.sum() + 1e-6)
                total = total + near + ((y == 0) * s**2).sum() / ((y == 0).sum() + 1e-6)
            base = torch.cosine_similarity(
                student[1][b][:, None], student[1][b][None].detach(), dim=-1
            )
            total = total + torch.relu(base).triu(1).square().sum() / (
                len(base) * (len(base) - 1) / 2
            )
        return total / B


def make(kind: str, config: Config, device: torch.device) -> Callable[[Batch], object]:
    """A step function: `published` or `ours`."""
    if kind == "published":
        return PublishedStep(config, device)
    run = voco_step.start(config, World(0, 1, device))
    return lambda batch: voco_step.train_step(run, batch)


def batch_of(config: Config) -> Batch:
    """Random crops: time and memory do not depend on what they show."""
    options = config.pretrain
    side, P = options.image_size // options.grid, options.random_crops + options.grid**2
    crops = torch.randint(0, 256, (options.batch, P, options.slices, side, side), dtype=torch.uint8)
    overlap = torch.rand(options.batch, options.random_crops, options.grid**2)
    return {"crops": crops, "overlap": overlap * (overlap > 0.6), "ids": ["random"] * options.batch}


def time_steps(config: Config, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each step, alternating."""
    torch.manual_seed(0)
    batch = batch_of(config)
    steps = {kind: make(kind, config, device) for kind in ("published", "ours")}
    works = {kind: partial(step, batch) for kind, step in steps.items()}
    return medians(alternate(works, device, rounds, warm_up=2))


def peak_memory(kind: str, config: Config, device: torch.device) -> float:
    """Peak of this process after three steps, in GiB: resident memory, or the GPU's allocated
    memory.
    """
    torch.manual_seed(0)
    peak = Peak(device)
    step, batch = make(kind, config, device), batch_of(config)
    for _ in range(3):
        step(batch)
    return peak.gib()


def share_of_peak(config: Config, device: torch.device, seconds: float) -> str:
    """Achieved TFLOP/s of our step (student forward and backward, teacher forward) and its share of
    the GPU's peak.
    """
    from torch.utils.flop_counter import FlopCounterMode

    step, batch = make("ours", config, device), batch_of(config)
    with FlopCounterMode(display=False) as counter:
        step(batch)
    rate = counter.get_total_flops() / seconds / 1e12
    peak = next(
        (value for name, value in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None
    )
    return f"{rate:.1f} TFLOP/s" + (f", {rate / peak:.1%} of peak" if peak else "")


def main() -> None:
    """Print one Markdown table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument(
        "--memory",
        choices=("published", "ours"),
        help="internal: print the peak memory of one variant",
    )
    flags.add_argument(
        "overrides",
        nargs="*",
        help="config overrides, e.g. model.backbone=resnet50 pretrain.slices=32",
    )
    options = flags.parse_intermixed_args()
    small = ("pretrain.batch=2",) if options.device == "cpu" else ()
    overrides = ("pretrain.init=scratch", "pretrain.workers=0", *small, *options.overrides)
    config, device = load_config("paper", overrides), torch.device(options.device)
    if options.memory:
        print(json.dumps(peak_memory(options.memory, config, device)))
        return
    call = [sys.executable, __file__, "--device", options.device, *options.overrides, "--memory"]
    memory = {
        kind: json.loads(
            subprocess.run(
                [*call, kind], capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        for kind in ("published", "ours")
    }
    seconds, shape = time_steps(config, device, options.rounds), batch_of(config)["crops"].shape
    slices = shape[0] * shape[1] * shape[2]
    print(
        f"{config.model.backbone}, crops {tuple(shape)}, {options.device},"
        f" {torch.get_num_threads()} threads\n"
    )
    print("| step | s | slices/s | peak memory (GiB) |\n|---|---|---|---|")
    for kind in ("published", "ours"):
        print(
            f"| {kind} | {seconds[kind]:.3f} | {slices / seconds[kind]:.0f} | {memory[kind]:.2f} |"
        )
    print(
        f"| ratio | {seconds['published'] / seconds['ours']:.2f} x | |"
        f" {memory['ours'] / memory['published']:.2f} |"
    )
    if device.type == "cuda":
        print(f"\nours: {share_of_peak(config, device, seconds['ours'])}")


if __name__ == "__main__":
    main()
