"""Tensor files: safetensors (or `torch.load(weights_only=True)`) read and written strictly, every
tensor accounted for.
"""

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..system.errors import InputError, TrainingStopped
from ..system.files import atomic_path

NESTS = ("state_dict", "model", "state_dict_ema", "model_ema")


def read_weights(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a weights file: safetensors, or a PyTorch file of plain tensors (no
    pickled code is run).

    Raises:
        InputError: no such file, not readable, or not a mapping of names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            "no such weights file",
            str(path),
            "give the path of a .safetensors or PyTorch weights file",
        )
    try:
        state, metadata = (
            _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
        )
    except pickle.UnpicklingError as fault:
        raise InputError(
            "weights not readable",
            f"{path}: more than plain tensors, and pickled code is never run",
            "give a safetensors or weights-only PyTorch file",
        ) from fault
    # both readers raise their own kinds for damaged files; the cause stays chained
    except Exception as fault:
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise InputError(
            "weights not readable",
            f"{path}: {reason}",
            "give a whole safetensors or weights-only PyTorch file",
        ) from fault
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError("not a mapping of names to tensors", str(path), "give a state dict")
    return state, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, dict(  # noqa: SIM118
            handle.metadata() or {}
        )


def _read_torch(path: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what the next line says better
        state = torch.load(path, map_location="cpu", weights_only=True)
    for nest in NESTS:
        if isinstance(state, Mapping) and isinstance(state.get(nest), Mapping):
            state = state[nest]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (OSError, SafetensorError) as fault:
        raise InputError(
            "weights not readable", f"{path}: {fault}", "make the file again"
        ) from fault


def save_weights(
    path: Path | str, module: nn.Module, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a module's state dict as safetensors, atomically; TrainingStopped (naming the tensor)
    where a value is not finite.
    """
    from safetensors.torch import save

    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    if broken := not_finite(state):
        raise TrainingStopped(
            f"{len(broken)} tensors are not finite ({broken[0]} is the first): {path} is not"
            " written"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(_sorted_header(save(state, dict(metadata or {}))))


def _sorted_header(data: bytes) -> bytes:
    """The same file with its metadata in alphabetical order: the library writes it in an order that
    changes from run to run.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_weights(module: nn.Module, path: Path | str) -> str:
    """Read `path` into `module`, strictly; returns the report of `match`."""
    return match(module, read_weights(path)[0], str(path))


def match(module: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> str:
    """Load `state` into `module` and report how many tensors matched.

    Raises:
        InputError: the first tensors that are missing, unexpected, of another shape, or not finite;
        the module is left as it was.
    """
    own = module.state_dict()
    shared = [name for name in own if name in state]
    shapes = [name for name in shared if state[name].shape != own[name].shape]
    faults = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} not {tuple(own[name].shape)}" for name in shapes
        ],
        "not finite": not_finite({name: state[name] for name in shared}),
    }
    wrong = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in faults.items()
        if names
    ]
    if wrong:
        raise InputError(
            f"{len(shared)} of {len(own)} tensors are known, but {'; '.join(wrong)}",
            where,
            "give weights of this very model",
        )
    module.load_state_dict(dict(state))
    return f"{len(own)} of {len(own)} tensors matched ({where})"


def not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return sorted(
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    )
