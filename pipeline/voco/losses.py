"""The three terms of 2D-VoCo (the 3D method: arXiv 2402.17300; by slices: arXiv 2601.14593)."""

from functools import lru_cache

import torch
from torch.nn import functional

EPS = 1e-6


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """cos of all pairs: (..., R, E), (..., K, E) -> (..., R, K)."""
    return functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).mT


def similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """clamp(cos, 0, 1) of all pairs: (..., R, E), (..., K, E) -> (..., R, K)."""
    return cosine(first, second).clamp(0, 1)


def position_loss(similarity: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """l(y, s): (..., R, K), (..., R, K) -> (...), sums over one sample's pairs; no gradient flows
    into `overlap`.

    Pairs that overlap are drawn to their label in proportion to it, pairs that do not are pushed to
    0.
    """
    overlap = overlap.detach().to(similarity.dtype)
    apart = (overlap == 0).to(similarity.dtype)
    near = -(overlap * torch.log(1 - (overlap - similarity).abs() + EPS)).sum((-2, -1)) / (
        overlap.sum((-2, -1)) + EPS
    )
    far = (apart * similarity.square()).sum((-2, -1)) / (apart.sum((-2, -1)) + EPS)
    return near + far


def softmax_position_loss(
    cosine: torch.Tensor, overlap: torch.Tensor, temperature: float
) -> torch.Tensor:
    """(..., R, K), (..., R, K) -> (...): mean over the random crops of the cross entropy between
    each one's overlaps, as shares of their sum, and the softmax over base crops of cos /
    temperature.

    Our own: base crops compete for a random crop, where `position_loss` draws to each by itself.
    """
    shares = overlap.detach().to(cosine.dtype)
    shares = shares / (shares.sum(-1, keepdim=True) + EPS)
    return -(shares * functional.log_softmax(cosine / temperature, -1)).sum(-1).mean(-1)


@lru_cache(maxsize=8)
def pairs(K: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All k < m out of K, (K * (K - 1) / 2,) each; made once."""
    with torch.inference_mode(False):
        k, m = torch.triu_indices(K, K, 1, device=device)
    return k, m


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised temperature-scaled cross entropy of pairs (N, E), (N, E): each of the 2 N has its
    twin to find among the other 2 N - 1.
    """
    views = torch.cat([first, second])
    logits = cosine(views, views) / temperature
    logits = logits.masked_fill(
        torch.eye(len(views), dtype=torch.bool, device=views.device), float("-inf")
    )
    twins = torch.arange(len(views), device=views.device).roll(len(first))
    return functional.cross_entropy(logits, twins)


def base_regularisation(base_embeddings: torch.Tensor) -> torch.Tensor:
    """reg: (..., K, E) -> (...): mean over pairs k < m of relu(cos(z_k, sg z_m))^2, which keeps
    base crops apart.
    """
    unit = functional.normalize(base_embeddings, dim=-1)
    k, m = pairs(unit.shape[-2], unit.device)
    return torch.relu((unit @ unit.detach().mT)[..., k, m]).square().mean(-1)
