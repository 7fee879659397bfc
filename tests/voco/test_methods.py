"""Every method on the one loop: its terms, its figures against slow loops, what is stopped goes on
as if it had not, and what is exported.
"""

import os
import signal

import numpy as np
import pytest
import torch
from helpers_losses import slow_nt_xent
from helpers_pretrain import ALONE, TINY, numbers, trained, volumes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.learning.backbone import GREY_MEAN, GREY_STD
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.log import read_log
from pipeline.run.presets import load_config
from pipeline.voco import pretrain as loop
from pipeline.voco.losses import nt_xent
from pipeline.voco.simclr import retrieved
from pipeline.voco.step import METHODS, train_step


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return volumes_of(tmp_path_factory.mktemp("run"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8), st.floats(0.05, 2))
def test_nt_xent_equals_naive_loops(seed, N, E, temperature):
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, N, E))
    found = nt_xent(torch.from_numpy(first), torch.from_numpy(second), temperature)
    assert found.item() == pytest.approx(
        slow_nt_xent(first, second, temperature), rel=1e-9, abs=1e-9
    )


def test_nt_xent_is_that_of_lightly():
    loss = pytest.importorskip("lightly.loss", reason="needs the extra peers").NTXentLoss
    first, second = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    for temperature in (0.1, 0.5):
        expected = loss(temperature=temperature)(first, second)
        torch.testing.assert_close(nt_xent(first, second, temperature), expected)


def test_a_twin_is_retrieved_where_it_is_the_most_similar():
    first = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    second = torch.tensor([[0.9, 0.1, 0], [0.8, 0.2, 0.6]])
    # the second of place 1 looks more like place 0, and the first of place 1 most like it
    assert retrieved(first, second).tolist() == [True, True, True, False]


@pytest.mark.parametrize("z_bins", [1, 2])
def test_height_is_regressed_for_slices_or_slabs(volumes, z_bins):
    plain = ("pretrain.method=height", f"pretrain.z_bins={z_bins}", "pretrain.slices=4")
    run, samples = trained(*plain, "pretrain.amp=false", volumes=volumes)
    batch = samples[0]
    with torch.no_grad():
        found = run.method.student(batch["crops"])  # (B, G, P)
    loss, stats = run.method.loss(batch, 0)
    errors = []
    for b in range(4):
        phase = 4 * batch["heights"][b, 0].item()
        for g in range(found.shape[1]):
            slices = [g] if z_bins == 1 else [2 * g, 2 * g + 1]
            height = sum((s + phase) / 4 for s in slices) / len(slices)
            errors += [(value - height) ** 2 for value in found[b, g].tolist()]
    assert found.shape[1] == (4 if z_bins == 1 else 2)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert stats.tolist() == [pytest.approx(loss.item())]


def test_masked_patches_alone_count(volumes):
    """The decoder's output against plain loops over hidden pixels, and what it is given."""
    run, samples = trained("pretrain.method=masked", "pretrain.amp=false", volumes=volumes)
    batch, seen = samples[0], []
    run.method.student.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].detach(), output.detach()))
    )
    loss, stats = run.method.loss(batch, step=3)
    given_, painted = (tensor[:, 0].double().numpy() for tensor in seen[0])
    images = (batch["crops"].flatten(0, 2).double().numpy() / 255 - GREY_MEAN) / GREY_STD
    own, plain, count = 0.0, 0.0, 0
    for image, shown, guess in zip(images, given_, painted, strict=True):
        hidden = np.kron(np.ones((8, 8)), np.ones((3, 3))) == 0
        for y in range(8):
            for x in range(8):
                cell = np.s_[3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
                gone = np.all(shown[cell] == 0)
                assert gone or np.allclose(shown[cell], image[cell], atol=1e-5), "all or nothing"
                hidden[cell] = gone
        mean = image[~hidden].mean()
        own += ((guess - image)[hidden] ** 2).sum()
        plain += ((mean - image)[hidden] ** 2).sum()
        count += hidden.sum()
    assert count / images.size == pytest.approx(0.6, abs=0.05)
    assert loss.item() == pytest.approx(own / count, rel=1e-4)
    assert stats[1].item() == pytest.approx(1 - own / plain, rel=1e-3)


def test_pairs_show_one_place_twice(volumes):
    run, samples = trained("pretrain.method=simclr", "pretrain.random_crops=4", volumes=volumes)
    plain = samples.sample(0, [1, 2, 3], augment=False)
    # (4 random + 4 base) // 2 places; each view within an eighth of a side of 24
    assert plain["crops"].shape == (8, 2, 24, 24)
    own = np.diag(plain["overlap"])
    assert own.min() >= (1 - 1 / 8) ** 2 - 1e-6
    first, second = plain["crops"][:4], plain["crops"][4:]
    assert not np.array_equal(first, second)
    loss, stats = run.method.loss(samples[0], 0)
    assert loss.item() > 0
    assert len(stats) == len(run.method.stats)


FIGURES = {
    "voco2d": "position_accuracy",
    "height": "height_r2",
    "simclr": "retrieval_accuracy",
    "masked": "held_out_explained",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_of_every_method_goes_on_as_if_it_had_not_stopped(
    volumes, tmp_path, monkeypatch, method
):
    config = load_config("smoke", (*TINY, f"pretrain.method={method}", "pretrain.steps=4"))
    counts = loop.pretrain(config, volumes, tmp_path / "unbroken", ALONE)

    def stopping(run, batch, stop=False):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, batch, stop)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(SystemExit):
        loop.pretrain(config, volumes, tmp_path / "broken", ALONE)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "broken" / "last.ckpt")["step"] < 4
    assert loop.pretrain(config, volumes, tmp_path / "broken", ALONE) == counts
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "unbroken")
    first, second = (
        load_file(tmp_path / name / "backbone.safetensors") for name in ("broken", "unbroken")
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    records = read_log(tmp_path / "broken" / "log.jsonl")
    assert counts["merit"] == FIGURES[method]
    assert [FIGURES[method] in record for record in records] == [False, False, True, True]
    assert all(set(METHODS[method].stats) <= record.keys() for record in records)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"voco2d"}))
def test_every_method_learns(volumes, method):
    """Twelve steps on one batch lower its loss."""
    options = (f"pretrain.method={method}", "pretrain.lr=0.003", "pretrain.warmup=0")
    run, samples = trained(*options, "pretrain.steps=1000", volumes=volumes)
    losses = []
    for _ in range(12):
        losses.append(train_step(run, samples[0]).read()[0]["loss"])
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
