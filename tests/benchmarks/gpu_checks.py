"""Checks of `gpu.py`: what the GPU computes against what the CPU computes, and against itself.

The reference is float32 on the CPU; TF32 is off and algorithms are deterministic in all of them. A
relative difference is that of whole vectors: |a - b| / |b|.
"""

import contextlib
import copy
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from gpu_plan import CPU, Plan, Row, check, exact, least, missing, other_road, stopping
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.data import default_collate

from pipeline.classifier.model import CnnLstm
from pipeline.classifier.predict import Trained, as_batch, load_classifier, predict
from pipeline.classifier.train import FoldTrainer
from pipeline.learning import compilation, optimise
from pipeline.learning.backbone import create_backbone, load_backbone, save_backbone
from pipeline.learning.checkpoint import describe, load_checkpoint, save_weights
from pipeline.learning.compilation import lacks_compiler
from pipeline.learning.distributed import World
from pipeline.learning.fast_layers import speed_up
from pipeline.learning.log import read_log
from pipeline.run import layout
from pipeline.run.config import Config, TrainConfig
from pipeline.submission.inference import Ensemble
from pipeline.voco import pretrain as loop
from pipeline.voco.data import VocoSamples
from pipeline.voco.step import State, start, train_step

TERMS = ("loss", "intra", "inter", "reg")
FLIPS = ("x", "y", "z")
# its draws are not the same on two devices
NO_DROPOUT = (
    "pretrain.dropout=0",
    *(f"train.{name}=0" for name in TrainConfig.model_fields if name.endswith("dropout")),
)
CLOCK = {"samples_per_s", "waiting", "seconds", "slices_per_s"}  # of a log: what time changes
TENSORS = ("student", "teacher", "model", "averaged", "optimiser")  # of a checkpoint


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All floating-point tensors as one vector, float64 on the CPU."""
    return torch.cat(
        [t.detach().double().cpu().flatten() for t in tensors if t.dtype.is_floating_point]
    )


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """|found - reference| / |reference|."""
    return ((found - reference).norm() / reference.norm()).item()


def cosine(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Of two vectors."""
    return torch.cosine_similarity(found, reference, dim=0).item()


def worst(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest relative difference of two tables of losses; those near 0 count as 0.1."""
    return ((found - reference).abs() / reference.abs().clamp_min(0.1)).max().item()


@dataclass(frozen=True)
class Trace:
    """Some steps of pretraining: losses (steps, terms), the first step's gradient as it reaches the
    optimiser, and how far the teacher has come, both as vectors.
    """

    run: State
    losses: torch.Tensor
    gradient: torch.Tensor
    change: torch.Tensor


class Bounds(NamedTuple):
    """How far two traces may be apart: losses and gradient (relative, cosine) of the first step,
    losses of all, change of the teacher.
    """

    first: float
    gradient: float
    cosine: float
    losses: float
    change: float


GRAPH_STEPS = 5  # the first warms up, the second is recorded, the others are replayed
SAME = Bounds(1e-3, 1e-2, 0.999, 1e-2, 0.05)  # float32 by other kernels, two steps


@torch.no_grad()
def disturb(teacher: nn.Module) -> None:
    """Move a teacher away from its student, of which it is a copy: the loss has |teacher - student|
    in it, whose slope at 0 is a matter of rounding. The same numbers on every device.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + 0.1 * noise.to(parameter.device))


@torch.no_grad()
def nudge(run: State) -> None:
    """Change every weight by about the last digit of float32."""
    generator = torch.Generator().manual_seed(1)
    for network in run.method.networks.values():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + 2**-22 * noise.to(parameter.device))


def stepped(
    run: State, samples: VocoSamples, steps: int
) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Take `steps` steps: the figures of each, and its gradient as it reaches the optimiser."""
    gradients: list[torch.Tensor] = []

    def keep(*_: Any) -> None:
        gradients.append(flat(p.grad for p in run.method.student.parameters()))

    hook = run.update.optimiser.register_step_pre_hook(keep)
    values = [train_step(run, samples[k]).read()[0] for k in range(steps)]
    hook.remove()
    return values, gradients


def trace(
    plan: Plan, config: Config, device: torch.device, steps: int, nudged: bool = False
) -> Trace:
    """Take `steps` steps on the drawn volumes."""
    run = start(config, World(0, 1, device))
    disturb(run.method.networks["teacher"])
    if nudged:
        nudge(run)
    # a scale at which float16 does not overflow: the step would be left out and nothing compared
    enabled = run.update.scaler.is_enabled()
    run.update.scaler = torch.amp.GradScaler(device.type, init_scale=64.0, enabled=enabled)
    names = [f"p{k}_0.npy" for k in range(16)]
    samples = VocoSamples(plan.volumes(config), names, config.pretrain, config.seed)
    teacher = run.method.networks["teacher"]
    before = flat(teacher.state_dict().values())
    values, gradients = stepped(run, samples, steps)
    losses = torch.tensor([[one[term] for term in TERMS] for one in values], dtype=torch.float64)
    return Trace(run, losses, gradients[0], flat(teacher.state_dict().values()) - before)


def pretraining(plan: Plan) -> Iterator[Row]:
    """Losses, gradients and the averaged teacher: device against CPU."""
    config = plan.checked(*NO_DROPOUT, "pretrain.amp=false", "pretrain.lr=1e-5")
    steps = plan.pick(2, 3, 5)
    with exact():
        reference = trace(plan, config, CPU, steps)
        rounded = trace(plan, config, CPU, steps, nudged=True)
        with other_road(plan.device):
            found = trace(plan, config, plan.device, steps)
        yield from agreement("float32", found, reference, allowed(rounded, reference))
        yield averaging(reference.run, plan.device)
        yield from half_precision(plan, steps)


def allowed(rounded: Trace, reference: Trace) -> Bounds:
    """Ten times what a change of the weights' last digit does on the CPU: an untrained network
    makes much of it, and the more the longer it trains.
    """
    return Bounds(
        max(1e-4, 10 * worst(rounded.losses[:1], reference.losses[:1])),
        max(1e-3, 10 * relative(rounded.gradient, reference.gradient)),
        0.999,
        max(1e-3, 10 * worst(rounded.losses, reference.losses)),
        max(1e-3, 10 * relative(rounded.change, reference.change)),
    )


def half_precision(plan: Plan, steps: int) -> Iterator[Row]:
    """Mixed precision on the device against float32 on the CPU. Of an EfficientNet that has learnt
    nothing even float32 gradients have three digits: compared is a ResNet, and the one layer that
    is the project's own by itself.
    """
    dtype = optimise.amp_dtype(plan.device)
    if dtype is None:
        yield missing("mixed precision", "this device computes in float32 only")
        return
    name = str(dtype).removeprefix("torch.")
    resnet = (*NO_DROPOUT, f"model.backbone={plan.resnet}")
    reference = trace(plan, plan.checked(*resnet, "pretrain.amp=false"), CPU, steps)
    found = trace(plan, plan.checked(*resnet), plan.device, steps)
    yield from agreement(name, found, reference, Bounds(0.1, 0.7, 0.8, 0.4, 0.5))
    value = norm_gradients(plan.device, dtype)
    yield check(f"{name}: gradients of norm and activation", value, 0.02)
    mixed = trace(plan, plan.checked(), plan.device, steps)
    tensors = [*mixed.run.method.student.state_dict().values(), mixed.losses, mixed.change]
    broken = sum(not torch.isfinite(tensor).all() for tensor in tensors)
    yield check(f"{name}: tensors with NaN or infinity after {steps} steps", broken, 0)


def norm_gradients(device: torch.device, dtype: torch.dtype) -> float:
    """Relative difference of the gradients of batch norm with SiLU: ours, in half precision on the
    device, and the library's in float32 on the CPU.
    """
    layer = BatchNormAct2d(24, act_layer=nn.SiLU).train()
    own = speed_up(nn.Sequential(copy.deepcopy(layer))).to(device)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(16, 24, 12, 12, generator=generator).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    inputs = [x.clone().requires_grad_(), x.to(device, dtype).requires_grad_()]
    (layer(inputs[0]) * weight).sum().backward()
    (own(inputs[1]) * weight.to(device, dtype)).float().sum().backward()
    found, expected = (
        flat([one.grad, *(parameter.grad for parameter in net.parameters())])
        for one, net in ((inputs[1], own), (inputs[0], layer))
    )
    return relative(found, expected)


def agreement(name: str, found: Trace, reference: Trace, bounds: Bounds) -> Iterator[Row]:
    """Five checks of two traces."""
    first = worst(found.losses[:1], reference.losses[:1])
    yield check(f"{name}: losses of a step", first, bounds.first)
    yield check(f"{name}: gradient", relative(found.gradient, reference.gradient), bounds.gradient)
    angle = cosine(found.gradient, reference.gradient)
    yield least(f"{name}: gradient, cosine", angle, bounds.cosine)
    steps = f"{len(found.losses)} steps"
    yield check(f"{name}: losses of {steps}", worst(found.losses, reference.losses), bounds.losses)
    moved = relative(found.change, reference.change)
    yield check(f"{name}: change of the averaged teacher in {steps}", moved, bounds.change)


def averaging(run: State, device: torch.device) -> Row:
    """The average alone, of the very same weights."""
    results = []
    for place in (CPU, device):
        teacher, student = (
            copy.deepcopy(run.method.networks[name]).to(place) for name in ("teacher", "student")
        )
        average = optimise.Average(teacher, student)
        for momentum in (0.9, 0.99, 0.999):
            average.update(momentum)
        results.append(flat(teacher.state_dict().values()))
    return check("float32: average of the same weights", relative(results[1], results[0]), 1e-6)


def resuming(plan: Plan) -> Iterator[Row]:
    """A run stopped by SIGTERM and gone on with against an unbroken one, both on the device."""
    steps, world = 6, World(0, 1, plan.device)
    often = ("pretrain.eval_every=3", "pretrain.log_every=1", "pretrain.augment=true")
    config = plan.checked(f"pretrain.steps={steps}", *often)

    def pretrained(folder: Path) -> None:
        loop.pretrain(config, plan.volumes(config), folder, world)

    yield from twice(plan, "pretraining", pretrained, lambda record: record["step"] == 2)
    config = plan.checked("train.epochs=2", "train.ema=0.9")
    data = plan.fold_data(config)

    def trained(folder: Path) -> None:
        FoldTrainer(config, data, folder, plan.device, None).run()

    yield from twice(plan, "fold", trained, lambda record: record["epoch"] == 1)


def twice(
    plan: Plan,
    name: str,
    train: Callable[[Path], None],
    asks: Callable[[Mapping[str, Any]], bool],
) -> Iterator[Row]:
    """Train without a stop, and with one where `asks` wants it: the differences."""
    whole, parts = plan.folder / f"{name}_whole", plan.folder / f"{name}_parts"
    for folder in (whole, parts):
        folder.mkdir()
    with exact(), undetermined() as operations:
        train(whole)
        with stopping(asks):
            train(parts)
        records = len(read_log(parts / layout.LOG))
        train(parts)
    expected, found = (load_checkpoint(folder / layout.LAST) or {} for folder in (whole, parts))
    logs = [numbers(read_log(folder / layout.LOG)) for folder in (whole, parts)]
    stopped = records < len(logs[0])
    most = 1e-3 if operations else 0.0
    note = f"not deterministic: {', '.join(sorted(operations))}" if operations else "bit for bit"
    apart = largest(found, expected) if stopped else math.nan
    yield check(f"{name}: stopped and resumed, last.ckpt", apart, most, note)
    same = relative(logs[1], logs[0]) if logs[0].shape == logs[1].shape else math.nan
    yield check(f"{name}: stopped and resumed, log.jsonl", same, most, note)
    for folder in (whole, parts):
        shutil.rmtree(folder)


@contextlib.contextmanager
def undetermined() -> Iterator[set[str]]:
    """The names of the operations that have no deterministic algorithm, after the block."""
    found: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    texts = [str(one.message) for one in caught]
    found |= {text.split()[0] for text in texts if "deterministic implementation" in text}


def numbers(records: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """All figures of a log but those of the clock, as a vector."""
    found: list[float] = []
    for record in records:
        for name, value in record.items():
            if name not in CLOCK:
                found += value.values() if isinstance(value, Mapping) else [value]
    return torch.tensor(found, dtype=torch.float64)


def largest(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest relative difference among the tensors of two checkpoints; NaN where they do not
    hold the same ones.
    """
    one, other = dict(leaves(found)), dict(leaves(expected))
    if one.keys() != other.keys() or not one:
        return math.nan
    return max(
        0.0
        if torch.equal(one[name], other[name])
        else relative(flat([one[name]]), flat([other[name]]))
        for name in one
    )


def leaves(state: Any, where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `TENSORS` in a checkpoint, with a name each."""
    if isinstance(state, torch.Tensor):
        yield where, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            if where or name in TENSORS:
                yield from leaves(value, f"{where}/{name}")


@contextlib.contextmanager
def compiling(plan: Plan) -> Iterator[None]:
    """`torch.compile` as it is on a GPU; on a CPU traced alone, which needs no compiler, since
    compiling would take minutes: there graphs are counted, and what they compute is what it was.
    """
    if plan.cuda:
        yield
        return
    compile = torch.compile

    def traced(model: Any, mode: str | None = None, **options: Any) -> Any:
        return compile(model, backend="eager", **options)

    with (
        mock.patch.object(torch, "compile", traced),
        mock.patch.object(compilation, "lacks_compiler", return_value=""),
    ):
        yield


def compiled(plan: Plan) -> Iterator[Row]:
    """`pretrain.compile` and `train.compile` on against off, on the device, float32."""
    if why := lacks_compiler(plan.device):
        yield missing("compile", why)
        return
    from torch._dynamo.utils import counters

    # the same kinds of layers, compiled in a third of the time
    small = plan.pick((), ("model.backbone=test_efficientnet",), ())
    off, on = (
        plan.checked(
            *("pretrain.amp=false", "train.amp=false", *NO_DROPOUT, *small),
            *(f"{section}.compile={wanted}" for section in ("pretrain", "train")),
        )
        for wanted in ("false", "true")
    )
    with exact(), compiling(plan):
        expected = trace(plan, off, plan.device, 2)
        counters.clear()
        found = trace(plan, on, plan.device, 2)
        yield from agreement("pretraining", found, expected, SAME)
        yield breaks("pretraining", counters["graph_break"])
        torch._dynamo.reset()  # a stage has a process of its own: no sizes of another one before
        counters.clear()
        losses = [losses_of(trainer_on(plan, config, plan.device), 2) for config in (on, off)]
        yield check("fold: losses of 2 steps", worst(*losses), 1e-2)
        yield breaks("fold", counters["graph_break"])


def graphs(plan: Plan) -> Iterator[Row]:
    """`pretrain.compile=reduce-overhead` against `true`, on the device, float32: the same kernels,
    launched together from the third step on.
    """
    if why := lacks_compiler(plan.device):
        yield missing("graphs", why)
        return
    from torch._dynamo.utils import counters

    small = plan.pick((), ("model.backbone=test_efficientnet",), ())
    plain, wanted = (
        plan.checked("pretrain.amp=false", *NO_DROPOUT, *small, f"pretrain.compile={value}")
        for value in ("true", "reduce-overhead")
    )
    with exact(), compiling(plan):
        expected = trace(plan, plain, plan.device, GRAPH_STEPS)
        torch._dynamo.reset()
        counters.clear()
        found = trace(plan, wanted, plan.device, GRAPH_STEPS)
    yield from agreement("pretraining", found, expected, SAME)
    row = check("pretraining: passes that are no graph", counters["inductor"]["cudagraph_skips"], 0)
    yield row if plan.cuda else missing(row.name, "needs a CUDA device")


def breaks(name: str, found: Mapping[str, int]) -> Row:
    """Where the compiler gave up a part of the model."""
    reasons = "; ".join(" ".join(reason.split())[:100] for reason in found)
    return Row(f"{name}: graph breaks", sum(found.values()), note=reasons[:300])


def losses_of(trainer: FoldTrainer, steps: int) -> torch.Tensor:
    """Losses (steps, targets) of optimiser steps on the training series in their order."""
    give_opinions(trainer.model.train())
    size, rows = trainer.options.batch, []
    for k in range(steps):
        keys = [(0, (k * size + i) % len(trainer.dataset)) for i in range(size)]
        terms = trainer.step(k, [default_collate([trainer.dataset[key] for key in keys])])
        rows.append(list(terms.read().values()))
    return torch.tensor(rows, dtype=torch.float64)


def fold(plan: Plan) -> Iterator[Row]:
    """Losses of a fold's steps, the model's file, and predictions: device against CPU."""
    config = plan.checked(*NO_DROPOUT, "train.amp=false")
    steps = plan.pick(2, 4, 4)
    with exact():
        reference = losses_of(trainer_on(plan, config, CPU), steps)
        with other_road(plan.device):
            trainer = trainer_on(plan, config, plan.device)
            found = losses_of(trainer, steps)
        yield check(f"float32: losses of {steps} steps", worst(found, reference), 0.02)
        if optimise.amp_dtype(plan.device):
            resnet = (*NO_DROPOUT, f"model.backbone={plan.resnet}")
            single = trainer_on(plan, plan.checked(*resnet, "train.amp=false"), CPU)
            half = trainer_on(plan, plan.checked(*resnet), plan.device)
            value = worst(losses_of(half, steps), losses_of(single, steps))
            yield check(f"mixed: losses of {steps} steps", value, 0.2)
            yield recurrent_type(half)
        yield from predictions(plan, trainer.model, plan.checked(*NO_DROPOUT))


@torch.no_grad()
def recurrent_type(trainer: FoldTrainer) -> Row:
    """What the sequence model computes in: cuDNN's recurrent layers know float16 alone beside
    float32, whatever half precision is asked for.
    """
    width = trainer.model.norm.normalized_shape[0]
    features = torch.zeros(1, trainer.options.slices, width, device=trainer.device)
    with optimise.autocast(trainer.device, True):
        dtype = trainer.model.sequence(features).dtype
    note = str(dtype).removeprefix("torch.")
    return least("mixed: bits of the sequence model", 8 * dtype.itemsize, 32, note)


def trainer_on(plan: Plan, config: Config, device: torch.device) -> FoldTrainer:
    """A fold at its start."""
    return FoldTrainer(config, plan.fold_data(config), plan.folder, device, None)


@torch.no_grad()
def give_opinions(model: CnnLstm) -> None:
    """Heads that look at their input: they start at 0, and then a model says the same of
    everything.
    """
    generator = torch.Generator().manual_seed(0)
    for head in model.heads.values():
        weight = head.get_parameter("weight")
        drawn = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
        weight.copy_(drawn)


def predictions(plan: Plan, model: CnnLstm, config: Config) -> Iterator[Row]:
    """Save on the device, load on both, predict with every flip."""
    path, data = plan.folder / layout.MODEL, plan.fold_data(config)
    save_weights(path, model, describe("classifier", config, Trained))
    here, there = load_classifier(path, CPU)[0], load_classifier(path, plan.device)[0]
    found = differing(model.state_dict(), here.state_dict())
    yield check("model.safetensors: tensors that differ after loading on the CPU", found, 0)
    volumes = [np.load(series.path) for series in data.held_out[:2]]
    batches = [as_batch(volume, config.train, CPU) for volume in volumes]
    reference = torch.cat([predict(here, batch, False, FLIPS) for batch in batches])
    note = f"probabilities {reference.min():.2f} to {reference.max():.2f}"
    with other_road(plan.device):
        found = torch.cat(
            [predict(there, batch.to(plan.device), False, FLIPS) for batch in batches]
        )
    yield check("float32: probabilities", (found - reference).abs().max().item(), 1e-3, note)
    with ThreadPoolExecutor(1) as threads:
        ensemble = Ensemble([there, there], config.train, config.volume, plan.device, threads)
        series = torch.from_numpy(np.stack([ensemble.series(one, FLIPS) for one in volumes]))
    name = "mixed" if optimise.amp_dtype(plan.device) else "float32"
    value = (series - reference).abs().max().item()
    yield check(f"{name}: probabilities of stage 08", value, 0.1, note)


def differing(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> int:
    """How many tensors of two state dicts are not the same."""
    return sum(not torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in state.items())


def files(plan: Plan) -> Iterator[Row]:
    """A backbone written on the device and read on the CPU."""
    config = plan.checked()
    run = trace(plan, config, plan.device, 1).run
    path = plan.folder / layout.BACKBONE
    save_backbone(run.method.backbone, path, {})
    backbone = create_backbone(config.model.backbone)
    load_backbone(backbone, path)
    found = differing(run.method.backbone.state_dict(), backbone.state_dict())
    yield check("backbone.safetensors: tensors that differ on the CPU", found, 0)
    loop.save_checkpoint(plan.folder / "state.ckpt", run.state())
    other = start(config, World(0, 1, CPU))
    other.restore(load_checkpoint(plan.folder / "state.ckpt") or {})
    value = largest(other.state(), load_checkpoint(plan.folder / "state.ckpt") or {})
    yield check("checkpoint of the device, taken up on the CPU", value, 0)


def synchronisations(plan: Plan) -> Iterator[Row]:
    """Calls that wait for the GPU, by PyTorch's own guard: none before the step is taken."""
    config = plan.checked()
    run = trace(plan, config, plan.device, 2).run
    names = [f"p{k}_0.npy" for k in range(16)]
    batch = VocoSamples(plan.volumes(config), names, config.pretrain, config.seed)[0]
    for name, between in (("between backward and optimiser", True), ("of a whole step", False)):
        places = waits(plan, run, partial(train_step, run, batch), between)
        note = ", ".join(f"{place} x{count}" for place, count in places.most_common(8))
        row = check(f"synchronising calls {name}", sum(places.values()), 0, note)
        yield row if plan.cuda else missing(row.name, "needs a CUDA device")


def waits(plan: Plan, run: State, step: Callable[[], object], between: bool) -> Counter[str]:
    """Places (file:line) of the calls that wait in a step, or `between` its backward pass and the
    optimiser's.
    """
    guard = torch.cuda.set_sync_debug_mode if plan.cuda else (lambda mode: None)
    backward = run.update.backward

    def watched(loss: torch.Tensor) -> None:
        backward(loss)
        guard("warn")

    with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as closing:
        warnings.simplefilter("always")
        closing.callback(guard, "default")
        if between:
            closing.enter_context(mock.patch.object(run.update, "backward", watched))
            optimiser = run.update.optimiser
            closing.callback(optimiser.register_step_pre_hook(lambda *_: guard("default")).remove)
        else:
            guard("warn")
        step()
    # not what torch says of the guard itself when it is first set
    found = [one for one in caught if "called a synchronizing" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
