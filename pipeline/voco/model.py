"""2D-VoCo: student and averaged teacher, crops in, three loss terms out."""

import copy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from ..learning.backbone import feature_shape, standardise
from ..learning.fast_layers import Depthwise, Pointwise, Stem
from .losses import (
    base_regularisation,
    cosine,
    position_loss,
    similarity,
    softmax_position_loss,
)


class VocoNet(nn.Module):
    """Backbone and projector; the projector's input width is measured, not typed in."""

    def __init__(
        self, backbone: nn.Module, crop: int, width: int, pool: str, z_bins: int = 1
    ) -> None:
        super().__init__()
        C, h, w = feature_shape(backbone, crop)
        self.backbone, self.features, self.pool = backbone, C * h * w, pool
        self.z_bins = z_bins
        layers: list[nn.Module] = [nn.Linear(self.features, width)]
        for _ in range(2):
            layers += [nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, width)]
        self.projector = nn.Sequential(*layers)

    def forward(self, crops: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (B, P, S, h, w) -> float32 (B, G, P, E): G embeddings of the clip's slabs, or G = S
        of its slices.

        `keep`, if given, multiplies the features: the dropout mask, (B, S, P, F) of the slices
        before their mean or (B, G, P, F) of the means.
        """
        B, P, S, h, w = crops.shape
        images = (
            standardise(crops)
            .reshape(B * P * S, 1, h, w)
            .contiguous(memory_format=torch.channels_last)
        )
        features = self.backbone(images).flatten(1).view(B, P, S, self.features)  # (B, P, S, F)
        features = features.transpose(1, 2)  # (B, S, P, F)
        if keep is not None and keep.shape[1] == S:
            features, keep = features * keep, None
        if self.pool == "clip":
            slabs = features.unflatten(1, (self.z_bins, S // self.z_bins))
            features = slabs.mean(2)  # (B, G, P, F)
        features = features * keep if keep is not None else features
        return (
            self.projector(features.reshape(-1, self.features))
            .float()
            .view(*features.shape[:3], -1)
        )  # rows are crops: BN is per feature


def make_teacher(student: VocoNet) -> VocoNet:
    """A copy that no gradient reaches.

    Its batch norms normalise by the batch as the student's do (averaged statistics lag behind
    weights that move fast, which slows learning several times), but never move their own running
    statistics: those are averages of the student's.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for layer in teacher.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 0.0
    return teacher.train()


class RoundedCopy:
    """A network for forward passes without gradient under autocast to `dtype`. Weights of
    convolutions and linear layers are kept in `dtype`, rounded all together as autocast would round
    each at its use; every other tensor is the network's own. The numbers are the same to the last
    bit.
    """

    rounded = (nn.Conv2d, nn.Linear, Depthwise, Pointwise, Stem)  # not what is derived from them

    def __init__(self, network: VocoNet, dtype: torch.dtype) -> None:
        self.copy = copy.deepcopy(network)
        self._own: list[torch.Tensor] = []
        self._rounded: list[torch.Tensor] = []
        for layer, twin in zip(network.modules(), self.copy.modules(), strict=True):
            twin._buffers.update(layer._buffers)
            twin._parameters.update(layer._parameters)
            for name, weight in layer.named_parameters(recurse=False):
                if type(layer) in self.rounded:
                    twin._parameters[name] = nn.Parameter(weight.to(dtype), requires_grad=False)
                    self._own.append(weight)
                    self._rounded.append(twin.get_parameter(name))

    @torch.no_grad()
    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """What the network itself gives for `crops`."""
        torch._foreach_copy_(self._rounded, self._own)
        return self.copy(crops)


@lru_cache(maxsize=8)
def _generator(device: torch.device) -> torch.Generator:
    """One of each device, seeded anew wherever it is used."""
    return torch.Generator(device)


def dropout_mask(
    shape: tuple[int, ...], rate: float, seed: int, step: int, device: torch.device
) -> torch.Tensor:
    """Inverted dropout as a pure function of `seed` and `step`, for the whole batch over all
    ranks.
    """
    generator = _generator(device).manual_seed(
        int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    )
    return torch.rand(shape, generator=generator, device=device).ge_(rate).div_(1 - rate)


@dataclass(frozen=True)
class Embeddings:
    """(B, G, R, E) of random and (B, G, K, E) of base crops; G is 1 where all slabs meet."""

    random: torch.Tensor
    base: torch.Tensor

    @classmethod
    def split(cls, embeddings: torch.Tensor, random_crops: int, z_bins: int = 1) -> "Embeddings":
        """Random crops come first in every batch. Of (B, z_bins, R + K, E) every random crop of a
        slab meets every base crop of all slabs: (B, 1, z_bins * R, E) and (B, 1, z_bins * K, E).
        """
        parts = embeddings[:, :, :random_crops], embeddings[:, :, random_crops:]
        return cls(*((part.flatten(1, 2)[:, None] for part in parts) if z_bins > 1 else parts))


def voco_terms(
    student: Embeddings,
    teacher: Embeddings,
    overlap: torch.Tensor,
    next_student: torch.Tensor | None = None,
    next_teacher: torch.Tensor | None = None,
    symmetric: bool = False,
    temperature: float | None = None,
) -> dict[str, torch.Tensor]:
    """The terms intra, inter and reg (scalars) and the intra-volume similarity (B, G, R, K).

    overlap (B, R, K); next_*: base embeddings of the volume after each one, (B, G, K, E), modulo
    the whole batch; without them inter is 0, without base crops of the student reg. `symmetric`:
    the intra-volume cosine is the mean of that of the student's random and the teacher's base crops
    and that of the teacher's random and the student's base. `temperature`: intra is a softmax's
    cross entropy at that temperature.
    """
    own = cosine(student.random, teacher.base)
    if symmetric:
        own = (own + cosine(teacher.random, student.base)) / 2
    labels = overlap[:, None].expand_as(own)
    intra = (
        position_loss(own.clamp(0, 1), labels)
        if temperature is None
        else softmax_position_loss(own, labels, temperature)
    )
    inter = reg = own.new_zeros(())
    if next_student is not None and next_teacher is not None:
        with torch.no_grad():
            target = similarity(teacher.random, next_teacher)
        inter = position_loss(similarity(student.random, next_student), target).mean()
    if student.base.shape[-2]:
        reg = base_regularisation(student.base).mean()
    return {
        "intra": intra.mean(),
        "inter": inter,
        "reg": reg,
        "similarity": own.detach().clamp(0, 1),
    }


def spread_of(embeddings: torch.Tensor) -> torch.Tensor:
    """Standard deviation of unit embeddings over crops, times sqrt(E): about 1 where they fill the
    sphere, 0 where they collapse.
    """
    unit = nn.functional.normalize(embeddings.detach().flatten(0, -2), dim=-1)
    return unit.std(0, correction=0).mean() * unit.shape[-1] ** 0.5


def correlation(similarity: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of similarity (B, G, R, K) and label (B, R, K), 0 where one of them is
    constant.
    """
    s, y = similarity.float().flatten(), overlap[:, None].expand_as(similarity).flatten()
    s, y = s - s.mean(), y - y.mean()
    return (s * y).sum() / (s.norm() * y.norm()).clamp_min(1e-12)
