"""What the timings in `tests/benchmarks/` stand on: that both sides do the same work, that
energy and memory are read as they are, and that the commands run.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import voco_2d_3d
import voco_against
import voco_data
import voco_settings
import voco_step
from common import Energy
from helpers_pretrain import volumes_of
from torch import nn
from voco_2d_3d import CROPS, crops_within, repeated

from pipeline.learning import optimise
from pipeline.run.presets import load_config
from pipeline.voco.data import VocoSamples
from pipeline.voco.model import Embeddings, voco_terms

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# tiny networks lose by threads what they gain
ONE_THREAD = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parents[1]), "OMP_NUM_THREADS": "1"}
TINY = (
    "model.backbone=test_efficientnet",
    *("pretrain.width=16", "pretrain.slices=2", "pretrain.image_size=96"),
)


def package(powercap: Path, zone: str, name: str, used: int, span: int = 1_000_000) -> None:
    """A RAPL zone, microjoules."""
    folder = powercap / f"intel-rapl:{zone}"
    folder.mkdir(exist_ok=True)
    for file, value in (("name", name), ("energy_uj", used), ("max_energy_range_uj", span)):
        (folder / file).write_text(f"{value}\n")


def test_energy_is_that_of_all_packages_also_where_a_counter_starts_again(tmp_path):
    package(tmp_path, "0", "package-0", 100_000)
    package(tmp_path, "0:0", "core", 5)  # part of the package
    package(tmp_path, "1", "package-1", 900_000)
    package(tmp_path, "2", "psys", 7)  # the whole machine, packages included
    energy = Energy(CPU, tmp_path)
    package(tmp_path, "0", "package-0", 350_000)
    package(tmp_path, "0:0", "core", 500)
    package(tmp_path, "1", "package-1", 50_000)
    package(tmp_path, "2", "psys", 700_000)
    assert energy.missing == ""
    assert energy.joules() == pytest.approx(0.25 + 0.15)


def test_energy_that_cannot_be_read_says_why(tmp_path):
    assert "no energy counters" in Energy(CPU, tmp_path).missing
    package(tmp_path, "0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    energy = Energy(CPU, tmp_path)
    assert "energy_uj" in energy.missing
    assert energy.joules() is None


@pytest.mark.parametrize(
    ("five", "ten", "most", "crops"),
    [
        (5.0, 9.0, 17.0, CROPS),  # 5, 9, 13 and 17 GiB
        (5.0, 9.0, 16.9, 15),
        (5.0, 9.0, 9.0, 10),
        (5.0, 9.0, 8.0, 5),
        (5.0, 9.0, 1.0, 5),
        (5.0, 5.0, 5.0, CROPS),
    ],
)
def test_a_3d_step_takes_the_crops_that_memory_is_free_for(five, ten, most, crops):
    assert crops_within(five, ten, most) == crops


def test_what_is_repeated_counts_neither_its_first_call_nor_that_ones_energy(monkeypatch):
    calls = []

    class Meter:
        def __init__(self, device):
            self.before = len(calls)

        def joules(self):
            return 12.0 * (len(calls) - self.before)

    monkeypatch.setattr(voco_2d_3d, "LEAST_S", 0.0)
    monkeypatch.setattr(voco_2d_3d, "Energy", Meter)
    seconds, joules = repeated(lambda: calls.append(1), CPU, 3)
    assert len(calls) == 4
    assert joules == 12.0
    assert 0 < seconds < 1


class Small(nn.Module):
    """In place of MONAI's encoders."""

    width = 4

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Conv3d(1, 4, 8, 8), []

    def forward(self, x):
        self.seen.append(len(x))
        return self.layer(x).mean((2, 3, 4))


@pytest.fixture
def small(monkeypatch):
    """The 3D methods with a small encoder; those that were made."""
    made = []

    def make():
        made.append(Small())
        return made[-1]

    make.width = Small.width
    monkeypatch.setattr(voco_2d_3d, "ENCODERS", {"3D small": make})
    return made


@pytest.mark.slow
def test_a_3d_step_trains_and_its_cost_is_scaled_to_all_crops(small, monkeypatch):
    took = iter([(1.0, 3.0), (0.5, None)])

    def called(work, device, rounds):
        work()
        return next(took)

    monkeypatch.setattr(voco_2d_3d, "repeated", called)
    cost = voco_2d_3d.measure("3D small", CPU, 1, 5)
    assert (cost.step, cost.step_j, cost.latency, cost.latency_j) == (4.0, 12.0, 0.5, None)
    assert cost.memory > 0
    student, encoder = small
    assert student.seen == [5]
    assert encoder.seen == [2] * (voco_2d_3d.TILES // 2)  # every tile of the volume
    torch.manual_seed(0)
    step = voco_2d_3d.step_3d("3D small", CPU, 10)
    before = small[-1].layer.weight.clone()
    step()
    assert not torch.equal(small[-1].layer.weight, before)
    assert voco_2d_3d.fitting("3D small", CPU) in range(5, CROPS + 1, 5)


@pytest.mark.parametrize("joules", [None, 7.0])
def test_the_3d_table_says_what_it_was_measured_from(small, monkeypatch, joules):
    """All crops but where memory has no room, energy where it can be read."""
    asked = []
    costs = {"3D small": (8.0, 4.0, 3.0), "2D": (2.0, 0.5, 1.5)}

    def answer(kind, *flags):
        asked.append((kind, *flags))
        if flags == ("--fit",):
            return 15
        step, memory, latency = costs[kind]
        return vars(voco_2d_3d.Cost(step, memory, latency, joules, joules))

    monkeypatch.setattr(voco_2d_3d, "in_process", answer)
    lines = list(voco_2d_3d.table(CPU, None))
    assert asked == [("3D small", "--fit"), ("3D small", "--crops", "15"), ("2D", "--crops", "20")]
    assert lines[0].endswith("3D small from 15 of 20 crops")
    assert lines[1].startswith("energy left out: ") == (joules is None)
    energy = " 7.00 | 7.00 |" if joules else ""
    assert lines[-3] == "| 3D small | 8.00 | 4.00 | 3.00 |" + energy
    assert lines[-1] == "| 3D small over 2D | 4.0 x | 8.0 x | 2.0 x |" + energy.replace(
        "7.00", "1.0 x"
    )
    assert list(voco_2d_3d.table(CPU, 5))[0].endswith("3D small from 5 of 20 crops")


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_the_published_step_computes_in_the_precision_that_it_is_compared_in(monkeypatch, half):
    monkeypatch.setattr(optimise, "amp_dtype", lambda device: half)
    configs = voco_step.by_precision(CPU, TINY)
    assert list(configs) == (["float32", "mixed"] if half else ["float32"])
    seen = []
    for config in configs.values():
        torch.manual_seed(0)
        step, batch = voco_step.make("published", config, CPU), voco_step.batch_of(config)
        step.student[1].register_forward_hook(lambda *given: seen.append(given[-1].dtype))
        assert np.isfinite(step(batch))
    # random crops, then base crops
    assert seen == [torch.float32] * 2 + ([half] * 2 if half else [])


def test_the_published_loss_is_the_one_that_ours_computes():
    torch.manual_seed(0)
    config = voco_step.by_precision(CPU, (*TINY, "pretrain.batch=3"))["float32"]
    options = config.pretrain
    R, K = options.random_crops, options.grid**2
    student, teacher = torch.randn(2, 3, 1, R + K, 8).unbind()
    overlap = voco_step.batch_of(config)["overlap"]
    theirs = voco_step.PublishedStep(config, CPU).loss(
        [student[:, 0, :R], student[:, 0, R:]], [teacher[:, 0, :R], teacher[:, 0, R:]], overlap
    )
    parts = [Embeddings.split(one, R, 1) for one in (student, teacher)]
    terms = voco_terms(*parts, overlap, *(part.base.roll(-1, 0) for part in parts))
    ours = sum(
        getattr(options, weight) * terms[name]
        for weight, name in (("intra", "intra"), ("inter", "inter"), ("regularisation", "reg"))
    )
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.slow
def test_the_steps_are_compared_float32_with_float32_and_mixed_with_mixed():
    call = [sys.executable, str(BENCHMARKS / "voco_step.py"), "--rounds", "1", *TINY]
    done = subprocess.run(call, env=ONE_THREAD, capture_output=True, text=True, check=True)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    steps = {
        tuple(cells[:2]): cells[2:] for cells in lines if cells[:1] in (["published"], ["ours"])
    }
    precisions = ["float32", "mixed"] if optimise.amp_dtype(CPU) else ["float32"]
    assert list(steps) == [(kind, one) for one in precisions for kind in ("published", "ours")]
    assert all(float(cell) > 0 for cells in steps.values() for cell in cells)
    pairs = dict.fromkeys([(one, one) for one in precisions] + [("float32", precisions[-1])])
    found = {tuple(c[:2]): c[2:] for c in lines if len(c) == 4 and tuple(c[:2]) in pairs}
    assert found.keys() == pairs.keys()
    for (theirs, own), (time, memory) in found.items():
        other, us = steps["published", theirs], steps["ours", own]
        assert float(time.split()[0]) == pytest.approx(float(other[0]) / float(us[0]), rel=0.1)
        assert float(memory) == pytest.approx(float(us[2]) / float(other[2]), abs=0.02)


@pytest.mark.parametrize(("most", "code"), [(1.15, 1), (1.25, 0)])
def test_a_step_that_takes_longer_than_anothers_fails(monkeypatch, capsys, most, code):
    """By the median of the ratios, here 1.2, without the first step."""
    here, there = [9.0, 1.2, 2.4, 8.0, 1.0], [1.0, 1.0, 2.0, 1.0, 1.0]
    answers = iter([(one, 0.5) for pair in zip(here, there, strict=True) for one in pair])
    monkeypatch.setattr(voco_against, "start", lambda root, overrides: root)
    monkeypatch.setattr(voco_against, "ask", lambda process, seed: next(answers))
    assert voco_against.compare(Path("other"), 5, most, ()) == code
    assert capsys.readouterr().out.splitlines()[-1] == "| 1.800 | 1.000 | 1.200 |"


@pytest.mark.slow
def test_steps_of_two_checkouts_stand_side_by_side():
    """Here both are this one: the same losses of different crops."""
    command, root = (
        [sys.executable, str(BENCHMARKS / "voco_against.py")],
        str(BENCHMARKS.parents[1]),
    )
    call = [*command, root, "--steps", "3", "--most", "1000", *TINY]
    done = subprocess.run(call, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    losses = [cells[1:] for cells in lines if cells and cells[0].strip().isdigit()]
    assert all(here == there for here, there in losses)
    assert len({here for here, _ in losses}) == 3


def test_a_folder_that_is_no_checkout_is_told_of(tmp_path):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no checkout"):
        voco_against.start(tmp_path, ())


def test_monais_samples_are_the_same_crops_whether_kept_or_not(tmp_path):
    """As many voxels as ours, and as the scan itself has there."""
    pytest.importorskip("monai")
    config = load_config("paper", TINY)
    voco_data.write_volumes(tmp_path, config, 8)
    datasets = voco_data.monai_datasets(tmp_path / "volume.nii.gz", tmp_path / "cache", config)
    made, kept = datasets.values()
    for _ in range(2):  # the second time from the cache
        one, other = (voco_data.monai_sample(each, config, 3) for each in (made, kept))
        assert torch.equal(one, other)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    samples = VocoSamples(tmp_path, ["volume.npy"], config.pretrain, config.seed)
    ours = samples.sample(0, [3, 0, 0], augment=False)["crops"]
    assert ours.size == one.numel()
    image = made[0]["image"][0].numpy()
    side = config.pretrain.image_size // config.pretrain.grid
    assert np.array_equal(one[-1, 0].numpy(), image[-side:, -side:])


def test_settings_are_timed_in_turn_and_stand_beside_the_first(tmp_path, monkeypatch, capsys):
    folder, base = volumes_of(tmp_path), "pretrain.batch=2 model.backbone=test_resnet"
    settings = [base, f"{base} pretrain.random_crops=3"]
    command = ["voco_settings.py", str(folder), *settings, "--config", "smoke", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    voco_settings.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| `{setting}`" for setting in settings]
    assert rows[0][2] == "1.00 |"
    seconds = [float(row[1]) for row in rows]
    assert float(rows[1][2].split()[0]) == pytest.approx(seconds[1] / seconds[0], rel=0.03)
