"""The 2D backbone that pretraining and classifier share: any timm model, one grey channel in
(or neighbouring planes as channels), spatial map out.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..system.errors import InputError
from .weights import match, read_weights, save_weights

REACH_S = 10.0  # for an answer of timm's hub
N = TypeVar("N", bound=nn.Module)
# of ImageNet, mean over R, G and B: what pretrained stems summed over RGB expect
GREY_MEAN, GREY_STD = 0.449, 0.226
# how timm's families are told that the image size varies
EXTRAS: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})
TABLE = ".relative_position_bias_table"
MISFITS = (TypeError, AssertionError, RuntimeError, ValueError)  # of timm's families


class WrongSize(InputError):
    """A model takes no images of a size; `sizes` (pixels) are some that it takes."""

    def __init__(self, name: str, size: int, sizes: list[int]) -> None:
        self.sizes = sizes
        super().__init__(
            f"this timm model takes no images of {size} x {size} pixels, or has no spatial map",
            f"model.backbone={name}",
            f"choose an image_size that fits ({', '.join(map(str, sizes))}) or another model"
            if sizes
            else "choose another one",
        )


def placed(network: N, device: torch.device | str) -> N:
    """The network itself on `device`, its weights in the order of memory that convolutions like."""
    return network.to(device).to(memory_format=torch.channels_last)


def standardise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (...) to float (...), the same constants for every image of the project."""
    return pixels.float().mul_(1 / (255 * GREY_STD)).sub_(GREY_MEAN / GREY_STD)


def create_backbone(
    name: str,
    init: str = "scratch",
    weights: str | None = None,
    size: int = 64,
    channels: int = 1,
) -> nn.Module:
    """A timm model (N, channels, h, w) -> (N, C, h', w') for images of `size` x `size`, without
    head and pooling; its state dict is timm's own.

    `init="imagenet"` takes the weights from the file `weights`, or from timm's hub; RGB stems are
    kept for three channels, summed for one, repeated and scaled for more (timm's rule).

    Raises:
        InputError: unknown model name, or ImageNet weights that are out of reach or do not match;
        WrongSize where it takes no images of that size.
    """
    from .fast_layers import speed_up

    check_model(name)
    backbone = _build(name, size, channels, init == "imagenet" and weights is None)
    if init == "imagenet" and weights is not None:
        match(backbone, adapted(backbone, _imagenet_state(backbone, weights)), weights)
    backbone.register_forward_hook(_to_map)
    return speed_up(backbone)


def check_model(name: str) -> None:
    """Raises InputError where timm has no model of this name."""
    import timm  # late: it takes seconds that whoever only reads the data does without

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)[0]
        raise InputError(
            "no such timm model",
            f"model.backbone={name}",
            f"did you mean {near}? see timm.list_models()",
        )


def check_weights(name: str, weights: str | None) -> None:
    """Is what `init="imagenet"` asks for within reach: the file, timm's cache, or its hub?

    Raises:
        InputError: it is not, or there is no such model.
    """
    check_model(name)
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError("no such weights", f"model.weights={weights}", "give the file's path")
        return
    import timm
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    known = timm.get_pretrained_cfg(name)
    hub, url = getattr(known, "hf_hub_id", None), getattr(known, "url", None)
    kept = Path(torch.hub.get_dir()) / "checkpoints" / str(url).rpartition("/")[2]
    files = ("model.safetensors", "pytorch_model.bin")
    if (url and kept.is_file()) or (
        hub and any(isinstance(try_to_load_from_cache(hub, file), str) for file in files)
    ):
        return
    try:
        get_hf_file_metadata(hf_hub_url(str(hub), files[0]), timeout=REACH_S)
    except Exception as fault:  # the hub client raises many kinds; the cause stays chained
        raise _out_of_reach(name, fault) from fault


def _out_of_reach(name: str, fault: Exception) -> InputError:
    reason = (str(fault).splitlines() or [type(fault).__name__])[0]
    return InputError(
        f"ImageNet weights of {name} are out of reach ({reason})",
        "init=imagenet",
        "give a local file as model.weights=FILE, or choose init=scratch",
    )


def _headless(name: str, **options: Any) -> nn.Module:
    """A timm model that gives its features: without head and, unless its family always pools,
    without pooling.
    """
    import timm

    options |= {"num_classes": 0}
    try:
        return timm.create_model(name, global_pool="", **options)
    except AssertionError:  # CoaT
        backbone = timm.create_model(name, **options)
        vars(backbone)["forward"] = backbone.forward_features
        return backbone


@torch.no_grad()
def _takes(backbone: nn.Module, size: int, channels: int = 1) -> bool:
    """Whether the model gives a map of all pixels of a `size` x `size` image."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    if size % (patch[0] if isinstance(patch, tuple) else patch):  # the rest would not be looked at
        return False
    try:
        _to_map(backbone, (), backbone.eval()(torch.zeros(1, channels, size, size)))
    except MISFITS:
        return False
    return True


def _made(name: str, in_chans: int = 1, **extra: Any) -> nn.Module | None:
    try:
        return _headless(name, in_chans=in_chans, **extra)
    except MISFITS:
        return None


def _build(name: str, size: int, channels: int, pretrained: bool) -> nn.Module:
    for extra in (*EXTRAS, {"img_size": size}):
        backbone = _made(name, channels, **extra)
        if backbone is not None and _takes(backbone, size, channels):
            break
    else:
        raise WrongSize(name, size, _fitting_sizes(name, size))
    if not pretrained:
        return backbone.train()
    try:
        return _headless(name, pretrained=True, in_chans=channels, **extra).train()
    except Exception as fault:  # the hub client raises many kinds; the cause stays chained
        raise _out_of_reach(name, fault) from fault


def _fitting_sizes(name: str, size: int) -> list[int]:
    """Image sizes near `size` that a model takes: multiples of usual patches, and its own size."""
    import timm

    near = {step * (size // step + more) for step in (14, 16, 32) for more in (0, 1)} - {0, size}
    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    sizes = sorted({*near, own.input_size[-1]} if own else near)
    varying = [made for made in (_made(name, **extra) for extra in EXTRAS) if made is not None]

    def models(one: int) -> Iterator[nn.Module]:
        yield from varying
        if one % 32 == 0 and (fixed := _made(name, img_size=one)) is not None:
            yield fixed

    return [one for one in sizes if any(_takes(model, one) for model in models(one))]


def _stems(backbone: nn.Module) -> list[str]:
    """Names of the weights that the image meets first."""
    known = cast(dict[str, Any], backbone.pretrained_cfg).get("first_conv") or ()
    return [f"{stem}.weight" for stem in ((known,) if isinstance(known, str) else known)]


def adapted(backbone: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` as the backbone keeps it (timm's rules): the relative positions of attention windows,
    which MaxViT and CoAtNet have for one image size, interpolated to its own, and a linear layer as
    a 1 x 1 convolution. A stem of one channel is divided equally among several: equal channels give
    what the one gave.
    """
    from timm.layers import resize_rel_pos_bias_table

    own, found = backbone.state_dict(), dict(state)
    for stem in _stems(backbone):
        if stem in own and stem in state and state[stem].ndim == 4 and state[stem].shape[1] == 1:
            channels = own[stem].shape[1]
            found[stem] = state[stem].repeat(1, channels, 1, 1) / channels
    for name, tensor in state.items():
        shape = own[name].shape if name in own else tensor.shape
        if name.endswith(TABLE) and shape != tensor.shape:
            window = cast(Any, backbone.get_submodule(name.removesuffix(TABLE))).window_size
            found[name] = resize_rel_pos_bias_table(tensor, window, shape)
        elif tensor.ndim == 2 and shape == (*tensor.shape, 1, 1):
            found[name] = tensor.reshape(shape)
    return found


def _imagenet_state(backbone: nn.Module, path: str) -> dict[str, torch.Tensor]:
    """A timm ImageNet file as the headless state dict of `backbone`, with its channels."""
    from timm.models import adapt_input_conv

    own, (state, _) = backbone.state_dict(), read_weights(path)
    heads = cast(dict[str, Any], backbone.pretrained_cfg).get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        state.pop(f"{head}.weight", None), state.pop(f"{head}.bias", None)
    for stem in _stems(backbone):
        if stem in own and stem in state and state[stem].shape[1] == 3:
            state[stem] = adapt_input_conv(own[stem].shape[1], state[stem])
    return state


def _to_map(backbone: nn.Module, inputs: tuple, features: Any) -> torch.Tensor:
    """Bring what timm's families return to (N, C, h', w'): channels-last maps and token sequences
    are rearranged, of several maps the last is taken.
    """
    if isinstance(features, (list, tuple)):
        features = features[-1]
    if features.ndim == 4:
        return (
            features.permute(0, 3, 1, 2)
            if getattr(backbone, "output_fmt", "NCHW") == "NHWC"
            else features
        )
    if features.ndim != 3:
        raise AssertionError(f"features of shape {tuple(features.shape)} are no map")
    N, T, C = features.shape
    tokens = T - getattr(backbone, "num_prefix_tokens", 0)
    side = int(tokens**0.5)
    if tokens - side * side not in (0, 1):  # 1: a class token that the family does not name
        raise AssertionError(f"{tokens} tokens are no square")
    return features[:, T - side * side :].transpose(1, 2).reshape(N, C, side, side)


def all_maps(backbone: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Maps of a batch (N, channels, h, w) by one pass: of every size the last one that the backbone
    makes on the way to its own, the finest first, then its own; that alone where timm tells of no
    others.
    """
    inner_maps: Any = getattr(backbone, "forward_intermediates", None)
    if inner_maps is None:
        return [backbone(batch)]
    features, inner = inner_maps(batch)
    if "forward" not in vars(backbone):  # else the family's features are its map (`_headless`)
        features = cast(Any, backbone).forward_head(features)
    return [*{one.shape[2:]: one for one in inner}.values(), _to_map(backbone, (), features)]


class Taps:
    """Maps that a backbone makes on the way to its own, kept of each forward pass with gradients:
    the outputs of the modules that timm calls the features of a model. No pass is made for them.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone, self._found = backbone, dict[str, Any]()
        modules, known = dict(backbone.named_modules()), getattr(backbone, "feature_info", ())
        for name in dict.fromkeys([*(one.get("module") for one in known), ""]):  # and its own map
            if name in modules:
                modules[name].register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        if torch.is_grad_enabled():
            self._found[name] = output

    def maps(self, size: int) -> list[torch.Tensor]:
        """Maps (N, C, h, w) of the last pass, of images of `size` x `size` pixels: the last of each
        smaller size, coarsest first. They are given once.
        """
        by_size = {}
        for name, output in self._found.items():
            with contextlib.suppress(AssertionError):  # what is no map
                one = _to_map(self.backbone, (), output) if name else output
                by_size[tuple(one.shape[2:])] = one
        self._found.clear()
        return [by_size[shape] for shape in sorted(by_size) if shape != (size, size)]


@torch.no_grad()
def feature_shape(backbone: nn.Module, size: int, channels: int = 1) -> tuple[int, int, int]:
    """(C, h', w') for images of `channels` x `size` x `size`, by a dry forward pass; the model's
    state is left as it was. `create_backbone` has seen to it that it takes them.
    """
    training, device = backbone.training, next(backbone.parameters()).device
    shape = backbone.eval()(torch.zeros(1, channels, size, size, device=device)).shape
    backbone.train(training)
    return tuple(shape[1:])


def pool_maps(maps: torch.Tensor, how: str = "both") -> torch.Tensor:
    """(N, C, h, w) to (N, 2C) float32, the features of a slice: an organ fills the mean of its map,
    a small lesion shows in the maximum; the `mean` alone: (N, C).
    """
    mean = maps.mean((2, 3))
    return (mean if how == "mean" else torch.cat([mean, maps.amax((2, 3))], 1)).float()


def settle(backbone: nn.Module, batches: Iterable[torch.Tensor], device: torch.device) -> None:
    """Take the running statistics of all batch norms again, as plain averages over `batches` of
    slices (N, 1, h, w) uint8.
    """
    torch.optim.swa_utils.update_bn((standardise(batch.to(device)) for batch in batches), backbone)


def load_backbone(backbone: nn.Module, path: Path | str) -> str:
    """Strict transfer from a file of `save_backbone`: returns how many tensors matched, how many
    were interpolated to the image size, and whether the stem was divided among channels; InputError
    naming those that did not match.
    """
    state, _ = read_weights(path)
    fitting = adapted(backbone, state)
    resized = sum(name.endswith(TABLE) and fitting[name] is not state[name] for name in state)
    note = f", {resized} of them interpolated to the image size" if resized else ""
    if divided := [name for name in state if fitting[name].shape[1:2] > state[name].shape[1:2]]:
        note += f", {divided[0]} divided among {fitting[divided[0]].shape[1]} channels"
    return match(backbone, fitting, str(path)) + note


def save_backbone(backbone: nn.Module, path: Path | str, metadata: dict[str, str]) -> None:
    """Write the timm state dict (`in_chans=1, num_classes=0, global_pool=""`) with metadata,
    atomically.
    """
    save_weights(path, backbone, metadata)
