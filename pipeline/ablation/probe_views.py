"""How a plane is described to a probe: by a frozen backbone, or by what needs no network.

Every view describes planes as a whole, each cell of the grid on which masks are asked for, and the
inside of a mask.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.nn import functional

from ..learning.backbone import all_maps, pool_maps, standardise
from ..volumes.sampling import resize_planes
from .probe_cases import STRIDE

SIDE = 16  # of a thumbnail, and of the patch around a cell
KEPT = 64  # planes whose maps are kept at most, if no single question is about more
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class View(Protocol):
    """Descriptions of S planes `images` (S, h, w) uint8 at `height` (S,)."""

    def planes(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        """(S, F): of each plane."""

    def cells(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        """(S, h / 4, w / 4, F): of each cell."""

    def inside(self, images: np.ndarray, height: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(S, F): of what lies in `mask` (S, h, w) bool, which is nowhere empty."""


def _polynomials(values: np.ndarray) -> np.ndarray:
    """(N, F) to all products of up to three of them."""
    from sklearn.preprocessing import PolynomialFeatures

    return PolynomialFeatures(3, include_bias=False).fit_transform(values).astype(np.float32)


class Place:
    """Where something is, not what it looks like: height in the volume, and place in the plane."""

    def planes(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        return _polynomials(height[:, None])

    def cells(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        h, w = (side // STRIDE for side in images.shape[1:])
        at = np.meshgrid(height, np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
        return _polynomials(np.stack(at, -1).reshape(-1, 3)).reshape(len(images), h, w, -1)

    def inside(self, images: np.ndarray, height: np.ndarray, mask: np.ndarray) -> np.ndarray:
        y, x = (np.linspace(0, 1, side) for side in mask.shape[1:])
        area = mask.mean((1, 2))
        middle = (mask.mean(2) @ y / area, mask.mean(1) @ x / area)
        return _polynomials(np.stack([height, area, *middle], 1))


class Grey:
    """Greys as they are: `side` x `side` cells around a cell, of a plane its thumbnail, of a mask
    its distribution.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def planes(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        return resize_planes(images, self.side).reshape(len(images), -1).astype(np.float32)

    def cells(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        small = resize_planes(images.astype(np.float32), images.shape[1] // STRIDE)
        before, after = (self.side - 1) // 2, self.side // 2
        padded = np.pad(small, ((0, 0), (before, after), (before, after)))
        windows = sliding_window_view(padded, (self.side, self.side), (1, 2))
        return windows.reshape(*small.shape, -1)

    def inside(self, images: np.ndarray, height: np.ndarray, mask: np.ndarray) -> np.ndarray:
        greys = [image[own].astype(np.float32) for image, own in zip(images, mask, strict=True)]
        return np.stack([[*np.quantile(g, QUANTILES), g.mean(), g.std()] for g in greys])


class Network:
    """A frozen backbone and its maps of the planes asked about last."""

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        self.backbone, self.device = backbone, device
        self._kept: dict[bytes, list[torch.Tensor]] = {}  # (1, C, h', w') each, by the plane

    def maps(self, images: np.ndarray) -> list[torch.Tensor]:
        """`all_maps` of planes (S, h, w) uint8: (S, C, h', w') each, float32."""
        planes = [one.tobytes() for one in images]
        fresh = [k for k, plane in enumerate(planes) if plane not in self._kept]
        if fresh and len(fresh) + len(self._kept) > KEPT:
            self._kept, fresh = {}, [*range(len(planes))]
        if fresh:
            made = zip(*(one.split(1) for one in self._made(images[fresh])), strict=True)
            self._kept |= {planes[k]: list(own) for k, own in zip(fresh, made, strict=True)}
        known = zip(*(self._kept[plane] for plane in planes), strict=True)
        return [torch.cat(one) for one in known]

    @torch.no_grad()
    def _made(self, images: np.ndarray) -> list[torch.Tensor]:
        batch = standardise(torch.from_numpy(images)[:, None].to(self.device))
        batch = batch.contiguous(memory_format=torch.channels_last)
        return [one.float() for one in all_maps(self.backbone, batch)]


class Maps:
    """A network's last map or, with `scales`, all that it tells of."""

    def __init__(self, network: Network, scales: bool = False) -> None:
        self.network, self.first = network, 0 if scales else -1

    def maps(self, images: np.ndarray) -> list[torch.Tensor]:
        """(S, C, h', w') each, float32."""
        return self.network.maps(images)[self.first :]

    def planes(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Layer-normed mean and maximum of each map: what the classifier sees of a slice."""
        pooled = [pool_maps(one) for one in self.maps(images)]
        return torch.cat([functional.layer_norm(p, p.shape[1:]) for p in pooled], 1).cpu().numpy()

    def cells(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Larger maps are averaged over a cell, smaller ones interpolated."""
        size = tuple(side // STRIDE for side in images.shape[1:])
        shrink, grow = nn.AdaptiveAvgPool2d(size), nn.Upsample(size, mode="bilinear")
        found = [(shrink if one.shape[2] > size[0] else grow)(one) for one in self.maps(images)]
        return torch.cat(found, 1).permute(0, 2, 3, 1).cpu().numpy()

    def inside(self, images: np.ndarray, height: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Mean of each map, weighted by the share of the mask, and maximum where there is any."""
        share, found = torch.from_numpy(mask).to(self.network.device)[:, None].float(), []
        for one in self.maps(images):
            weight = nn.AdaptiveAvgPool2d(one.shape[2:])(share)
            mean = (one * weight).sum((2, 3)) / weight.sum((2, 3))
            most = one.masked_fill(weight == 0, -torch.inf).amax((2, 3))
            found.append(torch.cat([mean, most], 1))
        return torch.cat(found, 1).cpu().numpy()


class Both:
    """Two views side by side."""

    def __init__(self, first: View, second: View) -> None:
        self.views = first, second

    def planes(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        return np.concatenate([one.planes(images, height) for one in self.views], -1)

    def cells(self, images: np.ndarray, height: np.ndarray) -> np.ndarray:
        return np.concatenate([one.cells(images, height) for one in self.views], -1)

    def inside(self, images: np.ndarray, height: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.concatenate([one.inside(images, height, mask) for one in self.views], -1)


BASELINES: dict[str, View] = {
    "place": Place(),
    "3 x 3 pixels": Grey(3),
    "16 x 16 pixels": Grey(SIDE),
    "16 x 16 pixels and place": Both(Grey(SIDE), Place()),
}
