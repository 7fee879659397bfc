"""Layers by another road: the same sums as the library's, for less time and memory, chosen while
training.

oneDNN (CPUs) computes the weight gradient of a depthwise convolution whose filter outgrows the map,
and in half precision that of other small maps and the input gradient of a strided one, through
reference kernels that take ten to a hundred times the forward pass; the weight gradient of a first
convolution, of few channels, takes two to nine times a matrix product, and a 1 x 1 convolution on a
map of 4 x 4 and less is a matrix product with overhead: on crops these are most of a step. Batch
norm followed by SiLU or Hardswish keeps its output beside its input and the activation for the
backward pass; it is made again there instead, for a third less memory at no cost in time. On a GPU
all layers take the library's road: its kernels are fast there, and what counts is how many there
are. Memory is saved there by `pretrain.activation_checkpointing`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional

# largest map (pixels) that takes the other road; of depthwise layers in half precision
POINTWISE, DEPTHWISE, STRIDED = 16, 64, 256
PICTURE = 3  # most channels of a picture
IN_CACHE = 1 << 18  # elements that a core's cache holds
ELEMENTS_AT_ONCE, HALF = 1 << 24, (torch.bfloat16, torch.float16)
SIZE2 = tuple[int, int]
ACTIVATIONS = {
    nn.SiLU: (functional.silu, torch.ops.aten.silu_backward),
    nn.Hardswish: (functional.hardswish, torch.ops.aten.hardswish_backward),
}


def speed_up(module: nn.Module) -> nn.Module:
    """Let the layers of `module` choose their road; parameters, buffers and their names stay as
    they are.
    """
    for layer in module.modules():
        if (
            type(layer) is BatchNormAct2d
            and type(layer.act) in ACTIVATIONS
            and isinstance(layer.drop, nn.Identity)
            and layer.affine
        ):
            layer.__class__ = _NormAct
        if (
            type(layer) is not nn.Conv2d
            or layer.padding_mode != "zeros"
            or isinstance(layer.padding, str)
            or layer.dilation != (1, 1)
        ):
            continue
        if layer.groups == layer.in_channels == layer.out_channels > 1:
            layer.__class__ = Depthwise
        elif (
            layer.groups == 1
            and layer.kernel_size == layer.stride == (1, 1)
            and layer.padding == (0, 0)
        ):
            layer.__class__ = Pointwise
        elif layer.groups == 1 and layer.in_channels <= PICTURE:
            layer.__class__ = Stem
    return module


class _NormAct(BatchNormAct2d):
    """timm's batch norm with activation; only its input and the activation are kept for the
    backward pass.
    """

    # by its name: `get_buffer` breaks the graph of `torch.compile` before torch 2.5
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            x.is_cuda
            or not (self.training and self.track_running_stats and torch.is_grad_enabled())
            or self.momentum is None
        ):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        options = (
            self.running_mean,
            self.running_var,
            self.momentum,
            self.eps,
            ACTIVATIONS[type(self.act)],
        )
        return _NormActFunction.apply(x, self.weight, self.bias, *options)


class _NormActFunction(torch.autograd.Function):
    """act(batch_norm(x)), the norm made again from x and its statistics in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
        activation: tuple[Any, Any],
    ) -> torch.Tensor:
        y, mean, deviation = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        ctx.eps, ctx.activation = eps, activation
        return activation[0](y, inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, deviation = ctx.saved_tensors  # `deviation` is 1 / sqrt(var + eps)
        scale = weight * deviation
        shape = (1, -1, 1, 1)
        y = torch.addcmul((bias - mean * scale).view(shape), x, scale.view(shape)).to(x.dtype)
        gradient = ctx.activation[1](gradient, y)
        statistics = None, None, mean, deviation, True, ctx.eps, (True, True, True)
        return (
            *torch.ops.aten.native_batch_norm_backward(gradient, x, weight, *statistics),
            None,
            None,
            None,
            None,
            None,
        )


class Pointwise(nn.Conv2d):
    """1 x 1 convolution, a linear layer over pixels where the map is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or x.shape[2] * x.shape[3] > POINTWISE:
            return super().forward(x)
        return functional.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(
            0, 3, 1, 2
        )


class Stem(nn.Conv2d):
    """Convolution of a picture of few channels, which needs no gradient itself, with its own weight
    gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trains = self.weight.requires_grad and torch.is_grad_enabled()
        if x.is_cuda or x.requires_grad or not trains:
            return super().forward(x)
        return _StemFunction.apply(x, self.weight, self.bias, self.stride, self.padding)


class _StemFunction(torch.autograd.Function):
    """(N, C, H, W), (O, C, k, l) -> (N, O, h, w)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: SIZE2,
        padding: SIZE2,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (s, t), (p, q) = ctx.options
        total = weight.new_zeros(weight[0].numel(), len(weight))
        with torch.autocast("cpu", enabled=False):  # the sum over images in full precision
            for own, part in _in_cache(x, gradient, weight.dtype):
                own, part = functional.pad(own, (q, q, p, p)), part.permute(0, 2, 3, 1)
                of_image, of_channel, down, right = own.stride()
                # what a tap sees of each image and output pixel: (C, k, l, N, h, w)
                seen = own.as_strided(
                    (*weight.shape[1:], *part.shape[:3]),
                    (of_channel, down, right, of_image, s * down, t * right),
                )
                total += seen.reshape(len(total), -1) @ part.flatten(0, 2)
        of_bias = gradient.sum((0, 2, 3), dtype=weight.dtype) if ctx.needs_input_grad[2] else None
        return None, total.T.reshape(weight.shape), of_bias, None, None


class Depthwise(nn.Conv2d):
    """Depthwise convolution with its own weight gradient where the map is smaller than the filter,
    in half precision where it is small.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.dtype in HALF or torch.is_autocast_enabled("cpu")
        limit = STRIDED if max(self.stride) > 1 else DEPTHWISE
        few = half and x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1]) <= limit
        if (
            x.is_cuda
            or not self.weight.requires_grad
            or not torch.is_grad_enabled()
            or not (few or _below_filter(x, self.weight, self.stride))
        ):
            return super().forward(x)
        y = _DepthwiseFunction.apply(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)


def _below_filter(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...]) -> bool:
    """Whether oneDNN leaves the weight gradient to its reference kernel: the map is smaller than
    the filter and the step after the first.
    """
    sizes = zip(x.shape[2:], weight.shape[2:], stride, strict=True)
    return any(size < taps + step - 1 for size, taps, step in sizes)


class _DepthwiseFunction(torch.autograd.Function):
    """(N, C, H, W), (C, 1, k, l) -> (N, C, h, w)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: SIZE2, padding: SIZE2
    ) -> torch.Tensor:
        y = functional.conv2d(x, weight, None, stride, padding, 1, x.shape[1])
        ctx.save_for_backward(x.to(y.dtype), weight)  # autocast may have chosen another type
        ctx.options = stride, padding
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.options
        of_x = (
            input_gradient(x, gradient, weight, stride, padding)
            if ctx.needs_input_grad[0]
            else None
        )
        return of_x, weight_gradient(x, gradient, weight, stride, padding), None, None


def input_gradient(
    x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, stride: SIZE2, padding: SIZE2
) -> torch.Tensor:
    """The library's dX; of strided layers in float32, whose kernel is 7 to 200 times as fast as
    that for half precision.
    """
    if max(stride) == 1 or x.dtype not in HALF:
        return _by_library(0, gradient, x, weight.to(x.dtype), stride, padding)
    weight, found = weight.float(), torch.empty_like(x)
    size = max(1, ELEMENTS_AT_ONCE // x[0].numel())  # images at once: the float32 copies stay small
    for own, part in zip(found.split(size), gradient.split(size), strict=True):
        shape = torch.empty_like(own, dtype=torch.float32)  # only the shape of the input matters
        own.copy_(_by_library(0, part.float(), shape, weight, stride, padding))
    return found


def weight_gradient(
    x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, stride: SIZE2, padding: SIZE2
) -> torch.Tensor:
    """dW[c, 0, i, j] = sum over n, y, x of x[n, c, s y + i - p, s x + j - p] * gradient[n, c, y,
    x], in the precision of the weight.
    """
    with torch.autocast("cpu", enabled=False):  # the sum over images in full precision
        if _below_filter(x, weight, stride):
            x, gradient = x.to(weight.dtype), gradient.to(weight.dtype)
            return _by_products(x, gradient, weight, stride, padding)
        total = torch.zeros_like(weight)
        for own, part in _in_cache(x, gradient, weight.dtype):
            total += _by_library(1, part, own, weight, stride, padding)
        return total


def _by_library(
    wanted: int,
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: SIZE2,
    padding: SIZE2,
) -> torch.Tensor:
    """dX (`wanted` 0) or dW (1) of a depthwise convolution, and nothing else."""
    mask = [wanted == 0, wanted == 1, False]
    options = stride, padding, (1, 1), False, (0, 0), x.shape[1], mask
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)[wanted]


def _in_cache(
    x: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Maps and their gradients in `dtype`, so many images at a time as a core's cache holds."""
    size = max(1, IN_CACHE // x[0].numel())
    for own, part in zip(x.split(size), gradient.split(size), strict=True):
        yield own.to(dtype), part.to(dtype)


def _by_products(
    x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor, stride: SIZE2, padding: SIZE2
) -> torch.Tensor:
    """All products of an input pixel with an output pixel, summed over images, one matrix product
    a channel; a tap's gradient is the sum over the pairs that it joins.
    """
    N, C, H, W = x.shape
    h, w = gradient.shape[2:]
    # images innermost, (C, H W, N) and (C, h w, N), by one transposition each of channels-last
    seen, of_y = (
        maps.permute(0, 2, 3, 1).reshape(N, -1).T.contiguous().view(-1, C, N).transpose(0, 1)
        for maps in (x, gradient)
    )
    pairs = torch.bmm(seen, of_y.mT).view(C, H, W, h * w)
    (p, q), (s, t) = padding, stride
    pairs = functional.pad(pairs, (0, 0, q, q, p, p))
    column = h * w  # elements from a pair to that with the input one to the right
    row = column * (W + 2 * q)
    joined = pairs.as_strided(
        (h, w, *weight.shape), (s * row + w, t * column + 1, pairs.stride(0), 1, row, column)
    )
    return joined.reshape(h * w, -1).sum(0).view(weight.shape)
