"""The three terms of 2D-VoCo (the 3D method: arXiv 2402.17300; by slices: arXiv 2601.14593)."""

import torch
from torch.nn import functional

EPS = 1e-6


def similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """clamp(cos, 0, 1) of all pairs: (..., R, E), (..., K, E) -> (..., R, K)."""
    return (functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).mT).clamp(
        0, 1
    )


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


def base_regularisation(base_embeddings: torch.Tensor) -> torch.Tensor:
    """reg: (..., K, E) -> (...): mean over pairs k < m of relu(cos(z_k, sg z_m))^2, which keeps
    base crops apart.
    """
    unit = functional.normalize(base_embeddings, dim=-1)
    K = unit.shape[-2]
    k, m = torch.triu_indices(K, K, 1, device=unit.device)
    return torch.relu((unit @ unit.detach().mT)[..., k, m]).square().mean(-1)
