"""One training step over several processes: `torchrun` starts them, gloo (CPU) or nccl (GPU) joins
them.
"""

import contextlib
import inspect
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn import functional

from ..system.errors import InputError, TrainingStopped
from ..system.machine import pick_device, world_size

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)


class PeerLost(TrainingStopped):
    """Another process of this run has ended; its own message says why."""


PEER_LOST = "another process of this run has ended: its own message says why"


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Turn what nccl and gloo raise, at whichever call that waits for a lost process, into
    PeerLost.
    """
    try:
        yield
    except RuntimeError as fault:
        # gloo has no kind of its own, but each of its messages begins with the file it comes from
        if not isinstance(fault, distributed.DistError) and "/gloo/" not in str(fault):
            raise
        raise PeerLost(PEER_LOST) from fault


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.contiguous().clone()
        with peers():
            distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _AllReduce.apply(gradient)


@dataclass(frozen=True)
class World:
    """This process among `size` others; every method is the identity for one process."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True for the one process that writes files and logs."""
        return self.rank == 0

    def check_divides(self, batch: int, key: str) -> None:
        """InputError where a batch cannot be shared out evenly."""
        if batch % self.size:
            raise InputError(
                f"{key}={batch} is no multiple of {self.size} processes",
                "torchrun",
                f"choose another {key}",
            )

    def agree(self, value: int, what: str, remedy: str) -> None:
        """InputError where `value` is not the same on every rank."""
        found = self.gather(torch.tensor([value], device=self.device)).tolist()
        if len(set(found)) > 1:
            raise InputError(f"processes differ in {what}: {found}", "torchrun", remedy)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.sum(torch.zeros(1, device=self.device)).tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, differentiable."""
        return _AllReduce.apply(tensor) if self.size > 1 else tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over ranks, differentiable."""
        return self.sum(tensor) / self.size

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, ...) of each rank to (size * B, ...) in rank order, differentiable."""
        if self.size == 1:
            return tensor
        B = len(tensor)
        around = (self.rank * B, (self.size - self.rank - 1) * B)
        return self.sum(functional.pad(tensor, (*[0, 0] * (tensor.ndim - 1), *around)))

    def parallel(self, network: nn.Module) -> nn.Module:
        """`network` as a step calls it: its gradients become their means over ranks, bucket by
        bucket while the backward pass goes on. One process gets the network itself.
        """
        if self.size == 1:
            return network
        import torch._dynamo  # late: it takes seconds

        # the graph of a compiled backbone stays whole, as in one process
        torch._dynamo.config.optimize_ddp = False
        # buffers are those of `broadcast`; torch has renamed what leaves them alone
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        buffers: dict[str, Any] = {name: False}
        with peers():
            # what of the network gets a gradient is the same in every step
            return nn.parallel.DistributedDataParallel(
                network, gradient_as_bucket_view=True, static_graph=True, **buffers
            )

    def broadcast(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        if self.size > 1:
            with peers():
                for tensor in module.state_dict().values():
                    distributed.broadcast(tensor, 0)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def setup(device_name: str = "auto", threads: int = 0) -> World:
    """Join the process group that `torchrun` describes in the environment; without it, a world of
    one.

    `threads` (0: torch's own choice) compute in each process on a CPU.
    """
    if threads:
        torch.set_num_threads(threads)
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    size = world_size()
    if size > 1:
        _join("nccl" if device.type == "cuda" else "gloo")
        return World(distributed.get_rank(), size, device)
    return World(0, 1, device)


def _join(backend: str) -> None:
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE") and "lo" in (
        name for _, name in socket.if_nameindex()
    ):
        # one machine: no need that its host name resolves
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(backend)


def of_rank_0(value: T) -> T:
    """What rank 0 of `torchrun` gave, on every rank; `value` itself in a single process."""
    if world_size() == 1:
        return value
    _join("gloo")
    found = [value]
    distributed.broadcast_object_list(found, 0)
    distributed.destroy_process_group()
    return found[0]


def sync_batch_norm(module: N, world: World) -> N:
    """Let every batch norm of `module` take its statistics over all ranks: nccl's fused layers
    where it joins the ranks, our own with gloo. Both keep what `fast_layers` would make again in
    the backward pass; on a GPU it never does.
    """
    if world.size == 1:
        return module
    if world.device.type == "cuda" and distributed.get_backend() == "nccl":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(module)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.__class__ = type(
                f"Synced{type(layer).__name__}", (_SyncedBatchNorm, type(layer)), {"world": world}
            )
    return module


class _SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm (torch's and timm's with activation) with statistics over all ranks, for one
    collective forward and one backward; torch's own needs a GPU.
    """

    world: World
    momentum: float
    # there where statistics are tracked
    num_batches_tracked: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    # of timm's
    drop: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        count = self.world.size * x.numel() // x.shape[1]
        values = x.float()  # autocast may bring bfloat16, whose sums over a batch are of no use
        own = torch.stack(torch.var_mean(values, axes, correction=0))
        variances, means = self.world.gather(own[None]).unbind(1)  # (ranks, C), of as many values
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if self.track_running_stats:
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (count / max(1, count - 1)), self.momentum)
        y = (values - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        y = y.to(x.dtype)
        return self.act(self.drop(y)) if hasattr(self, "act") else y
