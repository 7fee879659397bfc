"""Stage 04 on one rank of `torchrun`, with plain gradient descent and a planted fault: run by
test_pretrain.

Adam divides a gradient by its own size: it would hide a wrong scale, and blow up the rounding of
small gradients.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline.learning import optimise
from pipeline.system.errors import InputError
from pipeline.voco import pretrain
from pipeline.voco.data import Batch
from pipeline.voco.voco2d import Voco2D

STAGE = Path(__file__).resolve().parents[2] / "stages" / "04_pretrain_voco2d.py"


def descent(module: torch.nn.Module, lr: float, *options: object) -> torch.optim.Optimizer:
    """Stands for `optimise.adamw`."""
    return torch.optim.SGD(module.parameters(), lr)


def plant(fault: str) -> None:
    """`error`: one of the user's in step 3 of rank 1. `storm`: a signal to stop to every rank in
    step 3, and another one to the rank that writes the checkpoint, which takes its time. `none`:
    nothing.
    """
    loss, save = Voco2D.loss, pretrain.save_checkpoint

    def slow(*given: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        save(*given)

    if fault == "storm":
        pretrain.save_checkpoint = slow

    def broken(method: Voco2D, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 2 and fault == "storm":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 2 and fault == "error" and method.world.rank == 1:
            raise InputError("planted fault", "rank 1", "see what the others do")
        return loss(method, batch, step)

    if fault != "none":
        Voco2D.loss = broken


def main() -> None:
    """argv: fault, then the arguments of stage 04."""
    fault, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    optimise.adamw = descent
    plant(fault)
    sys.argv = [str(STAGE), *arguments]
    runpy.run_path(str(STAGE), run_name="__main__")


if __name__ == "__main__":
    main()
