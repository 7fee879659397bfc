"""Probes of frozen backbones: the dense classifier against a slow reference and scikit-learn,
what is planted is found and nothing in noise, and the command line.
"""

import nibabel
import numpy as np
import polars as pl
import pytest
import torch
from helpers_report import write_manifest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.ablation import dense, probe_views, questions
from pipeline.ablation.dense import THRESHOLDS, Moments, dense_probe
from pipeline.ablation.probe_cases import Case, _injured, _marks, read_cases
from pipeline.ablation.probe_views import BASELINES, Grey, Maps, Network
from pipeline.ablation.probes import folds_of, main, markdown
from pipeline.organs.masks import ORGANS
from pipeline.run import layout
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError

SIZE, PLANES = 32, 3
EVERY = len(ORGANS) + 1


def case(k, folds=2, hospital="", **facts):
    """Planes of one patient with organs in blocks of 8 pixels, background the commonest."""
    rng = np.random.default_rng(k)
    blocks = np.maximum(rng.integers(-4, EVERY, (PLANES, 4, 4)), 0).astype(np.uint8)
    masks = blocks.repeat(8, 1).repeat(8, 2)
    images = rng.integers(1, 256, masks.shape, dtype=np.uint8)
    height = (np.arange(PLANES) + 0.5) / PLANES
    return Case(f"p{k}", k % folds, hospital, images, height, masks, **facts)


class Told:
    """A view whose cells are `number` of each label, with noise; planes and insides in kind."""

    def __init__(self, cases, noise=0.0):
        self.truth = {one.images.tobytes(): one for one in cases}
        self.noise = noise

    def cells(self, images, height):
        own = next(one for key, one in self.truth.items() if images.tobytes() in key)
        cells = own.cells[: len(images)]
        drawn = np.random.default_rng(len(own.patient)).normal(size=(*cells.shape, EVERY))
        return (np.eye(EVERY)[cells] + self.noise * drawn).astype(np.float32)


class Noise:
    """A view of nothing at all."""

    def cells(self, images, height):
        shape = (*images[:, ::4, ::4].shape, 5)
        return np.random.default_rng(images.sum()).normal(size=shape).astype(np.float32)

    def planes(self, images, height):
        return np.random.default_rng(images.sum()).normal(size=(len(images), 5))

    def inside(self, images, height, mask):
        return self.planes(images, height)


def test_cells_have_the_label_that_fills_most_of_them():
    one = case(0)
    masks = np.zeros((PLANES, SIZE, SIZE), np.uint8)
    masks[:, :3, :4] = 2  # three quarters of a cell
    masks[:, 4:8, :1] = 3  # one quarter
    masks[:, 8:12, :4], masks[:, 8:9, :4] = 1, 4
    found = Case("p", 0, "", one.images, one.height, masks).cells
    assert found.shape == (PLANES, SIZE // 4, SIZE // 4)
    assert found[0, :4, 0].tolist() == [2, 0, 1, 0]
    assert (found[:, :, 1:] == 0).all()


def test_the_classifier_is_linear_discriminant_analysis():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    features = rng.normal(size=(300, 6)) * [1, 2, 30, 0.1, 1, 5] + [0, 3, 100, 0, 0, 0]
    features[:, 0] += labels
    features[:, 4] += labels == 1
    parts = [Moments.of(features[k::3], labels[k::3], 4) for k in range(3)]
    weights, bias = (parts[0] + parts[1] + parts[2]).discriminant()
    own = features @ weights + bias
    assert own.shape == (300, 4)
    assert (own[:, 3] == -np.inf).all(), "a class without a cell"
    scaled = (features - features.mean(0)) / features.std(0)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=dense.SHRINKAGE)
    expected = reference.fit(scaled, labels).predict_log_proba(scaled)
    own = own[:, :3] - np.log(np.exp(own[:, :3]).sum(1, keepdims=True))
    assert own == pytest.approx(expected, abs=1e-4)


def test_a_feature_that_never_changes_gets_no_weight():
    rng = np.random.default_rng(0)
    labels, features = rng.integers(0, 3, 200), rng.normal(size=(200, 2))
    features[:, 0] += labels
    more = np.column_stack([features, np.full(200, 1e4 / 3), np.zeros(200)])
    weights, bias = Moments.of(features, labels, 3).discriminant()
    wider, same = Moments.of(more, labels, 3).discriminant()
    assert (wider[2:] == 0).all()
    assert wider[:2] == pytest.approx(weights, rel=1e-6)
    assert same == pytest.approx(bias, rel=1e-6)


def slow_dice(probability, truth, organ, threshold):
    """By a loop over the cells."""
    both = predicted = there = 0
    for p, t in zip(probability, truth, strict=True):
        called = p[organ] >= threshold
        predicted, there = predicted + called, there + (t == organ)
        both += called and t == organ
    return 2 * both / (predicted + there) if there else np.nan


def test_dice_and_thresholds_are_those_of_slow_loops(monkeypatch):
    monkeypatch.setattr(dense, "SAMPLE", 10**6)
    cases = [case(k, 3) for k in range(7)]
    view = Told(cases, 0.6)
    found = dense_probe(view, cases)
    features = {c.patient: view.cells(c.images, c.height).reshape(-1, EVERY) for c in cases}
    truth = {c.patient: c.cells.ravel() for c in cases}
    for one in cases:
        others = [c.patient for c in cases if c.fold != one.fold]
        fit = np.concatenate([features[p] for p in others])
        mean, scale = fit.mean(0), fit.std(0)
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=dense.SHRINKAGE)
        model.fit((fit - mean) / scale, np.concatenate([truth[p] for p in others]))
        answers = {p: model.predict_proba((f - mean) / scale) for p, f in features.items()}
        for organ in range(1, EVERY):
            means = [
                np.nanmean([slow_dice(answers[p], truth[p], organ, t) for p in others])
                for t in THRESHOLDS
            ]
            best = THRESHOLDS[int(np.argmax(means))]
            expected = slow_dice(answers[one.patient], truth[one.patient], organ, best)
            assert found[one.patient][organ - 1] == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_features_that_are_the_labels_have_dice_1_and_noise_has_that_of_guessing():
    cases = [case(k) for k in range(6)]
    told, noise = dense_probe(Told(cases), cases), dense_probe(Noise(), cases)
    assert sorted(told) == [f"p{k}" for k in range(6)]
    assert np.nanmin(list(told.values())) == 1.0
    share = np.mean([np.mean([one.cells == k for one in cases]) for k in range(1, EVERY)])
    # all cells called: 2 share / (1 + share)
    assert np.nanmean(list(noise.values())) == pytest.approx(2 * share / (1 + share), abs=0.06)


def test_an_organ_that_a_patient_does_not_show_is_not_asked_of_that_patient():
    cases = [case(k) for k in range(4)]
    cases[1].masks[cases[1].masks == 2] = 0
    found = dense_probe(Told(cases), cases)
    assert np.isnan(found["p1"][1])
    assert not np.isnan(np.delete(found["p1"], 1)).any()


def test_series_of_one_patient_are_judged_together():
    first, second = case(0), case(2)
    again = Case("p0", 0, "", second.images, second.height, second.masks)
    cases = [first, again, case(1), case(3)]
    assert set(dense_probe(Noise(), cases)) == {"p0", "p1", "p3"}


def planted(seed=0):
    """Cases of 40 patients: liver shown where the plane is bright, injured where its mask is."""
    rng, cases = np.random.default_rng(seed), []
    for k in range(40):
        one, hurt, shown = case(k, 4, "AB"[k % 2]), bool(k % 3 == 0), rng.random(PLANES) < 0.5
        images = rng.integers(60, 120, one.images.shape, dtype=np.uint8)
        images[shown] += 60
        images[one.masks == 1] += np.uint8(70 * hurt)
        everywhere = np.full(PLANES, hurt)
        facts = {"shown": {"liver": shown}, "injured": {"liver": everywhere, "bowel": shown}}
        cases.append(
            Case(one.patient, one.fold, one.hospital, images, one.height, one.masks, **facts)
        )
    return cases


def values(rows):
    return {(row["question"], row["probe"], row["hospital"]): row["value"] for row in rows}


class Two(torch.nn.Module):
    """Its own map: means of 8 x 8 pixels; on the way to it those of 4 x 4, squared."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward_intermediates(self, x):
        self.asked += len(x)
        return x, [torch.nn.functional.avg_pool2d(x, 4) ** 2]

    def forward_head(self, features):
        return torch.nn.functional.avg_pool2d(features, 8)


@pytest.mark.parametrize("kept", [PLANES - 1, 3 * PLANES + 1, 10**6])
def test_views_that_share_a_network_answer_as_each_does_alone(monkeypatch, kept):
    monkeypatch.setattr(probe_views, "KEPT", kept)
    monkeypatch.setattr(questions, "KEPT", kept)
    cases, device, net = planted(), torch.device("cpu"), Two()
    network = Network(net, device)
    found = questions.judge_together([Maps(network), Maps(network, scales=True)], cases, 5)
    planes = sum(len(case.images) for case in cases)
    if kept > planes:
        assert net.asked == planes, "once for all questions of both views"
    for scales, rows in zip((False, True), found, strict=True):
        alone = questions.judge(Maps(Network(Two(), device), scales), cases, 5)
        assert values(rows) == pytest.approx(values(alone), abs=1e-6)
        assert [row["question"] for row in rows] == [row["question"] for row in alone]
    assert values(found[0]) != values(found[1])


def test_what_is_planted_is_found_by_hospital_too_and_nothing_in_noise():
    cases = planted()
    grey = values(questions.judge(Grey(16), cases, 5))
    noise = values(questions.judge(Noise(), cases, 5))
    for hospital in ("all", "A", "B"):
        assert grey["liver", "planes", hospital] > 0.95
        assert grey["liver", "inside", hospital] > 0.95, "of patients, from the mask's inside"
        assert abs(noise["liver", "planes", hospital] - 0.5) < 0.25
        assert noise["liver", "dense", hospital] < 0.3
    assert grey["liver", "neighbours", "all"] > 0.9
    assert abs(noise["liver", "inside", "all"] - 0.5) < 0.25
    assert ("spleen", "planes", "all") not in grey


def test_cases_without_masks_are_asked_which_planes_show_an_organ_only():
    cases = [Case(c.patient, c.fold, "", c.images, c.height, None, c.shown) for c in planted()]
    assert {row["probe"] for row in questions.judge(Grey(16), cases, 5)} == {"planes", "neighbours"}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_describe_planes_cells_and_insides(name):
    one, view = case(3), BASELINES[name]
    assert len(view.planes(one.images, one.height)) == PLANES
    cells = view.cells(one.images, one.height)
    assert cells.shape[:3] == (PLANES, SIZE // 4, SIZE // 4)
    assert len(view.inside(one.images, one.height, one.masks > 0)) == PLANES


def test_the_patch_around_a_cell_is_of_its_neighbours():
    images = np.zeros((1, 16, 16), np.uint8)
    images[0, 4:8, 8:12] = 80  # the cell (1, 2)
    found = Grey(3).cells(images, np.array([0.5]))
    assert found.shape == (1, 4, 4, 9)
    assert found[0, 1, 2].tolist() == [0, 0, 0, 0, 80, 0, 0, 0, 0]
    assert found[0, 0, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 80]


def test_maps_are_brought_to_the_cells_and_pooled_inside_the_mask():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x[:, :, ::8, ::8] * 0 + torch.arange(4.0).reshape(1, 1, 4, 1)

        def forward_intermediates(self, x):
            return self(x), [torch.nn.functional.avg_pool2d(x, 2), self(x)]

        def forward_head(self, features):
            return features

    net = Net()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8)
    height, mask = np.array([0.2, 0.8]), np.zeros((2, 32, 32), bool)
    mask[:, 8:24, 8:16], mask[:, 24:, 8:12] = True, True  # rows 1, 2 and half of a cell of row 3
    network = Network(net, torch.device("cpu"))
    last, scales = Maps(network), Maps(network, scales=True)
    assert last.cells(images, height).shape == (2, 8, 8, 1)
    assert last.inside(images, height, mask)[0] == pytest.approx([(1 + 2 + 0.5 * 3) / 2.5, 3])
    cells = scales.cells(images, height)
    assert cells.shape == (2, 8, 8, 3)
    standard = (images / 255 - 0.449) / 0.226
    assert cells[..., 0] == pytest.approx(standard.reshape(2, 8, 4, 8, 4).mean((2, 4)), abs=1e-5)


def test_maps_of_a_plane_are_made_once_while_its_series_is_asked_about(monkeypatch):
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.extend(x[:, 0].numpy().round(3).tolist())
            return torch.nn.functional.avg_pool2d(x, 8) ** 2

    monkeypatch.setattr(probe_views, "KEPT", 5)
    series = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32), dtype=np.uint8)
    height, mask = np.arange(4) / 4, series[0] > 99
    network = Network(Net(), torch.device("cpu"))
    kept = Maps(network)
    for images in series:
        fresh = Maps(Network(Net(), torch.device("cpu")))
        expected = [
            fresh.inside(images[1:3], height[1:3], mask[1:3]),
            fresh.planes(images, height),
            fresh.cells(images[2:], height[2:]),
        ]
        seen.clear()
        found = [
            kept.inside(images[1:3], height[1:3], mask[1:3]),
            kept.planes(images, height),
            kept.cells(images[2:], height[2:]),
        ]
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-6)
        assert len(seen) <= 6, "four planes, two of them again where the other series' made way"
    assert len(network._kept) <= 5
    wide = series.reshape(12, 32, 32)
    assert len(kept.planes(wide, np.arange(12) / 12)) == 12, "more at once than are kept"


def test_neighbours_and_regressions_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    features, folds = rng.normal(size=(90, 3)) * [1, 5, 0.2], np.arange(90) % 3
    truths = np.stack([features[:, 0] > 0, features[:, 1] > 3, folds > 3], 1)
    for answers, model in (
        (questions.linear, LogisticRegression(C=0.01, max_iter=300)),
        (questions.nearest(7), KNeighborsClassifier(7)),
    ):
        found = questions.out_of_fold(answers, features, truths, folds)
        assert np.isnan(found[:, 2]).all(), "true of nobody"
        for k in range(2):
            for fold in range(3):
                away, whole = folds == fold, make_pipeline(StandardScaler(), model)
                whole.fit(features[~away], truths[~away, k])
                p = whole.predict_proba(features[away]).clip(1e-12)
                assert found[away, k] == pytest.approx(np.log(p[:, 1] / p[:, 0]), abs=1e-6)


def test_an_organ_that_some_cases_do_not_know_is_asked_of_the_others():
    cases = planted()
    for one in cases[::2]:
        one.shown["spleen"] = ~one.shown["liver"]
    rows = questions.judge(Grey(16), cases, 5)
    asked = {(row["question"], row["probe"]): row for row in rows if row["hospital"] == "all"}
    for probe in ("planes", "neighbours"):
        assert asked["spleen", probe]["patients"] == 20
        assert asked["liver", probe]["patients"] == 40
        assert asked["spleen", probe]["value"] > 0.9
    alone = [c for c in cases if "spleen" in c.shown]
    for row in questions.judge(Grey(16), alone, 5):
        if row["question"] == "spleen" and row["hospital"] == "all" and row["probe"] != "dense":
            assert row["value"] == asked["spleen", row["probe"]]["value"]


def write_data(root, top=0.0):
    """A data set of two patients of four planes of 16 x 16 mm: of `a` a label map, whose uppermost
    plane lies at `top` mm, and of `b` a table of organs.
    """
    volumes, ids = root / layout.VOLUMES, {"a": "1", "b": "2"}
    volumes.mkdir(parents=True)
    rows, slices = [], []
    for patient, series in ids.items():
        np.save(volumes / f"{patient}.npy", np.full((4, 16, 16), 7, np.uint8))
        key = {"patient_id": patient, "series_id": series}
        row = {"path": f"{patient}.npy", "depth": 4, "height": 16, "width": 16}
        box = {"box_y0": 0, "box_y1": 16, "box_x0": 0, "box_x1": 16}
        mm = {f"spacing_{axis}_mm": 1.0 for axis in "zyx"}
        rows.append({**key, **row, **box, **mm, "plane_instances": [11, 12, 13, 14]})
        for k in range(4):
            place = {"instance_number": 11 + k, "order": k, "z_mm": -2.0 * k, "source": "train"}
            size = {"rows": 16, "cols": 16, "spacing_y_mm": 1.0, "spacing_x_mm": 1.0}
            slices.append({**key, **place, **size, "flags": "", "png": "", "crc32": 0})
    pl.DataFrame(rows).write_parquet(volumes / layout.INDEX)
    pl.DataFrame(slices).write_parquet(volumes / layout.SLICE_TABLE)
    config = {"volume": {"depth": 4, "height": 16, "width": 16, "aspect": "stretch"}}
    write_manifest(root, layout.VOLUMES, {}, config=config)
    labels = np.zeros((4, 16, 16), np.uint8)  # superior first, y to the back, x to the left
    labels[1:, 2:9, 3:12], labels[3, 12:, 12:] = 1, 4
    affine = np.diag([-1.0, -1.0, -2.0, 1.0])
    affine[2, 3] = top
    (root / "segmentations").mkdir()
    image = nibabel.Nifti1Image(labels.transpose(2, 1, 0).copy(), affine)
    nibabel.save(image, root / "segmentations" / "1.nii.gz")
    return labels


def test_cases_are_read_with_their_masks_and_what_is_known_of_their_planes(tmp_path):
    labels = write_data(tmp_path)
    (tmp_path / "phantom_organs.csv").write_text(
        "patient_id,series_id,instance_number,organ\nb,2,12,left kidney\nb,2,14,liver\n"
    )
    (tmp_path / "train_series_meta.csv").write_text(
        "patient_id,series_id,aortic_hu,hospital\na,1,100,North\nb,2,100,South\n"
    )
    first, second = read_cases(tmp_path, tmp_path / layout.VOLUMES, {"a": 0, "b": 1}, 4, 16)
    assert (first.patient, first.fold, first.hospital) == ("a", 0, "North")
    expected = np.array([0, 1, 2, 3, 3])[labels]  # both kidneys are one organ
    assert np.array_equal(first.masks, expected)
    assert first.shown["liver"].tolist() == [False, True, True, True]
    assert first.shown["kidney"].tolist() == [False, False, False, True]
    assert (second.masks, second.hospital) == (None, "South")
    assert second.shown["kidney"].tolist() == [False, True, False, False]
    assert set(second.shown) == {"kidney", "liver"}, "of bowel and spleen nobody said a word"
    assert first.height.tolist() == [0.125, 0.375, 0.625, 0.875]


def test_masks_that_do_not_fit_are_named_and_left_out(tmp_path, capfd):
    write_data(tmp_path, top=500.0)
    moved = nibabel.load(tmp_path / "segmentations" / "1.nii.gz")
    shorter = nibabel.Nifti1Image(np.asarray(moved.dataobj)[:, :, :3], moved.affine)
    nibabel.save(shorter, tmp_path / "segmentations" / "1.nii.gz")
    with pytest.raises(InputError, match="no series with a volume has masks in segmentations/"):
        read_cases(tmp_path, tmp_path / layout.VOLUMES, {"a": 0, "b": 1}, 4, 16)
    shown = capfd.readouterr().err
    assert "warning: the mask's 3 planes" in shown
    assert "1.nii.gz" in shown


def test_one_patient_is_too_few(tmp_path, capsys):
    write_data(tmp_path)
    assert main(["--data", str(tmp_path), "--volumes", str(tmp_path / layout.VOLUMES)]) == 2
    assert "only one fold, and nobody to judge a probe on" in capsys.readouterr().err


def test_left_and_right_are_one_organ_and_unlabelled_slices_of_the_injured_are_unknown(tmp_path):
    text = "patient_id,series_id,instance_number,organ\n01,2,7,left kidney\n01,2,9,right kidney\n"
    (tmp_path / "organs.csv").write_text(text)
    assert _marks(tmp_path / "organs.csv", "organ") == {("01", "2"): {"kidney": [7, 9]}}
    labels = {f"{name}_healthy": int(name != "bowel") for name in ("bowel", "kidney", "liver")}
    labels |= {"spleen_healthy": 0, "extravasation_healthy": 0}
    found = _injured(labels, np.array([7, 8]), {"Active_Extravasation": [8]})
    assert "bowel" not in found, "injured, but nobody said where"
    assert found["extravasation"].tolist() == [False, True]
    assert found["spleen"].tolist() == [True, True]
    assert found["liver"].tolist() == [False, False]


def test_few_patients_are_left_out_one_by_one():
    assert folds_of(["b", "a", "b"], None) == {"a": 0, "b": 1}
    assert sorted(folds_of([f"{k:02d}" for k in range(20)], None).values()) == sorted(
        4 * [*range(5)]
    )


def test_tables_have_a_line_a_view_and_the_mean_of_the_questions():
    row = {"backbone": "net", "statistics": "stored", "seed": 0, "probe": "dense", "figure": "Dice"}
    row |= {"patients": 3}
    rows = [
        {**row, "question": question, "hospital": hospital, "value": value}
        for question, hospital, value in (
            ("liver", "all", 0.5),
            ("spleen", "all", 0.7),
            ("liver", "A", 0.25),
            ("spleen", "A", 0.75),
        )
    ]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| dense, Dice | liver | spleen | mean |"
    assert lines[2] == "| net stored | 0.500 | 0.700 | 0.600 |"
    assert lines[4:] == [
        "| dense, Dice | A | mean |",
        "|---|---|---|",
        "| net stored | 0.500 | 0.500 |",
    ]


def test_wrong_input_is_one_line(tmp_path, capsys):
    write_data(tmp_path, top=500.0)
    (tmp_path / "segmentations" / "1.nii.gz").unlink()
    given = ["--data", str(tmp_path), "--volumes", str(tmp_path / layout.VOLUMES)]
    for arguments, line in (
        (given, "no series with a volume has masks in segmentations/"),
        ([*given, "--backbone", "gone.safetensors"], "gone.safetensors"),
        ([*given[:3], str(tmp_path)], "no volumes here"),
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr().err
        assert line in shown
        assert "Traceback" not in shown


def test_a_grid_without_pretraining_is_probed_as_it_starts():
    from pipeline.ablation.grid import declared_cells
    from pipeline.ablation.probe_parts import probed

    grid = (
        "ablation.variants={a: {}, b: {train.sequence: none}}",
        "ablation.reference=a",
        "train.init=scratch",
        "pretrain.init=imagenet",
    )
    config = load_config("smoke", grid)
    found = list(probed(config, declared_cells(config), None))
    starts = [("start_scratch", None)] * len(config.ablation.seeds)
    assert [(one.name, one.path) for one in found] == [("baselines", None), *starts]
    off = load_config("smoke", (*grid, "ablation.probes=false"))
    assert list(probed(off, declared_cells(off), None)) == []


@pytest.mark.parametrize(
    "name", ["ablation_quick", "ablation_long", "ablation_more", "ablation_full"]
)
def test_every_probe_has_a_folder_of_its_own(name):
    from pipeline.ablation.grid import declared_cells
    from pipeline.ablation.probe_parts import probed
    from pipeline.run.stage import Options, Stage

    config = load_config(name, ["ablation.probes=true"])
    stage = Stage("10_ablation", config, Options(out="/nowhere"))
    found = list(probed(config, declared_cells(config), stage))
    assert len({one.key for one in found}) == len(found)
    named = {(one.name, one.config.seed) for one in found}
    assert len(named) == len(found), "rows tell the networks apart"


def test_settled_statistics_are_plain_averages_over_whole_slices():
    from pipeline.ablation.probes import settle_on

    torch.manual_seed(0)
    layer = torch.nn.Conv2d(1, 3, 3)
    net = torch.nn.Sequential(layer, torch.nn.BatchNorm2d(3)).eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    settle_on(net, images, torch.device("cpu"))
    from pipeline.learning.backbone import standardise

    values = (
        layer(standardise(torch.from_numpy(images))[:, None])
        .detach()
        .double()
        .transpose(0, 1)
        .flatten(1)
        .numpy()
    )
    assert net[1].running_mean.numpy() == pytest.approx(values.mean(1), abs=1e-5)
    assert net[1].running_var.numpy() == pytest.approx(values.var(1, ddof=1), rel=1e-4)
    assert not net[1].training
