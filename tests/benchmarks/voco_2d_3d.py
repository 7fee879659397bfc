"""2D-VoCo against 3D VoCo on one volume: time of a step, peak memory, inference latency: `python
tests/benchmarks/voco_2d_3d.py`.

3D, the published setting of arXiv 2402.17300: MONAI's SwinUNETR encoder (feature size 48, with its
convolution blocks), 16 base and 4 random crops resized to 64^3, activation checkpointing as
published, student and teacher, each level pooled, projector 2048; and the same with a 3D ResNet-50,
without activation checkpointing. 2D, the published setting of
arXiv 2601.14593 (preset `paper`): 9 base and 2 random crops of 32 slices of 64 x 64. Latency is the
encoder over one whole volume: 16 tiles of 64^3 (3D), 48 slices of 192 x 192 (2D). On a CPU the 3D
step is measured with 4 crops and 2 tiles and its times are scaled to 20 and 16; its memory is not
scaled. Needs monai (the extra `bench`).
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import torch
from common import Peak, alternate
from torch import nn
from torch.nn import functional
from voco_step import batch_of

from pipeline.learning.backbone import create_backbone, placed
from pipeline.learning.distributed import World
from pipeline.learning.optimise import Average, adamw, autocast
from pipeline.run.presets import load_config
from pipeline.voco import step
from pipeline.voco.losses import base_regularisation, position_loss, similarity

CROPS, TILES = 20, 16  # of one volume: 16 base and 4 random crops, and the tiles of a whole volume


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


def step_3d(kind: str, device: torch.device, base: int, random: int) -> Callable[[], object]:
    """One step of the 3D method on one volume: intra-volume loss and regularisation."""
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


def latency(kind: str, device: torch.device, tiles: int) -> Callable[[], object]:
    """The encoder over one whole volume (3D: `tiles` of it), without gradient."""
    flat = kind == "2D"
    shape = (48, 1, 192, 192) if flat else (tiles, 1, 64, 64, 64)
    net = placed(create_backbone("efficientnet_b0"), device) if flat else ENCODERS[kind]()
    net = net.to(device).eval()
    x = torch.rand(shape, device=device)

    @torch.no_grad()
    def embed() -> torch.Tensor:
        with autocast(device, True):
            return functional.adaptive_avg_pool2d(net(x), 1) if flat else net(x)

    return embed


def measure(
    kind: str, device: torch.device, rounds: int, crops: int, tiles: int
) -> dict[str, float]:
    """Seconds a volume of a step, peak memory in GiB after the steps, seconds of the latency."""
    peak, flat = Peak(device), kind == "2D"
    step = step_2d(device) if flat else step_3d(kind, device, crops - crops // 4, crops // 4)
    step_s = median(alternate({"": step}, device, rounds)[""])
    memory = peak.gib()
    del step
    latency_s = median(alternate({"": latency(kind, device, tiles)}, device, rounds)[""])
    return {
        "step": step_s / (2 if flat else crops / CROPS),
        "memory": memory,
        "latency": latency_s * (1 if flat else TILES / tiles),
    }


def main() -> None:
    """Print one Markdown table; each method runs in a process of its own."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=1)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument(
        "--crops", type=int, help=f"3D crops, of {CROPS} (default: all on a GPU, 4 on a CPU)"
    )
    flags.add_argument(
        "--tiles",
        type=int,
        help=f"3D tiles of the latency, of {TILES} (default: all on a GPU, 2 on a CPU)",
    )
    flags.add_argument("--only", choices=("2D", *ENCODERS), help="internal: measure one method")
    options = flags.parse_args()
    cuda = options.device == "cuda"
    crops, tiles = options.crops or (CROPS if cuda else 4), options.tiles or (TILES if cuda else 2)
    if options.only:
        print(
            json.dumps(
                measure(options.only, torch.device(options.device), options.rounds, crops, tiles)
            )
        )
        return
    print(
        f"{options.device}, {torch.get_num_threads()} threads, 3D from {crops} of {CROPS} crops and"
        f" {tiles} of {TILES} tiles\n"
    )
    print(
        "| method | step, s a volume | peak memory of a step (GiB) | latency, s a volume"
        " |\n|---|---|---|---|"
    )
    found = {}
    for kind in (*ENCODERS, "2D"):
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", kind],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {kind} | {found[kind]['step']:.2f} | {found[kind]['memory']:.2f} |"
            f" {found[kind]['latency']:.2f} |"
        )
    for kind in ENCODERS:
        ratios = " | ".join(
            f"{found[kind][name] / found['2D'][name]:.1f} x"
            for name in ("step", "memory", "latency")
        )
        print(f"| {kind} over 2D | {ratios} |")


if __name__ == "__main__":
    main()
