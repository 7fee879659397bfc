"""Stage 06's loop: resuming equals not stopping, early stopping, averaged weights, non-finite
losses, weights that do not fit.
"""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from pipeline.classifier import batches
from pipeline.classifier import train as training
from pipeline.classifier.data import HELD_OUT, Series, labelled_series
from pipeline.classifier.fold import FoldData
from pipeline.classifier.predict import load_classifier, predict_volume
from pipeline.classifier.train import FoldTrainer, train_fold
from pipeline.competition.targets import COLUMNS, TARGETS
from pipeline.learning.log import read_log
from pipeline.learning.optimise import NonFiniteLoss
from pipeline.organs.find import organ_boxes
from pipeline.run.layout import MODEL, OOF
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError, TrainingStopped

CPU = torch.device("cpu")
# everything that the winners' recipe adds
RECIPE = (
    "train.channels=3",
    "train.batch=2",
    "train.accumulate=2",
    "train.slice_loss=1",
    "train.slice_weight=8",
    "train.positive_slices=0.5",
    "train.mixup=0.4",
    "train.cutmix=1.0",
    "train.rarity=0.5",
    "train.augment={blur: 0.5, noise: 0.5, elastic: 0.5, flip_z: true}",
    "predict.phases=3",
)
REGIONS = ("train.regions=organs", "train.slices=3", "train.visible_loss=1")
DICE = ("train.dice_loss=1",)


def found_organs(k):
    """Places of organs, another one missing in each series."""
    labels = np.zeros((12, 48, 48), np.uint8)
    for number in range(1, 5):
        labels[2 * number : 2 * number + 3, 4 * number : 20 + k, 3 * number : 30] = number
    return np.where(labels == k % 4 + 1, 0, labels).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training and three held-out series of noise, every class there, some slices labelled,
    half of the series with masks.
    """
    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    series = []
    for k in range(9):
        path = folder / f"{k}.npy"
        np.save(path, rng.integers(0, 256, (12, 48, 48), dtype=np.uint8))
        np.save(mask := folder / f"mask{k}.npy", organs := found_organs(k))
        labels = np.concatenate(
            [np.eye(len(t.classes), dtype=np.float32)[k % len(t.classes)] for t in TARGETS]
        )
        series.append(
            Series(
                str(k),
                f"s{k}",
                path,
                labels,
                np.eye(12, 2, -3 * k, np.float32),
                np.ones(2, np.float32),
                tuple(organ_boxes(organs)),
                mask if k % 2 else None,
            )
        )
    return FoldData(0, series[:6], series[6:])


def config(*overrides):
    return load_config(
        "smoke", ["train.init=scratch", "train.image_size=32", "train.epochs=3", *overrides]
    )


def trainer(data, folder, *overrides):
    folder.mkdir(exist_ok=True)
    return FoldTrainer(config(*overrides), data, folder, CPU, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "other"),
    [
        ((), ()),
        (RECIPE, ("train.workers=1",)),
        (RECIPE + REGIONS + DICE, ("train.workers=1",)),
        (("train.ema=0.5", "train.accumulate=2", "train.batch=2"), ("train.workers=1",)),
    ],
)
def test_resuming_equals_not_stopping(data, tmp_path, overrides, other):
    """Also with `other` workers than before: fewer of them is what a killed loader's message
    advises.
    """
    whole = trainer(data, tmp_path / "whole", *overrides)
    whole.run()
    first = trainer(data, tmp_path / "cut", *overrides)
    for _ in range(2):
        row = first.train_epoch()
        first.epoch += 1
        first.history.append(row | first.validate())
        first.save()
    second = trainer(data, tmp_path / "cut", *overrides, *other)
    second.resume()
    assert second.epoch == 2
    second.run()
    assert [row["loss"] for row in second.history] == [row["loss"] for row in whole.history]
    assert second.predict_held_out().equals(whole.predict_held_out())
    for name, tensor in whole.final_model.state_dict().items():
        assert torch.equal(tensor, second.final_model.state_dict()[name]), name


@pytest.mark.slow
def test_workers_change_nothing(data, tmp_path):
    """Nor does accumulation over the end of an epoch: 6 series in batches of 2 by fours are a step
    of 8 and one of 2.
    """
    overrides = ("train.accumulate=2", "train.batch=2", "train.epochs=2")
    alone, helped = (
        trainer(data, tmp_path / f"{workers}", *overrides, f"train.workers={workers}")
        for workers in (0, 2)
    )
    alone.run()
    helped.run()
    assert [row["terms"] for row in helped.history] == [row["terms"] for row in alone.history]
    assert all(
        torch.equal(tensor, helped.model.state_dict()[name])
        for name, tensor in alone.model.state_dict().items()
    )


def test_accumulated_steps_equal_those_of_the_big_batch(data, tmp_path):
    """Batches of 4 against 2 + 2, and a last step of 2: the trainer's own loop, batch norm and
    dropout fixed (they see the batch).

    In float32: where the processor has bfloat16, its rounding would be all that there is to see.
    """
    common = (
        "train.epochs=2",
        "train.dropout=0",
        "train.freeze_backbone=true",
        "train.warmup=0",
        "train.amp=false",
    )
    large = trainer(data, tmp_path / "large", *common, "train.batch=4")
    small = trainer(data, tmp_path / "small", *common, "train.batch=2", "train.accumulate=2")
    before = {name: tensor.clone() for name, tensor in large.model.named_parameters()}
    large.run()
    small.run()
    assert [row["loss"] for row in small.history] == pytest.approx(
        [row["loss"] for row in large.history], rel=1e-5
    )
    for name, tensor in large.model.named_parameters():
        assert torch.allclose(tensor, small.model.get_parameter(name), rtol=1e-3, atol=1e-5), name
        assert tensor.requires_grad != torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_one_set_of_workers_serves_all_epochs(data, tmp_path, monkeypatch):
    made, original = [], batches.series_batches
    monkeypatch.setattr(
        batches, "series_batches", lambda *given: made.append(given[1]) or original(*given)
    )
    # other tests' pools may be up
    run, before = (
        trainer(data, tmp_path / "fold", "train.workers=1"),
        multiprocessing.active_children(),
    )
    run.run()
    (plan,) = made
    epochs = [batch[0][0] for batch in plan]
    assert epochs == [0, 0, HELD_OUT, 1, 1, HELD_OUT, 2, 2, HELD_OUT], "scores are part of it"
    left = [
        child
        for child in multiprocessing.active_children()
        if child not in before and child.is_alive()
    ]
    assert not left, "they end with the training"


def test_epochs_draw_anew_and_in_their_own_order(data, tmp_path):
    run = trainer(data, tmp_path / "fold")
    plans = [[key for batch in run.batches.plan(epoch) for key in batch] for epoch in range(2)]
    assert [sorted(index for _, index in plan) for plan in plans] == [list(range(6))] * 2
    assert [index for _, index in plans[0]] != [index for _, index in plans[1]]
    assert not np.array_equal(run.dataset[0, 0]["slices"], run.dataset[1, 0]["slices"])
    assert np.array_equal(run.dataset[1, 0]["slices"], run.dataset[1, 0]["slices"])


def test_rare_classes_are_drawn_more_often(data, tmp_path):
    """Weights by hand, frequencies of many epochs, repetitions that are augmented anew."""
    liver = np.zeros(13, np.float32)
    series = []
    for patient, (grade, count) in enumerate(((0, 1), (0, 2), (0, 1), (2, 2))):
        labels = liver.copy()
        labels[[0, 2, 4, 7 + grade, 10]] = 1  # healthy but for the liver
        series += [replace(data.train[0], patient_id=str(patient), labels=labels)] * count
    options = config("train.rarity=0.5").train
    weights = batches.rarity_weights(series, options)
    by_hand = np.array([(3 / 4) ** -0.5] * 4 + [(1 / 4) ** -0.5] * 2)
    assert weights == pytest.approx(by_hand / by_hand.mean())
    assert (batches.rarity_weights(series, config().train) == 1).all()
    others = options.model_copy(update={"targets": ("bowel",)})
    assert (batches.rarity_weights(series, others) == 1).all(), "grades of what is not trained"
    run = trainer(replace(data, train=series), tmp_path / "fold", "train.rarity=0.5")
    keys = [key for epoch in range(2000) for batch in run.batches.plan(epoch) for key in batch]
    drawn = np.bincount([key[1] for key in keys]) / 2000
    assert len(keys) == 6 * 2000
    assert drawn == pytest.approx(weights, abs=0.05)
    assert run.batches.plan(3) == run.batches.plan(3)
    assert len(set(keys)) == len(keys)
    again = next(key for key in keys if len(key) == 3)
    assert not np.array_equal(run.dataset[again]["slices"], run.dataset[again[:2]]["slices"])


def test_drawn_often_counts_in_prior_and_scale(data, tmp_path):
    """The heads start at the classes' shares as they are drawn."""
    run = trainer(data, tmp_path / "fold", "train.rarity=1")
    labels = np.stack([one.labels for one in data.train])
    shares = (labels * run.batches.weights[:, None]).mean(0)
    liver = slice(7, 10)
    expected = np.log(shares[liver] * [1, 2, 4])
    found = run.model.heads["liver"].bias.detach().numpy()
    assert found == pytest.approx(expected - expected.mean(), abs=1e-4)
    assert float(run.loss.scale_liver) == pytest.approx((shares[liver] * [1, 2, 4]).sum(), rel=1e-5)


@pytest.mark.parametrize("regions", [(), REGIONS])
def test_phases_predict_the_held_out_series_as_the_test_series(data, tmp_path, regions):
    keys = "predict.phases=3", "predict.flips=[z]", "train.amp=false", *regions
    run = trainer(data, tmp_path / "fold", *keys)
    for head in run.model.heads.values():
        torch.nn.init.normal_(head.weight)
    rows = run.predict_held_out(run.config.predict).select(COLUMNS).to_numpy()
    for row, one in zip(rows, data.held_out, strict=True):
        alone = predict_volume(run.model, np.load(one.path), run.options, ("z",), 3, one.organs)
        assert row == pytest.approx(list(alone.values()), abs=1e-5)
    plain = run.predict_held_out().select(COLUMNS).to_numpy()
    assert not np.allclose(rows, plain, atol=1e-4)


def test_checkpoint_of_another_config_is_not_taken_up(data, tmp_path):
    trainer(data, tmp_path / "fold", "train.epochs=1").run()
    other = trainer(data, tmp_path / "fold", "train.epochs=1", "train.lr=0.01")
    other.resume()
    assert other.epoch == 0


def test_checkpoint_of_other_inputs_is_not_taken_up(data, tmp_path):
    """Same config, but for example another pretrained backbone: the finished run of the old one
    must not pass for it.
    """
    trainer(replace(data, fingerprint="a"), tmp_path / "fold", "train.epochs=1").run()
    other = trainer(replace(data, fingerprint="b"), tmp_path / "fold", "train.epochs=1")
    other.resume()
    assert other.epoch == 0


def test_fold_writes_a_model_that_predicts_its_own_out_of_fold_rows(data, tmp_path):
    counts = train_fold(config("train.epochs=1", "train.sequence=gru"), data, tmp_path, CPU, None)
    assert counts["held_out_series"] == 3
    from pipeline.classifier.data import SeriesDataset
    from pipeline.classifier.predict import predict

    model, stored = load_classifier(tmp_path / MODEL, CPU)
    options = stored.train
    assert options.sequence == "gru"
    rows = pl.read_parquet(tmp_path / OOF)
    held_out = SeriesDataset(data.held_out, options)
    samples = torch.from_numpy(np.stack([held_out[0, k]["slices"] for k in range(3)]))
    assert predict(model, samples, options.amp).numpy() == pytest.approx(
        rows.select(COLUMNS).to_numpy(), abs=1e-6
    )


def test_patience_stops_and_keeps_the_best_weights(data, tmp_path, monkeypatch, capfd):
    run = trainer(data, tmp_path / "fold", "train.epochs=9", "train.patience=2")
    scores = iter([0.9, 0.5, 0.6, 0.7, 0.1])
    kept = {}

    def validate():
        value = next(scores)
        kept[value] = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        return {"score": value}

    monkeypatch.setattr(run, "validate", validate)
    run.run()
    assert run.epoch == 4
    assert (run.kept["epoch"], run.kept["score"]) == (2, 0.5), "what the manifest says of the fold"
    assert (
        "train.patience kept epoch 2 of 4 by its score on the held-out patients"
        in capfd.readouterr().err
    )
    assert all(
        torch.equal(tensor, kept[0.5][name])
        for name, tensor in run.final_model.state_dict().items()
    )


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"cut")])
def test_the_last_weights_are_not_taken_for_the_best(data, tmp_path, monkeypatch, harm):
    """As when a finished fold is predicted again by other views, and best.ckpt is gone."""
    options = ("train.epochs=9", "train.patience=2")
    run = trainer(data, tmp_path / "fold", *options)
    scores = iter([0.5, 0.6, 0.7])
    monkeypatch.setattr(run, "validate", lambda: {"score": next(scores)})
    run.run()
    harm(tmp_path / "fold" / "best.ckpt")
    again = trainer(data, tmp_path / "fold", *options)
    with pytest.raises(InputError, match=r"best epoch are missing.*best\.ckpt.*remove last\.ckpt"):
        again.run()


def test_non_finite_loss_stops_with_step_terms_and_ids(data, tmp_path, monkeypatch):
    run = trainer(data, tmp_path / "fold")
    with torch.no_grad():
        run.model.heads["liver"].bias.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 0.*liver nan.*s\d"):
        run.run()


def test_predictions_that_are_no_numbers_stop_with_the_series(data, tmp_path, monkeypatch):
    run = trainer(data, tmp_path / "fold")
    real = training.predict

    def broken(*given):
        values = real(*given).clone()
        values[1] = float("nan")
        return values

    monkeypatch.setattr(training, "predict", broken)
    with pytest.raises(
        NonFiniteLoss, match="non-finite predictions of held-out series s7 of fold 0;"
    ):
        run.predict_held_out()


def test_non_finite_gradient_of_a_finite_loss_stops_before_the_weights_are_lost(data, tmp_path):
    run = trainer(data, tmp_path / "fold", "train.amp=false")
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    run.model.heads["liver"].bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 0: .*liver \d.*gradient nan; batch s\d"):
        run.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.named_parameters())


def test_float16_gradients_that_never_become_finite_stop_training(data, tmp_path):
    run = trainer(data, tmp_path / "fold", "train.amp=false")
    run.update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-6)
    run.model.heads["liver"].bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLoss, match=r"non-finite gradients at step 2 .*batch s\d"):
        run.run()


def test_a_checkpoint_of_another_type_of_number_is_taken_up(data, tmp_path):
    """Of a GPU that computes in bfloat16 by one that needs float16: the scaler, which left no
    state, starts anew.
    """
    trainer(data, tmp_path / "fold", "train.epochs=1").run()
    other = trainer(data, tmp_path / "fold", "train.epochs=1")
    other.update.scaler = torch.amp.GradScaler("cpu")
    other.resume()
    assert other.epoch == 1
    assert other.update.scaler.get_scale() == 2**16


def test_a_loader_killed_at_the_very_end_is_one_line_and_the_model_is_kept(
    data, tmp_path, monkeypatch
):
    """The out-of-fold rows of several views come after the last epoch, whose validation predicts
    the same patients.
    """
    calls, original = [], FoldTrainer.predict_held_out

    def killed_at_last(self, *flips):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        return original(self, *flips)

    monkeypatch.setattr(FoldTrainer, "predict_held_out", killed_at_last)
    with pytest.raises(TrainingStopped, match="a process that loads data was killed"):
        train_fold(config("train.epochs=1", "predict.phases=2"), data, tmp_path, CPU, None)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["last.ckpt", "log.jsonl", MODEL, "tensorboard"]


@pytest.mark.parametrize(
    ("keys", "again"),
    [
        ((), False),
        (("train.ema=0.5", "train.eval_every=2"), False),
        (("predict.flips=[x]",), True),
        (("predict.phases=2",), True),
        (("train.patience=1",), True),
    ],
)
def test_held_out_series_are_predicted_anew_where_the_last_score_is_not_of_these_rows(
    data, tmp_path, monkeypatch, keys, again
):
    keys = "train.epochs=3", *keys
    whole = trainer(data, tmp_path / "whole", *keys)
    whole.run()
    passes, original = [], FoldTrainer.predict_held_out
    monkeypatch.setattr(
        FoldTrainer,
        "predict_held_out",
        lambda self, *given: (passes.append(given), original(self, *given))[1],
    )
    rows = whole.out_of_fold()
    assert len(passes) == again
    assert rows.equals(original(whole, whole.config.predict))
    resumed = trainer(data, tmp_path / "whole", *keys)
    resumed.run()  # nothing is left to do, and no score was taken
    assert resumed.out_of_fold().equals(rows)
    assert len(passes) == again + 1


def test_checkpoints_may_be_rarer_than_epochs(data, tmp_path, monkeypatch):
    """A killed run then goes on from an older one, to the same end."""
    keys, written = ("train.epochs=5", "train.checkpoint_every=2"), []
    whole = trainer(data, tmp_path / "whole", *keys)
    save = whole.save_state
    monkeypatch.setattr(whole, "save_state", lambda: (written.append(whole.epoch), save()))
    whole.run()
    assert written == [2, 4, 5], "the last one always"
    cut = trainer(data, tmp_path / "cut", *keys)
    validate = cut.validate

    def killed():
        if cut.epoch == 3:
            raise KeyboardInterrupt
        return validate()

    monkeypatch.setattr(cut, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert [row["epoch"] for row in read_log(tmp_path / "cut" / "log.jsonl")] == [1, 2, 3]
    second = trainer(data, tmp_path / "cut", *keys)
    second.resume()
    assert second.epoch == 2
    second.run()
    for name in ("whole", "cut"):
        rows = read_log(tmp_path / name / "log.jsonl")
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
        assert [row["loss"] for row in rows] == [row["loss"] for row in whole.history]
    assert second.out_of_fold().equals(whole.out_of_fold())


def test_the_best_epoch_has_its_checkpoint_whenever_it_comes(data, tmp_path, monkeypatch):
    keys = "train.epochs=6", "train.patience=3", "train.checkpoint_every=100"
    run, written, scores = trainer(data, tmp_path, *keys), [], iter([3.0, 2.0, 2.5, 2.6, 2.7])
    save = run.save_state
    monkeypatch.setattr(run, "validate", lambda: {"score": next(scores)})
    monkeypatch.setattr(run, "save_state", lambda: (written.append(run.epoch), save()))
    run.run()
    assert written == [1, 2, 5]


def test_series_keep_the_order_of_the_index(tmp_path):
    """Whatever the order of the labels: the order of epochs, and with it a resumed run, hangs on
    it.
    """
    count, rng = 3000, np.random.default_rng(0)
    ids = [str(k) for k in rng.permutation(count)]
    index = {
        "patient_id": ids,
        "series_id": ids,
        "path": ids,
        "source": ["train"] * count,
        "depth": [2] * count,
    }
    pl.DataFrame(index).with_columns(plane_instances=pl.lit([1, 2])).write_parquet(
        tmp_path / "index.parquet"
    )
    values = {column: [0] * count for column in COLUMNS}
    labels = pl.DataFrame({"patient_id": [str(k) for k in rng.permutation(count)], **values})
    assert [one.series_id for one in labelled_series(tmp_path, labels, None)] == ids


def test_wrong_backbone_file_names_the_tensors(data, tmp_path):
    from pipeline.learning.backbone import create_backbone, save_backbone

    save_backbone(
        create_backbone("lcnet_035"), tmp_path / "other.safetensors", {"backbone": "lcnet_035"}
    )
    with pytest.raises(InputError, match="missing.*unexpected"):
        FoldTrainer(config(), data, tmp_path, CPU, tmp_path / "other.safetensors")


def test_frozen_backbone_stays_as_it_was(data, tmp_path):
    run = trainer(data, tmp_path / "fold", "train.freeze_backbone=true", "train.epochs=1")
    before = {name: tensor.clone() for name, tensor in run.model.backbone.state_dict().items()}
    run.run()
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in run.model.backbone.state_dict().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "at"),
    [
        ((), 2),
        (("train.accumulate=2", "train.batch=1", "train.workers=1"), 4),
        (RECIPE, 1),
        (RECIPE + REGIONS + DICE, 1),
        ((), "held-out"),
    ],
)
def test_a_stop_within_an_epoch_loses_nothing(data, tmp_path, monkeypatch, overrides, at):
    """SIGTERM in a step or in the validation: the checkpoint holds the place in the epoch, and the
    rest repeats bit for bit.
    """
    options = ("train.batch=2", "train.epochs=2", *overrides)
    whole, cut = (
        trainer(data, tmp_path / "whole", *options),
        trainer(data, tmp_path / "cut", *options),
    )
    whole.run()
    step, predict_held_out = cut.step, cut.predict_held_out

    def stopping(number, micro):
        if number == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, micro)

    def predicting(*given):
        if at == "held-out":
            os.kill(os.getpid(), signal.SIGTERM)
        return predict_held_out(*given)

    monkeypatch.setattr(cut, "step", stopping)
    monkeypatch.setattr(cut, "predict_held_out", predicting)
    with pytest.raises(SystemExit) as stop:
        cut.run()
    assert stop.value.code == 128 + signal.SIGTERM
    second = trainer(data, tmp_path / "cut", *options)
    steps = []
    monkeypatch.setattr(
        second,
        "step",
        lambda number, micro, step=second.step: (steps.append(number), step(number, micro))[1],
    )
    second.run()
    assert (
        steps
        == list(range(2 * second.steps_per_epoch))[
            second.steps_per_epoch if at == "held-out" else at + 1 :
        ]
    )
    assert [row["loss"] for row in second.history] == [row["loss"] for row in whole.history]
    assert second.predict_held_out().equals(whole.predict_held_out())


def test_the_rate_falls_by_half_a_cosine_to_its_end_and_stays(data, tmp_path):
    published = trainer(
        data,
        tmp_path,
        "train.lr=1.25e-4",
        "train.warmup=0",
        "train.lr_final=1.25e-5",
        "train.cosine_steps=5000",
    )
    rate = published.learning_rate
    assert rate(0) == pytest.approx(1.25e-4)
    assert rate(1250) == pytest.approx(1.25e-5 + 1.125e-4 * (0.5 + 0.5**1.5))
    assert rate(2500) == pytest.approx((1.25e-4 + 1.25e-5) / 2)
    assert rate(5000) == rate(9999) == pytest.approx(1.25e-5)
    ours = trainer(data, tmp_path, "train.lr=2e-4", "train.warmup=0", "train.epochs=50")
    assert ours.learning_rate(50 * ours.steps_per_epoch) == pytest.approx(0)


def test_the_publications_recipe_trains_and_resumes(data, tmp_path):
    """Its keys together, on small volumes: loss finite, both halves of a stopped run as one."""
    recipe = (
        "train.crop_size=32",
        "train.map_pool=mean",
        "train.backbone_dropout=0.1",
        "train.shortcut=false",
        "train.slice_loss=0",
        "train.lr_final=1e-5",
        "train.cosine_steps=4",
        "train.augment={probability: 0, flip_x: true, flip_y: true, flip_z: true,"
        " quarter_turn: 0.25, grey_curve: 0.5, boxes: 0.5, z_jitter: false}",
        "train.epochs=2",
    )
    whole = trainer(data, tmp_path / "whole", *recipe)
    whole.run()
    first = trainer(data, tmp_path / "cut", *recipe)
    row = first.train_epoch()
    first.epoch += 1
    first.history.append(row | first.validate())
    first.save()
    second = trainer(data, tmp_path / "cut", *recipe)
    second.run()
    assert [row["loss"] for row in second.history] == [row["loss"] for row in whole.history]
    assert second.predict_held_out().equals(whole.predict_held_out())


def test_averaged_weights_lie_in_memory_as_those_they_average(data, tmp_path):
    """Channels last, else each prediction turns every map twice."""
    run = trainer(data, tmp_path / "fold", "train.ema=0.9", "model.backbone=test_resnet")
    assert run.averaged is not None
    turned = 0
    for name, tensor in run.model.state_dict().items():
        assert run.averaged.state_dict()[name].stride() == tensor.stride(), name
        turned += not tensor.is_contiguous()
    assert turned


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_scores_of_some_epochs_change_nothing_else(data, tmp_path, workers):
    """Of five epochs the second, the fourth and the last; each as where all are scored."""
    options = ("train.epochs=5", "train.batch=2", "train.accumulate=2", f"train.workers={workers}")
    every = trainer(data, tmp_path / "every", *options)
    every.run()
    some = trainer(data, tmp_path / "some", *options, "train.eval_every=2")
    some.run()
    assert [row["epoch"] for row in some.history if "score" in row] == [2, 4, 5]
    for row, other in zip(some.history, every.history, strict=True):
        assert row["terms"] == other["terms"]
        if "score" in row:
            assert row["score"] == other["score"]
    assert some.predict_held_out().equals(every.predict_held_out())


@pytest.mark.parametrize(
    ("batch", "slices", "size", "fits"),
    # six series: one is left over of batches of five
    [(1, 1, 32, False), (5, 1, 32, False), (3, 1, 32, True), (1, 2, 32, True), (1, 1, 48, True)],
)
def test_a_batch_with_one_value_of_a_channel_is_refused(data, tmp_path, batch, slices, size, fits):
    keys = (f"train.batch={batch}", f"train.slices={slices}", f"train.image_size={size}")
    if fits:
        trainer(data, tmp_path, *keys).train_epoch()
        return
    with pytest.raises(InputError, match=" ".join(keys)):
        trainer(data, tmp_path, *keys)


def test_patience_counts_epochs_between_scores(data, tmp_path, monkeypatch):
    options = ("train.epochs=9", "train.patience=3", "train.eval_every=2")
    run = trainer(data, tmp_path / "fold", *options)
    scores = iter([0.9, 0.5, 0.6, 0.7])
    monkeypatch.setattr(run, "validate", lambda: {"score": next(scores)})
    run.run()
    assert run.epoch == 7, "the best is of epoch 4, and 7 is three later"
    assert (run.kept["epoch"], run.kept["score"]) == (4, 0.5)


def test_an_epoch_whose_score_nobody_asks_for_leaves_the_next_one_its_series(data, tmp_path):
    """As a notebook may call them; and a score asked for twice."""
    whole, parts = (trainer(data, tmp_path / name, "train.batch=2") for name in ("whole", "parts"))
    whole.run()
    first = parts.train_epoch()
    parts.epoch += 1
    second = parts.train_epoch()
    assert [first["loss"], second["loss"]] == [row["loss"] for row in whole.history[:2]]
    scores = [parts.validate()["score"] for _ in range(2)]
    assert scores == [whole.history[1]["score"]] * 2
    parts.epoch += 1
    assert parts.train_epoch()["loss"] == whole.history[2]["loss"]
