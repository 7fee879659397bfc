"""What the GPU paths do differently, shown on a CPU: nothing waits for the device, and the numbers
stay those of the plain way.
"""

import copy
import math
import os
import signal

import numpy as np
import pytest
import torch
from gpu_checks import CLOCK, compiling, flat, largest, relative
from gpu_plan import CPU, Plan, stopping
from timm.layers import BatchNormAct2d
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from pipeline.classifier import train as training
from pipeline.classifier.sequence import positions, sequence_model
from pipeline.classifier.train import FoldTrainer
from pipeline.learning import fast_layers as layers
from pipeline.learning import optimise
from pipeline.learning.backbone import create_backbone
from pipeline.learning.checkpoint import load_checkpoint
from pipeline.learning.distributed import PeerLost, World
from pipeline.learning.fast_layers import speed_up
from pipeline.learning.log import read_log
from pipeline.run import layout
from pipeline.run.config import TrainConfig
from pipeline.system import machine
from pipeline.voco import pretrain as pretraining_loop
from pipeline.voco import step as voco_step
from pipeline.voco import voco2d
from pipeline.voco.baselines import CROPS
from pipeline.voco.data import VocoSamples, batches, evaluation_batches
from pipeline.voco.losses import pairs
from pipeline.voco.model import RoundedCopy, VocoNet, make_teacher
from pipeline.voco.voco2d import following_volumes, position_accuracies

BACKBONE = "test_efficientnet"


@pytest.fixture
def pretended(monkeypatch):
    """A machine with two GPUs, as far as choosing one goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize(("name", "tries"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_cudnn_tries_its_algorithms_in_whichever_stage_chose_a_gpu(pretended, name, tries):
    device = machine.pick_device(name, 1)
    assert str(device) == ("cuda:1" if tries else "cpu")
    assert torch.backends.cudnn.benchmark == tries


@pytest.mark.slow
def test_the_backbone_is_one_graph_to_the_compiler():
    """Its counters of batches once broke it at every norm, with torch 2.4."""
    torch.manual_seed(0)
    backbone = create_backbone(BACKBONE, size=32)
    plain, x = copy.deepcopy(backbone), torch.randn(2, 1, 32, 32)
    counters.clear()
    compiled = torch.compile(backbone, backend="aot_eager")
    weight = torch.randn(compiled(x).shape)
    backbone.load_state_dict(plain.state_dict())  # its statistics have moved
    for net in (compiled, plain):
        (net(x) * weight).sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    for (name, one), (_, other) in zip(
        plain.state_dict().items(), backbone.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(other, one, msg=name)
    found, expected = (flat(p.grad for p in net.parameters()) for net in (backbone, plain))
    assert relative(found, expected) < 1e-3


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed"), PeerLost),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), PeerLost),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), torch.cuda.OutOfMemoryError),
        (RuntimeError("No backend type associated with device type cpu"), RuntimeError),
    ],
)
def test_only_what_the_process_group_raises_is_a_lost_process(monkeypatch, fault, kind):
    def failing(tensor):
        raise fault

    monkeypatch.setattr(torch.distributed, "all_reduce", failing)
    with pytest.raises(RuntimeError if kind is not PeerLost else PeerLost) as told:
        World(0, 2, torch.device("cpu")).barrier()
    assert type(told.value) is kind


def test_the_average_follows_through_a_loaded_state():
    """The tensors are listed once: what a checkpoint brings must reach the very same ones."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher, other = copy.deepcopy(student), copy.deepcopy(student)
    average = optimise.Average(teacher, student)
    other(torch.randn(5, 3))
    with torch.no_grad():
        other[0].weight.add_(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student.load_state_dict(other.state_dict())
    average.update(0.75)
    for name, tensor in teacher.state_dict().items():
        new = other.state_dict()[name]
        expected = 0.75 * before[name] + 0.25 * new if tensor.is_floating_point() else new
        torch.testing.assert_close(tensor, expected, msg=name)
    assert teacher[1].num_batches_tracked == 1


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recurrent_cells_compute_in_float32_under_autocast(kind, dtype):
    """To the last bit, forward and backward, of features that half precision brings."""
    torch.manual_seed(0)
    cells = sequence_model(6, TrainConfig(sequence=kind, hidden=4, layers=2, dropout=0))
    x = (100 * torch.randn(2, 5, 6)).to(dtype)
    expected = cells.cell(x.float())[0]
    wanted = torch.autograd.grad(expected.square().sum(), list(cells.parameters()))
    with torch.autocast("cpu", dtype=dtype):
        found = cells(x)
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == dtype, "autocast is on"
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    got = torch.autograd.grad(found.square().sum(), list(cells.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


WAITS = ("item", "__float__", "__int__", "__bool__", "tolist", "cpu", "numpy", "__index__")


@pytest.fixture
def waits(monkeypatch):
    """The calls that would wait for a GPU from a backward pass until `watching` is cleared, by
    name; and `watching`.
    """
    found, watching = [], []

    def counted(name, original):
        def call(*given, **options):
            if watching:
                found.append(name)
            return original(*given, **options)

        return call

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    backward = optimise.Update.backward

    def watched(update, loss):
        backward(update, loss)
        watching.append(True)

    monkeypatch.setattr(optimise.Update, "backward", watched)
    return found, watching


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Drawn volumes, as the GPU command has them."""
    return Plan(CPU, "tiny", tmp_path_factory.mktemp("plan"))


def pretraining(plan, *overrides):
    config = plan.checked(*overrides)
    names = [f"p{k}_0.npy" for k in range(16)]
    samples = VocoSamples(plan.volumes(config), names, config.pretrain, config.seed)
    return voco_step.start(config, World(0, 1, plan.device)), samples


def fold(plan, folder, *overrides):
    config = plan.checked(*overrides)
    folder.mkdir(exist_ok=True)
    trainer = FoldTrainer(config, plan.fold_data(config), folder, plan.device, None)
    trainer.model.train()
    return trainer, default_collate([trainer.dataset[0, k] for k in range(4)])


@pytest.mark.parametrize("scale", [False, True])
def test_nothing_waits_for_the_device_from_backward_to_the_end_of_the_step(
    plan, tmp_path, waits, scale
):
    """Whether losses are scaled or not; reading the figures is what waits."""
    run, samples = pretraining(plan, "pretrain.ema_final=1.0")
    trainer, batch = fold(plan, tmp_path, "train.ema=0.9")
    for update in (run.update, trainer.update):
        update.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scale)
    found, watching = waits
    taken = voco_step.train_step(run, samples[0])
    watching.clear()
    figures = trainer.step(0, [batch])
    assert found == []
    assert taken.read()[0]["step"] == 1
    assert set(figures.read()) == set(trainer.loss.columns)
    assert found == ["tolist", "tolist"], "otherwise nothing is counted"


class Waiting(TorchDispatchMode):
    """The operations that a GPU would be waited for: a number, or a size that depends on values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in tree_leaves(args[1:2])
        )
        if by_mask or name.startswith(self.names) or str(func) == "aten.repeat_interleave.Tensor":
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("scale", "options"),
    [(False, ()), (True, ("pretrain.dropout=0.2", "pretrain.symmetric=true"))],
)
def test_no_operation_of_a_step_needs_a_value_on_the_host(plan, tmp_path, scale, options):
    """From the batch's copy to the average, whoever asks for it, as PyTorch's own guard shows on a
    GPU. The step gives its figures as a tensor; reading them is what asks.
    """
    run, samples = pretraining(plan, *options)
    trainer, batch = fold(plan, tmp_path, "train.ema=0.9")
    for update in (run.update, trainer.update):
        update.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scale)
    sample = samples[0]
    with Waiting() as watch:
        taken, figures = voco_step.train_step(run, sample), trainer.step(0, [batch])
        assert watch.found == []
        for given in (taken.figures, figures):
            assert isinstance(given._values, torch.Tensor)
        figures._values.sum().item()
        figures._values[figures._values > 0]
    assert watch.found == ["_local_scalar_dense", "index"], "otherwise nothing is seen"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_call_of_a_step_waits_for_a_gpu(tmp_path):
    """PyTorch's own guard over whole steps, from the batch's copy to the average."""
    plan = Plan(torch.device("cuda", 0), "tiny", tmp_path)
    run, samples = pretraining(plan)
    trainer, batch = fold(plan, tmp_path / "fold", "train.ema=0.9")
    for step in range(2):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            taken, figures = voco_step.train_step(run, samples[step]), trainer.step(step, [batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert taken.read()[0]["step"] == 2
    assert figures.read()


def linear_update(scaled=False, **options):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimiser = optimise.adamw(net, 0.1, 0.01, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    return net, optimise.Update(net.parameters(), optimiser, scaler, 1.0)


def take(net, update, step, factor=1.0, term=1.0):
    """A step whose gradient is multiplied by `factor`, and whose second figure is `term`."""
    loss = net(torch.ones(4, 3)).square().mean()
    update.backward(loss * factor)
    values = torch.stack([loss.detach(), torch.tensor(term)])
    return update.apply(step, ("loss", "other"), values, [f"batch {step}"])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("broken", [{"factor": math.nan}, {"factor": math.inf}, {"term": math.nan}])
def test_from_a_non_finite_step_on_no_parameter_changes_until_it_is_read(amsgrad, broken):
    net, update = linear_update(amsgrad=amsgrad)
    plain, other = linear_update(amsgrad=amsgrad)
    for step in range(2):
        take(net, update, step).read()
        take(plain, other, step).read()
    figures = take(net, update, 2, **broken)
    later = take(net, update, 3)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    for one, two in zip(
        update.optimiser.state.values(), other.optimiser.state.values(), strict=True
    ):
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert later.read()["other"] == 1, "its own figures are fine"
    with pytest.raises(optimise.NonFiniteLoss, match="step 2: loss .*; batch batch 2; the last"):
        figures.read()


def test_an_overflow_of_float16_leaves_out_its_step_alone():
    net, update = linear_update(scaled=True)
    before = net.weight.clone()
    figures = take(net, update, 0, factor=math.inf)
    assert torch.equal(net.weight, before)
    take(net, update, 1).read()
    assert not torch.equal(net.weight, before)
    assert figures.read()["other"] == 1
    assert update.scaler.get_scale() == 32


def test_an_optimiser_without_that_way_is_still_told_of():
    net, update = linear_update()
    update.optimiser = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(optimise.NonFiniteLoss, match="gradient nan"):
        take(net, update, 0, factor=math.nan).read()


@pytest.fixture
def late(monkeypatch):
    """Figures are read one step late, as on a GPU."""
    for module in (optimise, training):
        monkeypatch.setattr(module, "reads_late", lambda device: True)


def without_clock(folder):
    return [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in read_log(folder / layout.LOG)
    ]


def pretrain(plan, folder, *overrides):
    config = plan.checked("pretrain.steps=7", "pretrain.eval_every=3", *overrides)
    folder.mkdir(exist_ok=True)
    pretraining_loop.pretrain(config, plan.volumes(config), folder, World(0, 1, CPU))
    return folder


def same_checkpoints(one, other):
    first, second = (load_checkpoint(folder / layout.LAST) for folder in (one, other))
    return first.keys() == second.keys() and largest(first, second) == 0


@pytest.mark.slow
def test_pretraining_that_reads_late_logs_and_keeps_the_same(plan, tmp_path, monkeypatch):
    """Also when it was stopped by a signal in between, and where not every step is logged."""
    for name, options in (("all", ()), ("some", ("pretrain.log_every=2",))):
        at_once = pretrain(plan, tmp_path / f"{name}_at_once", *options)
        with monkeypatch.context() as patch:
            patch.setattr(optimise, "reads_late", lambda device: True)
            read_late = pretrain(plan, tmp_path / f"{name}_late", *options)
            with stopping(lambda record: record["step"] == 4):
                pretrain(plan, tmp_path / f"{name}_stopped", *options)
            assert load_checkpoint(tmp_path / f"{name}_stopped" / layout.LAST)["step"] in (5, 6)
            parts = pretrain(plan, tmp_path / f"{name}_stopped", *options)
        assert [record["step"] for record in without_clock(at_once)][-1] == 7
        for folder in (read_late, parts):
            assert same_checkpoints(folder, at_once)
        assert without_clock(read_late) == without_clock(at_once)
        if name == "all":  # elsewhere the stop's own step is logged too
            assert without_clock(parts) == without_clock(at_once)


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_loss_that_is_not_finite_ends_a_run_that_reads_late(
    plan, tmp_path, monkeypatch, late, every
):
    """Step 4 is broken, step 5 under way when it is found out: the checkpoint is from before it."""
    step = voco_step.train_step

    def broken(run, batch, stopping=False):
        if run.step == 3:
            with torch.no_grad():
                run.method.student.projector[-1].weight.mul_(math.nan)
        return step(run, batch, stopping)

    monkeypatch.setattr(pretraining_loop, "train_step", broken)
    with pytest.raises(optimise.NonFiniteLoss, match=r"step 4: .*nan.*; batch p\d+_0.npy"):
        pretrain(plan, tmp_path, f"pretrain.checkpoint_every={every}", "pretrain.eval_every=100")
    state = load_checkpoint(tmp_path / layout.LAST)
    assert (state and state["step"]) == {1: 3, 2: 2, 100: None}[every]
    assert [record["step"] for record in read_log(tmp_path / layout.LOG)] == [1, 2, 3]


@pytest.mark.slow
def test_a_fold_that_reads_late_trains_the_same(plan, tmp_path, monkeypatch):
    """Also when it was stopped within its first epoch."""
    overrides = ("train.batch=2", "train.accumulate=2", "train.ema=0.9")
    whole, _ = fold(plan, tmp_path / "whole", *overrides)
    whole.run()
    monkeypatch.setattr(training, "reads_late", lambda device: True)
    at_a_time, _ = fold(plan, tmp_path / "late", *overrides)
    at_a_time.run()
    cut, _ = fold(plan, tmp_path / "cut", *overrides)
    step = cut.step

    def signalled(number, micro):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, micro)

    monkeypatch.setattr(cut, "step", signalled)
    with pytest.raises(SystemExit):
        cut.run()
    rest, _ = fold(plan, tmp_path / "cut", *overrides)
    rest.run()
    for other in (at_a_time, rest):
        assert [row["terms"] for row in other.history] == [row["terms"] for row in whole.history]
        assert all(
            torch.equal(tensor, other.final_model.state_dict()[name])
            for name, tensor in whole.final_model.state_dict().items()
        )


def test_a_fold_that_reads_late_stops_with_the_broken_step(plan, tmp_path, late):
    run, _ = fold(plan, tmp_path, "train.batch=2")
    liver, seen = run.model.heads["liver"].bias, []

    def spoil(gradient):
        seen.append(gradient)
        return gradient * (math.nan if len(seen) == 2 else 1)

    liver.register_hook(spoil)
    with pytest.raises(optimise.NonFiniteLoss, match=r"step 1: .*gradient nan; batch \d+, \d+;"):
        run.run()
    assert len(seen) == 3, "the step after it was under way"
    assert liver.isfinite().all()


class Machine:
    """A clock of its own: a host that hands a step over in 0.01 s, a device at work 0.2 s a step,
    and batches that take `pause` to come.
    """

    def __init__(self, pause):
        self.pause, self.now, self.busy_until = pause, 0.0, 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def batches(self, *given):
        for batch in batches(*given):
            self.now += self.pause
            yield batch

    def figures(self, *given):
        self.now += 0.01
        self.busy_until = max(self.busy_until, self.now) + 0.2
        found = optimise.Figures(*given)
        found.here = lambda done=self.busy_until: self.now >= done
        found.read = lambda done=self.busy_until, read=found.read: self.until(done) or read()
        return found

    def until(self, done):
        self.now = max(self.now, done)


@pytest.mark.parametrize(
    ("pause", "seconds", "waiting"),
    [(0.0, 0.2, 0.0), (0.15, 0.2, 0.0), (0.39, 0.4, 0.39 / 0.4)],
)
def test_a_device_waits_for_data_only_when_it_is_done(
    plan, tmp_path, monkeypatch, late, pause, seconds, waiting
):
    """Steps follow each other as the slower of both allows; what comes while the device is still
    at work was not waited for.
    """
    machine, apply = Machine(pause), optimise.Update.apply

    def handed_over(update, *given):
        with monkeypatch.context() as patch:
            patch.setattr(optimise, "Figures", lambda *own: own)
            own = apply(update, *given)
        return machine.figures(*own)

    monkeypatch.setattr(optimise.Update, "apply", handed_over)
    monkeypatch.setattr(pretraining_loop, "batches", machine.batches)
    monkeypatch.setattr(pretraining_loop, "time", machine)
    pretrain(plan, tmp_path, "pretrain.eval_every=100", "pretrain.checkpoint_every=100")
    batch = plan.checked().pretrain.batch
    for record in read_log(tmp_path / layout.LOG)[1:6]:
        assert batch / record["samples_per_s"] == pytest.approx(seconds, rel=1e-3)
        assert record["waiting"] == pytest.approx(waiting, abs=1e-3)


class Thumbnails(nn.Module):
    """Embeddings that are plainly apart: mean slices, coarse, less their mean."""

    def forward(self, crops):
        coarse = nn.functional.adaptive_avg_pool2d(crops.double().mean(2), 4).flatten(2)
        return (coarse - coarse.mean(2, keepdim=True))[:, None]


def slow_accuracy(net, samples):
    """One crop at a time, by the definition."""
    right, base = [], samples.base
    for batch in evaluation_batches(samples, CROPS):
        embeddings = net(batch["crops"])[0, 0]
        for r, overlap in enumerate(batch["overlap"][0].tolist()):
            alike = [
                torch.cosine_similarity(embeddings[r], embeddings[CROPS + k], 0).item()
                for k in range(len(base))
            ]
            right.append(overlap[int(np.argmax(alike))] >= max(overlap) - 0.1 - 1e-6)
    return float(np.mean(right))


def test_held_out_volumes_are_evaluated_in_batches_with_one_wait(plan, monkeypatch):
    """Batches of 1, 3 (the last one smaller) and all give what single crops give."""
    _, samples = pretraining(plan)
    samples.paths = samples.paths[:7]
    net = Thumbnails()
    expected = slow_accuracy(net, samples)
    assert 0 < expected < 1
    waited = []
    for name in WAITS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *given, name=name, original=original: waited.append(name) or original(*given),
        )
    for volumes in (1, 3, 7):
        found = position_accuracies(net, samples, CPU, False, volumes)
        assert found == {"position_accuracy": pytest.approx(expected)}
    # once for the chosen crops; labels are on the CPU
    assert waited == ["cpu", "numpy", "numpy"] * 3


@pytest.mark.parametrize(
    ("method", "wanted", "modes"),
    [
        ("voco2d", "false", []),
        ("voco2d", "true", [None, None]),
        ("voco2d", "reduce-overhead", ["reduce-overhead"] * 2),
        ("simclr", "reduce-overhead", ["reduce-overhead"]),
    ],
)
def test_every_backbone_is_compiled_as_the_config_says(plan, monkeypatch, method, wanted, modes):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda net, mode=None: seen.append((net, mode)))
    run, _ = pretraining(plan, f"pretrain.method={method}", f"pretrain.compile={wanted}")
    backbones = [network.backbone for network in run.method.networks.values()]
    assert [mode for _, mode in seen] == modes
    assert [net for net, _ in seen] == backbones[: len(modes)]


@pytest.mark.slow
def test_a_compiled_fold_trains_the_same_in_few_graphs(plan, tmp_path):
    """Batches of 5, 5 and 2 an epoch: a graph for the first, one for any size after that, and those
    of predictions.
    """
    overrides = ("train.batch=5", "train.dropout=0", "model.backbone=test_efficientnet")
    plain, _ = fold(plan, tmp_path / "plain", *overrides)
    torch._dynamo.reset()
    with compiling(plan):
        compiled, _ = fold(plan, tmp_path / "compiled", *overrides, "train.compile=true")
        counters.clear()
        compiled.run()
    plain.run()
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    for one, other in zip(compiled.history, plain.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_ranks_gather_stands_in_their_order(rank):
    """Each rank's part alone, the others' zeros: the sum over ranks is the whole batch."""

    class Alone(World):
        def sum(self, tensor):
            return tensor

    x = torch.randn(2, 3, 4, requires_grad=True)
    found = Alone(rank, 3, CPU).gather(x)
    assert found.shape == (6, 3, 4)
    assert torch.equal(found[2 * rank : 2 * rank + 2], x)
    assert (found != 0).sum() == x.numel()
    weight = torch.randn(6, 3, 4)
    assert torch.equal(
        torch.autograd.grad((found * weight).sum(), x)[0], weight[2 * rank : 2 * rank + 2]
    )


def test_constants_are_made_once_and_serve_training_after_a_prediction():
    for make in (
        lambda: pairs(5, CPU)[0],
        lambda: following_volumes(3, 2, 4, CPU),
        lambda: positions(7, 6, CPU),
    ):
        with torch.inference_mode():
            first = make()
        assert make() is first
        assert not first.is_inference()
    assert following_volumes(3, 2, 4, CPU).tolist() == [3, 0]
    assert torch.stack(pairs(3, CPU)).tolist() == [[0, 0, 1], [1, 2, 2]]
    model = sequence_model(6, TrainConfig(sequence="transformer", hidden=4, dropout=0))
    x = torch.randn(2, 5, 6)
    with torch.inference_mode():
        expected = model(x)
    model(x).sum().backward()
    torch.testing.assert_close(model(x).detach(), expected.clone())


def test_a_rate_held_in_a_tensor_takes_the_same_steps():
    """As on a GPU; a group's own factor counts, and a number's checkpoint is taken up."""
    nets = [linear_update(amsgrad=True) for _ in range(2)]
    nets[1][1].rates = [torch.zeros(()) for _ in nets[1][1].optimiser.param_groups]
    for _, update in nets:
        update.optimiser.param_groups[0]["factor"] = 0.3
    for step in range(5):
        for net, update in nets:
            update.set_rate(0.1 / (1 + step))
            take(net, update, step).read()
        if step == 2:
            nets[1][1].restore(copy.deepcopy(nets[0][1].state()))
    plain, held = (net.weight for net, _ in nets)
    torch.testing.assert_close(held, plain, rtol=1e-6, atol=1e-7)
    assert nets[1][1].optimiser.param_groups[0]["lr"] is nets[1][1].rates[0]
    assert nets[0][1].optimiser.param_groups[0]["lr"] == pytest.approx(0.006)


def test_on_a_gpu_norm_and_activation_are_the_librarys(monkeypatch):
    torch.manual_seed(0)
    plain = BatchNormAct2d(6, act_layer=nn.SiLU)
    own = speed_up(nn.Sequential(copy.deepcopy(plain)))
    called, apply = [], layers._NormActFunction.apply
    monkeypatch.setattr(
        layers._NormActFunction, "apply", lambda *given: called.append(1) or apply(*given)
    )
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(own(x), plain(x))
    assert called
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert torch.equal(own(x), plain(x))
    assert called == [1]
    assert torch.equal(own[0].running_var, plain.running_var)
    assert own[0].num_batches_tracked == 2


@pytest.mark.parametrize("name", [BACKBONE, "test_resnet", "test_vit"])
def test_weights_rounded_together_give_the_teachers_very_numbers(name):
    """Also after it has moved, and its counters move as they did."""
    torch.manual_seed(0)
    student = VocoNet(create_backbone(name, size=32), 32, 8, "clip")
    teacher = make_teacher(student)
    plain, copied = copy.deepcopy(teacher), RoundedCopy(teacher, torch.bfloat16)
    crops = torch.randint(0, 256, (2, 3, 2, 32, 32), dtype=torch.uint8)
    assert len(copied._own) > 8
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            assert torch.equal(copied(crops), plain(crops))
        with torch.no_grad():
            for parameter, other in zip(teacher.parameters(), plain.parameters(), strict=True):
                parameter.mul_(1.1)
                other.mul_(1.1)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name
    assert all(weight.dtype == torch.bfloat16 for weight in copied._rounded)


@pytest.mark.slow
def test_pretraining_with_weights_rounded_together_is_the_same(plan, monkeypatch):
    """Five steps in bfloat16, a checkpoint taken up in between."""
    monkeypatch.setattr(optimise, "amp_dtype", lambda device: torch.bfloat16)
    runs = []
    for together in (False, True):
        monkeypatch.setattr(voco2d, "rounds_together", lambda device, yes=together: yes)
        run, samples = pretraining(plan)
        assert isinstance(run.method.teaching, RoundedCopy) == together
        records = [voco_step.train_step(run, samples[k]).read()[0] for k in range(3)]
        state = copy.deepcopy(run.state())
        run, _ = pretraining(plan)
        run.restore(state)
        records += [voco_step.train_step(run, samples[k]).read()[0] for k in range(3, 5)]
        runs.append((records, run.method.teacher.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())
