"""Slabs along z, the window, symmetric intra, where dropout acts, and what needs no network."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from helpers_losses import (
    slow_cosine,
    slow_overlap,
    slow_position_loss,
    slow_softmax_position_loss,
)
from helpers_pretrain import ALONE, TINY, trained, volumes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.learning.backbone import create_backbone
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.log import read_log
from pipeline.run import layout
from pipeline.run.config import VocoConfig
from pipeline.run.presets import load_config
from pipeline.run.stage import Options, Stage
from pipeline.system.errors import InputError
from pipeline.voco import baselines
from pipeline.voco import pretrain as loop
from pipeline.voco.crops import (
    base_boxes,
    hits,
    in_slabs,
    overlap_labels,
    random_boxes,
    twin_boxes,
    window_of,
)
from pipeline.voco.data import VocoSamples, choose_volumes
from pipeline.voco.model import Embeddings, VocoNet, voco_terms
from pipeline.voco.stage import excluded_patients, pretrain_voco2d
from pipeline.voco.step import identity
from pipeline.voco.voco2d import Voco2D


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return volumes_of(tmp_path_factory.mktemp("run"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 9), st.integers(1, 4))
def test_labels_with_z_equal_naive_loops(seed, grid, side, z_bins):
    """Of boxes anywhere, also across slabs; and of crops in slabs, whose rows sum to 1."""
    rng, size = np.random.default_rng(seed), grid * side
    base = in_slabs(base_boxes(size, grid), z_bins)
    plane = random_boxes(size, grid, 3, rng)
    z0 = rng.uniform(-0.5, z_bins, (3, 1))
    anywhere = np.concatenate([z0, plane[:, :2], z0 + rng.uniform(0.2, 2, (3, 1)), plane[:, 2:]], 1)
    for random in (anywhere, in_slabs(plane, z_bins)):
        expected = slow_overlap(random.tolist(), base.tolist())
        np.testing.assert_allclose(overlap_labels(random, base), expected, atol=1e-12)
        torch.testing.assert_close(
            overlap_labels(torch.from_numpy(random), torch.from_numpy(base)).double(),
            torch.tensor(expected, dtype=torch.float64),
        )
    np.testing.assert_allclose(np.sum(expected, 1), 1)
    flat = overlap_labels(plane, base_boxes(size, grid))
    np.testing.assert_allclose(expected, np.kron(np.eye(z_bins), flat), atol=1e-12)


def test_window_lies_in_the_plane_and_moves_by_its_jitter():
    rows, columns = window_of((100, 200), 0.15, 0.08, np.array([-1.0, 1.0]))
    assert (rows, columns) == (slice(7, 77), slice(46, 186))
    assert window_of((100, 200), 0.15, 0.08, np.zeros(2)) == (slice(15, 85), slice(30, 170))
    # rounding never leaves the plane
    for draw in (-1.0, 1.0):
        for part, size in zip(
            window_of((47, 33), 0.1, 0.1, np.full(2, draw)), (47, 33), strict=True
        ):
            assert part.start >= 0
            assert part.stop <= size


def test_a_sample_shows_the_window_at_the_place_that_was_drawn(volumes):
    """The base crops of a sample, put together, are one window of the stored plane."""
    config = VocoConfig(
        batch=2, slices=3, image_size=33, grid=3, window=True, augment=False, holdout=2, workers=0
    )
    samples, seen = VocoSamples(volumes, ["p0_0.npy"], config, seed=5), set()
    volume = np.load(volumes / "p0_0.npy")[[2, 6, 10]]
    for step in range(8):
        crops = samples.sample(0, [5, step, 0])["crops"][2:]
        plane = np.concatenate([np.concatenate(list(crops[k : k + 3]), 2) for k in (0, 3, 6)], 1)
        places = [
            (y, x)
            for y in range(16)
            for x in range(16)
            if np.array_equal(volume[:, y : y + 33, x : x + 33], plane)
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 4
    # 15 % of 48 pixels, give or take 8 %
    assert all(3 <= y <= 11 and 3 <= x <= 11 for y, x in seen)


def test_twins_stay_near_and_in_the_plane():
    boxes = random_boxes(48, 3, 200, np.random.default_rng(0))
    twins = twin_boxes(boxes, 48, np.random.default_rng(1))
    assert np.abs(twins - boxes).max() == 2
    assert twins.min() >= 0
    assert twins.max() <= 48
    assert (twins[:, 2:] - twins[:, :2] == 16).all()


def test_hits_follow_their_definition():
    """Two slabs of two tiles: slab by slab."""
    overlap = np.array([[0, 0, 0.54, 0.46]] * 4 + [[0, 0, 0.7, 0.3]])
    found = hits(np.array([0, 1, 2, 3, 3]), overlap, 2)
    assert found["position_accuracy"].tolist() == [True, True, True, True, False]
    assert found["slab_accuracy"].tolist() == [False, False, True, True, True]
    assert found["place_accuracy"].tolist() == [False, False, True, True, False]
    assert hits(np.array([1]), np.array([[0.5, 0.3]]), 1) == {"position_accuracy": [False]}


def test_slabs_are_means_of_their_own_slices():
    torch.manual_seed(0)
    net = VocoNet(create_backbone("test_resnet"), crop=32, width=16, pool="clip", z_bins=2).eval()
    crops = torch.randint(0, 256, (2, 5, 6, 32, 32), dtype=torch.uint8)
    found = net(crops)
    assert found.shape == (2, 2, 5, 16)
    net.z_bins = 1
    for slab in range(2):
        alone = net(crops[:, :, 3 * slab : 3 * slab + 3])
        torch.testing.assert_close(found[:, slab], alone[:, 0], rtol=1e-3, atol=1e-4)
    parts = Embeddings.split(found, 2, 2)
    assert torch.equal(parts.random[1, 0], torch.cat([found[1, 0, :2], found[1, 1, :2]]))
    assert torch.equal(parts.base[1, 0], torch.cat([found[1, 0, 2:], found[1, 1, 2:]]))


@pytest.mark.parametrize("place", ["slices", "mean"])
def test_dropout_acts_where_it_is_told(volumes, monkeypatch, place):
    """Before the mean each slice's features are dropped by themselves; after it the mean's."""
    run, samples = trained(f"pretrain.dropout_at={place}", "pretrain.amp=false", volumes=volumes)
    crops, seen = samples[0]["crops"], []
    keep = run.method._dropout(crops, step=0)
    net = run.method.student
    assert keep.shape == (4, 2 if place == "slices" else 1, 5, net.features)
    net.projector.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    raw = []
    net.backbone.register_forward_hook(lambda module, inputs, output: raw.append(output))
    net(crops, keep)
    slices = raw[0].flatten(1).view(4, 5, 2, -1)
    expected = (
        torch.stack([slices[:, :, s] * keep[:, s] for s in range(2)]).mean(0)
        if place == "slices"
        else slices.mean(2) * keep[:, 0]
    )
    torch.testing.assert_close(seen[0], expected.reshape(20, -1))


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_symmetric_intra_takes_the_mean_of_both_directions(temperature):
    torch.manual_seed(3)
    student, teacher = (
        Embeddings(torch.randn(3, 1, 2, 8), torch.randn(3, 1, 4, 8)) for _ in range(2)
    )
    overlap = torch.rand(3, 2, 4)
    following = student.base, teacher.base
    terms = voco_terms(student, teacher, overlap, *following, True, temperature)
    losses = []
    for b in range(3):
        alike = [
            [
                (slow_cosine(s, tb) + slow_cosine(t, sb)) / 2
                for tb, sb in zip(
                    teacher.base[b, 0].tolist(), student.base[b, 0].tolist(), strict=True
                )
            ]
            for s, t in zip(
                student.random[b, 0].tolist(), teacher.random[b, 0].tolist(), strict=True
            )
        ]
        labels, clamped = overlap[b].tolist(), np.clip(alike, 0, 1).tolist()
        losses.append(
            slow_position_loss(clamped, labels)
            if temperature is None
            else slow_softmax_position_loss(alike, labels, temperature)
        )
    assert terms["intra"].item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("slabs", [1, 2])
def test_at_a_temperature_that_tells_nothing_apart_softmax_intra_is_chance(volumes, slabs):
    keys = "pretrain.intra_loss=softmax", "pretrain.temperature=1e6", f"pretrain.z_bins={slabs}"
    run, samples = trained(*keys, volumes=volumes)
    _, stats = run.method.loss(samples[0], 0)
    bases = slabs * run.config.pretrain.grid**2
    assert stats[1].item() == pytest.approx(np.log(bases), rel=1e-4)


def test_crops_of_which_no_term_asks_are_not_looked_at(volumes):
    """Softmax alone in one direction: the student's random and the teacher's base crops."""
    keys = "pretrain.inter=0", "pretrain.regularisation=0", "pretrain.dropout=0"
    run, samples = trained(
        "pretrain.intra_loss=softmax", "pretrain.z_bins=2", *keys, volumes=volumes
    )
    method, batch, counts = run.method, samples[0], []
    # so that no crop depends on the others
    student, teacher = (network.eval() for network in method.networks.values())
    torch.manual_seed(3)
    for weights in teacher.parameters():
        weights.data += 0.1 * weights.data.std().nan_to_num() * torch.randn_like(weights)
    for network in (student, teacher):
        network.backbone.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    loss, stats = method.loss(batch, 0)
    loss.backward()
    B, P, S = batch["crops"].shape[:3]
    R = method.options.random_crops
    assert counts == [B * R * S, B * (P - R) * S]
    assert all(weights.grad.isfinite().all() for weights in student.parameters())
    with torch.no_grad():
        whole = [Embeddings.split(network(batch["crops"]), R, 2) for network in (student, teacher)]
    temperature = method.options.temperature
    expected = voco_terms(*whole, batch["overlap"], temperature=temperature)["intra"].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    swapped = voco_terms(*whole[::-1], batch["overlap"], temperature=temperature)["intra"].item()
    assert abs(swapped - expected) > 1e-3, "the sides differ"
    assert stats[2:4].tolist() == [0, 0], "inter and reg"


def test_the_students_own_base_crops_are_met_and_learn(volumes):
    """One pass of the student for all crops and none of the teacher; gradients of both sides."""
    keys = (
        *("pretrain.base_encoder=student", "pretrain.inter=0", "pretrain.regularisation=0"),
        *("pretrain.intra_loss=softmax", "pretrain.dropout=0", "pretrain.z_bins=2"),
    )
    run, samples = trained(*keys, volumes=volumes)
    method, batch, passes = run.method, samples[0], []
    student, teacher = (network.eval() for network in method.networks.values())
    R, temperature = method.options.random_crops, method.options.temperature
    hooks = [
        network.register_forward_hook(lambda net, _, out: passes.append((net, out)))
        for network in (student, teacher)
    ]
    loss, stats = method.loss(batch, 0)
    for hook in hooks:
        hook.remove()
    [(net, embeddings)] = passes
    assert net is student
    assert embeddings.shape[:3] == (len(batch["crops"]), 2, batch["crops"].shape[1])
    losses = []
    for b, labels in enumerate(batch["overlap"].tolist()):
        crops = embeddings[b].detach().tolist()  # by slab and crop
        random, base = [
            [e for slab in crops for e in slab[part]] for part in (slice(R), slice(R, None))
        ]
        alike = [[slow_cosine(r, k) for k in base] for r in random]
        losses.append(slow_softmax_position_loss(alike, labels, temperature))
    assert stats[1].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert stats[2].item() == 0, "inter"
    assert stats[3].item() > 0, "reg, weighted by 0"
    learnt = torch.autograd.grad(loss, embeddings)[0]
    assert (learnt[:, :, :R].abs().sum(-1) > 0).all(), "random crops learn"
    assert (learnt[:, :, R:].abs().sum(-1) > 0).all(), "and base crops"


@pytest.mark.parametrize("more", [(), ("pretrain.inter=0", "pretrain.symmetric=true")])
def test_the_students_own_base_crops_exclude_what_needs_the_teacher(more):
    with pytest.raises(InputError, match="set inter=0 and symmetric=false"):
        load_config("smoke", ("pretrain.base_encoder=student", *more))
    other = load_config("smoke", ("pretrain.base_encoder=student", *more, "pretrain.method=simclr"))
    assert other.pretrain.base_encoder == "student", "a key of 2D-VoCo alone"


def test_a_batch_of_one_has_no_inter_volume_term(volumes):
    run, samples = trained("pretrain.batch=1", "pretrain.inter=0", volumes=volumes)
    loss, stats = run.method.loss(samples[0], 0)
    assert len(samples[0]["ids"]) == 1
    assert stats[2] == 0
    assert loss.item() == pytest.approx((stats[1] + stats[3]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch=1"], "batch=1 has no next volume for the term inter: set inter=0"),
        (["slices=8", "z_bins=3"], "slices=8 is no multiple of z_bins=3"),
        (["z_bins=2", "pool=slice"], "it needs pool=clip"),
        (["window=true", "window_jitter=0.2"], "window_jitter=0.2 is more than window_margin=0.15"),
        (["window=true", "window_margin=0.49"], "leaves 0 pixels of volume.height=48"),
        (["exclude_fold=2"], "exclude_fold=2 is none of folds.count=2 folds"),
        (["method=byol"], "method"),
    ],
)
def test_keys_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config("smoke", [f"pretrain.{one}" for one in overrides])


def test_pictures_of_crops_are_means_over_cells_and_slices():
    """Against plain loops; the silhouette is body or not in each slice."""
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (2, 4, 16, 16), np.uint8) * (rng.random((2, 4, 16, 16)) < 0.5)
    crops = crops.astype(np.uint8)
    body, grey = baselines.silhouette(crops, 2), baselines.thumbnail(crops, 2)
    for group in range(2):
        for p in range(2):
            for y in range(8):
                for x in range(8):
                    cells = [
                        crops[p, s, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].astype(float)
                        for s in (2 * group, 2 * group + 1)
                    ]
                    row, column = 2 * group + p, 8 * y + x
                    assert grey[row, column] == pytest.approx(np.mean(cells), rel=1e-5)
                    shares = [(cell > 0).mean() for cell in cells]
                    # half is left to rounding
                    least = np.mean([share > 0.5 for share in shares])
                    most = np.mean([share >= 0.5 for share in shares])
                    assert least <= body[row, column] <= most


def test_trees_find_places_that_grey_tells_and_not_those_of_noise(tmp_path):
    rng, config = np.random.default_rng(0), load_config("smoke", TINY).pretrain
    y, x = np.mgrid[0:48, 0:48]
    for n in range(12):
        np.save(
            tmp_path / f"told{n}.npy", np.broadcast_to(y * 2 + x * 3, (12, 48, 48)).astype("u1")
        )
        np.save(tmp_path / f"noise{n}.npy", rng.integers(1, 256, (12, 48, 48), np.uint8))
    found = {}
    for kind in ("told", "noise"):
        names = [f"{kind}{n}.npy" for n in range(12)]
        parts = (VocoSamples(tmp_path, some, config, 3) for some in (names[:8], names[8:]))
        found[kind] = baselines.position_accuracies(*parts)
    assert found["told"]["thumbnail_position_accuracy"] > 0.6
    # all of it is body, and the silhouette knows nothing
    assert found["told"]["silhouette_position_accuracy"] < 0.55
    assert found["noise"]["thumbnail_position_accuracy"] < 0.55


def planted(monkeypatch, figures, floor):
    """Held-out accuracies in their order, the last again and again; and what needs no network."""
    said = list(figures)
    monkeypatch.setattr(
        Voco2D,
        "evaluate",
        lambda method, samples: {"position_accuracy": said.pop(0) if said[1:] else said[0]},
    )
    monkeypatch.setattr(
        Voco2D,
        "baselines",
        lambda method, *samples: {"a_position_accuracy": 0.1, "b_position_accuracy": floor},
    )


@pytest.mark.parametrize(
    ("figures", "chosen", "warns"),
    [
        ([0.4, 0.7, 0.6], 4, False),
        ([0.5, 0.4, 0.45], 6, True),  # the first would be the best of all
        ([0.4, 0.5, 0.5001], 6, False),
    ],
)
def test_the_backbone_is_one_that_is_better_than_every_baseline(
    volumes, tmp_path, monkeypatch, capsys, figures, chosen, warns
):
    planted(monkeypatch, figures, floor=0.5)
    config = load_config("smoke", (*TINY, "pretrain.eval_every=2"))
    counts = loop.pretrain(config, volumes, tmp_path, ALONE)
    assert load_checkpoint(tmp_path / "best.ckpt")["step"] == chosen
    text = capsys.readouterr().err
    assert ("no checkpoint's position_accuracy is above 0.5" in text) == warns
    assert counts["position_accuracy"] == figures[chosen // 2 - 1]
    assert counts["baselines"] == {"a_position_accuracy": 0.1, "b_position_accuracy": 0.5}
    logged = [r for r in read_log(tmp_path / "log.jsonl") if "position_accuracy" in r]
    assert [record["b_position_accuracy"] for record in logged] == [0.5] * 3


def test_a_best_that_is_none_of_an_older_run_is_not_exported(
    volumes, tmp_path, monkeypatch, capsys
):
    """Its checkpoints know no baselines: these are computed, and its best is held to them."""
    planted(monkeypatch, [0.4], floor=0.1)
    tiny = (*TINY, "pretrain.eval_every=2")
    loop.pretrain(load_config("smoke", (*tiny, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    state = load_checkpoint(tmp_path / "last.ckpt")
    assert state["best"] == 0.4
    del state["baselines"]
    torch.save(state, tmp_path / "last.ckpt")
    planted(monkeypatch, [0.4], floor=0.5)
    loop.pretrain(load_config("smoke", (*tiny, "pretrain.steps=4")), volumes, tmp_path, ALONE)
    text = capsys.readouterr().err
    assert "resumed at step 2" in text
    assert "is the last state's (0.4)" in text
    assert load_checkpoint(tmp_path / "best.ckpt")["step"] == 4


def test_a_key_set_back_to_its_default_makes_another_run(volumes, tmp_path, capsys):
    """At its default it stands in no identity: what is missing there is compared too."""
    for more in (["pretrain.depth=8"], []):
        config = load_config("smoke", (*TINY, "pretrain.steps=1", *more))
        loop.pretrain(config, volumes, tmp_path, ALONE)
    assert "of another run (depth differs)" in capsys.readouterr().err


def excluding(volumes, fold, **options):
    config = load_config("smoke", (*TINY, "pretrain.steps=1", f"pretrain.exclude_fold={fold}"))
    return Stage(layout.VOCO, config, Options(out=volumes.parent, device="cpu", **options))


def fold_table(volumes, patients):
    """Stage 03's folder beside the volumes: `patients` in fold 1, the other labelled in fold 0."""
    folder = volumes.parent / layout.FOLDS
    folder.mkdir(exist_ok=True)
    labelled = [f"p{n}" for n in range(12) if n % 3]
    table = pl.DataFrame(
        {"patient_id": labelled, "fold": [int(name in patients) for name in labelled]}
    )
    table.write_csv(folder / layout.FOLD_TABLE)
    size = (folder / layout.FOLD_TABLE).stat().st_size
    output = {layout.FOLD_TABLE: {"bytes": size, "digest": ",".join(patients)}}
    manifest = {"schema": 1, "fingerprint": "by hand", "outputs": output}
    manifest["schema"] = json.loads((volumes / "manifest.json").read_text())["schema"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_patients_of_the_fold_left_out_are_not_seen(tmp_path, capsys, monkeypatch):
    volumes = volumes_of(tmp_path)
    with pytest.raises(InputError, match="03_folds is missing.*run stages/03_make_folds.py first"):
        pretrain_voco2d(excluding(volumes, 1).config, out=tmp_path, device="cpu")
    fold_table(volumes, ["p1", "p4"])
    assert excluded_patients(excluding(volumes, 1)) == {"p1", "p4"}
    index = pl.read_parquet(volumes / "index.parquet")
    options = excluding(volumes, 1).config.pretrain
    parts = choose_volumes(index, options, 3, frozenset({"p1", "p4", "p0"}))
    # p0 is unlabelled, and another patient than a labelled one of that name
    assert sorted(sum(parts, [])) == sorted(f"p{n}_0.npy" for n in range(12) if n not in (1, 4))
    read, load = [], np.load
    monkeypatch.setattr(
        np, "load", lambda path, **how: (read.append(path.name), load(path, **how))[1]
    )
    run = excluding(volumes, 1).config
    pretrain_voco2d(run, out=tmp_path, device="cpu")
    assert len(set(read)) > 6
    assert not {"p1_0.npy", "p4_0.npy"} & set(read)
    pretrain_voco2d(run, out=tmp_path, device="cpu")
    assert "04_voco2d: up to date" in capsys.readouterr().err
    fold_table(volumes, ["p2"])
    pretrain_voco2d(run, out=tmp_path, device="cpu")
    text = capsys.readouterr().err
    assert "up to date" not in text
    assert "of another run (excluded differs)" in text


def test_without_a_fold_left_out_folds_are_not_asked_for(volumes):
    config = load_config("smoke", TINY)
    assert excluded_patients(Stage(layout.VOCO, config, Options(out=volumes.parent))) == frozenset()
    assert "excluded" not in identity(config, volumes)
