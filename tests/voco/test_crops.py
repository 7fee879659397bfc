"""Boxes and labels against counted pixels; augmentation leaves the labels true; the sampler is a
pure function.
"""

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.run.config import VocoConfig
from pipeline.system.errors import InputError
from pipeline.voco.crops import base_boxes, cut, overlap_labels, random_boxes, turn
from pipeline.voco.data import VocoSamples, batches, choose_volumes, evaluation_batches
from pipeline.volumes.sampling import evenly, resize_planes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 12), st.integers(1, 4))
def test_labels_equal_counted_pixels(seed, grid, side, count):
    size = grid * side
    random, base = (
        random_boxes(size, grid, count, np.random.default_rng(seed)),
        base_boxes(size, grid),
    )
    labels = overlap_labels(random, base)
    for r, (y0, x0, y1, x1) in enumerate(random):
        canvas = np.zeros((size, size), bool)
        canvas[y0:y1, x0:x1] = True
        assert canvas.sum() == side * side
        counted = [canvas[a:c, b:d].sum() / side**2 for a, b, c, d in base]
        np.testing.assert_allclose(labels[r], counted, atol=1e-12)
    np.testing.assert_allclose(labels.sum(1), 1)
    assert np.allclose(
        overlap_labels(torch.from_numpy(random), torch.from_numpy(base)).numpy(), labels
    )


def test_random_centres_are_uniform_over_all_places():
    boxes = random_boxes(24, 3, 20_000, np.random.default_rng(0))
    counts = np.stack([np.bincount(boxes[:, axis], minlength=17) for axis in (0, 1)])
    assert counts.shape == (2, 17)
    assert np.abs(counts / 20_000 - 1 / 17).max() < 0.01


def test_slices_are_spread_evenly():
    assert evenly(96, 32).tolist() == list(range(1, 96, 3))
    assert evenly(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_planes_are_resized_by_area():
    planes = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    expected = planes.reshape(2, 4, 2, 4, 2).mean((2, 4))
    assert np.abs(resize_planes(planes, 4) - expected).max() <= 0.51


@pytest.mark.parametrize("draw", range(8))
def test_labels_stay_true_when_crops_are_turned(draw):
    """Paint a random box into an empty volume: what a base crop shows of it is its label, turned or
    not.
    """
    base, random = base_boxes(24, 3), random_boxes(24, 3, 3, np.random.default_rng(draw))
    for r, (y0, x0, y1, x1) in enumerate(random):
        volume = np.zeros((2, 24, 24), np.uint8)
        volume[:, y0:y1, x0:x1] = 200
        crops = turn(cut(volume, np.concatenate([random, base])), np.full(len(random) + 9, draw))
        np.testing.assert_allclose(
            (crops[len(random) :] == 200).mean((1, 2, 3)), overlap_labels(random, base)[r]
        )


def test_turns_are_the_eight_symmetries():
    crop = np.arange(9, dtype=np.uint8).reshape(1, 1, 3, 3)
    seen = {turn(crop, np.array([draw])).tobytes() for draw in range(8)}
    assert len(seen) == 8
    assert np.array_equal(turn(crop, np.array([0])), crop)


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(16):
        source, path = ("train", "unlabelled")[n >= 12], f"{n // 2}_{n}.npy"
        np.save(tmp_path / path, rng.integers(60, 200, (12, 48, 48), np.uint8))
        rows.append(
            {
                "patient_id": ("unlabelled-" if n >= 12 else "") + str(n // 2),
                "series_id": str(n),
                "source": source,
                "path": path,
            }
        )
    pl.DataFrame(rows).write_parquet(tmp_path / "index.parquet")
    return tmp_path


SMALL = VocoConfig(batch=4, slices=3, image_size=48, grid=3, random_crops=2, holdout=4, workers=0)


def test_held_out_patients_are_never_trained_on(store):
    index = pl.read_parquet(store / "index.parquet")
    training, held = choose_volumes(index, SMALL, seed=1)
    owner = dict(index.select("path", "patient_id").iter_rows())
    assert len(held) == 4
    assert len(training) == 12
    assert not {owner[path] for path in training} & {owner[path] for path in held}
    none = choose_volumes(index, SMALL.model_copy(update={"unlabelled": 0.0}), seed=1)
    assert not any(owner[path].startswith("unlabelled") for path in none[0] + none[1])
    half = choose_volumes(index, SMALL.model_copy(update={"patients": 0.5}), seed=1)
    used = {owner[path] for path in half[0] + half[1]}
    assert len(used) == round(0.5 * len(set(owner.values())))
    with pytest.raises(InputError, match="too few"):
        choose_volumes(index.head(3), SMALL, seed=1)


def test_batches_are_a_function_of_the_step_and_ranks_share_them(store):
    training, _ = choose_volumes(pl.read_parquet(store / "index.parquet"), SMALL, seed=1)
    whole = VocoSamples(store, training, SMALL, seed=5)
    halves = [VocoSamples(store, training, SMALL, seed=5, rank=rank, size=2) for rank in range(2)]
    for step in (0, 7):
        batch, parts = whole[step], [half[step] for half in halves]
        assert batch["crops"].shape == (4, 11, 3, 16, 16)
        assert torch.equal(batch["crops"], torch.cat([part["crops"] for part in parts]))
        assert torch.equal(batch["overlap"], torch.cat([part["overlap"] for part in parts]))
        assert torch.equal(
            batch["crops"], VocoSamples(store, training, SMALL, seed=5)[step]["crops"]
        )
    late = [batch["crops"] for batch in batches(whole, 6, 8, pinned=False)]
    assert torch.equal(late[1], whole[7]["crops"])
    ahead = VocoSamples(store, training, SMALL.model_copy(update={"workers": 1}), seed=5)
    assert torch.equal(next(iter(batches(ahead, 7, 8, pinned=False)))["crops"], late[1])


def test_an_epoch_shows_each_volume_once_and_mixes_the_sources(store):
    training, _ = choose_volumes(pl.read_parquet(store / "index.parquet"), SMALL, seed=1)
    samples = VocoSamples(store, training, SMALL, seed=5)
    epochs = [
        np.concatenate([samples.order(step) for step in range(start, start + 3)])
        for start in (0, 3)
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert not np.array_equal(*epochs)
    assert not np.array_equal(epochs[0], np.arange(12))


@pytest.mark.parametrize(
    "drawn", [{}, {"turn": 1.0}, {"intensity": 1.0}, {"turn": 1.0, "intensity": 1.0}]
)
def test_labels_of_a_sample_are_its_painted_pixels_whatever_is_drawn(store, drawn):
    """The random box of a sample, painted bright in the volume: its share in each base crop is the
    sample's label.
    """
    config = SMALL.model_copy(update={"turn": 0.0, "intensity": 0.0, "random_crops": 1, **drawn})
    samples = VocoSamples(store, ["painted.npy"], config, seed=5)
    seen = []
    for step in range(6):
        ((y0, x0, y1, x1),) = random_boxes(48, 3, 1, np.random.default_rng([5, step, 0]))
        volume = np.full((12, 48, 48), 60, np.uint8)
        volume[:, y0:y1, x0:x1] = 180
        np.save(store / "painted.npy", volume)
        sample, plain = (
            samples.sample(0, [5, step, 0], augment=augment) for augment in (True, False)
        )
        painted = sample["crops"].astype(int) > 120  # (1 + 9, 3, 16, 16)
        np.testing.assert_allclose(painted[1:].mean((1, 2, 3)), sample["overlap"][0], atol=1e-6)
        assert painted[0].all()
        seen.append(np.array_equal(sample["crops"], plain["crops"]))
    assert any(seen) != bool(drawn), "drawn, or not"


def test_evaluation_crops_are_fixed_and_plain(store):
    samples = VocoSamples(store, ["6_12.npy", "6_13.npy"], SMALL, seed=5)
    first, again = (
        torch.cat([batch["crops"] for batch in evaluation_batches(samples, 2)]) for _ in range(2)
    )
    assert torch.equal(first, again)
    volume = np.load(store / "6_12.npy")[evenly(12, 3)]
    assert np.array_equal(first[0, 2:].numpy(), cut(volume, samples.base))


def test_volumes_are_resampled_in_depth_on_reading(store):
    """`pretrain.depth=8` of 12 stored planes: every plane is the mean of one and a half."""
    config = SMALL.model_copy(update={"depth": 8, "slices": 4})
    samples = VocoSamples(store, ["6_12.npy"], config, seed=5)
    stored = np.load(store / "6_12.npy").astype(float)
    expected = [
        np.repeat(stored, 2, axis=0)[3 * k : 3 * k + 3].mean(0)  # halves of planes
        for k in (1, 3, 5, 7)
    ]
    assert np.abs(samples.planes(0) - expected).max() <= 0.5 + 1e-4
    as_stored = SMALL.model_copy(update={"depth": 12})
    plain = VocoSamples(store, ["6_12.npy"], SMALL, seed=5)
    assert np.array_equal(
        VocoSamples(store, ["6_12.npy"], as_stored, seed=5).planes(0), plain.planes(0)
    )
