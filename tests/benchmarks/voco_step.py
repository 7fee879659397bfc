"""One 2D-VoCo step against the published step, same backbone, batch and crops: `python
tests/benchmarks/voco_step.py`.

The published step, written plainly: the teacher's forward pass builds a graph and its projector is
trained by gradient, student and teacher each pass over random and base crops separately, contiguous
memory, parameters averaged one by one. Both in float32, and both mixed: the published step by
autocast to float16 on a GPU, as published, and to bfloat16 on a CPU; ours as the pipeline does.
Times are medians of steps in one process, all in turn; peak memory is that of a process for each.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from common import Peak, alternate, medians
from torch import nn

from pipeline.learning import optimise
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
        half = torch.float16 if device.type == "cuda" else optimise.amp_dtype(device)
        self.half = half if options.amp else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half == torch.float16)

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
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
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


def by_precision(device: torch.device, overrides: Sequence[str]) -> dict[str, Config]:
    """What is compared: float32, and last what the pipeline takes unless told, `mixed` where this
    device computes in half precision.
    """
    small = ("pretrain.batch=2",) if device.type == "cpu" else ()
    always = ("pretrain.init=scratch", "pretrain.workers=0", *small, *overrides)
    precisions = {"float32": "false", "mixed": "true"}
    if optimise.amp_dtype(device) is None:
        del precisions["mixed"]
    return {
        name: load_config("paper", (*always, f"pretrain.amp={amp}"))
        for name, amp in precisions.items()
    }


def batch_of(config: Config) -> Batch:
    """Random crops: time and memory do not depend on what they show."""
    options = config.pretrain
    side, P = options.image_size // options.grid, options.random_crops + options.grid**2
    crops = torch.randint(0, 256, (options.batch, P, options.slices, side, side), dtype=torch.uint8)
    overlap = torch.rand(options.batch, options.random_crops, options.grid**2)
    return {"crops": crops, "overlap": overlap * (overlap > 0.6), "ids": ["random"] * options.batch}


@dataclass(frozen=True)
class Variant:
    """A step in one precision."""

    kind: str
    precision: str
    config: Config

    @property
    def name(self) -> str:
        """As a flag of this command has it."""
        return f"{self.kind}-{self.precision}"


def time_steps(variants: Sequence[Variant], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each step, all in turn."""
    torch.manual_seed(0)
    works, batch = {}, batch_of(variants[0].config)
    for one in variants:
        works[one.name] = partial(make(one.kind, one.config, device), batch)
    return medians(alternate(works, device, rounds, warm_up=2))


def peak_memory(variant: Variant, device: torch.device) -> float:
    """Peak of this process after three steps, in GiB: resident memory, or the GPU's allocated
    memory.
    """
    torch.manual_seed(0)
    peak = Peak(device)
    step, batch = make(variant.kind, variant.config, device), batch_of(variant.config)
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


def rows(
    variants: Sequence[Variant], seconds: dict[str, float], memory: dict[str, float]
) -> Iterator[str]:
    """Two Markdown tables: each step, and the ratios of both within a precision and of ours in the
    precision that it takes to the published step in float32.
    """
    yield "| step | precision | s | slices/s | peak memory (GiB) |\n|---|---|---|---|---|"
    for one in variants:
        slices = batch_of(one.config)["crops"][..., 0, 0].numel()
        yield (
            f"| {one.kind} | {one.precision} | {seconds[one.name]:.3f} |"
            f" {slices / seconds[one.name]:.0f} | {memory[one.name]:.2f} |"
        )
    precisions = list(dict.fromkeys(one.precision for one in variants))
    pairs = [(name, name) for name in precisions] + [(precisions[0], precisions[-1])]
    yield "\n| published step | ours | its time, times ours | our memory, share of its |"
    yield "|---|---|---|---|"
    for theirs, own in dict.fromkeys(pairs):
        other, us = f"published-{theirs}", f"ours-{own}"
        yield (
            f"| {theirs} | {own} | {seconds[other] / seconds[us]:.2f} x |"
            f" {memory[us] / memory[other]:.2f} |"
        )


def memory_of_process(name: str, device: torch.device, overrides: Sequence[str]) -> float:
    """`peak_memory` of a variant, in a process of its own."""
    call = [sys.executable, __file__, "--device", device.type, *overrides, "--memory", name]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print two Markdown tables."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--memory", help="internal: print the peak memory of one variant")
    flags.add_argument(
        "overrides",
        nargs="*",
        help="config overrides, e.g. model.backbone=resnet50 pretrain.slices=32",
    )
    options = flags.parse_intermixed_args()
    device = torch.device(options.device)
    configs = by_precision(device, options.overrides)
    variants = [
        Variant(kind, precision, config)
        for precision, config in configs.items()
        for kind in ("published", "ours")
    ]
    if options.memory:
        chosen = next(one for one in variants if one.name == options.memory)
        print(json.dumps(peak_memory(chosen, device)))
        return
    own = variants[-1]
    print(
        f"{own.config.model.backbone}, crops {tuple(batch_of(own.config)['crops'].shape)},"
        f" {device.type}, {torch.get_num_threads()} threads; ours takes {own.precision}\n"
    )
    memory = {one.name: memory_of_process(one.name, device, options.overrides) for one in variants}
    seconds = time_steps(variants, device, options.rounds)
    print("\n".join(rows(variants, seconds, memory)))
    if device.type == "cuda":
        print(f"\nours: {share_of_peak(own.config, device, seconds[own.name])}")


if __name__ == "__main__":
    main()
