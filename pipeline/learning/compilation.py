"""`torch.compile`, or one line that says why it cannot be had."""

import os
import shlex
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from ..system.errors import InputError

# what writes the host's part of the kernels: Triton's launchers on a GPU, all of them on a CPU
COMPILERS = {"cuda": ("CC", "gcc", "clang"), "cpu": ("CXX", "g++", "clang++")}


def lacks_compiler(device: torch.device) -> str:
    """Why `torch.compile` cannot work on `device`; empty where it can."""
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
    except RuntimeError as fault:
        return str(fault)
    if device.type == "cuda" and find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    variable, *usual = COMPILERS[device.type]
    names = shlex.split(os.environ.get(variable, ""))[:1] or usual
    if not any(map(shutil.which, names)):
        return f"torch.compile needs a compiler, {' or '.join(names)}: there is none"
    return ""


def compile_passes(
    backbone: nn.Module, device: torch.device, key: str, mode: str | None = None
) -> None:
    """Have the forward and backward passes of a backbone compiled, in place, when they are first
    met.

    Raises:
        InputError: this cannot work here; `key` of the config asks for it.
    """
    if why := lacks_compiler(device):
        raise InputError(why, f"{key} is on", f"install it or set {key}=false")
    backbone.compile(mode=mode)
