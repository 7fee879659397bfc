"""Position loss and regularisation against slow float64 loops, at their edges, and their
gradients.
"""

import numpy as np
import pytest
import torch
from helpers_losses import (
    slow_position_loss,
    slow_regularisation,
    slow_similarity,
    slow_softmax_position_loss,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.voco.losses import (
    base_regularisation,
    position_loss,
    similarity,
    softmax_position_loss,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 9), st.integers(1, 8))
def test_terms_equal_naive_loops(seed, R, K, E):
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((R, E)), rng.standard_normal((K, E))
    y = rng.random((R, K)) * (rng.random((R, K)) < 0.5)
    s = similarity(torch.from_numpy(u), torch.from_numpy(v))
    np.testing.assert_allclose(s.numpy(), slow_similarity(u, v), atol=1e-12)
    assert position_loss(s, torch.from_numpy(y)).item() == pytest.approx(
        slow_position_loss(s.tolist(), y.tolist()), rel=1e-12
    )
    assert base_regularisation(torch.from_numpy(v)).item() == pytest.approx(
        slow_regularisation(v), rel=1e-12, abs=1e-15
    )


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_position_loss_at_its_corners(label, value):
    s, y = (
        torch.full((2, 3), value, dtype=torch.float64),
        torch.full((2, 3), label, dtype=torch.float64),
    )
    assert position_loss(s, y).item() == pytest.approx(
        slow_position_loss(s.tolist(), y.tolist()), abs=1e-12
    )
    assert torch.isfinite(position_loss(s, y))


@pytest.mark.parametrize(("base", "expected"), [("equal", 1.0), ("opposite", 1 / 3), ("zero", 0.0)])
def test_degenerate_embeddings(base, expected):
    z = {
        "equal": torch.ones(4, 5),
        "opposite": torch.tensor([[1.0], [-1], [1], [-1]]).expand(4, 5),
        "zero": torch.zeros(4, 5),
    }[base]
    z = z.double().requires_grad_()
    loss, own = base_regularisation(z), similarity(z, z)
    assert loss.item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(slow_regularisation(z.tolist()))
    for labels in (torch.eye(4), torch.zeros(4, 4), torch.ones(4, 4)):
        slow = slow_position_loss(slow_similarity(z.tolist(), z.tolist()), labels.tolist())
        # 1 - (cosine of equal vectors) is 0 to rounding
        assert position_loss(own, labels).item() == pytest.approx(slow, abs=1e-9)
        loss = loss + position_loss(own, labels)
    loss.backward()
    assert torch.isfinite(z.grad).all()


def test_batched_terms_are_the_terms_of_each_sample():
    torch.manual_seed(0)
    s, y, z = torch.rand(3, 2, 2, 4), torch.rand(3, 2, 2, 4), torch.randn(3, 2, 4, 6)
    y = y * (y > 0.5)
    for b in range(3):
        for g in range(2):
            assert torch.allclose(position_loss(s, y)[b, g], position_loss(s[b, g], y[b, g]))
            assert torch.allclose(base_regularisation(z)[b, g], base_regularisation(z[b, g]))


def test_gradients():
    torch.manual_seed(1)
    u, v, y = torch.randn(2, 6).double(), torch.randn(4, 6).double(), torch.rand(2, 4).double()
    y = y * (y > 0.4)
    assert torch.autograd.gradcheck(
        lambda u, v: position_loss(similarity(u, v), y), (u.requires_grad_(), v.requires_grad_())
    )


def test_regularisation_stops_the_gradient_of_the_second_of_each_pair():
    torch.manual_seed(2)
    z = torch.randn(3, 5).double().requires_grad_()
    base_regularisation(z).backward()
    frozen = z.detach()
    for k in range(3):
        own = z.detach()[k].clone().requires_grad_()
        pairs = [
            torch.relu(torch.cosine_similarity(own, frozen[m], dim=0)) ** 2 for m in range(k + 1, 3)
        ]
        expected = torch.autograd.grad(sum(pairs) / 3, own)[0] if pairs else torch.zeros(5).double()
        assert torch.allclose(z.grad[k], expected)


def test_no_gradient_flows_into_the_labels():
    s, y = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    position_loss(s, y).backward()
    assert y.grad is None
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_softmax_position_loss_equals_plain_loops(temperature):
    """Of six random crops and nine base crops, the second without any overlap."""
    rng = np.random.default_rng(4)
    cosine, overlap = rng.uniform(-1, 1, (6, 9)), rng.random((6, 9)) * (rng.random((6, 9)) < 0.4)
    overlap[1] = 0
    found = softmax_position_loss(
        torch.from_numpy(cosine), labels := torch.from_numpy(overlap).requires_grad_(), temperature
    )
    slow = slow_softmax_position_loss(cosine.tolist(), overlap.tolist(), temperature)
    assert found.item() == pytest.approx(slow, rel=1e-12)
    assert not found.requires_grad, "no gradient flows into the labels"
    assert labels.grad is None
