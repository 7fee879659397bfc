"""The second level: gates and pooling against float64 loops, files of features against a forward
pass, stopped runs.
"""

from dataclasses import replace

import cv2
import numpy as np
import polars as pl
import pytest
import torch

from pipeline.classifier.data import Series
from pipeline.classifier.features import (
    feature_file,
    in_parts,
    plane_features,
    read_features,
    save_features,
    weights_digest,
)
from pipeline.classifier.fold import FoldData
from pipeline.classifier.model import CnnLstm, probabilities
from pipeline.classifier.regions import organ_gates, region_windows
from pipeline.classifier.second_fold import (
    SecondTrainer,
    feature_statistics,
    train_second_level,
)
from pipeline.classifier.second_level import (
    SecondLevel,
    as_gated_batch,
    gated_pool,
    gated_sequences,
    load_second_level,
    logits_of_volume,
    second_logits,
)
from pipeline.competition.targets import COLUMNS, TARGETS
from pipeline.learning.backbone import create_backbone, feature_shape, pool_maps, standardise
from pipeline.organs.find import organ_boxes
from pipeline.run import layout
from pipeline.run.config import SecondLevelConfig, TrainConfig, decisive
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError

CPU = torch.device("cpu")
SHAPE = (12, 40, 48)
TRAIN = TrainConfig(
    init="scratch",
    slices=4,
    image_size=32,
    hidden=8,
    amp=False,
    workers=0,
    second_level=SecondLevelConfig(enabled=True, hidden=4, epochs=3, batch=2),
)
ORGANS = TRAIN.model_copy(update={"regions": "organs", "region_margin": 0.0})


def label_map():
    """Liver and kidney as boxes, the liver tapering; neither spleen nor bowel."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:4, 4:20, 30:46] = 1
    labels[4:6, 4:12, 30:38] = 1
    labels[3:9, 22:30, 8:16] = 3
    return labels


@pytest.fixture
def series(tmp_path):
    """Six series of six patients, of which the last has no organs."""
    rng, found = np.random.default_rng(0), []
    for k in range(6):
        path = tmp_path / f"{k}.npy"
        np.save(path, rng.integers(0, 256, SHAPE, dtype=np.uint8))
        labels = np.concatenate(
            [np.eye(len(t.classes), dtype=np.float32)[k % len(t.classes)] for t in TARGETS]
        )
        organs = tuple(organ_boxes(label_map())) if k < 5 else ()
        planes, known = np.zeros((SHAPE[0], 2), np.float32), np.ones(2, np.float32)
        found.append(Series(str(k), f"s{k}", path, labels, planes, known, organs))
    return found


def classifier(config):
    torch.manual_seed(0)
    backbone = create_backbone("mobilenetv3_small_050", size=32, channels=config.channels)
    channels = feature_shape(backbone, config.image_size, config.channels)[0]
    return CnnLstm(backbone, channels, config).eval()


def second_level(width, config):
    torch.manual_seed(1)
    second = SecondLevel(width, config)
    for head in second.heads.values():
        torch.nn.init.normal_(head.weight)
    return second.eval()


def test_pooling_equals_float64_loops():
    rng = np.random.default_rng(0)
    B, T, N, E = 2, 3, 7, 4
    states, scores = rng.normal(size=(B, T, N, E)), rng.normal(size=(B, T, N))
    gates = rng.random((B, T, N)) * (rng.random((B, T, N)) < 0.6)
    gates[..., 2] = 0.3  # one is open at least
    gates[0, 0], gates[0, 0, 5] = 0, 1
    found = gated_pool(*map(torch.from_numpy, (states, scores, gates))).numpy()
    for b in range(B):
        for t in range(T):
            weights = [gates[b, t, n] * np.exp(scores[b, t, n]) for n in range(N)]
            for e in range(E):
                values = states[b, t, :, e]
                mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
                shown = [g * v for g, v in zip(gates[b, t], values, strict=True) if g > 0]
                assert found[b, t, e] == pytest.approx(mean, rel=1e-12)
                assert found[b, t, E + e] == pytest.approx(max(shown), rel=1e-12)


def test_gates_are_shares_of_the_fullest_plane():
    """By hand: the liver has 256 pixels in planes 1 to 3 and 64 in 4 and 5, the kidney 64 in each
    of 3 to 8; the abdomen shows as much as the organ that shows most.
    """
    liver = [0, 1, 1, 1, 0.25, 0.25, 0, 0, 0, 0, 0, 0]
    kidney = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    abdomen = [max(pair) for pair in zip(liver, kidney, strict=True)]
    organs = organ_boxes(label_map())
    assert organ_gates(organs, 12, TRAIN).tolist() == [abdomen, abdomen, kidney, liver, [1] * 12]
    one = TRAIN.model_copy(update={"targets": ("liver",)})
    assert organ_gates(organs, 12, one).tolist() == [liver]
    assert organ_gates((), 12, TRAIN).tolist() == [[1] * 12] * 5


def test_a_series_is_all_planes_of_its_regions_with_their_gates():
    organs = organ_boxes(label_map())
    windows = region_windows(organs, SHAPE, ORGANS)
    ranges = [(window[0].start, window[0].stop) for window in windows]
    planes = np.concatenate([np.arange(*one) for one in ranges])
    features = torch.from_numpy(planes).half()[:, None]
    parts, gates = gated_sequences(features, organs, 12, ORGANS)
    assert [part[:, 0].tolist() for part in parts] == [[*range(*one)] for one in ranges]
    whole = organ_gates(organs, 12, ORGANS)
    for row, own, target in zip(whole, gates, TARGETS, strict=True):
        first, end = ranges[ORGANS.region_number(target.region)]
        assert own.tolist() == row[first:end].tolist()


def test_training_takes_ascending_planes_of_equal_parts():
    features, lengths = torch.arange(12).half()[:, None], set()
    organs = organ_boxes(label_map())
    for seed in range(40):
        rng = np.random.default_rng(seed)
        (part,), gates = gated_sequences(features, organs, 12, TRAIN, rng)
        planes, N = part[:, 0].long(), len(part)
        assert 6 <= N <= 12
        lengths.add(N)
        assert [int(p) * N // 12 for p in planes] == [*range(N)], "one of each of N parts"
        for row, own in zip(organ_gates(organs, 12, TRAIN), gates, strict=True):
            assert own.tolist() == row[planes].tolist()
    assert lengths == {6, 7, 8, 9, 10, 11, 12}


def test_planes_count_alike_where_those_drawn_show_nothing():
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 4:20, 30:46] = 1
    organs, missed = organ_boxes(labels), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        (part,), gates = gated_sequences(torch.arange(12).half()[:, None], organs, 12, TRAIN, rng)
        if 1 not in part:
            missed += 1
            assert gates[3].tolist() == [1] * len(part)
    assert missed > 2


@pytest.mark.parametrize("config", [TRAIN, ORGANS], ids=["whole", "organs"])
def test_a_batch_gives_what_each_series_gives_alone(config):
    """Series and regions of other lengths are padded, which no state may notice."""
    rng, second, samples, alone = np.random.default_rng(0), second_level(6, config), [], []
    for depth, organs in ((12, organ_boxes(label_map())), (9, ()), (15, ())):
        windows = region_windows(organs, (depth, 1, 1), config)
        count = sum(one[0].stop - one[0].start if one else depth for one in windows)
        features = torch.from_numpy(rng.normal(size=(count, 6))).half()
        samples.append(gated_sequences(features, organs, depth, config))
        alone.append(second_logits(second, features, organs, depth, config))
    with torch.inference_mode():
        together = second(*as_gated_batch(samples, CPU))
    for name, found in together.items():
        expected = torch.cat([one[name] for one in alone])
        assert torch.allclose(found, expected, atol=1e-5), name
        assert expected.std(0).min() > 1e-3, "the series differ"


def test_a_target_sees_the_planes_of_its_organ_alone():
    """Without a sequence between the planes, what others show changes nothing."""
    organs, second = organ_boxes(label_map()), second_level(6, TRAIN)
    for parameter in second.cell.parameters():
        torch.nn.init.zeros_(parameter)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 6))).half()
    other = features.clone()
    other[6:] += 3  # planes without liver
    before, after = (second_logits(second, one, organs, 12, TRAIN) for one in (features, other))
    same = {name: torch.allclose(before[name], after[name], atol=1e-6) for name in before}
    assert [name for name in same if same[name]] == ["liver"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("regions", ["whole", "organs"])
def test_files_of_features_are_those_of_a_forward_pass(series, tmp_path, regions, channels):
    """Plane by plane, each cut out and resized by itself."""
    config = ORGANS.model_copy(update={"regions": regions, "channels": channels})
    model, folder = classifier(config), tmp_path / "features"
    save_features(model, series[4:], config, folder, "mine", lambda: None)
    for one in series[4:]:
        volume, rows = np.load(one.path), []
        for window in region_windows(one.organs, SHAPE, config):
            parts = window or tuple(slice(0, side) for side in SHAPE)
            for z in range(parts[0].start, parts[0].stop):
                around = [min(max(z + k - channels // 2, 0), SHAPE[0] - 1) for k in range(channels)]
                small = min(part.stop - part.start for part in parts[1:]) < 32
                how = cv2.INTER_LINEAR if small and window else cv2.INTER_AREA
                planes = [
                    cv2.resize(volume[k, parts[1], parts[2]], (32, 32), interpolation=how)
                    for k in around
                ]
                with torch.inference_mode():
                    maps = model.backbone(standardise(torch.from_numpy(np.stack(planes)))[None])
                    rows.append(model.norm(pool_maps(maps, "both"))[0])
        found = np.load(feature_file(folder, one))
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, torch.stack(rows).numpy(), atol=2e-3)
        assert len(found) == 12 or regions == "organs"


def test_the_classifier_reads_the_same_features(series):
    config = TRAIN.model_copy(update={"slices": 12})
    model, volume = classifier(config), np.load(series[0].path)
    seen = []
    model.sequence.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    planes = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_AREA) for one in volume])
    with torch.inference_mode():
        model(standardise(torch.from_numpy(planes))[None])
    found = plane_features(model, torch.from_numpy(planes), amp=False)
    assert torch.equal(found, seen[0][0].half())


@pytest.mark.parametrize("size", [1, 5, 6, 12, 64])
def test_parts_have_one_size_and_give_what_the_whole_gives(size):
    planes, sizes = torch.arange(24.0).reshape(12, 2), []

    def work(part):
        sizes.append(len(part))
        return part.sum(1)

    assert torch.equal(in_parts(work, planes, size), planes.sum(1))
    assert set(sizes) == {size}


def test_what_overflows_is_computed_again_in_float32(series, monkeypatch):
    model, given = classifier(TRAIN), torch.zeros(12, 32, 32, dtype=torch.uint8)
    whole, features, calls = plane_features(model, given, False), model.features, []

    def broken(slices):
        calls.append(len(calls))
        return features(slices) * (float("inf") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(model, "features", broken)
    assert torch.equal(plane_features(model, given, True), whole)
    assert len(calls) == 2


def test_a_stopped_extraction_goes_on_and_another_classifier_starts_anew(series, tmp_path):
    model, folder = classifier(TRAIN), tmp_path / "features"
    left = [3]

    def stop():
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_features(model, series, TRAIN, folder, "a", stop)
    there = sorted(folder.glob("*.npy"))
    assert 0 < len(there) < 6
    times = [path.stat().st_mtime_ns for path in there]
    (folder / f".{there[0].name}.tmp-1").write_bytes(b"x")
    save_features(model, series, TRAIN, folder, "a", lambda: None)
    assert [path.stat().st_mtime_ns for path in there] == times
    assert len([*folder.iterdir()]) == 7, "six series and whose they are"
    first = read_features(folder, series[0])
    with torch.no_grad():
        model.norm.weight.mul_(2)
    save_features(model, series, TRAIN, folder, "b", lambda: None)
    assert torch.allclose(read_features(folder, series[0]), first * 2, atol=1e-3)


def test_damaged_features_are_one_line(series, tmp_path):
    folder = tmp_path / "features"
    save_features(classifier(TRAIN), series[:1], TRAIN, folder, "a", lambda: None)
    path = feature_file(folder, series[0])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=f"missing or damaged, {path}, remove {folder}"):
        read_features(folder, series[0])


def test_the_digest_is_of_names_and_values():
    model, same = classifier(TRAIN), classifier(TRAIN)
    assert weights_digest(model) == weights_digest(same.to(memory_format=torch.channels_last))
    with torch.no_grad():
        same.norm.bias[0] += 1e-6
    assert weights_digest(model) != weights_digest(same)


def test_statistics_are_those_of_all_planes(series, tmp_path):
    folder = tmp_path / "features"
    save_features(classifier(TRAIN), series, TRAIN, folder, "a", lambda: None)
    mean, std = feature_statistics(folder, series[:4])
    every = np.concatenate([np.load(feature_file(folder, one)) for one in series[:4]])
    np.testing.assert_allclose(mean, every.astype(float).mean(0), atol=1e-5)
    np.testing.assert_allclose(std, np.maximum(every.astype(float).std(0), 1e-3), atol=1e-5)


def config_of(train):
    config = load_config("smoke", ["seed=4"])
    return config.model_copy(update={"train": train})


@pytest.mark.parametrize("train", [TRAIN, ORGANS], ids=["whole", "organs"])
def test_a_fold_predicts_what_its_files_predict(series, tmp_path, train):
    """Stage 08's way, from the volume, gives the out-of-fold rows."""
    config, model = config_of(train), classifier(train)
    data = FoldData(1, series[:4], series[4:])
    counts = train_second_level(config, data, model, tmp_path)
    assert np.isfinite([counts["loss"], counts["held_out_score"]]).all()
    rows = pl.read_parquet(tmp_path / layout.OOF)
    assert rows["series_id"].to_list() == ["s4", "s5"]
    assert rows["fold"].to_list() == [1, 1]
    second = load_second_level(tmp_path / layout.SECOND_MODEL, model)
    for one, row in zip(series[4:], rows.select(COLUMNS).rows(), strict=True):
        (logits,) = logits_of_volume([(model, second)], np.load(one.path), train, one.organs)
        np.testing.assert_allclose(probabilities(logits)[0], row, rtol=1e-5)
    other = classifier(train)
    with torch.no_grad():
        other.norm.bias[0] += 1
    with pytest.raises(InputError, match="another classifier's features"):
        load_second_level(tmp_path / layout.SECOND_MODEL, other)


def test_a_stopped_training_ends_as_if_it_had_not_stopped(series, tmp_path):
    config, model, data = config_of(TRAIN), classifier(TRAIN), FoldData(0, series[:4], series[4:])
    folder = tmp_path / layout.SECOND_LEVEL / layout.FEATURES
    save_features(model, series, TRAIN, folder, "a", lambda: None)
    width, left = model.norm.normalized_shape[0], [5]

    def trainer():
        return SecondTrainer(config, data, folder, width, CPU)

    def stop():
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    (stopped := trainer()).model.train()
    with pytest.raises(KeyboardInterrupt):
        stopped.run("x", stop)
    assert len(stopped.history) == 2, "in the last of three epochs of two steps"
    (resumed := trainer()).run("x", lambda: None)
    (whole := trainer()).run("y", lambda: None)  # another identity: from the start
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.predict_held_out().equals(whole.predict_held_out())


@pytest.mark.slow
def test_it_learns_what_a_few_planes_show(tmp_path, series):
    """Features that tell the liver's class in one plane of it, on held-out series too."""
    rng = np.random.default_rng(0)
    options = SecondLevelConfig(enabled=True, hidden=8, epochs=25, batch=8, lr=1e-2)
    train = TRAIN.model_copy(update={"second_level": options, "targets": ("liver",)})
    folder, many = tmp_path / "second" / "features", []
    folder.mkdir(parents=True)
    for k in range(96):
        grade = k % 3
        labels = np.concatenate([np.eye(len(t.classes), dtype=np.float32)[0] for t in TARGETS])
        labels[7:10] = np.eye(3)[grade]
        one = replace(series[0], patient_id=str(k), series_id=str(k), labels=labels)
        features = 0.3 * rng.normal(size=(12, 8))
        features[rng.integers(1, 4), grade] += 4
        np.save(feature_file(folder, one), features.astype(np.float16))
        many.append(one)
    data = FoldData(0, many[:64], many[64:])
    trainer = SecondTrainer(config_of(train), data, folder, 8, CPU)
    trainer.run("x", lambda: None)
    liver = trainer.predict_held_out().select(COLUMNS).to_numpy()[:, 7:10]
    truth = np.array([k % 3 for k in range(64, 96)])
    assert (liver.argmax(1) == truth).mean() > 0.9


def test_at_its_default_it_enters_no_fingerprint():
    off = TRAIN.model_copy(update={"second_level": SecondLevelConfig()})
    assert decisive(TRAIN) == decisive(off)
    assert "second_level" not in decisive(TRAIN)
