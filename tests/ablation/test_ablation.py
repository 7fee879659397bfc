"""Stage 10: statistics against naive loops, nested label subsets, cells that resume, and the stage
as a user calls it.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers_scores import label_frame, naive_score, one_hot, predicted
from helpers_stages import stage_here
from sklearn.metrics import average_precision_score, precision_score, recall_score

from pipeline.ablation.stage import ablate
from pipeline.ablation.statistics import (
    FIGURES,
    Draws,
    cell_draws,
    compare,
    correct,
    long_rows,
    markdown,
    over_seeds,
    sentence,
    significance,
    verdict,
)
from pipeline.ablation.summary import declared_pairs, judged_patients
from pipeline.competition.subset import label_subset
from pipeline.competition.targets import TARGET_NAMES, TARGETS, group_slices
from pipeline.evaluation.metrics import resamples
from pipeline.run import layout
from pipeline.run.config import AblationConfig
from pipeline.run.manifest import read_manifest
from pipeline.run.presets import derive, load_config
from pipeline.run.stage import Options, Stage
from pipeline.system.errors import InputError
from pipeline.system.files import write_json

ALL = {"a": TARGET_NAMES, "b": TARGET_NAMES}


def naive_figures(labels: np.ndarray, values: np.ndarray, targets: tuple[str, ...]) -> list[float]:
    """Score, mAP, macro precision and recall by scikit-learn and plain loops."""
    where, areas, precisions, recalls = group_slices(), [], [], []
    scores = naive_score(labels.tolist(), values.tolist())
    for name in targets:
        columns = range(where[name].start, where[name].stop)
        truth = [int(row[columns[0]] == 0) for row in labels]
        risk = [1 - row[columns[0]] / sum(row[c] for c in columns) for row in values]
        called = [int(one >= 0.5) for one in risk]
        areas.append(average_precision_score(truth, risk))
        precisions.append(precision_score(truth, called, zero_division=0))
        recalls.append(recall_score(truth, called))
    score = scores["score"] if len(targets) == 5 else np.mean([scores[name] for name in targets])
    return [float(score), *(float(np.mean(part)) for part in (areas, precisions, recalls))]


@pytest.mark.parametrize("targets", [TARGET_NAMES, ("liver",), ("bowel", "spleen")])
def test_figures_of_resampled_patients_are_those_of_a_table_with_these_patients(targets):
    labels = one_hot(40)
    values = predicted(labels, 1.5)
    found = cell_draws(labels, values, 3, seed=5).figures(targets)
    counts = np.concatenate(list(resamples(40, 3, 5))).astype(int)
    assert found.shape == (4, len(FIGURES))
    for row, drawn in zip(found, counts, strict=True):
        again = np.repeat(np.arange(40), drawn)
        assert row == pytest.approx(naive_figures(labels[again], values[again], targets), abs=1e-12)


def test_precision_is_zero_where_nothing_is_called_positive():
    labels = one_hot(40)
    values = np.concatenate(
        [
            np.r_[0.9, np.full(len(target.classes) - 1, 0.1 / (len(target.classes) - 1))]
            for target in TARGETS
        ]
    )
    found = cell_draws(labels, np.repeat(values[None], 40, 0), 0, 0)
    assert found.precision.tolist() == [[0.0] * 5]
    assert found.recall.tolist() == [[0.0] * 5]


def test_seeds_give_the_mean_the_spread_of_students_t():
    """Without any noise of patients the interval is the textbook's: mean plus or minus t times the
    standard error.
    """
    values = np.repeat(np.array([[1.0, -2.0], [2.0, -2.0], [6.0, -2.0]])[:, None], 2001, axis=1)
    found = over_seeds(values, 0)
    assert found[0].tolist() == [3.0, -2.0]
    error = 4.302653 * np.std([1, 2, 6], ddof=1) / 3**0.5
    assert np.percentile(found[1:, 0], [2.5, 97.5]) == pytest.approx(
        [3 - error, 3 + error], rel=0.01
    )
    assert (found[:, 1] == -2).all()
    assert over_seeds(values[:1], 0).tolist() == values[0].tolist(), "one seed has no spread"


@pytest.mark.parametrize(("seeds", "ratio"), [(2, 0.3), (3, 0.0), (3, 1.0), (5, 0.3)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, ratio):
    """Normal noise of seeds, and `ratio` times as much of patients; resampling alone held it in 49
    to 88 of 100.
    """
    rng, held = np.random.default_rng(5), 0
    for rep in range(400):
        patients = ratio * rng.normal()
        rows = (
            rng.normal(size=(seeds, 1)) + patients + ratio * np.insert(rng.normal(size=400), 0, 0)
        )
        low, high = np.percentile(over_seeds(rows[..., None], rep)[1:, 0], [2.5, 97.5])
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 1


def test_intervals_stay_within_what_a_figure_can_be():
    labels = one_hot(60)
    cells = [
        cell_draws(labels, predicted(labels, strength, seed=k), 200, 1)
        for k, strength in enumerate((0.0, 9.0))
    ]
    figures = compare({"a": cells}, ALL, [("a", "a")], 0)[0]["figures"]
    assert all(figures[name]["own"]["low"] >= 0 for name in FIGURES)
    assert all(figures[name]["own"]["high"] <= 1 for name in FIGURES if name != "score")
    assert figures["mAP"]["own"]["high"] == 1, "two seeds that differ so much tell next to nothing"


def test_one_seed_shows_no_difference():
    row = compare(
        {name: cells[:1] for name, cells in cells_of(0.5)[1].items()}, ALL, [("b", "a")], 0
    )[0]
    correct([row], None)
    assert row["figures"]["score"]["difference"]["high"] < 0
    assert "of one seed each" in sentence(row)
    assert next(long_rows({"compared": [row], "patients": 150}))["verdict"] == "no difference shown"


def test_intervals_of_equal_variants_hold_zero_even_where_seeds_differ_much():
    rng, missed = np.random.default_rng(0), 0
    for rep in range(20):
        labels = one_hot(80, seed=rep)
        draws = {
            name: [
                cell_draws(
                    labels,
                    predicted(
                        labels, 1 + 0.3 * rng.normal(), seed=100 * rep + 10 * (name == "b") + k
                    ),
                    200,
                    1,
                )
                for k in range(3)
            ]
            for name in "ab"
        }
        missed += (
            verdict(
                compare(draws, ALL, [("b", "a")], 0)[0]["figures"]["score"]["difference"], True, 3
            )
            != "no difference shown"
        )
    assert missed <= 3, "5 percent of 20 is one"


def cells_of(
    shift: float, seeds: int = 3, patients: int = 150
) -> tuple[np.ndarray, dict[str, list[Draws]]]:
    """Variant b sees the labels as well as a does plus `shift`; the seeds of both have noise of
    their own.
    """
    labels = one_hot(patients)
    signal = {"a": 1.0, "b": 1.0 + shift}
    return labels, {
        name: [
            cell_draws(labels, predicted(labels, strength, seed=k + 10 * (name == "b")), 300, 1)
            for k in range(seeds)
        ]
        for name, strength in signal.items()
    }


def test_planted_difference_is_found_and_none_is_not():
    for shift, outcome in ((0.5, "better"), (-0.5, "worse"), (0.0, "no difference shown")):
        row = compare(cells_of(shift)[1], ALL, [("b", "a")], 0)[0]
        for figure in ("score", "mAP"):
            assert verdict(row["figures"][figure]["difference"], FIGURES[figure], 3) == outcome, (
                shift,
                figure,
            )
        assert ("no difference" if shift == 0 else outcome) in sentence(row)


def test_difference_is_paired_over_patients():
    """The same predictions with a small constant handicap: the difference is certain though both
    scores are not.
    """
    labels = one_hot(150)
    values = predicted(labels, 1.5)
    worse = 0.98 * values + 0.02 / 3
    row = compare(
        {"a": [cell_draws(labels, values, 300, 1)], "b": [cell_draws(labels, worse, 300, 1)]},
        ALL,
        [("b", "a")],
        0,
    )[0]["figures"]
    widths = {name: part["high"] - part["low"] for name, part in row["score"].items()}
    assert widths["difference"] < 0.2 * min(widths["own"], widths["other"])
    assert row["score"]["difference"]["value"] == pytest.approx(
        row["score"]["own"]["value"] - row["score"]["other"]["value"]
    )
    # one seed tells no spread
    for seeds, p, detectable in ((1, None, None), (2, 1.0, 0.0)):
        cells = {"a": [cell_draws(labels, values, 300, 1)] * seeds}
        same = compare(cells, ALL, [("a", "a")], 0)[0]["figures"]["mAP"]["difference"]
        assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "p": p, "detectable": detectable}


def test_single_target_variant_is_compared_on_its_target_only():
    labels, draws = cells_of(0.5)
    row = compare(draws, {"a": TARGET_NAMES, "b": ("liver",)}, [("b", "a")], 0)[0]
    assert row["targets"] == ["liver"]
    liver = np.mean([one.loss[0, TARGET_NAMES.index("liver")] for one in draws["a"]])
    assert row["figures"]["score"]["other"]["value"] == pytest.approx(liver)


@pytest.mark.parametrize(
    ("low", "high", "less", "word"),
    [
        (-2, -1, True, "better"),
        (1, 2, True, "worse"),
        (1, 2, False, "better"),
        (-1, 1, True, "no difference shown"),
        (0, 1, False, "no difference shown"),
        (None, None, True, "no difference shown"),
    ],
)
def test_verdict_needs_an_interval_without_zero(low, high, less, word):
    assert verdict({"value": 0.0, "low": low, "high": high}, less, 3) == word


def test_p_values_count_the_rarer_side_of_zero():
    drawn, span = np.r_[np.full(97, -1.0), np.full(2, 1.0), np.nan], {"low": -1.0, "high": 0.5}
    found = significance(drawn, {"value": -1.0, **span}, 2)
    assert found["p"] == pytest.approx(2 * (1 + 2) / (1 + 99))
    assert found["detectable"] == pytest.approx(0.75 * (1.959964 + 0.841621) / 1.959964, rel=1e-6)
    unknown = {"p": None, "detectable": None}
    assert significance(drawn, {"value": None, "low": None, "high": None}, 2) == unknown
    assert significance(drawn, {"value": -1.0, **span}, 1) == unknown, "of one seed"


def test_a_difference_of_the_detectable_size_is_shown_in_four_of_five_experiments():
    """Five seeds whose noise is as large as that of the patients."""
    rng, sizes, shown = np.random.default_rng(3), [], 0

    def experiment(truth: float, rep: int) -> dict[str, float | None]:
        patients = rng.normal() + np.insert(rng.normal(size=400), 0, 0.0)
        rows = truth + rng.normal(size=(5, 1)) + patients
        part = over_seeds(rows[..., None], rep)[:, 0]
        low, high = np.percentile(part[1:], [2.5, 97.5])
        return {
            "low": low,
            "high": high,
            **significance(part[1:], {"value": 0, "low": low, "high": high}, 5),
        }

    sizes = [experiment(0.0, rep)["detectable"] for rep in range(300)]
    for rep in range(400):
        found = experiment(float(np.mean(sizes)), rep)
        shown += not found["low"] <= 0 <= found["high"]
    assert 0.75 <= shown / 400 <= 0.9


def test_all_but_the_primary_comparison_are_corrected_for_being_many():
    """By hand: q of the k-th smallest of n is the least p n / j of all j >= k."""
    ps = [0.03, 0.001, 0.04, 0.02, 0.9]
    names = [("a", "z"), ("b", "z"), ("c", "z"), ("d", "z"), ("e", "z")]

    def rows() -> list[dict]:
        return [
            {
                "variant": one,
                "reference": other,
                "seeds": 5,
                "figures": {
                    name: {"difference": {"value": -1.0, "low": -2.0, "high": -0.1, "p": p}}
                    for name in FIGURES
                },
            }
            for (one, other), p in zip(names, ps, strict=True)
        ]

    def by_hand(found: list[float]) -> list[float]:
        order = sorted(found)
        return [
            min(one * len(order) / j for j, one in enumerate(order, 1) if one >= p) for p in found
        ]

    alone, named = rows(), rows()
    correct(alone, None)
    correct(named, ("c", "z"))
    found = [row["figures"]["score"]["difference"]["q"] for row in alone]
    assert found == pytest.approx(by_hand(ps))
    assert [row["role"] for row in named] == ["exploratory"] * 2 + ["primary"] + ["exploratory"] * 2
    found = [row["figures"]["score"]["difference"]["q"] for row in named]
    assert found[2] == 0.04
    assert found[:2] + found[3:] == pytest.approx(by_hand([0.03, 0.001, 0.02, 0.9]))
    ps[0] = 0.04  # the very figures of the primary pair: corrected all the same
    correct(same := rows(), ("c", "z"))
    found = [row["figures"]["score"]["difference"]["q"] for row in same]
    assert found[2] == 0.04
    assert found[:2] + found[3:] == pytest.approx(by_hand([0.04, 0.001, 0.02, 0.9]))
    ps[0] = 0.03
    found = [row["figures"]["mAP"]["difference"]["q"] for row in named]
    assert found == pytest.approx(by_hand(ps)), "it was named for the score alone"
    score = [row["figures"]["score"]["difference"] for row in named]
    assert verdict(score[1], True, 5) == "better"
    assert verdict(score[4], True, 5) == "no difference shown"


@pytest.mark.parametrize("seeds", [1, 3])
def test_tables_hold_every_comparison(seeds):
    draws = cells_of(0.3, seeds)[1]
    pair = compare(draws, ALL, [("b", "a")], 0)
    correct(pair, ("b", "a"))
    result = {
        "patients": 150,
        "seeds": list(range(seeds)),
        "variants": compare(draws, ALL, [("a", "a"), ("b", "b")], 0),
        "compared": pair,
        "costs": [{"variant": name, "training_s": 10.0, "pretraining_s": 5.0} for name in "ab"],
        "sentences": [sentence(pair[0])],
    }
    rows = list(long_rows(result))
    assert [row["figure"] for row in rows] == list(FIGURES)
    assert all(
        row["own_value"] - row["other_value"] == pytest.approx(row["difference_value"])
        for row in rows
    )
    text = markdown(result)
    assert text.count("| **b − a** (primary) |") == 1
    assert f"{pair[0]['figures']['score']['own']['value']:.3f} (" in text
    assert sentence(pair[0]) in text
    assert text.count("– | – |") == (seeds == 1), "of one seed neither p nor what it would show"
    assert ("one seed; 95 % intervals: bootstrap over patients alone." in text) == (seeds == 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_label_subsets_are_nested_stratified_and_whatever_the_order(seed):
    labels = one_hot(200, seed=3)
    names = label_frame(labels)["patient_id"].to_list()
    subsets = [label_subset(names, labels, fraction, seed) for fraction in (0.1, 0.3, 0.5, 1.0)]
    assert [len(one) for one in subsets] == [20, 60, 100, 200]
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))
    chosen = np.array([name in subsets[1] for name in names])
    assert np.abs(labels[chosen].sum(0) - 0.3 * labels.sum(0)).max() < 1.5, (
        "every class has its share"
    )
    turned = label_subset(names[::-1], labels[::-1], 0.3, seed)
    assert turned == subsets[1]
    assert subsets[0] != label_subset(names, labels, 0.1, seed + 1)


def test_no_two_variants_are_compared_twice():
    """Every comparison counts in the correction for many, so none may stand there twice."""
    options = AblationConfig(
        variants={name: {} for name in "abcde"},
        reference="a",
        primary=("c", "b"),
        pairs=(("a", "b"), ("b", "c"), ("d", "b"), ("a", "e"), ("d", "b")),
    )
    expected = [("c", "b"), ("a", "b"), ("d", "b"), ("a", "e")]
    assert declared_pairs(options, "abcde") == expected
    # variants that could not be trained, such as those of ImageNet where there is no network
    assert declared_pairs(options, "abce") == [("c", "b"), ("a", "b"), ("a", "e")]


@pytest.mark.slow
def test_variants_are_checked_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match="'other' is none of the variants"):
        load_config("smoke", ["ablation.variants={a: {}}", "ablation.reference=other"])
    with pytest.raises(InputError, match="'volume.depth' is the same for all variants"):
        load_config("smoke", ["ablation.variants={a: {volume.depth: 3}}", "ablation.reference=a"])
    with pytest.raises(InputError, match="'predict.flush_every' is the same for all variants"):
        load_config(
            "smoke", ["ablation.variants={a: {predict.flush_every: 3}}", "ablation.reference=a"]
        )
    allowed = ["ablation.variants={a: {predict.phases: 2}}", "ablation.reference=a"]
    assert load_config("smoke", allowed).ablation.reference == "a"
    with pytest.raises(InputError, match="'b' is none of the variants"):
        load_config(
            "smoke",
            ["ablation.variants={a: {}}", "ablation.primary=[b, a]", "ablation.reference=a"],
        )
    itself = ["ablation.variants={a: {}}", "ablation.pairs=[[a, a]]", "ablation.reference=a"]
    with pytest.raises(InputError, match="'a' would be compared with itself"):
        load_config("smoke", itself)
    with pytest.raises(InputError, match="no name for a variant"):
        load_config("smoke", ["ablation.variants={../a: {}}", "ablation.reference=../a"])
    done = stage_here(
        "10",
        "--config",
        "smoke",
        "--out",
        str(tmp_path),
        "ablation.variants={a: {train.epoch: 3}}",
        "ablation.reference=a",
    )
    assert done.returncode == 2
    assert "did you mean 'train.epochs'" in done.stderr
    assert "ablation.variants.a" in done.stderr
    config = load_config(
        "smoke",
        ["ablation.variants={a: {}, b: {model.backbone: resnt50}}", "ablation.reference=a"],
    )
    with pytest.raises(InputError, match="no such timm model, model.backbone=resnt50, did you"):
        ablate(config, out=tmp_path)
    variants = "{a: {}, b: {model.backbone: test_vit, train.init: scratch, train.image_size: 40}}"
    config = load_config("smoke", [f"ablation.variants={variants}", "ablation.reference=a"])
    with pytest.raises(InputError, match="test_vit takes no images of 40 x 40 pixels"):
        ablate(config, out=tmp_path)
    variants = variants.replace("train.init: scratch, train", "pretrain")
    config = load_config("smoke", [f"ablation.variants={variants}", "ablation.reference=a"])
    with pytest.raises(InputError, match="test_vit takes no crops of 20 x 20 pixels"):
        ablate(config, out=tmp_path)
    assert not (tmp_path / "10_ablation" / "pretrained").exists()
    with pytest.raises(InputError, match="label_fraction"):
        derive(load_config("smoke"), {"train.label_fraction": 0}, "here")


@pytest.mark.parametrize("name", ["ablation_recipe", "ablation_recipe_more"])
def test_the_recipe_is_asked_on_the_demo_as_it_was(name):
    """Its cells share one pretraining a seed and change nothing but what they are named after."""
    from pipeline.ablation.grid import declared_cells, pretrainings, trained_folds

    demo, config = load_config("demo"), load_config(name)
    for section in ("seed", "convert", "volume", "model"):
        assert getattr(config, section) == getattr(demo, section)
    before = {
        "phantom": {"second_series": 0.25},
        "folds": {"count": 3},
        "pretrain": {
            **{"window": False, "window_margin": 0.15, "z_bins": 1, "intra_loss": "published"},
            **{"base_encoder": "teacher", "inter": 1, "regularisation": 1, "dropout": 0.2},
            **{"steps": 800, "batch": 8, "slices": 4, "image_size": 96, "random_crops": 6},
            **{"lr": 5e-3, "warmup": 80},
        },
        "organs": {"steps": 800},
    }
    for section, values in before.items():
        assert getattr(config, section) == getattr(demo, section).model_copy(update=values)
    cells = declared_cells(config)
    assert len(pretrainings(cells)) == len(config.ablation.seeds) == 5
    assert trained_folds(config) == (0,)
    own = next(cell for cell in cells if cell.variant == "demo").config
    training = {
        "slices": 12,
        "image_size": 64,
        "epochs": 20,
        "visible_loss": 1.0,
        "eval_every": 100,
        "lr": 1.5e-3,
        "workers": 1,
        "augment": demo.train.augment.model_copy(update={"probability": 0.8}),
    }
    assert own.train == demo.train.model_copy(update=training)
    assert own.predict == demo.predict.model_copy(update={"phases": 2})
    views = {"one_phase": 1, "all": 4, "larger_pictures": 4}
    for cell in cells:
        assert cell.config.predict.phases == views.get(cell.variant, 2)


@pytest.mark.parametrize(
    "name",
    [
        "ablation_quick",
        "ablation_long",
        "ablation_more",
        "ablation_softmax",
        "ablation_own_base",
        "ablation_full",
    ],
)
def test_presets_declare_valid_grids(name):
    from pipeline.ablation.grid import declared_cells, pretrainings, trained_folds

    config = load_config(name)
    options, cells = config.ablation, declared_cells(config)
    assert len(cells) == len(options.variants) * len(options.seeds)
    assert len(options.seeds) == 5
    assert len(pretrainings(cells)) < len(cells), "pretraining is shared"
    assert len({cell.name for cell in cells}) == len(cells)
    judged = config.phantom.train_patients / config.folds.count
    assert trained_folds(config) == (0,)
    assert judged >= 1000
    assert config.phantom.train_patients - judged >= 1000
    for cell in cells:
        assert cell.config.pretrain.exclude_fold == (None if cell.variant == "seen" else 0)


def test_quick_grid_asks_what_the_long_one_asks_with_two_fifths_of_the_training():
    from pipeline.ablation.grid import declared_cells

    quick, long = load_config("ablation_quick"), load_config("ablation_long")
    questions = {"primary", "reference", "pairs", "folds", "seeds"}
    assert quick.ablation.model_dump(include=questions) == long.ablation.model_dump(
        include=questions
    )
    cells = {cell.name: cell.config for cell in declared_cells(quick)}
    others = {cell.name: cell.config for cell in declared_cells(long)}
    assert cells.keys() == others.keys()
    lengths = {
        "pretrain": ("steps", "warmup", "eval_every", "checkpoint_every"),
        "train": ("epochs", "eval_every"),
    }
    for name, own in cells.items():
        other = others[name]
        for section, keys in lengths.items():
            mine, theirs = getattr(own, section), getattr(other, section)
            for key in keys:
                assert getattr(mine, key) == pytest.approx(0.4 * getattr(theirs, key), abs=0.5)
            kept = {key: getattr(theirs, key) for key in keys}
            assert mine.model_copy(update=kept) == theirs
        for section in ("phantom", "volume", "folds", "model", "score"):
            assert getattr(own, section) == getattr(other, section)


GRID = (
    (
        "ablation.variants={scratch: {train.init: scratch}, voco2d: {train.init: voco2d,"
        " train.label_fraction: 0.5}}"
    ),
    "ablation.reference=scratch",
    "ablation.seeds=[1]",
    "ablation.bootstrap=50",
    "train.slice_loss=0",
    "train.epochs=1",
    "train.slices=3",
    "pretrain.steps=2",
)


@pytest.fixture(scope="module")
def ablated(smoke, tmp_path_factory) -> Iterator[Path]:
    """A copy of the smoke run with a finished ablation of two variants."""
    out = tmp_path_factory.mktemp("ablation") / "run"
    shutil.copytree(
        smoke,
        out,
        ignore=shutil.ignore_patterns(
            layout.SLICES, "train_images", "test_images", "unlabelled", "0[4-8]_*"
        ),
    )
    shutil.copytree(
        smoke / layout.SLICES, out / layout.SLICES, ignore=shutil.ignore_patterns("*.png")
    )
    done = stage_here("10", "--config", "smoke", "--out", str(out), *GRID)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| voco2d − scratch |" in done.stdout
    return out


def test_every_cell_keeps_its_out_of_fold_rows_and_nothing_heavy(ablated):
    index = pl.read_parquet(ablated / layout.VOLUMES / "index.parquet").filter(
        pl.col("source") == "train"
    )
    for variant in ("scratch", "voco2d"):
        folder = ablated / layout.ABLATION / variant / "seed1"
        assert {path.name for path in folder.iterdir()} == {
            "manifest.json",
            "oof.parquet",
            "log.jsonl",
            "identity.txt",
        }
        assert sorted(pl.read_parquet(folder / "oof.parquet")["series_id"]) == sorted(
            index["series_id"]
        ), "held-out patients are all there"
    counts = {
        name: read_manifest(ablated / layout.ABLATION / name / "seed1")["counts"]
        for name in ("scratch", "voco2d")
    }
    assert counts["voco2d"]["train_series"] < 0.7 * counts["scratch"]["train_series"], (
        "half of the training patients"
    )
    assert not list((ablated / layout.ABLATION).rglob("*.ckpt"))


def test_tables_agree_with_the_cells(ablated):
    folder = ablated / layout.ABLATION
    cells = pl.read_csv(folder / "cells.csv")
    table = pl.read_csv(folder / "table.csv").filter(pl.col("figure") == "score").row(0, named=True)
    score = dict(cells.select("variant", "score").iter_rows())
    assert table["own_value"] == pytest.approx(score["voco2d"])
    assert table["difference_value"] == pytest.approx(score["voco2d"] - score["scratch"])
    assert table["difference_low"] <= table["difference_value"] <= table["difference_high"]
    assert (cells["training_s"] > 0).all()
    assert (cells.filter(pl.col("variant") == "voco2d")["pretraining_s"] > 0).all()
    assert (
        table["patients"]
        == pl.read_parquet(folder / "scratch" / "seed1" / "oof.parquet")["patient_id"].n_unique()
    )
    assert len(json.loads((folder / "table.json").read_text())["sentences"]) == 1


def test_one_fold_alone_is_trained_without_and_judged_on(ablated):
    """Nested calibration within it; the other cells go on as they are."""
    more = ("ablation.folds=[1]", "ablation.bootstrap=20", "score.nested_folds=2")
    done = stage_here("10", "--config", "smoke", "--out", str(ablated), *GRID, "ablation.folds=[7]")
    assert done.returncode == 2
    assert "there is no fold 7" in done.stderr
    stage = Stage(layout.ABLATION, load_config("smoke", [*GRID, *more]), Options(out=ablated))
    labels, folds = judged_patients(stage)
    table = pl.read_csv(
        ablated / layout.FOLDS / "folds.csv", schema_overrides={"patient_id": pl.String}
    )
    held_out = set(table.filter(pl.col("fold") == 1)["patient_id"])
    assert set(labels["patient_id"]) == set(folds["patient_id"]) == held_out
    assert set(folds["fold"]) == {0, 1}
    out = ablated.parent / "one_fold"
    shutil.copytree(ablated, out, ignore=shutil.ignore_patterns("voco2d"))
    one = "ablation.variants={scratch: {train.init: scratch}}"
    args = ("--config", "smoke", "--out", str(out), *GRID, *more, one, "name=second")
    done = stage_here("10", *args)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("table.md", "table.json", "table.csv", "cells.csv"):  # no grid's are lost
        first, second = (out / layout.ABLATION / "grids" / grid for grid in ("smoke", "second"))
        assert (first / name).read_bytes() == (ablated / layout.ABLATION / name).read_bytes()
        assert (second / name).read_bytes() == (out / layout.ABLATION / name).read_bytes()
    found = pl.read_parquet(out / layout.ABLATION / "scratch" / "seed1" / "oof.parquet")
    assert set(found["patient_id"]) == held_out
    rows = [
        json.loads(line)
        for line in (out / layout.ABLATION / "scratch" / "seed1" / "log.jsonl")
        .read_text()
        .splitlines()
    ]
    assert {row["fold"] for row in rows} == {1}


def test_probes_answer_for_both_statistics_before_and_after(ablated):
    table = pl.read_csv(ablated / layout.ABLATION / "probes.csv")
    assert {"place", "16 x 16 pixels", "start_scratch", "voco2d"} <= set(table["backbone"])
    assert {"stored", "settled"} <= set(table["statistics"])
    assert {"kidney", "liver", "spleen"} <= set(table["question"])
    assert table["value"].is_between(0, 1).all()


def test_an_interrupted_cell_is_redone_and_nothing_else(ablated):
    folder = ablated / layout.ABLATION
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("oof.parquet")}
    cell = folder / "scratch" / "seed1"
    rows = pl.read_parquet(cell / "oof.parquet")
    probes = (folder / "probes.csv").read_bytes()
    (cell / "manifest.json").unlink()
    done = stage_here("10", "--config", "smoke", "--out", str(ablated), *GRID)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "10_ablation/voco2d/seed1: up to date" in done.stderr
    assert [path for path, time in before.items() if path.stat().st_mtime_ns != time] == [
        cell / "oof.parquet"
    ]
    assert pl.read_parquet(cell / "oof.parquet").equals(rows), "the same cell again"
    assert done.stderr.count("10_ablation/probes/") == 3
    assert "10_ablation/probes/baselines: up to date" in done.stderr
    assert (folder / "probes.csv").read_bytes() == probes


def test_a_cell_is_of_the_weights_and_organs_that_are_there(ablated, tmp_path):
    """As stage 06: the content of a weights file counts, what `score.aggregate` chooses by, and
    organs of other folds are refused.
    """
    from pipeline.ablation.cells import cell_is_current
    from pipeline.ablation.grid import declared_cells, part_with

    weights = tmp_path / "weights.safetensors"
    out = tmp_path / "run"
    for name in (layout.VOLUMES, layout.FOLDS):
        shutil.copytree(ablated / name, out / name)

    def state(*keys: str) -> str:
        config = load_config("smoke", [*GRID, *keys])
        stage = Stage(layout.ABLATION, config, Options(out=out, data=ablated / "data/phantom"))
        cell = next(c for c in declared_cells(config) if c.variant == "scratch")
        part = part_with(stage, cell.name, cell.config)
        assert not cell_is_current(stage, part, cell)
        return part.fingerprint

    image = "ablation.variants={scratch: {train.init: imagenet}}"
    own = (image, "ablation.reference=scratch", f"model.weights={weights}")
    weights.write_bytes(b"one")
    before = state(*own)
    weights.write_bytes(b"two")
    assert state(*own) != before
    patient = ("train.patience=1", "score.aggregate=mean")
    assert state(*patient) != state("train.patience=1", "score.aggregate=max")
    (out / layout.ORGANS).mkdir()
    organs = {"schema": 1, "fingerprint": "", "outputs": {}, "inputs": {layout.FOLDS: "others"}}
    write_json(out / layout.ORGANS / "manifest.json", organs)
    with pytest.raises(InputError, match="of other volumes or folds"):
        state("train.visible_loss=1")


def test_ranks_share_the_probes(ablated, tmp_path, monkeypatch):
    """A rank makes its own; the writing one waits for those of the others, then joins all; what is
    gone is made again, alone.
    """
    from pipeline.ablation import probe_parts
    from pipeline.ablation.grid import declared_cells

    config, out, made = load_config("smoke", GRID), tmp_path / "run", []
    shutil.copytree(ablated, out)
    folder = out / layout.ABLATION
    shutil.rmtree(folder / "probes")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def rows(probes, one):
        made.append(one.name)
        known = {"question": "liver", "probe": "dense", "figure": "Dice", "hospital": "all"}
        return [
            {"backbone": one.name, "statistics": "", "seed": 1, "value": 0.5, "patients": 2} | known
        ]

    monkeypatch.setattr(probe_parts.Probes, "_rows", rows)

    def run(rank: int) -> str:
        monkeypatch.setenv("RANK", str(rank))
        stage = Stage(layout.ABLATION, config, Options(out=out, device="cpu"))
        probes = probe_parts.Probes(stage, declared_cells(config))
        probes.run()
        return probes.join() if rank == 0 else ""

    run(1)
    assert made == ["start_scratch"]
    run(0)
    assert made == ["start_scratch", "baselines", "voco2d"]
    table = pl.read_csv(folder / run(0))
    assert table["backbone"].to_list() == ["baselines", "start_scratch", "voco2d"]
    assert len(made) == 3
    next((folder / "probes").glob("start_*/probes.csv")).unlink()
    run(1)
    assert made[3:] == ["start_scratch"]


def test_a_cell_of_another_config_does_not_go_on_from_its_checkpoint(tmp_path):
    from pipeline.system.files import keep_only

    (fold := tmp_path / "seed1" / "fold0").mkdir(parents=True)
    keep_only(fold.parent, "one")
    assert not fold.exists(), "nobody said whose it was"
    fold.mkdir()
    keep_only(fold.parent, "one")
    assert fold.exists()
    keep_only(fold.parent, "two")
    assert not fold.exists()


def test_ranks_share_all_cells_and_no_cell_twice(monkeypatch):
    config = load_config("smoke", [*GRID[:2], "ablation.seeds=[1,2,3]"])
    from pipeline.ablation.grid import declared_cells

    names = [cell.name for cell in declared_cells(config)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        stage = Stage(layout.ABLATION, config)
        shares += [cell.name for cell in stage.share(declared_cells(config))]
    assert sorted(shares) == sorted(names)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_waits_for_a_backbone_when_it_comes_to_a_cell_that_needs_it(
    rank, tmp_path, monkeypatch
):
    """Cells without pretraining come first, and before the probes all backbones are there."""
    from pipeline.ablation import cells as ablation

    grid = (
        "ablation.variants={scratch: {train.init: scratch}, a: {}, b: {pretrain.steps: 3},"
        " c: {pretrain.steps: 3, train.sequence: none}}",
        "ablation.reference=scratch",
        "ablation.seeds=[1,2]",
        "train.init=voco2d",
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    stage, events = Stage(layout.ABLATION, load_config("smoke", grid), Options(tmp_path)), []
    stage.writer = rank == 0
    declared = ablation.declared_cells(stage.config)
    keys = [*ablation.pretrainings(declared)]
    assert len(keys) == 4
    own = keys[rank::2]
    trained = lambda stage, cell: events.append((cell.name, cell.backbone))  # noqa: E731
    monkeypatch.setattr(ablation, "_check_models", lambda stage, cells: None)
    monkeypatch.setattr(ablation, "train_cell", trained)
    monkeypatch.setattr(ablation, "pretrain_backbone", lambda part: events.append(part.name))
    monkeypatch.setattr(ablation, "wait_for", lambda part, current: events.append(part.name))
    ablation.run_cells(stage)
    places = [f"10_ablation/pretrained/{key}" for key in keys]
    assert events[:2] == [places[k] for k in range(rank, 4, 2)], "its own share of pretrainings"
    cells = [one for one in events if isinstance(one, tuple)]
    assert sorted(cells) == sorted((cell.name, cell.backbone) for cell in declared[rank::2])
    scratch = [one for one in cells if one[1] is None]
    assert events[2 : 2 + len(scratch)] == scratch, "before anything is waited for"
    for k, one in enumerate(events):
        if isinstance(one, tuple) and one[1] not in (None, *own):
            assert f"10_ablation/pretrained/{one[1]}" in events[:k]
    others = [place for key, place in zip(keys, places, strict=True) if key not in own]
    for place in others:
        assert events.count(place) == 1, "once, even where no cell of its own needs it"


def test_the_writing_rank_probes_before_it_waits_for_the_cells_of_another(tmp_path, monkeypatch):
    from pipeline.ablation import cells as ablation
    from pipeline.ablation.probe_parts import Probes

    grid = (
        "ablation.variants={a: {}, b: {train.sequence: none}}",
        "ablation.reference=a",
        "ablation.seeds=[1]",
        "train.init=scratch",
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    options, events = Options(tmp_path), []

    class Stop(Exception):
        pass

    def wait(part, current):
        events.append(part.name)
        raise Stop

    monkeypatch.setattr(ablation, "_check_models", lambda stage, cells: None)
    monkeypatch.setattr(ablation, "train_cell", lambda stage, cell: events.append(cell.name))
    monkeypatch.setattr(ablation, "wait_for", wait)
    monkeypatch.setattr(Probes, "run", lambda probes: events.append("probes"))
    with pytest.raises(Stop):
        ablate.run(Stage(layout.ABLATION, load_config("smoke", grid), options))
    assert events == ["a/seed1", "probes", "10_ablation/b/seed1"]


def test_a_rank_waits_for_this_runs_result_and_not_for_an_older_one(tmp_path, monkeypatch):
    from pipeline.ablation import cells as ablation

    part = Stage(
        "10_ablation/a/seed1",
        load_config("smoke"),
        Options(out=tmp_path),
    )
    naps = []

    def finish_after_two(seconds):
        naps.append(seconds)
        assert read_manifest(part.folder)["fingerprint"] == "of another config", (
            "a rank that waits removes nothing"
        )
        if len(naps) == 2:
            write_json(
                part.folder / "manifest.json",
                {"schema": 1, "fingerprint": part.fingerprint, "outputs": {}},
            )

    write_json(
        part.folder / "manifest.json",
        {"schema": 1, "fingerprint": "of another config", "outputs": {}},
    )
    monkeypatch.setattr(ablation.time, "sleep", finish_after_two)
    ablation.wait_for(part, lambda one: one.current({}, ["seed"]))
    assert len(naps) == 2


def test_a_rank_waits_until_the_files_are_there(tmp_path, monkeypatch):
    """The other rank removes the manifest of a cell that lost a file a moment later."""
    from pipeline.ablation import cells as ablation

    part = Stage(
        "10_ablation/a/seed1",
        load_config("smoke"),
        Options(out=tmp_path),
    )
    fingerprint = part.fingerprint_of({}, ["seed"])
    write_json(
        part.folder / "manifest.json",
        {"schema": 1, "fingerprint": fingerprint, "outputs": {"oof.parquet": {"bytes": 1}}},
    )
    monkeypatch.setattr(
        ablation.time, "sleep", lambda seconds: (part.folder / "oof.parquet").write_text("x")
    )
    ablation.wait_for(part, lambda one: one.current({}, ["seed"]))
    assert (part.folder / "oof.parquet").exists()


def test_rank_0_decides_what_is_out_of_reach(tmp_path, monkeypatch, capfd):
    from pipeline.ablation import cells as ablation
    from pipeline.ablation.grid import declared_cells

    grid = (
        "ablation.variants={scratch: {}, one: {train.init: imagenet}}",
        "ablation.reference=scratch",
        "train.init=scratch",
    )
    stage = Stage(
        layout.ABLATION,
        load_config("smoke", grid),
        Options(out=tmp_path),
    )
    cells = declared_cells(stage.config)
    asked = []
    monkeypatch.setattr(
        "pipeline.learning.distributed.of_rank_0",
        lambda value: asked.append(value) or {"one": "no network"},
    )
    stage.rank = 1
    assert {cell.variant for cell in ablation.startable(stage, cells)} == {"scratch"}
    assert asked == [{}], "another rank does not look itself"
    assert ablation.startable(stage, [cell for cell in cells if cell.variant == "scratch"])
    assert len(asked) == 1, "nor asks where there is nothing to ask"


def test_several_ranks_refuse_to_force(tmp_path, monkeypatch):
    from pipeline.ablation.cells import run_cells

    monkeypatch.setenv("WORLD_SIZE", "2")
    options = Options(out=tmp_path, force=True)
    with pytest.raises(InputError, match="--force works in a single process only"):
        run_cells(Stage(layout.ABLATION, load_config("smoke"), options))


def test_a_forced_ablation_that_is_stopped_leaves_nothing_that_looks_finished(
    tmp_path, monkeypatch
):
    """Else the same command without --force would take cells that it had not come to for new."""
    from pipeline.ablation import cells as ablation

    variants = (
        "ablation.variants={a: {}, b: {train.sequence: none}}",
        "ablation.reference=a",
        "train.init=voco2d",
    )
    stage = Stage(layout.ABLATION, load_config("smoke", variants), Options(tmp_path, force=True))
    cells = ablation.declared_cells(stage.config)
    folders = [stage.folder, *(stage.folder / cell.name for cell in cells)]
    folders += [ablation.backbone_part(stage, cell).folder for cell in cells]
    for folder in folders:
        write_json(folder / layout.MANIFEST, {"of": "an earlier run"})
        (folder / layout.LAST).touch()

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "pretrain_backbone", stop)
    with pytest.raises(KeyboardInterrupt):
        ablation.run_cells(stage)
    assert not list(stage.folder.rglob(layout.MANIFEST))
    assert not list(stage.folder.glob(f"*/*/{layout.LAST}"))


def test_organs_of_the_phantom_lie_where_they_belong(smoke):
    ids = {"patient_id": pl.String, "series_id": pl.String}
    table = pl.read_csv(smoke / "data" / "phantom" / "phantom_organs.csv", schema_overrides=ids)
    slices = pl.read_parquet(smoke / layout.SLICES / "index.parquet")
    joined = table.join(slices, on=["patient_id", "series_id", "instance_number"])
    middle = dict(joined.group_by("organ").agg(pl.col("order").mean()).iter_rows())
    assert set(middle) == {"liver", "spleen", "left kidney", "right kidney"}
    assert min(middle["left kidney"], middle["right kidney"]) > max(
        middle["liver"], middle["spleen"]
    ), "kidneys lie lower"
