"""The loop: stopping and resuming repeats an unbroken run, ranks share a batch, faults end it with the last good state kept."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import timm
import torch
from safetensors.torch import load_file

from pipeline import pretrain as loop
from pipeline.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.config import load_config
from pipeline.distributed import World
from pipeline.engine import Collapse, NonFiniteLoss, read_log
from pipeline.voco_data import VocoSamples
from pipeline.voco_figures import draw_all

ALONE = World(0, 1, torch.device("cpu"))
TINY = ("model.backbone=test_resnet", "pretrain.batch=4", "pretrain.holdout=2", "pretrain.lr=1e-3")
HELPER = Path(__file__).with_name("helpers_gloo.py")


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Twelve volumes with a gradient and a bright organ, so that places differ."""
    folder = tmp_path_factory.mktemp("volumes")
    rng, rows = np.random.default_rng(0), []
    y, x = np.mgrid[0:48, 0:48] / 48
    for n in range(12):
        plane = 90 * y + 60 * x + 80 * ((y - 0.3) ** 2 + (x - 0.7) ** 2 < 0.04)
        np.save(folder / f"p{n}_0.npy", np.clip(plane + rng.normal(0, 10, (12, 48, 48)), 0, 255).astype(np.uint8))
        rows.append({"patient_id": f"p{n}", "series_id": "0", "source": "train" if n % 3 else "unlabelled", "path": f"p{n}_0.npy"})
    pl.DataFrame(rows).write_parquet(folder / "index.parquet")
    return folder


def numbers(folder):
    """The log without what the clock says."""
    return [{k: v for k, v in record.items() if k not in ("samples_per_s", "waiting")} for record in read_log(folder / "log.jsonl")]


@pytest.fixture(scope="module")
def unbroken(volumes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    counts = loop.pretrain(load_config("smoke", TINY), volumes, folder, ALONE)
    return folder, counts


def test_a_run_leaves_a_backbone_that_timm_loads_whole(unbroken):
    folder, counts = unbroken
    plain = timm.create_model("test_resnet", in_chans=1, num_classes=0, global_pool="")
    plain.load_state_dict(load_file(folder / "backbone.safetensors"), strict=True)
    assert counts["held_out"] == 2
    assert 0 <= counts["position_accuracy"] <= 1
    best = load_checkpoint(folder / "best.ckpt")
    taught = {name.removeprefix("backbone."): t for name, t in best["teacher"].items() if name.startswith("backbone.")}
    assert all(torch.equal(taught[name], tensor) for name, tensor in plain.state_dict().items())


def test_the_log_says_what_the_contract_asks(unbroken):
    records = read_log(unbroken[0] / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    wanted = {"loss", "intra", "inter", "reg", "lr", "std", "correlation", "samples_per_s", "waiting"}
    assert all(wanted <= record.keys() for record in records)
    assert [record["step"] for record in records if "position_accuracy" in record] == [3, 6]
    assert records[0]["loss"] == pytest.approx(records[0]["intra"] + records[0]["inter"] + records[0]["reg"], rel=1e-5)
    assert list((unbroken[0] / "tensorboard").iterdir())


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(volumes, unbroken, tmp_path, monkeypatch):
    """SIGTERM in the middle of step 2: that step ends, the state is saved, and the rest repeats bit for bit."""
    config, forward = load_config("smoke", TINY), loop.forward

    def stopping(run, batch):
        if run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(run, batch)

    monkeypatch.setattr(loop, "forward", stopping)
    with pytest.raises(SystemExit) as stop:
        loop.pretrain(config, volumes, tmp_path, ALONE)
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    stopped_at = load_checkpoint(tmp_path / "last.ckpt")["step"]
    assert stopped_at == 2
    with open(tmp_path / "log.jsonl", "a") as handle:
        handle.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')  # what a killed process leaves behind
    loop.pretrain(config, volumes, tmp_path, ALONE)
    assert numbers(tmp_path) == numbers(unbroken[0])
    ours, theirs = (load_checkpoint(folder / "last.ckpt") for folder in (tmp_path, unbroken[0]))
    for part in ("student", "teacher"):
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in theirs[part].items())
    assert (tmp_path / "backbone.safetensors").read_bytes() == (unbroken[0] / "backbone.safetensors").read_bytes()


def test_another_configuration_starts_afresh_and_more_steps_go_on(volumes, tmp_path, capsys):
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=3")), volumes, tmp_path, ALONE)
    assert "resumed at step 2" in capsys.readouterr().err
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=3", "pretrain.dropout=0.1")), volumes, tmp_path, ALONE)
    assert "dropout differs" in capsys.readouterr().err
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("override", ["pretrain.pool=slice", "pretrain.activation_checkpointing=true", "pretrain.ema_final=1.0"])
def test_options_train(volumes, tmp_path, override):
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2", override)), volumes, tmp_path, ALONE)
    records = read_log(tmp_path / "log.jsonl")
    assert len(records) == 2
    if "ema_final" in override:
        assert [record["momentum"] for record in records] == pytest.approx([0.9, 0.95])


@pytest.mark.parametrize(("amount", "fault"), [(float("nan"), NonFiniteLoss), (0.0, Collapse)])
def test_faults_end_the_run_and_keep_the_last_good_state(volumes, tmp_path, monkeypatch, amount, fault):
    config = load_config("smoke", (*TINY, "pretrain.collapse_patience=2", "pretrain.checkpoint_every=1"))
    step = loop.train_step

    def broken(run, batch, stopping=False):
        if run.step >= 3:
            with torch.no_grad():
                run.student.projector[-1].weight.mul_(amount)
                run.student.projector[-1].bias.fill_(1.0)
        return step(run, batch, stopping)

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(fault, match="step 4.*p[0-9]+_0.npy" if fault is NonFiniteLoss else "collapsed for 2 steps until step 5"):
        loop.pretrain(config, volumes, tmp_path, ALONE)
    state = load_checkpoint(tmp_path / "last.ckpt")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["student"].values())


def test_checkpoints_rotate_and_a_damaged_one_costs_one_interval(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path / "last.ckpt", {"step": step}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.1.ckpt", "last.2.ckpt", "last.ckpt"]
    assert newest_checkpoint(tmp_path / "last.ckpt", 3) == {"step": 5}
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:100])
    assert newest_checkpoint(tmp_path / "last.ckpt", 3) == {"step": 4}
    assert newest_checkpoint(tmp_path / "none.ckpt", 3) is None


def run_ranks(folder, size, steps, overrides):
    """Losses and weight norms of `size` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPER.parents[1]), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "WORLD_SIZE": str(size)}  # fmt: skip
    command = [sys.executable, str(HELPER), str(folder), str(steps), *overrides]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
             for rank in range(size)]  # fmt: skip
    answers = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size
    return json.loads(answers[0])


def test_two_ranks_with_half_the_batch_are_one_rank(volumes):
    """Batch norm, inter-volume term, dropout and gradients: all of the whole batch."""
    config = load_config("smoke", TINY)
    run, paths = loop.start(config, ALONE), sorted(path.name for path in volumes.glob("*.npy"))
    samples = VocoSamples(volumes, paths, config.pretrain, config.seed)
    records = [loop.train_step(run, samples[step])[0] for step in range(2)]
    losses = [[record[name] for name in loop.STATS] for record in records]
    norms = [float(tensor.double().norm()) for tensor in run.teacher.state_dict().values()]
    two = run_ranks(volumes, 2, 2, TINY)
    np.testing.assert_allclose(two["losses"], losses, rtol=5e-4)  # two steps: Adam makes rounding errors grow after that
    assert two["weights"] == pytest.approx(norms, rel=1e-3, abs=1e-5)
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-3)


def test_pictures_are_drawn(volumes, unbroken, tmp_path):
    (tmp_path / "log.jsonl").write_bytes((unbroken[0] / "log.jsonl").read_bytes())
    (tmp_path / "best.ckpt").write_bytes((unbroken[0] / "best.ckpt").read_bytes())
    names = draw_all(load_config("smoke", TINY), volumes, tmp_path, ALONE.device)
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
