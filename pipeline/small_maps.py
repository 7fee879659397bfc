"""Convolutions on the small maps of crops, on CPUs: the same sums by another road.

oneDNN computes the weight gradient of a depthwise convolution on a map of 8 x 8 and less through a reference kernel that
takes ten to a hundred times the forward pass, and a 1 x 1 convolution on a map of 4 x 4 and less is a plain matrix
product with overhead. Both are most of a training step on crops. GPUs and larger maps are left to the library.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

DEPTHWISE, POINTWISE = 64, 16  # largest map (pixels) that takes the other road


def speed_up(module: nn.Module) -> nn.Module:
    """Let the plain convolutions of `module` choose their road by map size; parameters and their names stay as they are."""
    for layer in module.modules():
        if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.dilation != (1, 1):
            continue
        if layer.groups == layer.in_channels == layer.out_channels > 1:
            layer.__class__ = _Depthwise
        elif layer.groups == 1 and layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0):
            layer.__class__ = _Pointwise
    return module


class _Pointwise(nn.Conv2d):
    """1 x 1 convolution, a linear layer over pixels where the map is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or x.shape[2] * x.shape[3] > POINTWISE:
            return super().forward(x)
        return functional.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class _Depthwise(nn.Conv2d):
    """Depthwise convolution with its own weight gradient where the map is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or not self.weight.requires_grad or not torch.is_grad_enabled() or self._pixels(x) > DEPTHWISE:
            return super().forward(x)
        y = _DepthwiseFunction.apply(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)

    def _pixels(self, x: torch.Tensor) -> int:
        return x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])


class _DepthwiseFunction(torch.autograd.Function):
    """(N, C, H, W), (C, 1, k, l) -> (N, C, h, w)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=None)
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return functional.conv2d(x, weight.to(x.dtype), None, stride, padding, 1, x.shape[1])

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.options
        of_x = None
        if ctx.needs_input_grad[0]:
            masks = (True, False, False)
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight.to(x.dtype), None, stride, padding, (1, 1), False, (0, 0), x.shape[1], masks
            )[0]
        return of_x, weight_gradient(x, gradient, weight, stride, padding), None, None


def weight_gradient(x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int],
                    padding: tuple[int, int]) -> torch.Tensor:  # fmt: skip
    """dW[c, 0, i, j] = sum over n, y, x of x[n, c, s y + i - p, s x + j - p] * gradient[n, c, y, x]: one product and sum a tap."""
    x, gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)  # (N, H, W, C): C is contiguous in channels-last
    total = torch.zeros_like(weight)
    sizes = zip(x.shape[1:3], gradient.shape[1:3], weight.shape[2:], stride, padding, strict=True)
    rows, columns = (list(_taps(*size)) for size in sizes)
    for i, (rows_in, rows_out) in enumerate(rows):
        for j, (columns_in, columns_out) in enumerate(columns):
            if rows_in and columns_in:
                total[:, 0, i, j] = (x[:, rows_in, columns_in] * gradient[:, rows_out, columns_out]).sum((0, 1, 2))
    return total


def _taps(size: int, out: int, kernel: int, stride: int, padding: int) -> Iterator[tuple[slice | None, slice | None]]:
    """For each tap of one axis: the input positions it meets inside the map and the outputs they belong to, None where none."""
    for tap in range(kernel):
        first, last = max(0, -(-(padding - tap) // stride)), min(out - 1, (size - 1 + padding - tap) // stride)
        start = first * stride + tap - padding
        yield (slice(start, last * stride + tap - padding + 1, stride), slice(first, last + 1)) if first <= last else (None, None)
