"""The loop: stopping and resuming repeats an unbroken run, ranks share a batch, faults end it with
the last good state kept.
"""

import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers_faults import torchrun
from helpers_gloo import descent
from helpers_losses import slow_position_loss, slow_regularisation, slow_similarity
from helpers_pretrain import ALONE, TINY, numbers, trained, volumes_of
from safetensors.torch import load_file

from pipeline.learning import optimise
from pipeline.learning.backbone import GREY_MEAN, GREY_STD, create_backbone, load_backbone
from pipeline.learning.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.learning.distributed import PeerLost
from pipeline.learning.log import read_log
from pipeline.learning.optimise import Collapse, NonFiniteLoss
from pipeline.run import layout
from pipeline.run.presets import load_config
from pipeline.system.errors import InputError
from pipeline.voco import pretrain as loop
from pipeline.voco import step as voco_step
from pipeline.voco.data import batches
from pipeline.voco.figures import draw_all
from pipeline.voco.model import make_teacher
from pipeline.voco.voco2d import Voco2D

# for helpers_gloo: the gradient's scale counts
DESCENT = (*TINY, "pretrain.lr=2e-3", "pretrain.clip=1e9", "pretrain.amp=false")
HELPER = Path(__file__).parents[1] / "support" / "helpers_gloo.py"


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return volumes_of(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("pool", ["clip", "slice"])
def test_loss_of_a_step_is_that_of_plain_loops(volumes, pool):
    """Which embedding meets which, the volume after each one, and the weights of the terms."""
    plain = (
        "pretrain.dropout=0",
        "pretrain.amp=false",
        f"pretrain.pool={pool}",
        "pretrain.random_crops=2",
    )
    run, samples = trained(
        *plain,
        "pretrain.intra=0.5",
        "pretrain.inter=2",
        "pretrain.regularisation=0.25",
        volumes=volumes,
    )
    batch = samples[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.method.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std().nan_to_num(0))
        # (B, G, R + K, E)
        student, teacher = (
            net(batch["crops"]).tolist() for net in (run.method.student, run.method.teacher)
        )
    loss, stats = run.method.loss(batch, run.step)
    terms = []
    for b, labels in enumerate(batch["overlap"].tolist()):
        for own, taught, own_after, taught_after in zip(
            student[b], teacher[b], student[(b + 1) % 4], teacher[(b + 1) % 4], strict=True
        ):
            intra = slow_position_loss(slow_similarity(own[:2], taught[2:]), labels)
            target = slow_similarity(taught[:2], taught_after[2:])
            inter = slow_position_loss(slow_similarity(own[:2], own_after[2:]), target)
            terms.append((intra, inter, slow_regularisation(own[2:])))
    expected = np.mean(terms, 0)
    np.testing.assert_allclose(stats[1:4].numpy(), expected, rtol=1e-3)
    assert loss.item() == pytest.approx(expected @ [0.5, 2, 0.25], rel=1e-3)


def test_teacher_is_the_hand_computed_average_after_three_steps(volumes):
    """Parameters and buffers, by the momentum of each step; no gradient reaches it, even where it
    would take one.
    """
    run, samples = trained("pretrain.ema_final=0.3", "pretrain.lr=0.05", volumes=volumes)
    expected = {
        name: tensor.double().clone() for name, tensor in run.method.teacher.state_dict().items()
    }
    run.method.teacher.requires_grad_(True)
    for step in range(3):
        momentum = voco_step.train_step(run, samples[step]).read()[0]["momentum"]
        assert momentum == pytest.approx((0.9, 0.6 + 0.3 * 3**0.5 / 2, 0.75)[step])
        for name, tensor in run.method.student.state_dict().items():
            old = expected[name]
            expected[name] = (
                momentum * old + (1 - momentum) * tensor
                if tensor.is_floating_point()
                else tensor.double()
            )
    statistics = [name for name, _ in run.method.teacher.named_buffers() if "running" in name]
    assert len(statistics) > 8
    for name, tensor in run.method.teacher.state_dict().items():
        np.testing.assert_allclose(
            tensor.double(), expected[name], rtol=1e-4, atol=1e-6, err_msg=name
        )
    assert all(parameter.grad is None for parameter in run.method.teacher.parameters())
    assert not any(
        parameter.requires_grad for parameter in make_teacher(run.method.student).parameters()
    )
    distant = (
        run.method.student.state_dict()[statistics[0]]
        - run.method.teacher.state_dict()[statistics[0]]
    )
    assert distant.abs().max() > 1e-3, "otherwise nothing was averaged"


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
    taught = load_checkpoint(folder / "best.ckpt")["teacher"]
    assert all(
        torch.equal(taught[f"backbone.{name}"], tensor) for name, tensor in plain.named_parameters()
    )
    assert not any(
        torch.equal(taught[f"backbone.{name}"], tensor)
        for name, tensor in plain.named_buffers()
        if "running" in name
    )


def test_exported_statistics_are_the_averages_over_whole_slices(volumes, tmp_path):
    """Each batch norm's: mean over batches of what it is given, in float64; the run's own stay, and
    so does the file when made again.
    """
    run, samples = trained("pretrain.settle=3", "pretrain.amp=false", volumes=volumes)
    voco_step.train_step(run, samples[0])
    before = {name: tensor.clone() for name, tensor in run.method.teacher.state_dict().items()}
    for name in ("first", "again"):
        loop.export(run, samples, tmp_path / name)
        torch.rand(7), loop.seed_everything(9)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    assert all(
        torch.equal(before[name], tensor)
        for name, tensor in run.method.teacher.state_dict().items()
    )
    plain = timm.create_model("test_resnet", in_chans=1, num_classes=0, global_pool="").double()
    plain.load_state_dict(load_file(tmp_path / "first"))
    seen, norms = (
        {},
        {
            name: layer
            for name, layer in plain.named_modules()
            if isinstance(layer, torch.nn.BatchNorm2d)
        },
    )
    exported = {
        name: (layer.running_mean.clone(), layer.running_var.clone())
        for name, layer in norms.items()
    }
    for name, layer in norms.items():
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(
                inputs[0].transpose(0, 1).flatten(1)
            )
        )
    with torch.no_grad():
        for step in range(3):
            planes = [samples.planes(int(index), (step + 0.5) / 3) for index in samples.order(step)]
            plain.train()(
                (torch.from_numpy(np.concatenate(planes))[:, None].double() / 255 - GREY_MEAN)
                / GREY_STD
            )
    for name, (mean, variance) in exported.items():
        batches = seen[name]
        torch.testing.assert_close(
            mean, torch.stack([x.mean(1) for x in batches]).mean(0), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            variance, torch.stack([x.var(1) for x in batches]).mean(0), rtol=1e-3, atol=1e-4
        )


def test_without_settling_the_teachers_statistics_are_exported(volumes, tmp_path):
    run, samples = trained("pretrain.settle=0", volumes=volumes)
    voco_step.train_step(run, samples[0])
    loop.export(run, samples, tmp_path / "backbone")
    state = load_file(tmp_path / "backbone")
    assert all(
        torch.equal(run.method.teacher.backbone.state_dict()[name], tensor)
        for name, tensor in state.items()
    )


def test_the_log_says_what_the_method_page_lists(unbroken):
    records = read_log(unbroken[0] / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    wanted = {
        "loss",
        "intra",
        "inter",
        "reg",
        "lr",
        "std",
        "correlation",
        "samples_per_s",
        "waiting",
    }
    assert all(wanted <= record.keys() for record in records)
    assert [record["step"] for record in records if "position_accuracy" in record] == [3, 6]
    assert records[0]["loss"] == pytest.approx(
        records[0]["intra"] + records[0]["inter"] + records[0]["reg"], rel=1e-5
    )
    assert list((unbroken[0] / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(volumes, unbroken, tmp_path, monkeypatch):
    """SIGTERM in the middle of step 2: that step ends, the state is saved, and the rest repeats bit
    for bit.
    """
    config, loss = load_config("smoke", TINY), Voco2D.loss

    def stopping(method, batch, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(method, batch, step)

    monkeypatch.setattr(Voco2D, "loss", stopping)
    with pytest.raises(SystemExit) as stop:
        loop.pretrain(config, volumes, tmp_path, ALONE)
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    stopped_at = load_checkpoint(tmp_path / "last.ckpt")["step"]
    assert stopped_at == 2
    with open(tmp_path / "log.jsonl", "a") as handle:
        # what a killed process leaves behind
        handle.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')
    loop.pretrain(config, volumes, tmp_path, ALONE)
    assert numbers(tmp_path) == numbers(unbroken[0])
    ours, theirs = (load_checkpoint(folder / "last.ckpt") for folder in (tmp_path, unbroken[0]))
    for part in ("student", "teacher"):
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in theirs[part].items())
    assert (tmp_path / "backbone.safetensors").read_bytes() == (
        unbroken[0] / "backbone.safetensors"
    ).read_bytes()


def test_a_signal_to_the_whole_group_reaches_the_workers_without_ending_them(volumes):
    """As a terminal's Ctrl-C or a batch system's SIGTERM does: the loop still gets its data and
    ends at a step boundary.
    """
    _, samples = trained("pretrain.workers=1", volumes=volumes)
    before = set(multiprocessing.active_children())
    stream = batches(samples, 0, 40, pinned=False)
    first = next(stream)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    rest = list(stream)
    assert len(rest) == 39
    assert torch.equal(first["crops"], samples[0]["crops"])
    assert torch.equal(rest[-1]["crops"], samples[39]["crops"])
    worker.join(60)
    assert worker.exitcode == 0


def test_every_random_number_of_a_step_follows_from_seed_and_step(volumes, monkeypatch):
    """Stochastic depth and dropout of a backbone draw from the global generators."""
    loss, draws = Voco2D.loss, []

    def drawing(method, batch, step):
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
        return loss(method, batch, step)

    monkeypatch.setattr(Voco2D, "loss", drawing)
    run, samples = trained(volumes=volumes)
    for step in (0, 1, 1):
        run.step = step
        voco_step.train_step(run, samples[step])
    assert draws[1] == draws[2]
    assert not set(draws[0]) & set(draws[1])


@pytest.mark.slow
def test_another_configuration_starts_afresh_and_more_steps_go_on(volumes, tmp_path, capsys):
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=3")), volumes, tmp_path, ALONE)
    assert "resumed at step 2" in capsys.readouterr().err
    loop.pretrain(
        load_config("smoke", (*TINY, "pretrain.steps=3", "pretrain.dropout=0.1")),
        volumes,
        tmp_path,
        ALONE,
    )
    assert "dropout differs" in capsys.readouterr().err
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_checkpoints_of_another_run_are_set_aside_not_lost(volumes, tmp_path, capsys):
    """Fewer steps than were made, as who follows the advice of 60,000 at step 70,000 asks for, once
    removed them all.
    """
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=4")), volumes, tmp_path, ALONE)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")}
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    assert (
        "last.ckpt is at step 4, past pretrain.steps: training starts afresh"
        in capsys.readouterr().err
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()} == whole
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 2
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=5")), volumes, tmp_path, ALONE)
    assert "resumed at step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    ["pretrain.pool=slice", "pretrain.activation_checkpointing=true", "pretrain.ema_final=1.0"],
)
def test_options_train(volumes, tmp_path, override):
    loop.pretrain(
        load_config("smoke", (*TINY, "pretrain.steps=2", override)), volumes, tmp_path, ALONE
    )
    records = read_log(tmp_path / "log.jsonl")
    assert len(records) == 2
    if "ema_final" in override:
        assert [record["momentum"] for record in records] == pytest.approx([0.9, 0.95])


@pytest.mark.slow
def test_a_fresh_run_killed_at_once_does_not_bring_the_old_one_back(volumes, tmp_path, monkeypatch):
    config = load_config("smoke", (*TINY, "pretrain.steps=2"))
    loop.pretrain(config, volumes, tmp_path, ALONE)

    def killed(*anything):
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(ZeroDivisionError):
        loop.pretrain(config, volumes, tmp_path, ALONE, fresh=True)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_made_again(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(Voco2D, "baselines", lambda *given: {})  # any checkpoint is better
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    (tmp_path / "best.ckpt").write_bytes(b"cut")
    more = load_config("smoke", (*TINY, "pretrain.steps=4"))
    counts = loop.pretrain(more, volumes, tmp_path, ALONE)
    records = read_log(tmp_path / "log.jsonl")[2:]
    assert counts["position_accuracy"] == max(
        record.get("position_accuracy", 0) for record in records
    )
    assert loop.usable_best(voco_step.start(more, ALONE, volumes), tmp_path) is not None


@pytest.mark.slow
def test_recomputed_activations_give_the_same_losses(volumes, tmp_path):
    for name, override in (("plain", "false"), ("less", "true")):
        config = load_config(
            "smoke",
            (
                *TINY,
                "pretrain.steps=3",
                f"pretrain.activation_checkpointing={override}",
                "pretrain.amp=false",
            ),
        )
        loop.pretrain(config, volumes, tmp_path / name, ALONE)
    plain, less = (
        [record["loss"] for record in read_log(tmp_path / name / "log.jsonl")]
        for name in ("plain", "less")
    )
    assert less == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_a_model_that_cannot_recompute_is_refused(volumes):
    options = (
        "model.backbone=dla46_c",
        "pretrain.image_size=64",
        "pretrain.activation_checkpointing=true",
    )
    with pytest.raises(InputError, match="dla46_c cannot recompute its activations"):
        voco_step.start(load_config("smoke", (*TINY, *options)), ALONE)
    fits = (
        r"vgg11 takes no crops of 24 x 24 pixels, .*set pretrain.image_size to 64 \(crops of 32\)"
    )
    with pytest.raises(InputError, match=fits):
        voco_step.start(load_config("smoke", (*TINY, "model.backbone=vgg11")), ALONE)


def test_weights_of_the_start_are_part_of_a_runs_identity(tmp_path):
    options = (*TINY, "pretrain.init=imagenet", f"model.weights={tmp_path / 'w.pth'}")
    (tmp_path / "w.pth").write_bytes(b"one")
    before = voco_step.identity(load_config("smoke", options), None)
    (tmp_path / "w.pth").write_bytes(b"two")
    assert voco_step.identity(load_config("smoke", options), None) != before


def half_precision(monkeypatch):
    """Let this CPU compute as a GPU without bfloat16 does: float16, losses scaled."""
    monkeypatch.setattr(optimise, "amp_dtype", lambda device: torch.float16)


@pytest.mark.slow
def test_a_float16_run_takes_up_a_checkpoint_of_another_type(volumes, tmp_path, monkeypatch):
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    half_precision(monkeypatch)
    loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=4")), volumes, tmp_path, ALONE)
    losses = [record["loss"] for record in read_log(tmp_path / "log.jsonl")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_float16_gradients_that_stay_non_finite_end_the_run(volumes, monkeypatch):
    half_precision(monkeypatch)
    run, samples = trained(volumes=volumes)
    run.method.student.projector[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = run.method.student.projector[-1].weight.clone()
    for _ in range(24):
        voco_step.train_step(run, samples[0]).read()
    with pytest.raises(
        NonFiniteLoss, match="non-finite gradients at step 25 though the loss is scaled by 0.00195"
    ):
        voco_step.train_step(run, samples[0]).read()
    assert torch.equal(run.method.student.projector[-1].weight, before)


@pytest.mark.parametrize(("amount", "fault"), [(float("nan"), NonFiniteLoss), (0.0, Collapse)])
def test_faults_end_the_run_and_keep_the_last_good_state(
    volumes, tmp_path, monkeypatch, amount, fault
):
    config = load_config(
        "smoke", (*TINY, "pretrain.collapse_patience=2", "pretrain.checkpoint_every=1")
    )
    step = voco_step.train_step

    def broken(run, batch, stopping=False):
        if run.step >= 3:
            with torch.no_grad():
                run.method.student.projector[-1].weight.mul_(amount)
                run.method.student.projector[-1].bias.fill_(1.0)
        return step(run, batch, stopping)

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(
        fault,
        match=(
            "step 4.*p[0-9]+_0.npy"
            if fault is NonFiniteLoss
            else "collapsed for 2 steps until step 5"
        ),
    ):
        loop.pretrain(config, volumes, tmp_path, ALONE)
    state = load_checkpoint(tmp_path / "last.ckpt")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["student"].values())


def test_a_run_that_ends_collapsed_is_no_result(volumes, tmp_path, monkeypatch):
    """Fewer steps than collapse_patience once ended with exit code 0 and the collapsed network as
    backbone.
    """
    read = voco_step.Taken.read
    monkeypatch.setattr(
        voco_step.Taken,
        "read",
        lambda taken: (lambda record, stop: ({**record, "std": 0.0}, stop))(*read(taken)),
    )
    with pytest.raises(Collapse, match="collapsed for 2 steps until step 2"):
        loop.pretrain(load_config("smoke", (*TINY, "pretrain.steps=2")), volumes, tmp_path, ALONE)
    assert not list(tmp_path.glob("*.ckpt"))
    assert not (tmp_path / "backbone.safetensors").exists()


def test_what_nccl_raises_for_a_lost_process_is_one_line(volumes, tmp_path, monkeypatch):
    def lost(*given):
        raise torch.distributed.DistBackendError("NCCL communicator was aborted")

    monkeypatch.setattr(loop, "train_step", lost)
    with pytest.raises(PeerLost, match="another process of this run has ended"):
        loop.pretrain(load_config("smoke", TINY), volumes, tmp_path, ALONE)


def test_checkpoints_rotate_and_a_damaged_one_costs_one_interval(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path / "last.ckpt", {"step": step}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.1.ckpt",
        "last.2.ckpt",
        "last.ckpt",
    ]
    assert newest_checkpoint(tmp_path / "last.ckpt", 3) == {"step": 5}
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:100])
    assert newest_checkpoint(tmp_path / "last.ckpt", 3) == {"step": 4}
    assert newest_checkpoint(tmp_path / "none.ckpt", 3) is None


def ranks(volumes, fault):
    """Stage 04 under torchrun in the folder of `volumes`, two processes with a planted fault."""
    local = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
    stage = ("--config=smoke", f"--out={volumes.parent}", "--device=cpu", *DESCENT)
    logs = f"--log-dir={volumes.parent / 'ranks'}"
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPER.parents[2])}
    return torchrun(*local, logs, str(HELPER), fault, *stage, variables=shared)


@pytest.mark.slow
def test_two_ranks_stopped_and_gone_on_are_one_rank_that_never_stopped(
    volumes, tmp_path, monkeypatch
):
    """Batch norm, inter-volume term, dropout and gradients are those of the whole batch; one
    process writes, once.

    torchrun ends all ranks as soon as one has ended, and a batch system signals every process: no
    signal may cut the checkpoint short.
    """
    monkeypatch.setattr(optimise, "adamw", descent)
    loop.pretrain(load_config("smoke", DESCENT), volumes, tmp_path, ALONE)
    folder = volumes.parent / layout.VOCO
    shutil.rmtree(folder, ignore_errors=True)
    _, text = ranks(volumes, "storm")
    assert (folder / "last.ckpt").exists(), text
    assert "stopped at step 4, checkpoint written" in text
    assert not list(folder.glob(".*tmp*"))
    # the ranks agree one step after the signal
    assert load_checkpoint(folder / "last.ckpt")["step"] == 4, text
    assert not (folder / "manifest.json").exists()
    code, text = ranks(volumes, "none")
    assert code == 0, text
    assert text.count("04_voco2d: done") == 1
    assert len(list((folder / "tensorboard").iterdir())) == 2, "one process of each sitting writes"
    one, two = (
        [[record[name] for name in Voco2D.stats] for record in read_log(path / "log.jsonl")]
        for path in (tmp_path, folder)
    )
    np.testing.assert_allclose(two, one, rtol=5e-4, atol=1e-4)
    begun = voco_step.start(load_config("smoke", DESCENT), ALONE).method.student.state_dict()
    learnt, other = (load_checkpoint(path / "last.ckpt")["student"] for path in (tmp_path, folder))
    for name, tensor in begun.items():
        moved = (learnt[name] - tensor).float().norm()
        assert (learnt[name] - other[name]).float().norm() <= 0.05 * moved + 1e-5, name
    assert sum(not torch.equal(learnt[name], tensor) for name, tensor in begun.items()) > 0.9 * len(
        begun
    )


@pytest.mark.slow
def test_a_ranks_failure_ends_all_with_its_message(volumes):
    shutil.rmtree(volumes.parent / layout.VOCO, ignore_errors=True)
    code, text = ranks(volumes, "error")
    assert code != 0
    assert "error: planted fault, rank 1, see what the others do" in text
    assert "error: another process of this run has ended" in text
    assert not (volumes.parent / layout.VOCO / "manifest.json").exists()


@pytest.mark.slow
def test_pictures_are_drawn(volumes, unbroken, tmp_path):
    (tmp_path / "log.jsonl").write_bytes((unbroken[0] / "log.jsonl").read_bytes())
    (tmp_path / "best.ckpt").write_bytes((unbroken[0] / "best.ckpt").read_bytes())
    names = draw_all(load_config("smoke", TINY), volumes, tmp_path, ALONE.device)
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_crops_that_a_backbone_does_not_take_are_answered_with_those_that_fit():
    sizes = ("pretrain.image_size=120", "model.backbone=test_vit")
    with pytest.raises(
        InputError,
        match=r"test_vit takes no crops of 60 x 60 pixels, .*pretrain.image_size=120 and"
        r" pretrain.grid=2, set pretrain.image_size to 64 \(crops of 32\) or 96 \(crops of 48\)",
    ):
        voco_step.start(load_config("smoke", (*TINY, *sizes)), ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_maxvit", "test_vit"])
def test_a_backbone_of_one_size_is_exported_for_whole_planes(volumes, tmp_path, name):
    """Pretrained on crops of 32, settled and saved for planes of 64: a classifier at 64 takes it
    as it is, one at 96 interpolates.
    """
    if not timm.is_model(name):
        pytest.skip("an older timm")
    options = ("pretrain.image_size=64", f"model.backbone={name}", "pretrain.steps=2")
    loop.pretrain(load_config("smoke", (*TINY, *options)), volumes, tmp_path, ALONE)
    path = tmp_path / "backbone.safetensors"
    assert "interpolated" not in load_backbone(create_backbone(name, size=64), path)
    report = load_backbone(create_backbone(name, size=96), path)
    assert ("interpolated" in report) == (name == "test_maxvit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minutes", "written"), [(0, [6]), (1e-9, [1, 2, 3, 4, 5, 6]), (60, [6]), (2.5, [3, 6])]
)
def test_checkpoints_come_by_minutes_too(volumes, tmp_path, monkeypatch, minutes, written):
    """Steps of a minute each; `pretrain.checkpoint_every` alone would write none before the end."""
    steps, clock = [], [0.0]

    def save(path: Path, state: dict, keep: int = 1) -> None:
        steps.extend([state["step"]] * (path.name == "last.ckpt"))

    def step(run, batch, stopping=False):
        clock[0] += 60
        return voco_step.train_step(run, batch, stopping)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    every = ("pretrain.checkpoint_every=1000", f"pretrain.checkpoint_minutes={minutes}")
    loop.pretrain(load_config("smoke", (*TINY, *every)), volumes, tmp_path, ALONE)
    assert steps == written
