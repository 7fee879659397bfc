"""Two processes against one, of every method of pretraining: a section of `gpu.py`, and what each
of its processes runs (`torchrun`).

nccl joins them where there are two GPUs; on one GPU, which nccl gives to one process alone, and on
the CPU it is gloo, and the batch norms over ranks are then the project's own instead of nccl's.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from gpu_checks import NO_DROPOUT, disturb, nudge, relative, stepped, worst
from gpu_plan import Plan, Row, check, exact, missing
from torch import distributed, nn

from pipeline.learning.distributed import World
from pipeline.run.config import Config
from pipeline.voco.data import VocoSamples
from pipeline.voco.step import METHODS, State, start

RANKS, STEPS = 2, 4  # the buckets that overlap come with the second step
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")
# least differences that count, of losses (relative) and of the gradient
LOSSES, GRADIENT = 1e-4, 1e-3
MERIT = 0.1  # of few crops, of which one may go either way
# for ranks that wait for one another, and for their end where they are told to stop
WAIT_S, GRACE_S = 300, 10
FEW = 8  # embeddings, similarities and figures of a step


class Steps(NamedTuple):
    """Losses (steps, figures), the gradients (steps, parameters) as they reach the optimiser, the
    figure of merit after them (of rank 0, which alone evaluates), and how often each collective was
    called in a step.
    """

    losses: torch.Tensor
    gradient: torch.Tensor
    merit: float
    calls: dict[str, int]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count how often this process asks all others; buckets of gradients go another way."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., object]:
        work = getattr(distributed, name)

        def call(*given: object, **more: object) -> object:
            calls[name] += 1
            return work(*given, **more)

        return call

    with mock.patch.multiple(distributed, **{name: counting(name) for name in COLLECTIVES}):
        yield calls


def taken(config: Config, volumes: Path, world: World, nudged: bool = False) -> Steps:
    """Take steps on the drawn volumes, this rank's part of each batch."""
    run = start(config, world)
    if "teacher" in run.method.networks:
        disturb(run.method.networks["teacher"])
    if nudged:
        nudge(run)
    names = sorted(path.name for path in volumes.glob("*.npy"))
    ranks = (world.rank, world.size)
    samples = VocoSamples(
        volumes, names, config.pretrain, config.seed, *ranks, pairs=run.method.pairs
    )
    with counted() as calls:
        values, gradients = stepped(run, samples, STEPS)
    losses = [[one[name] for name in run.method.stats] for one in values]
    merit = 0.0
    if world.main:
        held = VocoSamples(volumes, names[:2], config.pretrain, config.seed, pairs=run.method.pairs)
        merit = run.method.evaluate(held)[run.method.merit]
    table = torch.tensor(losses, dtype=torch.float64)
    return Steps(
        table,
        torch.stack(gradients),
        merit,
        {kind: count // STEPS for kind, count in calls.items()} | parts(run),
    )


def parts(run: State) -> dict[str, int]:
    """Into how many buckets the gradients go, and how many batch norms ask the other ranks: forward
    and, those of the student, backward.
    """
    student = run.method.distributed_student
    if not isinstance(student, nn.parallel.DistributedDataParallel):
        return {}
    sizes = str(student._get_ddp_logging_data().get("rebuilt_bucket_sizes", ""))
    forward, backward = (
        sum(
            isinstance(layer, nn.modules.batchnorm._BatchNorm)
            for network in networks
            for layer in network.modules()
        )
        for networks in (run.method.networks.values(), [run.method.student])
    )
    return {
        "buckets": sizes.count(",") + bool(sizes),
        "norms forward": forward,
        "norms backward": backward,
    }


def ranks(plan: Plan) -> Iterator[Row]:
    """Losses and gradients of two ranks against those of one that has the whole batch."""
    config = plan.checked()
    nccl = plan.cuda and torch.cuda.device_count() >= RANKS
    out = plan.folder / "ranks.json"
    places = [f"cuda:{k}" if nccl else str(plan.device) for k in range(RANKS)]
    about = {
        "backend": "nccl" if nccl else "gloo",
        "devices": places,
        "volumes": str(plan.volumes(config)),
        "configs": {name: of_method(plan, name).model_dump_json() for name in METHODS},
        "out": str(out),
    }
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
    command = [sys.executable, *launch, __file__, json.dumps(about)]
    launched(command)
    by = f"{about['backend']}, {' and '.join(places)}"
    for name, found in json.loads(out.read_text()).items():
        calls = ", ".join(f"{count} {what}" for what, count in found["calls"].items())
        yield check(f"{name}: losses", found["losses"], found["most"]["losses"], by)
        yield check(f"{name}: gradient", found["gradient"], found["most"]["gradient"], by)
        yield check(f"{name}: figure of merit", found["merit"], MERIT, by)
        norms = sum(found["calls"][f"norms {way}"] for way in ("forward", "backward"))
        asked = sum(found["calls"].get(kind, 0) for kind in COLLECTIVES)
        yield check(f"{name}: collectives beside those of batch norms", asked - norms, FEW, calls)
    if plan.cuda and not nccl:
        yield missing("nccl", "it wants a GPU for each of two processes")


def launched(command: Sequence[str]) -> None:
    """Run torchrun to its end; whatever ends the wait ends its ranks too, which have sessions of
    their own and would outlive it.

    Raises:
        RuntimeError: it failed.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, text = process.communicate(timeout=WAIT_S)
        except BaseException:
            process.terminate()  # it hands the signal on
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"ranks ended with {process.returncode}: {text[-600:]}")


def of_method(plan: Plan, method: str) -> Config:
    """The config with which a step of a method is checked."""
    small = (f"model.backbone={plan.resnet}", "pretrain.amp=false", "pretrain.lr=1e-5")
    return plan.checked(*NO_DROPOUT, *small, f"pretrain.method={method}")


def main() -> None:
    """argv: what `ranks` asks. Rank 0 writes the comparison."""
    about = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = torch.device(about["devices"][rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(about["backend"])
    world, found = World(rank, RANKS, device), {}
    for name, text in about["configs"].items():
        config, volumes = Config.model_validate_json(text), Path(about["volumes"])
        with exact():
            shared = taken(config, volumes, world)
            if rank == 0:
                alone, other = (
                    taken(config, volumes, World(0, 1, device), nudged) for nudged in (False, True)
                )
                found[name] = compared(shared, alone, other)
        world.barrier()
    if rank == 0:
        Path(about["out"]).write_text(json.dumps(found))
    world.close()


def usual(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The relative difference of the gradients: the first step's, or the median of the later ones,
    of which rounding may turn one by a ReLU at 0.
    """
    first, *later = (relative(one, other) for one, other in zip(found, reference, strict=True))
    return max(first, median(later))


def compared(shared: Steps, alone: Steps, nudged: Steps) -> dict[str, object]:
    """How far two ranks are from one, and how far they may be: ten times what a change of the
    weights' last digit does.
    """
    pairs = {
        "losses": (worst, shared.losses, alone.losses, nudged.losses, LOSSES),
        "gradient": (usual, shared.gradient, alone.gradient, nudged.gradient, GRADIENT),
    }
    found: dict[str, object] = {
        name: far(one, whole) for name, (far, one, whole, _, _) in pairs.items()
    }
    found["most"] = {
        name: max(least, 10 * far(other, whole))
        for name, (far, _, whole, other, least) in pairs.items()
    }
    return found | {"merit": abs(shared.merit - alone.merit), "calls": shared.calls}


if __name__ == "__main__":
    main()
