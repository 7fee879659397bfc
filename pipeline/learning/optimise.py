"""What training loops share: schedules, averaging, precision, the optimiser and its step."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..system.errors import TrainingStopped

LEAST_SCALE = 2.0**-8  # of float16 losses; it starts at 2**16 and is halved at every overflow


class NonFiniteLoss(TrainingStopped):
    """A loss is NaN or infinite: names step, terms and batch ids."""


class Collapse(TrainingStopped):
    """All embeddings have become the same."""


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Learning-rate factor of a step (0-based): linear over `warmup` steps to 1, then half a cosine
    that reaches 0 at `total`.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def momentum_at(step: int, total: int, start: float, final: float | None) -> float:
    """EMA momentum of a step: constant `start`, or half a cosine from `start` to `final` at
    `total`.
    """
    return start if final is None else final - (final - start) * warmup_cosine(step, 0, total)


class Average:
    """A teacher that follows its student. Their tensors are listed once, so they must stay the same
    ones: loading a state, which copies into them, is no change.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        own, new = teacher.state_dict(), student.state_dict()
        floating = [name for name, tensor in own.items() if tensor.is_floating_point()]
        whole = [name for name in own if name not in set(floating)]
        self._floating, self._whole = (
            ([own[name] for name in names], [new[name] for name in names])
            for names in (floating, whole)
        )

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters and buffers alike;
        integer buffers are copied.
        """
        torch._foreach_lerp_(*self._floating, 1 - momentum)
        if self._whole[0]:
            torch._foreach_copy_(*self._whole)


def amp_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes in it (GPU, CPU with AMX tiles), float16 on older GPUs,
    None where float32 is faster.
    """
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    # torch 2.4 has it under another name
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if has_tiles() else None


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """Mixed precision in the type of `amp_dtype`; does nothing when not enabled or not of use."""
    dtype = amp_dtype(device) if enabled else None
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def grad_scaler(device: torch.device, enabled: bool) -> torch.amp.GradScaler:
    """Loss scaling, active for float16 only."""
    return torch.amp.GradScaler(device.type, enabled=enabled and amp_dtype(device) == torch.float16)


def parameter_groups(
    model: nn.Module, factor: float, decay: float, *beside: nn.Module
) -> list[dict[str, Any]]:
    """What of a model is trained, for `adamw`: its `backbone`, the learning rate times `factor`,
    and the rest, with the modules `beside` it, each with and without weight decay (norms, biases).
    """
    inside = {id(p) for p in model.get_submodule("backbone").parameters()}
    parameters = [p for one in (model, *beside) for p in one.parameters() if p.requires_grad]
    groups = [
        {
            "params": [
                p for p in parameters if (id(p) in inside) == own and (p.ndim > 1) == decays
            ],
            "factor": factor if own else 1.0,
            "weight_decay": decay if decays else 0.0,
        }
        for own in (True, False)
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]


def adamw(
    groups: Iterable[Mapping[str, Any]] | nn.Module,
    lr: float,
    weight_decay: float,
    amsgrad: bool = False,
) -> torch.optim.AdamW:
    """AdamW, fused: the step is one call, which `Update` can have left out on the device. Given a
    module, vectors (norms and biases) are not decayed.
    """
    if isinstance(groups, nn.Module):
        weights = [p for p in groups.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in groups.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=lr,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=True,
    )


def check_finite(step: int, terms: Mapping[str, float], ids: Iterable[str]) -> None:
    """Raise NonFiniteLoss where one of the terms is NaN or infinite."""
    if not all(math.isfinite(value) for value in terms.values()):
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        raise NonFiniteLoss(
            f"non-finite loss at step {step}: {values}; batch {', '.join(ids)}; the last checkpoint"
            " is kept"
        )


def reads_late(device: torch.device) -> bool:
    """Whether the figures of a step are read when the next one has been handed over: a GPU that
    was waited for in between would have nothing to do meanwhile.
    """
    return device.type == "cuda"


class Figures:
    """Figures of a step that was taken, on their way from the device: nothing has waited for them.

    `values` (n,) are those of `names` and any `more`, then the gradient's norm and the loss scale.
    """

    def __init__(
        self,
        step: int,
        names: Sequence[str],
        values: torch.Tensor,
        ids: Iterable[str],
        scaled: bool,
    ) -> None:
        self.step, self.names, self.ids, self.scaled = step, names, list(ids), scaled
        self.more: list[float] = []
        self._values = values.to("cpu", non_blocking=True)  # of a GPU, into pinned memory
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(values.device))

    def here(self) -> bool:
        """Whether `read` would not wait: the device is done with the step."""
        return self._event is None or self._event.query()

    def read(self) -> dict[str, float]:
        """The figures by name, once the device is done with the step.

        Raises:
            NonFiniteLoss: a figure or, without loss scaling, the gradient is not finite; the device
            has left out the step and all later ones. With loss scaling: overflows that no scale
            prevents.
        """
        if self._event is not None:
            self._event.synchronize()
        *values, norm, scale = self._values.tolist()
        found, self.more = dict(zip(self.names, values, strict=False)), values[len(self.names) :]
        # float16 overflows now and then: the scaler leaves such a step out and scales by less
        check_finite(self.step, found if self.scaled else {**found, "gradient": norm}, self.ids)
        if scale < LEAST_SCALE:  # then no step is taken any more
            raise NonFiniteLoss(
                f"non-finite gradients at step {self.step} though the loss is scaled by"
                f" {scale:.3g}; batch {', '.join(self.ids)}; the last checkpoint is kept"
            )
        return found


class Update:
    """One optimiser step, the same in every loop: `set_rate`, `backward` once for each part of the
    batch, `apply`. None of them waits for the device.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip: float,
    ) -> None:
        self.parameters, self.clip = list(parameters), clip
        self.optimiser, self.scaler = optimiser, scaler
        self._broken: torch.Tensor | None = None  # 1.0 from the first non-finite step on
        # by group, where the step runs on a GPU: a number would be part of a graph of its kernels
        self.rates = [
            torch.zeros((), device=group["params"][0].device)
            for group in optimiser.param_groups
            if group["params"][0].is_cuda
        ]

    def set_rate(self, rate: float) -> None:
        """Learning rate of the coming step; a group may have a `factor` of its own."""
        for k, group in enumerate(self.optimiser.param_groups):
            value = rate * group.get("factor", 1.0)
            group["lr"] = self.rates[k].fill_(value) if self.rates else value

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those that are there."""
        self.scaler.scale(loss).backward()

    def apply(
        self, step: int, names: Sequence[str], values: torch.Tensor, ids: Iterable[str]
    ) -> Figures:
        """Clip the gradients to the norm `clip`, take the step and forget them. `values` (n,) are
        the figures `names` of the loss and any more; reading what is returned raises where one of
        them or the gradient is not finite, and no parameter changes from then on.
        """
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        scaled = self.scaler.is_enabled()
        if not scaled:
            self._leave_out_unless_finite(torch.cat([values, norm[None]]))
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        scale = self.scaler.scale(torch.ones_like(norm))
        return Figures(step, names, torch.cat([values, torch.stack([norm, scale])]), ids, scaled)

    def _leave_out_unless_finite(self, figures: torch.Tensor) -> None:
        """Tell a fused optimiser to change nothing once a figure was not finite: its own way with
        overflows of float16, which the device decides by itself. Another optimiser steps on, in
        memory alone: the run ends before a checkpoint.
        """
        if not getattr(self.optimiser, "_step_supports_amp_scaling", False):
            return
        broken = (~figures.isfinite().all()).float()
        self._broken = broken if self._broken is None else torch.maximum(self._broken, broken)
        vars(self.optimiser)["found_inf"] = self._broken

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._broken = None
        self.optimiser.load_state_dict(state["optimiser"])
        # a run that computed in another type than float16 left no scale: then it starts anew
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


@contextlib.contextmanager
def fixed_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are: for backward passes that recompute
    activations.
    """
    norms = [
        layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    before = [(layer.momentum, layer.get_buffer("num_batches_tracked").clone()) for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(norms, before, strict=True):
            layer.momentum = momentum
            layer.get_buffer("num_batches_tracked").copy_(count)
