"""Model, teacher and terms: batch norm per feature, averages by hand, no gradient where none
belongs.
"""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.learning.backbone import create_backbone
from pipeline.learning.distributed import World, sync_batch_norm
from pipeline.learning.optimise import (
    Collapse,
    NonFiniteLoss,
    check_finite,
    fixed_statistics,
    momentum_at,
    warmup_cosine,
)
from pipeline.voco.losses import base_regularisation, position_loss, similarity
from pipeline.voco.model import (
    Embeddings,
    VocoNet,
    correlation,
    dropout_mask,
    make_teacher,
    spread_of,
    voco_terms,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return VocoNet(create_backbone("test_resnet"), crop=32, width=16, pool="clip")


def crops(B=2, P=5, S=3, side=32):
    return torch.randint(
        0, 256, (B, P, S, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_feature_width_is_measured(net):
    assert net.features == 96
    assert (
        VocoNet(create_backbone("test_resnet"), crop=64, width=16, pool="clip").features == 96 * 4
    )


@pytest.mark.parametrize(("pool", "groups"), [("clip", 1), ("slice", 3)])
def test_embedding_is_the_projector_of_the_mean_over_slices(net, pool, groups):
    net.pool = pool
    net.eval()
    found = net(crops())
    assert found.shape == (2, groups, 5, 16)
    pixels = (crops()[1, 4].float() / 255 - 0.449) / 0.226  # (S, h, w)
    features = net.backbone(pixels[:, None]).flatten(1)  # (S, F)
    expected = net.projector(features.mean(0, keepdim=True) if pool == "clip" else features)
    assert torch.allclose(found[1, :, 4], expected, atol=1e-4)


def test_batch_norm_is_per_feature_over_all_crops(net):
    """Not over the crop slot: each of the `width` features has mean 0 and variance 1 over volumes
    and crops together.
    """
    seen = []
    layer = net.projector[1]
    layer.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].clone(), output.clone()))
    )
    net.train()(crops())
    before, after = seen[0]
    assert before.shape == (2 * 5, 16)
    assert layer.weight.shape == (16,)
    expected = (before - before.mean(0)) / (before.var(0, correction=0) + layer.eps).sqrt()
    assert torch.allclose(after, expected, atol=1e-5)


def test_teachers_forward_pass_moves_no_statistics(net):
    teacher = make_teacher(net)
    before = {name: tensor.clone() for name, tensor in teacher.named_buffers() if "running" in name}
    teacher(crops())
    assert teacher.training
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in teacher.named_buffers()
        if "running" in name
    )
    assert torch.allclose(teacher(crops()), net.train()(crops()), atol=1e-5)


def test_terms_follow_the_definition():
    torch.manual_seed(3)
    student, teacher = (
        Embeddings(torch.randn(3, 2, 2, 8), torch.randn(3, 2, 4, 8)) for _ in range(2)
    )
    overlap = torch.rand(3, 2, 4)
    terms = voco_terms(
        student, teacher, overlap, student.base.roll(-1, 0), teacher.base.roll(-1, 0)
    )
    intra, inter, reg = [], [], []
    for b in range(3):
        for g in range(2):
            after = (b + 1) % 3
            intra.append(
                position_loss(similarity(student.random[b, g], teacher.base[b, g]), overlap[b])
            )
            target = similarity(teacher.random[b, g], teacher.base[after, g])
            inter.append(
                position_loss(similarity(student.random[b, g], student.base[after, g]), target)
            )
            reg.append(base_regularisation(student.base[b, g]))
    for name, values in (("intra", intra), ("inter", inter), ("reg", reg)):
        assert torch.allclose(terms[name], torch.stack(values).mean(), atol=1e-6)


def test_gradients_flow_through_both_sides_of_the_inter_volume_term():
    """By finite differences: random crops and the base crops of the volume after; the target is a
    constant.
    """
    torch.manual_seed(4)
    random, base, teacher, after = (torch.randn(3, 1, n, 5).double() for n in (2, 3, 3, 3))

    def inter(random, base):
        terms = voco_terms(
            Embeddings(random, base),
            Embeddings(random.detach(), teacher),
            torch.rand(3, 2, 3),
            base.roll(-1, 0),
            after,
        )
        return terms["inter"]

    frozen = random.clone()
    target = similarity(frozen, after)
    plain = position_loss(
        similarity(random.requires_grad_(), base.requires_grad_().roll(-1, 0)), target
    ).mean()
    expected = torch.autograd.grad(plain, (random, base))
    assert all(gradient.abs().sum() > 0.01 for gradient in expected)
    for found, wanted in zip(
        torch.autograd.grad(inter(random, base), (random, base)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_statistics_over_ranks_are_those_of_all_their_crops(dtype, tolerance):
    """Two ranks that hold the same crops: batch norm of the doubled batch, in float32 even where
    autocast brings bfloat16.
    """

    class Twins(World):
        def gather(self, tensor):
            return torch.cat([tensor, tensor])

    torch.manual_seed(0)
    plain = BatchNormAct2d(6, act_layer=nn.SiLU)
    synced = sync_batch_norm(copy.deepcopy(plain), Twins(0, 2, torch.device("cpu")))
    x = (3 * torch.randn(4, 6, 5, 5) + 2).to(dtype)
    expected = plain(torch.cat([x, x]).float())[:4]
    found = synced(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(synced, name), getattr(plain, name), rtol=1e-5, atol=1e-6
        )


def test_dropout_is_a_function_of_seed_and_step():
    masks = [
        dropout_mask((4, 1, 5, 1000), 0.2, seed, step, torch.device("cpu"))
        for seed, step in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])
    assert masks[0].unique().tolist() == pytest.approx([0, 1.25])
    assert masks[0].mean().item() == pytest.approx(1, abs=0.02)


def test_spread_and_correlation():
    assert spread_of(torch.randn(4, 1, 50, 64)).item() == pytest.approx(1, abs=0.02)
    assert spread_of(torch.ones(4, 1, 5, 64)).item() == pytest.approx(0, abs=1e-6)
    y = torch.rand(2, 2, 9)
    assert correlation(0.5 * y[:, None] + 0.1, y).item() == pytest.approx(1, abs=1e-5)
    assert correlation(torch.ones(2, 1, 2, 9), y).item() == 0


def test_schedules_are_pure_functions_of_the_step():
    assert [warmup_cosine(step, 4, 104) for step in (0, 3, 4, 54, 104)] == pytest.approx(
        [0.25, 1, 1, 0.5, 0]
    )
    assert warmup_cosine(0, 0, 10) == 1
    assert momentum_at(50, 100, 0.9, None) == 0.9
    assert [momentum_at(step, 100, 0.9, 1.0) for step in (0, 50, 100)] == pytest.approx(
        [0.9, 0.95, 1.0]
    )


def test_non_finite_values_are_named():
    check_finite(3, {"intra": 1.0}, ["a"])
    with pytest.raises(NonFiniteLoss, match=r"step 3: intra 1, inter nan; batch a\.npy, b\.npy"):
        check_finite(3, {"intra": 1.0, "inter": float("nan")}, ["a.npy", "b.npy"])
    assert issubclass(Collapse, RuntimeError)


def test_recomputed_activations_leave_statistics_alone(net):
    """Activation checkpointing runs the forward pass again in backward: same gradients, statistics
    moved once.
    """
    plain = copy.deepcopy(net).train()
    net.train().backbone.set_grad_checkpointing(True)
    plain(crops()).square().sum().backward()
    loss = net(crops()).square().sum()
    with fixed_statistics(net):
        loss.backward()
    for (name, a), b in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4), name
    for (name, a), b in zip(plain.named_buffers(), net.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(
        layer.momentum == 0.1 for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)
    )
