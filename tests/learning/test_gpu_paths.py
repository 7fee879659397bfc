"""What the GPU paths do differently, shown on a CPU: nothing waits for the device, and the numbers
stay those of the plain way.
"""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pipeline.classifier.sequence import sequence_model
from pipeline.learning import optimise
from pipeline.learning.backbone import create_backbone
from pipeline.learning.distributed import PeerLost, World
from pipeline.run.config import TrainConfig
from pipeline.system import machine

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


def test_the_backbone_is_one_graph_to_the_compiler():
    """Its counters of batches once broke it at every norm, with torch 2.4."""
    backbone = create_backbone(BACKBONE, size=32)
    plain, x = copy.deepcopy(backbone), torch.randn(2, 1, 32, 32)
    counters.clear()
    compiled = torch.compile(backbone, backend="aot_eager")
    compiled(x).sum().backward()
    expected = plain(x)
    expected.sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    for (name, one), (_, other) in zip(
        plain.state_dict().items(), backbone.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(other, one, msg=name)
    for (name, one), (_, other) in zip(
        plain.named_parameters(), backbone.named_parameters(), strict=True
    ):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3, msg=name)


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
