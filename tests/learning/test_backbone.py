"""Backbones: any family gives a map, transfer is strict, and small maps take the fast road to the
same numbers.
"""

import copy
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from pipeline.learning import fast_layers as layers
from pipeline.learning.backbone import (
    WrongSize,
    all_maps,
    create_backbone,
    feature_shape,
    load_backbone,
    save_backbone,
    standardise,
)
from pipeline.learning.fast_layers import speed_up
from pipeline.learning.weights import read_metadata, read_weights, save_weights
from pipeline.system.errors import InputError, TrainingStopped

TINY = "test_resnet"


def test_grey_values_are_normalised_by_constants():
    pixels = torch.tensor([0, 114, 255], dtype=torch.uint8)
    assert torch.allclose(
        standardise(pixels), (torch.tensor([0.0, 114, 255]) / 255 - 0.449) / 0.226, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", [TINY, "mobilenetv3_small_050", "test_vit", "swin_tiny_patch4_window7_224"]
)
def test_every_family_gives_a_map(name):
    backbone = create_backbone(name)
    C, h, w = feature_shape(backbone, 64)
    assert backbone.training
    assert backbone.eval()(torch.zeros(2, 1, 64, 64)).shape == (2, C, h, w)
    assert h == w > 1


@pytest.mark.parametrize(
    "name", [TINY, "mobilenetv3_small_050", "test_vit", "swin_tiny_patch4_window7_224", "coat_tiny"]
)
def test_all_maps_of_one_pass_end_with_the_backbones_own(name):
    backbone = create_backbone(name).eval()
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        *inner, own = all_maps(backbone, x)
        assert torch.equal(own, backbone(x))
        told = backbone.forward_intermediates(x, intermediates_only=True)
    assert [one.shape[2] for one in inner] == list(dict.fromkeys(t.shape[2] for t in told))
    for one in inner:
        last = [t for t in told if t.shape[2:] == one.shape[2:]][-1]
        assert torch.equal(one, last)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="mobilenetv3_small_050"):
        create_backbone("mobilenetv3_smal_050")


def test_saved_backbone_is_timms_own_state_dict(tmp_path):
    backbone = create_backbone(TINY)
    save_backbone(backbone, tmp_path / "backbone.safetensors", {"backbone": TINY})
    plain = timm.create_model(TINY, in_chans=1, num_classes=0, global_pool="")
    missing, unexpected = plain.load_state_dict(
        load_file(tmp_path / "backbone.safetensors"), strict=True
    )
    assert not missing
    assert not unexpected
    x = torch.randn(2, 1, 32, 32)
    assert torch.allclose(plain.eval()(x), backbone.eval()(x), atol=1e-5)
    other = create_backbone(TINY)
    count = len(plain.state_dict())
    assert load_backbone(other, tmp_path / "backbone.safetensors").startswith(
        f"{count} of {count} tensors"
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(other.state_dict().values(), backbone.state_dict().values(), strict=True)
    )
    assert read_metadata(tmp_path / "backbone.safetensors") == {"backbone": TINY}


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape", "not finite"])
def test_transfer_names_what_does_not_match_and_changes_nothing(tmp_path, fault):
    backbone = create_backbone(TINY)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    name = "layer1.0.conv1.weight"
    if fault == "missing":
        del state[name]
    elif fault == "unexpected":
        state[name := "layer9.weight"] = torch.zeros(1)
    elif fault == "of another shape":
        state[name] = torch.zeros(1)
    else:
        state[name][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(InputError, match=f"1 {fault} .*{name}"):
        load_backbone(backbone, tmp_path / "w.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        pytest.param("inception_v3", 64, [80, 96, 299], marks=pytest.mark.slow),
        ("levit_128s", 60, [32, 64, 224]),
        ("test_vit", 60, [32, 48, 64, 160]),
    ],
)
def test_a_model_that_takes_no_picture_of_a_size_names_sizes_that_fit(name, size, sizes):
    with pytest.raises(WrongSize, match=f"takes no images of {size} x {size} pixels") as fault:
        create_backbone(name, size=size)
    assert fault.value.sizes == sizes
    assert ", ".join(map(str, sizes)) in str(fault.value)
    for one in sizes[:2]:
        assert feature_shape(create_backbone(name, size=one), one)[1] > 0


SLOW_COAT = pytest.param("coat_lite_tiny", marks=pytest.mark.slow)


def newer(name):
    """A tiny model that the oldest timm does not have."""
    there = timm.is_model(name)
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason="an older timm"))


@pytest.mark.parametrize("name", [newer("test_maxvit"), newer("test_coatnet"), SLOW_COAT])
@pytest.mark.parametrize("size", [96, 128])
def test_attention_of_a_fixed_size_is_made_for_the_size_asked_for(name, size):
    backbone = create_backbone(name, size=size)
    C, h, w = feature_shape(backbone, size)
    assert (h, w) == (size // 32, size // 32)
    assert copy.deepcopy(backbone).eval()(torch.zeros(2, 1, size, size)).shape == (2, C, h, w)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("maxvit_tiny_tf_384", 384, (512, 12, 12)),
        ("coatnet_1_rw_224", 224, (768, 7, 7)),
        ("coat_lite_small", 384, (512, 12, 12)),
        ("vit_small_patch14_dinov2", 224, (384, 16, 16)),
    ],
)
def test_the_models_that_won_are_taken(name, size, shape):
    backbone = create_backbone(name, size=size)
    assert feature_shape(backbone, size) == shape
    pool = {} if name.startswith("coat_") else {"global_pool": ""}
    timms = timm.create_model(name, in_chans=1, num_classes=0, **pool)
    timms.load_state_dict(backbone.state_dict())


def test_tokens_become_the_map_that_they_were():
    """A class token in front, row by row."""
    plain = timm.create_model("test_vit", in_chans=1, num_classes=0, dynamic_img_size=True).eval()
    backbone = create_backbone("test_vit", size=64).eval()
    plain.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 1, 64, 64)
    tokens = plain.forward_features(x)
    side = int((tokens.shape[1] - 1) ** 0.5)
    maps = backbone(x)
    for row in range(side):
        for column in range(side):
            assert torch.equal(maps[0, :, row, column], tokens[0, 1 + row * side + column])


@pytest.mark.skipif(not timm.is_model("test_maxvit"), reason="an older timm")
def test_weights_of_another_image_size_are_interpolated_and_counted(tmp_path):
    """Relative positions of a window of 2 x 2 against one of 4 x 4; all else is taken as it is."""
    small, path = create_backbone("test_maxvit", size=64), tmp_path / "backbone.safetensors"
    save_backbone(small, path, {})
    large = create_backbone("test_maxvit", size=128)
    tables = [name for name in small.state_dict() if "relative_position_bias_table" in name]
    count = len(small.state_dict())
    report = load_backbone(large, path)
    assert report.startswith(f"{count} of {count} tensors matched")
    assert report.endswith(f", {len(tables)} of them interpolated to the image size")
    for name, tensor in small.state_dict().items():
        if name not in tables:
            assert torch.equal(tensor, large.state_dict()[name]), name
    assert "interpolated" not in load_backbone(create_backbone("test_maxvit", size=64), path)
    with pytest.raises(InputError, match="unexpected"):
        load_backbone(create_backbone(TINY), path)


@pytest.mark.skipif(not timm.is_model("test_maxvit"), reason="an older timm")
@pytest.mark.parametrize("size", [128, 160])
def test_an_imagenet_file_serves_a_model_of_another_size(tmp_path, size):
    """With a head, three channels and the tables of 160 pixels; timm's own loading is the
    reference.
    """
    full = timm.create_model("test_maxvit")
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    backbone = create_backbone("test_maxvit", "imagenet", str(tmp_path / "full.safetensors"), size)
    options = {"in_chans": 1, "num_classes": 0, "global_pool": "", "img_size": size}
    file = {"file": str(tmp_path / "full.safetensors")}
    plain = timm.create_model("test_maxvit", True, pretrained_cfg_overlay=file, **options)
    x = torch.randn(1, 1, size, size)
    assert torch.allclose(plain.eval()(x), backbone.eval()(x), atol=1e-4)


def test_imagenet_file_with_three_channels_and_a_head(tmp_path):
    """timm's own conversion of the same weights is the reference."""
    full = timm.create_model(TINY)
    for path in (tmp_path / "full.safetensors", tmp_path / "full.pth"):
        save_file(full.state_dict(), path) if path.suffix == ".safetensors" else torch.save(
            {"state_dict": full.state_dict()}, path
        )
        backbone = create_backbone(TINY, "imagenet", str(path))
        grey = torch.randn(1, 1, 32, 32)
        features = full.eval().forward_features(grey.expand(1, 3, 32, 32))
        assert torch.allclose(backbone.eval()(grey), features, atol=1e-4)
    with pytest.raises(InputError, match="missing"):
        create_backbone("mobilenetv3_small_050", "imagenet", str(tmp_path / "full.safetensors"))


def test_training_starts_from_a_file_of_our_own(tmp_path):
    """`model.weights` with `init=imagenet`: what one pretraining exported is where the next one
    begins.
    """
    backbone = create_backbone(TINY)
    save_backbone(backbone, tmp_path / "backbone.safetensors", {})
    begun = create_backbone(TINY, "imagenet", str(tmp_path / "backbone.safetensors"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(begun.state_dict().values(), backbone.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", [TINY, "mobilenetv3_small_050", "test_vit"])
def test_a_stem_divided_among_channels_gives_the_same_of_equal_planes(tmp_path, name):
    """What one channel gave: planes that do not change along z are what was pretrained on."""
    one, path = create_backbone(name, size=64).eval(), tmp_path / "backbone.safetensors"
    save_backbone(one, path, {})
    three = create_backbone(name, size=64, channels=3)
    stem = three.pretrained_cfg["first_conv"] + ".weight"
    count = len(one.state_dict())
    report = load_backbone(three, path)
    assert report.startswith(f"{count} of {count} tensors matched")
    assert report.endswith(f", {stem} divided among 3 channels")
    begun = create_backbone(name, "imagenet", str(path), 64, channels=3)
    grey = torch.randn(2, 1, 64, 64)
    for backbone in (three, begun):
        assert feature_shape(backbone, 64, 3) == feature_shape(one, 64)
        assert torch.allclose(
            backbone.eval()(grey.repeat(1, 3, 1, 1)), one(grey), rtol=1e-4, atol=1e-5
        )
    moved = torch.cat([grey, grey.flip(2), grey], 1)
    assert not torch.allclose(three(moved), one(grey), atol=1e-3), "each channel counts"
    with pytest.raises(InputError, match="of another shape"):
        load_backbone(create_backbone(name, size=64), _saved(three, tmp_path))


def _saved(backbone, folder):
    save_backbone(backbone, folder / "three.safetensors", {})
    return folder / "three.safetensors"


def test_three_channels_keep_the_weights_of_imagenets_rgb(tmp_path):
    full = timm.create_model(TINY)
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    backbone = create_backbone(TINY, "imagenet", str(tmp_path / "full.safetensors"), channels=3)
    own = backbone.state_dict()
    assert all(torch.equal(own[name], full.state_dict()[name]) for name in own)
    five = create_backbone(TINY, "imagenet", str(tmp_path / "full.safetensors"), channels=5)
    stem = full.pretrained_cfg["first_conv"] + ".weight"
    repeated = full.state_dict()[stem][:, [0, 1, 2, 0, 1]] * 3 / 5
    assert torch.allclose(five.state_dict()[stem], repeated)


@pytest.mark.parametrize("content", [None, b"", b"not tensors at all"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_unreadable_weights_are_input_errors(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="weights"):
        read_weights(path)


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"weight": nn.Linear(1, 1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not readable"):
        read_weights(tmp_path / "w.pth")


def test_non_finite_weights_are_not_written(tmp_path):
    layer = nn.Linear(2, 2)
    layer.bias.data[0] = float("inf")
    with pytest.raises(TrainingStopped, match="bias"):
        save_weights(tmp_path / "w.safetensors", layer)
    assert not list(tmp_path.iterdir())


def test_offline_imagenet_names_the_way_out(monkeypatch):
    original = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return original(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="model.weights"):
        create_backbone(TINY, "imagenet")


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [(3, 1, 1, True), (3, 2, 1, False), (5, 1, 2, False), (5, 2, 2, True), ((5, 3), 2, (2, 1), 0)],
)
def test_small_depthwise_convolutions_equal_the_library(size, kernel, stride, padding, bias):
    torch.manual_seed(size)
    plain = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=bool(bias)).double()
    fast = speed_up(copy.deepcopy(plain))
    assert type(fast) is not type(plain)
    x = torch.randn(3, 6, size, size).double().to(memory_format=torch.channels_last)
    found = []
    for layer in (plain, fast):
        own = x.clone().requires_grad_()
        y = layer(own)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        found.append((y, own.grad, *(one.grad for one in layer.parameters())))
    for expected, ours in zip(*found, strict=True):
        assert torch.allclose(expected, ours, rtol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "size", "own"),
    [
        *((3, 1, 2, True), (3, 1, 3, False), (3, 2, 3, True), (3, 2, 4, False)),
        *((5, 1, 4, True), (5, 1, (5, 4), True), (5, 1, 5, False)),
        *((5, 2, 5, True), (5, 2, 6, False), (7, 1, 6, True), (7, 1, 7, False)),
    ],
)
def test_the_way_to_a_weight_gradient_is_chosen_by_the_map(monkeypatch, kernel, stride, size, own):
    spy = mock.Mock(wraps=layers._by_products)
    monkeypatch.setattr(layers, "_by_products", spy)
    sizes = size if isinstance(size, tuple) else (size, size)
    layer = speed_up(nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6))
    layer(torch.randn(2, 6, *sizes)).sum().backward()
    assert spy.called == own


@pytest.mark.parametrize(("stride", "size", "own"), [(1, 8, True), (1, 9, False), (2, 32, True)])
def test_in_half_precision_small_maps_are_summed_in_full(stride, size, own):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, 3, stride, 1, groups=6, bias=False)
    fast, x = speed_up(copy.deepcopy(plain)), torch.randn(64, 6, size, size)
    x = x.to(memory_format=torch.channels_last)
    found = []
    for layer, half in ((plain, False), (fast, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x)
        y.backward(torch.ones_like(y))
        found.append(layer.weight.grad)
    assert (type(y.grad_fn).__name__ == "_DepthwiseFunctionBackward") == own
    assert torch.allclose(*found, rtol=0, atol=4e-3 * float(x.abs().sum((0, 2, 3)).max()))


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 11 * 8, 1 << 18])
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(1, 3, 2), (3, 7, 2), (2, (5, 4), 1)])
def test_the_first_convolution_equals_the_library(monkeypatch, at_once, channels, kernel, stride):
    monkeypatch.setattr(layers, "IN_CACHE", at_once)
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, 6, kernel, stride, 1).double()
    fast = speed_up(copy.deepcopy(plain))
    assert type(fast) is layers.Stem
    x = torch.randn(5, channels, 11, 8).double().to(memory_format=torch.channels_last)
    for asks in (False, True):  # the picture's own gradient, too
        found = []
        for layer in (plain, fast):
            layer.zero_grad()
            y = layer(own := x.clone().requires_grad_(asks))
            own_way = type(y.grad_fn).__name__ == "_StemFunctionBackward"
            assert own_way == (layer is fast and not asks)
            (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
            found.append((y, layer.weight.grad, layer.bias.grad, *([own.grad] if asks else [])))
        for expected, ours in zip(*found, strict=True):
            assert torch.allclose(expected, ours, rtol=1e-12)


@pytest.mark.parametrize("at_once", [1, 3 * 6 * 12 * 9, 1 << 18])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        *((3, (1, 1), (1, 1)), (3, (2, 2), (1, 1)), (5, (2, 2), (2, 2)), (5, (3, 2), (0, 1))),
        ((9, 3), (2, 1), (4, 1)),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_both_ways_to_a_weight_gradient_give_its_sum(
    monkeypatch, at_once, kernel, stride, padding, small
):
    monkeypatch.setattr(layers, "IN_CACHE", at_once)
    monkeypatch.setattr(layers, "_below_filter", lambda *layer: small)
    torch.manual_seed(0)
    x = torch.randn(7, 6, 12, 9).double()
    weight = torch.randn(6, 1, *np.broadcast_to(kernel, 2).tolist()).double()
    y = functional.conv2d(x, weight, None, stride, padding, 1, 6)
    gradient = torch.randn(y.shape).double()
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    expected = torch.zeros_like(weight)
    for i, j, r, c in np.ndindex(*weight.shape[2:], *y.shape[2:]):
        seen = padded[:, :, stride[0] * r + i, stride[1] * c + j]
        expected[:, 0, i, j] += (seen * gradient[:, :, r, c]).sum(0)
    found = layers.weight_gradient(x, gradient, weight, stride, padding)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_input_gradient_in_parts_is_the_librarys(monkeypatch, dtype, stride):
    # two images at once, the last part is smaller
    monkeypatch.setattr(layers, "ELEMENTS_AT_ONCE", 2 * 6 * 9 * 9)
    torch.manual_seed(0)
    x, weight = torch.randn(5, 6, 9, 9).double(), torch.randn(6, 1, 3, 3).double()
    y = functional.conv2d(own := x.clone().requires_grad_(), weight, None, stride, 1, 1, 6)
    y.backward(gradient := torch.randn(y.shape).double())
    found = layers.input_gradient(x.to(dtype), gradient.to(dtype), weight, stride, (1, 1))
    assert found.dtype == dtype
    assert torch.allclose(
        found.double(), own.grad, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.08
    )


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0"])
def test_whole_network_has_the_librarys_gradients_and_statistics(name):
    torch.manual_seed(0)
    fast = create_backbone(name).double()
    plain = timm.create_model(name, in_chans=1, num_classes=0, global_pool="").double()
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(4, 1, 32, 32).double().to(memory_format=torch.channels_last)
    gradients = []
    for model in (plain, fast):
        model.train()(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    kinds = {type(layer).__name__ for layer in fast.modules()}
    assert {"_NormAct", "Depthwise", "Pointwise", "Stem"} <= kinds
    # of efficientnet_b0: 6e4, so an absolute bound must scale
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    assert all(
        torch.allclose(a, b, rtol=1e-7, atol=1e-11 * largest)
        for a, b in zip(*gradients, strict=True)
    )
    assert all(torch.allclose(a, b) for a, b in zip(plain.buffers(), fast.buffers(), strict=True))


def test_mixed_precision_gradients_are_close():
    torch.manual_seed(0)
    backbone = create_backbone("mobilenetv3_small_050").to(memory_format=torch.channels_last)
    x, gradients = torch.randn(8, 1, 32, 32).to(memory_format=torch.channels_last), []
    for enabled in (False, True):
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = backbone(x).float().square().mean()
        loss.backward()
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()])
        )
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95
    assert all(parameter.grad.dtype == torch.float32 for parameter in backbone.parameters())


def test_less_is_kept_for_the_backward_pass():
    kept = {}
    for fast in (False, True):
        norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU)
        layers = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            speed_up(norm) if fast else norm,
            nn.Conv2d(8, 8, 3, padding=1),
        )
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=seen: s.setdefault(t.data_ptr(), t), lambda t: t
        ):
            layers(torch.randn(4, 8, 16, 16, requires_grad=True))
        kept[fast] = sum(t.numel() for t in seen.values() if t.shape[2:] == (16, 16))
    assert kept == {False: 4 * 8192, True: 3 * 8192}
