"""2D-VoCo against 3D VoCo on one volume: time of a step, peak memory, inference latency, energy:
`python tests/benchmarks/voco_2d_3d.py`.

3D, the published setting of arXiv 2402.17300: MONAI's SwinUNETR encoder (feature size 48, with its
convolution blocks), 16 base and 4 random crops resized to 64^3, activation checkpointing as
published, student and teacher, each level pooled, projector 2048; and the same with a 3D ResNet-50,
without activation checkpointing. 2D, the published setting of
arXiv 2601.14593 (preset `paper`): 9 base and 2 random crops of 32 slices of 64 x 64. Latency is the
encoder over one whole volume: 16 tiles of 64^3 (3D), 48 slices of 192 x 192 (2D).

A 3D step takes all crops where their memory is free, as two small steps foretell; else as many as
fit, its time and energy scaled to all, its memory not, and the line above the table says so.
Energy is the GPU board's (NVML) or the CPU packages' (RAPL), whoever used it meanwhile; a line says
where it cannot be read. Needs the extra `bench` (monai, nvidia-ml-py).
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from common import GIB, Energy, Peak, seconds_of
from torch import nn
from torch.nn import functional
from voco_step import batch_of

from pipeline.learning.backbone import create_backbone, placed
from pipeline.learning.distributed import World
from pipeline.learning.optimise import Average, adamw, autocast
from pipeline.run.presets import load_config
from pipeline.system.machine import available_memory
from pipeline.voco import step
from pipeline.voco.losses import base_regularisation, position_loss, similarity

CROPS, TILES = 20, 16  # of one volume: 16 base and 4 random crops, and the tiles of a whole volume
SHARE = 0.9  # of the free memory
LEAST_S = 2.0  # of what is repeated: counters of energy move in steps


class SwinEncoder(nn.Module):
    """(N, 1, 64, 64, 64) -> (N, 1152): all levels of the SwinUNETR encoder, pooled."""

    width = 1152

    def __init__(self) -> None:
        from monai.networks.nets import SwinUNETR

        super().__init__()
        net = SwinUNETR(
            in_channels=1, out_channels=2, feature_size=48, use_checkpoint=True, use_v2=True
        )
        self.swin, self.blocks = (
            net.swinViT,
            nn.ModuleList([net.encoder1, net.encoder2, net.encoder3, net.encoder4, net.encoder10]),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = self.swin(x)
        inputs = [x, levels[0], levels[1], levels[2], levels[4]]
        return torch.cat(
            [
                block(level).mean((2, 3, 4))
                for block, level in zip(self.blocks, inputs, strict=True)
            ],
            1,
        )


class ResNetEncoder(nn.Module):
    """(N, 1, 64, 64, 64) -> (N, 2048): MONAI's 3D ResNet-50, pooled."""

    width = 2048

    def __init__(self) -> None:
        from monai.networks.nets import resnet50

        super().__init__()
        self.net = resnet50(spatial_dims=3, n_input_channels=1, feed_forward=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


ENCODERS = {"3D SwinUNETR": SwinEncoder, "3D ResNet-50": ResNetEncoder}


def step_3d(kind: str, device: torch.device, crops: int) -> Callable[[], object]:
    """One step of the 3D method on `crops` of one volume, a fifth of them random: intra-volume loss
    and regularisation.
    """
    random = crops // 5
    base = crops - random
    encoder = ENCODERS[kind]()
    layers: list[nn.Module] = [encoder, nn.Linear(encoder.width, 2048)]
    for _ in range(2):
        layers += [nn.BatchNorm1d(2048), nn.ReLU(inplace=True), nn.Linear(2048, 2048)]
    student = nn.Sequential(*layers).to(device)
    teacher, optimiser = copy.deepcopy(student).requires_grad_(False), adamw(student, 1e-4, 1e-2)
    average = Average(teacher, student)
    crops, overlap = (
        torch.rand(base + random, 1, 64, 64, 64, device=device),
        torch.rand(random, base, device=device),
    )

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast(device, True):
            own = student(crops).float()
            with torch.no_grad():
                other = teacher(crops).float()
        (
            position_loss(similarity(own[:random], other[random:]), overlap)
            + base_regularisation(own[random:])
        ).backward()
        optimiser.step()
        average.update(0.9)

    return step


def step_2d(device: torch.device) -> Callable[[], object]:
    """One step of the 2D method; the batch of two volumes that it needs counts as two."""
    changes = ("pretrain.init=scratch", "pretrain.batch=2", "model.backbone=efficientnet_b0")
    config = load_config("paper", changes)
    run, batch = step.start(config, World(0, 1, device)), batch_of(config)
    return lambda: step.train_step(run, batch)


def latency(kind: str, device: torch.device) -> Callable[[], object]:
    """The encoder over one whole volume, without gradient; on a CPU two 3D tiles at a time."""
    flat = kind == "2D"
    shape = (48, 1, 192, 192) if flat else (TILES, 1, 64, 64, 64)
    net = placed(create_backbone("efficientnet_b0"), device) if flat else ENCODERS[kind]()
    net = net.to(device).eval()
    parts = torch.rand(shape, device=device).split(
        2 if device.type == "cpu" and not flat else shape[0]
    )

    @torch.no_grad()
    def embed() -> torch.Tensor:
        with autocast(device, True):
            maps = torch.cat([net(part) for part in parts])
            return functional.adaptive_avg_pool2d(maps, 1) if flat else maps

    return embed


@dataclass(frozen=True)
class Cost:
    """Of one volume: seconds and joules of a step and of the encoder over it, and a step's peak
    memory in GiB; joules are None where they cannot be read.
    """

    step: float
    memory: float
    latency: float
    step_j: float | None
    latency_j: float | None


TITLES = {
    "step": "step, s a volume",
    "memory": "peak memory of a step (GiB)",
    "latency": "latency, s a volume",
    "step_j": "step, J a volume",
    "latency_j": "latency, J a volume",
}


def repeated(
    work: Callable[[], object], device: torch.device, rounds: int
) -> tuple[float, float | None]:
    """Median seconds and mean joules of a call, of `rounds` calls at least; the first one does not
    count.
    """
    work()
    times, energy, end = [], Energy(device), time.monotonic() + LEAST_S
    while len(times) < rounds or time.monotonic() < end:
        times.append(seconds_of(work, device))
    joules = energy.joules()
    return median(times), joules if joules is None else joules / len(times)


def measure(kind: str, device: torch.device, rounds: int, crops: int = CROPS) -> Cost:
    """A method at work, on `crops` of its 3D crops: seconds and joules are scaled to all."""
    peak, flat = Peak(device), kind == "2D"
    step = step_2d(device) if flat else step_3d(kind, device, crops)
    step_s, step_j = repeated(step, device, rounds)
    memory, share = peak.gib(), 2 if flat else crops / CROPS
    del step
    latency_s, latency_j = repeated(latency(kind, device), device, rounds)
    return Cost(step_s / share, memory, latency_s, step_j and step_j / share, latency_j)


def fitting(kind: str, device: torch.device) -> int:
    """How many crops, a multiple of 5, a step has memory for: two small steps show what one needs.
    On a CPU in a process of its own, whose peak this is.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    peak, needs = Peak(device), []
    for crops in (5, 10):
        step_3d(kind, device, crops)()
        needs.append(peak.gib())
        gc.collect()
    return CROPS if free is None else crops_within(needs[0], needs[1], SHARE * free / GIB)


def crops_within(five: float, ten: float, most: float) -> int:
    """The largest multiple of 5 up to `CROPS`, 5 at least, whose step stays within `most`, along a
    straight line through what steps of five and of ten crops need; all in GiB.
    """
    each = ten - five  # five crops more
    return next((n for n in range(CROPS, 5, -5) if five + each * (n / 5 - 1) <= most), 5)


def in_process(kind: str, *flags: str) -> Any:
    """What this command says of one method with these flags more, in a process of its own."""
    call = [sys.executable, __file__, *sys.argv[1:], "--only", kind, *flags]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one Markdown table; each method runs in a process of its own."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=1)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument(
        "--crops",
        type=int,
        choices=range(5, CROPS + 1, 5),
        help=f"3D crops, of {CROPS} (default: as many as memory is free for)",
    )
    flags.add_argument("--only", choices=("2D", *ENCODERS), help="internal: measure one method")
    flags.add_argument("--fit", action="store_true", help="internal: how many crops fit")
    options = flags.parse_args()
    device = torch.device(options.device)
    if options.only and options.fit:
        print(fitting(options.only, device))
    elif options.only:
        found = measure(options.only, device, options.rounds, options.crops or CROPS)
        print(json.dumps(asdict(found)))
    else:
        print("\n".join(table(device, options.crops)))


def table(device: torch.device, crops: int | None) -> Iterator[str]:
    """The lines of the table, each method measured."""
    chosen = {kind: crops or in_process(kind, "--fit") for kind in ENCODERS}
    shares = ", ".join(f"{kind} from {count} of {CROPS} crops" for kind, count in chosen.items())
    yield f"{device.type}, {torch.get_num_threads()} threads, {shares}"
    found = {
        kind: Cost(**in_process(kind, "--crops", str(chosen.get(kind, CROPS))))
        for kind in (*ENCODERS, "2D")
    }
    names = [name for name in TITLES if getattr(found["2D"], name) is not None]
    if "step_j" not in names:
        yield f"energy left out: {Energy(device).missing}"
    yield f"\n| method | {' | '.join(TITLES[name] for name in names)} |"
    yield "|---" * (1 + len(names)) + "|"
    for kind, cost in found.items():
        yield f"| {kind} | {' | '.join(f'{getattr(cost, name):.2f}' for name in names)} |"
    for kind in ENCODERS:
        ratios = (getattr(found[kind], name) / getattr(found["2D"], name) for name in names)
        yield f"| {kind} over 2D | {' | '.join(f'{ratio:.1f} x' for ratio in ratios)} |"


if __name__ == "__main__":
    main()
