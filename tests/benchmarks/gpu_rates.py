"""Measurements of `gpu.py`: medians of alternating repeats, beside what the card itself can do.

`share` of a step is the time that its operations or its bytes need at the card's own rates,
whichever is longer, by the time that it takes. Operations are those of one forward pass of the
student (`torch.utils.flop_counter`), four times: student, teacher, and a backward pass of two.
Bytes are the inputs and outputs of every layer, read and written once in each of these passes, and
parameters, gradients, optimiser states and averages once a step.
"""

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from common import Energy, Peak, alternate, medians, seconds_of, synchronise
from gpu_checks import compiling
from gpu_plan import Plan, Row, after, cudnn, missing, ratio, spread, stopping
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from voco_step import batch_of, make

from pipeline.classifier.predict import build_model
from pipeline.classifier.train import FoldTrainer
from pipeline.learning import optimise
from pipeline.learning.backbone import create_backbone, placed, standardise
from pipeline.learning.checkpoint import save_checkpoint
from pipeline.learning.compilation import lacks_compiler
from pipeline.learning.distributed import World
from pipeline.learning.log import read_log
from pipeline.run import layout
from pipeline.run.config import Config
from pipeline.submission.inference import Ensemble
from pipeline.voco.pretrain import pretrain
from pipeline.voco.step import start, train_step

LAUNCH = re.compile(r"(cuda|cu|hip)(Launch|GraphLaunch)")
RANGES = ("Optimizer.", "ProfilerStep")  # of the profiler: no kernels
NEEDS_CUDA = "needs a CUDA device"
# of a parameter's bytes in a step: both forward passes, backward and its gradient (4), AdamW with
# amsgrad (parameter and three states read and written, gradient read: 9), the average (3)
PARAMETER_PASSES, LAYER_PASSES, FORWARDS = 16, 4, 4
COMPILED = {"not compiled": "false", "compiled": "true", "CUDA graphs": "reduce-overhead"}


@dataclass(frozen=True)
class Limits:
    """What the card does: operations a second in half precision and in float32 as convolutions
    use it (TF32 where there is any), bytes a second, seconds of one launch.
    """

    half: float
    single: float
    copy: float
    launch: float


def card(plan: Plan) -> Limits:
    """Measured once a run."""
    return plan.once("limits", lambda: Limits(*_measure_card(plan)))


def _measure_card(plan: Plan) -> Iterator[float]:
    for dtype, tf32 in ((optimise.amp_dtype(plan.device), True), (torch.float32, True)):
        yield product(plan, dtype or torch.float32, tf32)
    source = torch.zeros(
        plan.pick(1 << 16, 1 << 30, 1 << 30), dtype=torch.uint8, device=plan.device
    )
    target = torch.empty_like(source)
    yield 2 * source.numel() / repeated(plan, lambda: target.copy_(source), 10)
    one = torch.zeros(1, device=plan.device)
    yield repeated(plan, lambda: one.add_(1), plan.pick(10, 2000, 2000))


def repeated(plan: Plan, work: Callable[[], object], times: int) -> float:
    """Seconds of one of `times` calls in a row, the median of some rows."""

    def row() -> None:
        for _ in range(times):
            work()

    found = alternate({"": row}, plan.device, plan.rounds, 2, plan.until)
    return medians(found)[""] / times


def product(plan: Plan, dtype: torch.dtype, tf32: bool) -> float:
    """Operations a second of a large square matrix product."""
    n = plan.pick(64, 8192, 8192)
    a, b = (torch.randn(n, n, device=plan.device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        return 2 * n**3 / repeated(plan, lambda: a @ b, 5)
    finally:
        torch.set_float32_matmul_precision(before)


def limits(plan: Plan) -> Iterator[Row]:
    """The card's own limits."""
    found, half = card(plan), optimise.amp_dtype(plan.device)
    name = str(half or torch.float32).removeprefix("torch.")
    yield Row(f"matrix product, {name}", found.half / 1e12, "TFLOP/s")
    yield Row("matrix product, TF32 where there is any", found.single / 1e12, "TFLOP/s")
    strict = product(plan, torch.float32, tf32=False)
    yield Row("matrix product, float32", strict / 1e12, "TFLOP/s")
    yield Row("copy (read and written)", found.copy / 1e9, "GB/s")
    yield Row("one launch", found.launch * 1e6, "µs")


def on_gpu(plan: Plan, row: Row) -> Row:
    """The row, left out on a CPU."""
    return row if plan.cuda else missing(row.name, NEEDS_CUDA)


def memory_of(plan: Plan, step: Callable[[], object], peak: Peak) -> float:
    """Peak memory in GiB of a step and of what was made for it since `peak`; the first steps, whose
    kernels are chosen by trial, do not count.
    """
    for _ in range(2):
        step()
    peak.again()
    step()
    synchronise(plan.device)
    return peak.gib()


def steps(plan: Plan) -> Iterator[Row]:
    """A step of the paper preset against the published one."""
    own, small = plan.paper().model.backbone, "efficientnet_b0"
    chosen = [(own, True), (own, False), (small, True), (small, False)]
    for backbone, amp in dict.fromkeys(plan.pick(chosen[:2], chosen[:1] + chosen[2:], chosen)):
        config = plan.paper(f"model.backbone={backbone}", f"pretrain.amp={str(amp).lower()}")
        with cudnn(benchmark=True):
            yield from pair(plan, config, f"{backbone}, {'mixed' if amp else 'float32'}")


def pair(plan: Plan, config: Config, name: str) -> Iterator[Row]:
    """Time, memory, rate and share of both steps of one config."""
    torch.manual_seed(0)
    batch, works, memory = batch_of(config), {}, {}
    for kind in ("ours", "published"):
        peak = Peak(plan.device)
        works[kind] = partial(make(kind, config, plan.device), batch)
        memory[kind] = memory_of(plan, works[kind], peak)
    found = alternate(works, plan.device, plan.rounds, until=plan.until)
    yield ratio(f"{name}: published step, times ours", found, "ours", "published")
    note = f"ours {memory['ours']:.2f} GiB, published {memory['published']:.2f} GiB"
    yield on_gpu(
        plan,
        Row(
            f"{name}: memory, share of the published step's",
            memory["ours"] / memory["published"],
            "x",
            note=note,
        ),
    )
    seconds = medians(found)["ours"]
    yield Row(f"{name}: ours", config.pretrain.batch / seconds, "samples/s")
    yield share_row(plan, config, name, seconds)
    launches, busy = launched(plan, works["ours"])
    waiting = f"{launches * card(plan).launch / seconds:.0%} of the step at the card's launch time"
    yield profiled(plan, Row(f"{name}: launches of a step", launches, note=waiting))
    yield profiled(
        plan, Row(f"{name}: share of a step in which kernels run", min(1.0, busy / seconds))
    )


def profiled(plan: Plan, row: Row) -> Row:
    """The row, left out where the profiler saw no kernel."""
    if plan.cuda and not row.value:
        return missing(row.name, "the profiler sees no kernels here")
    return on_gpu(plan, row)


def share_row(plan: Plan, config: Config, name: str, seconds: float) -> Row:
    """Share of what the card's operations and bytes allow."""
    operations, moved = cost(plan, config)
    rates = card(plan)
    times = (operations / (rates.half if config.pretrain.amp else rates.single), moved / rates.copy)
    note = (
        f"{operations / 1e12:.3g} TFLOP take {1e3 * times[0]:.3g} ms at the card's rate,"
        f" {moved / 1e9:.3g} GB take {1e3 * times[1]:.3g} ms"
    )
    return Row(f"{name}: share of what the card allows", max(times) / seconds, note=note)


def cost(plan: Plan, config: Config) -> tuple[float, float]:
    """Operations and bytes of a step, see the top of this file."""
    run = start(config, World(0, 1, plan.device))
    student, crops = run.method.student, batch_of(config)["crops"].to(plan.device)
    counter, moved = FlopCounterMode(display=False), [0]

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        moved[0] += sum(t.nbytes for t in (*inputs, output) if isinstance(t, torch.Tensor))

    hooks = [layer.register_forward_hook(count) for layer in units(student)]
    with torch.no_grad(), optimise.autocast(plan.device, config.pretrain.amp), counter:
        student(crops)
    for hook in hooks:
        hook.remove()
    parameters = sum(parameter.nbytes for parameter in student.parameters())
    return (
        FORWARDS * counter.get_total_flops(),
        LAYER_PASSES * moved[0] + PARAMETER_PASSES * parameters,
    )


def units(module: nn.Module) -> Iterator[nn.Module]:
    """Layers that read and write maps: a norm with its activation is one, an identity none."""
    children = list(module.children())
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or not children:
        if not isinstance(module, nn.Identity):
            yield module
        return
    for child in children:
        yield from units(child)


def launched(plan: Plan, step: Callable[[], object]) -> tuple[int, float]:
    """Launches of a step, and seconds in which its kernels ran; zeros where the profiler sees
    none.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if plan.cuda else [])]
    with profile(activities=kinds) as seen:
        step()
        synchronise(plan.device)
    events = seen.events() or []
    kernels = [
        one
        for one in events
        if one.device_type == torch.autograd.DeviceType.CUDA and not one.name.startswith(RANGES)
    ]
    count = sum(LAUNCH.match(one.name) is not None for one in events)
    return count, sum(one.time_range.elapsed_us() for one in kernels) / 1e6


def batches(plan: Plan) -> Iterator[Row]:
    """Larger batches, until one does not fit."""
    with cudnn(benchmark=True):
        for size in plan.pick((2,), (4, 8, 16), (4, 8, 16, 32, 64)):
            config, peak = plan.paper(f"pretrain.batch={size}"), Peak(plan.device)
            name = f"batch {size}"
            try:
                step = partial(make("ours", config, plan.device), batch_of(config))
                memory = memory_of(plan, step, peak)
                times = alternate({"": step}, plan.device, plan.rounds, 0, plan.until)[""]
            except torch.cuda.OutOfMemoryError:
                yield missing(name, "out of memory")
                return
            rate = size / statistics.median(times)
            note = f"{spread(times)} a step" + (f", peak {memory:.2f} GiB" if plan.cuda else "")
            yield Row(name, rate, "samples/s", note=note)
            del step


def images(plan: Plan, count: int, side: int) -> torch.Tensor:
    """(count, 1, side, side) float in the order of memory that the pipeline uses."""
    drawn = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, device=plan.device)
    return standardise(drawn).contiguous(memory_format=torch.channels_last)


def backbone_steps(
    plan: Plan, config: Config, batch: torch.Tensor, order: Any
) -> Callable[[], None]:
    """Forward and backward pass of the backbone alone."""
    net = placed(create_backbone(config.model.backbone), plan.device).to(memory_format=order)
    batch = batch.contiguous(memory_format=order)

    def step() -> None:
        with optimise.autocast(plan.device, True):
            maps = net(batch)
        maps.float().mean().backward()
        net.zero_grad(set_to_none=True)

    return step


def memory_order(plan: Plan) -> Iterator[Row]:
    """Channels first against channels last, the backbone alone on a batch of crops."""
    config = plan.paper()
    options = config.pretrain
    side, count = (
        options.image_size // options.grid,
        batch_of(config)["crops"][:, :, :, 0, 0].numel(),
    )
    batch = images(plan, count, side)
    works = {
        "channels last": backbone_steps(plan, config, batch, torch.channels_last),
        "channels first": backbone_steps(plan, config, batch, torch.contiguous_format),
    }
    with cudnn(benchmark=True):
        found = alternate(works, plan.device, plan.rounds, 3, plan.until)
    yield ratio("channels first, times channels last", found, *works)


def compilation(plan: Plan) -> Iterator[Row]:
    """A step with `pretrain.compile` off, on, and with CUDA graphs."""
    if why := lacks_compiler(plan.device):
        yield missing("compile", why)
        return
    torch._dynamo.reset()
    works, took = {}, {}
    with cudnn(benchmark=True), compiling(plan):
        for name, override in COMPILED.items():
            config = plan.paper(f"pretrain.compile={override}")
            works[name] = partial(make("ours", config, plan.device), batch_of(config))
            took[name] = seconds_of(works[name], plan.device)
        found = alternate(
            works, plan.device, plan.rounds, 3, plan.until
        )  # graphs: the third is one
        launches = {name: launched(plan, work)[0] for name, work in works.items()}
    for name in list(COMPILED)[1:]:
        yield ratio(f"not compiled, times {name}", found, name, "not compiled")
        yield Row(f"{name}: the first step", took[name], "s")
    for name, count in launches.items():
        yield profiled(plan, Row(f"{name}: launches of a step", count))


def waiting(plan: Plan) -> Iterator[Row]:
    """The training loop itself on drawn volumes for some seconds: what of a step waits for data."""
    config = plan.paper("pretrain.log_every=1", "pretrain.steps=100000")
    seconds, folder = plan.pick(0.5, 8, 20), plan.folder / layout.VOCO
    with cudnn(benchmark=True), stopping(after(seconds + plan.pick(0, 8, 8))):
        pretrain(config, plan.volumes(config), folder, World(0, 1, plan.device))
    records = read_log(folder / layout.LOG)
    records = records[len(records) // 3 :]  # without the start of workers and the choice of kernels
    shares = sorted(record["waiting"] for record in records)
    note = f"{len(records)} steps, worst {shares[-1]:.1%}"
    yield Row("waiting for data", 100 * sum(shares) / len(shares), "% of a step", note=note)
    rate = statistics.median(record["samples_per_s"] for record in records)
    yield Row("the loop", rate, "samples/s")


def folds(plan: Plan) -> Iterator[Row]:
    """Training of a fold against the backbone alone on as many slices."""
    config = plan.paper("train.epochs=2000", "train.eval_every=2000")
    options, data = config.train, plan.fold_data(config)
    trainer = FoldTrainer(config, data, plan.folder, plan.device, None)
    batch = images(plan, options.batch * options.slices, options.image_size)
    step = backbone_steps(plan, config, batch, torch.channels_last)
    for benchmark in (False, True):
        with cudnn(benchmark=benchmark):
            rows = epochs(trainer, plan.pick(0.0, 8.0, 20.0))
            alone = alternate({"": step}, plan.device, 2 * plan.rounds, 2, plan.until)[""]
        rate, wait = (
            statistics.median(row[key] for row in rows) for key in ("slices_per_s", "waiting")
        )
        images_per_s = len(batch) / statistics.median(alone)
        name = f"fold, cuDNN benchmark {'on' if benchmark else 'off'}"
        note = f"{rate:.4g} slices/s, backbone alone {images_per_s:.4g} images/s"
        yield Row(f"{name}: rate, of that of the backbone alone", rate / images_per_s, note=note)
        yield Row(f"{name}: waiting for data", 100 * wait, "% of a step")


def epochs(trainer: FoldTrainer, seconds: float) -> list[dict[str, Any]]:
    """Log rows of epochs that take `seconds`, without the first third: until then there are batches
    that were made ahead.
    """
    rows, end = [], time.monotonic() + seconds
    while len(rows) < 2 or time.monotonic() < end:
        rows.append(trainer.train_epoch())
        trainer.epoch += 1
    return rows[len(rows) // 3 :]


def prediction(plan: Plan) -> Iterator[Row]:
    """Stage 08's models on a volume against their backbones alone."""
    config = plan.paper()
    options = config.train
    models = [placed(build_model(config), plan.device).eval() for _ in range(config.folds.count)]
    volume = np.load(plan.volumes(config) / "p0_0.npy")
    batch = images(plan, options.slices, options.image_size)

    @torch.inference_mode()
    def alone() -> None:
        with optimise.autocast(plan.device, options.amp):
            for model in models:
                model.backbone(batch)

    with ThreadPoolExecutor(1) as threads:
        ensemble = Ensemble(models, options, config.volume, plan.device, threads)
        works = {"stage 08": partial(ensemble.series, volume, ()), "backbones alone": alone}
        for benchmark in (False, True):
            with cudnn(benchmark=benchmark):
                found = alternate(works, plan.device, 2 * plan.rounds, 2, plan.until)
            rate = len(models) * options.slices / medians(found)["stage 08"]
            name = f"prediction, cuDNN benchmark {'on' if benchmark else 'off'}"
            row = ratio(f"{name}: rate, of that of the backbones alone", found, *works)
            yield Row(row.name, row.value, note=f"{rate:.4g} slices/s; {row.note}")


def three_d(plan: Plan) -> Iterator[Row]:
    """2D-VoCo against the 3D method on one volume."""
    if not plan.cuda or find_spec("monai") is None:
        why = NEEDS_CUDA if not plan.cuda else "needs MONAI (the extra bench)"
        yield missing("3D, times 2D", why)
        return
    from voco_2d_3d import ENCODERS, TITLES, measure

    with cudnn(benchmark=True):
        flat = measure("2D", plan.device, plan.rounds)
        for kind in ENCODERS:
            gc.collect()
            torch.cuda.empty_cache()
            deep = measure(kind, plan.device, plan.pick(1, 3, 7))
            for name, title in TITLES.items():
                own, other, row = (
                    getattr(flat, name),
                    getattr(deep, name),
                    f"{kind}, times 2D: {title}",
                )
                if own is None:
                    yield missing(row, Energy(plan.device).missing)
                else:
                    yield Row(row, other / own, "x", note=f"3D {other:.3g}, 2D {own:.3g}")


def checkpoints(plan: Plan) -> Iterator[Row]:
    """The checkpoint of a pretraining: size, and how long training stands still for it."""
    config = plan.paper()
    run = start(config, World(0, 1, plan.device))
    train_step(run, batch_of(config))  # from then on the optimiser has states
    path = plan.folder / "measured.ckpt"
    found = alternate(
        {"": lambda: save_checkpoint(path, run.state())}, plan.device, plan.pick(1, 3, 5)
    )
    yield Row("checkpoint", path.stat().st_size / 1e6, "MB")
    yield Row(
        "checkpoint: time to write",
        statistics.median(found[""]),
        "s",
        note=spread(found[""], 1, "s"),
    )
    path.unlink()
