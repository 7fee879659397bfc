"""Stage 04 on one rank of `torchrun`, with plain gradient descent and a planted fault: run by test_pretrain.

Adam divides a gradient by its own size: it would hide a wrong scale, and blow up the rounding of small gradients.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline import engine, pretrain
from pipeline.runtime import InputError

STAGE = Path(__file__).resolve().parents[1] / "stages" / "04_pretrain_voco2d.py"


def descent(module: torch.nn.Module, lr: float, *options: object) -> torch.optim.Optimizer:
    """Stands for `engine.adamw`."""
    return torch.optim.SGD(module.parameters(), lr)


def plant(fault: str) -> None:
    """In step 3 of rank 1: an error of the user's, a signal to stop, or (`none`) nothing.

    `storm`: a signal to every rank in step 3, and another one to the rank that writes while it does so, slowly.
    """
    forward, save = pretrain.forward, pretrain.save_checkpoint

    def slow(*given: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        save(*given)

    if fault == "storm":
        pretrain.save_checkpoint = slow

    def broken(run: pretrain.Run, batch: pretrain.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if run.step == 2 and fault == "storm":
            os.kill(os.getpid(), signal.SIGTERM)
            return forward(run, batch)
        if run.step == 2 and run.world.rank == 1:
            if fault == "error":
                raise InputError("planted fault", "rank 1", "see what the others do")
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(run, batch)

    if fault != "none":
        pretrain.forward = broken


def main() -> None:
    """argv: fault, then the arguments of stage 04."""
    fault, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    engine.adamw = descent
    plant(fault)
    sys.argv = [str(STAGE), *arguments]
    runpy.run_path(str(STAGE), run_name="__main__")


if __name__ == "__main__":
    main()
