"""Two real gloo processes against one: DDP and FSDP2, local and gathered. A `mutation` was tried and fails the test."""

import importlib.util
from pathlib import Path

import pytest
import torch
import warm
from nets import seen
from torch import nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import Dispersive
from dispersive_kit.regularizers.attach import all_gather

WORKER = Path(__file__).with_name("worker.py")
spec = importlib.util.spec_from_file_location("regularizers_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    warm.run(WORKER, folder, processes=2)
    return torch.load(folder / "results.pt", weights_only=True)


def one_process(rows=slice(None)):
    model = worker.make_model()
    return worker.backward(model, Dispersive(model, **worker.OPTIONS), rows)


def relative(got, want):
    assert set(got) == set(want)
    difference = torch.stack([(got[name] - want[name]).norm() for name in want]).norm()
    return (difference / torch.stack([g.norm() for g in want.values()]).norm()).item()


@pytest.mark.parametrize(
    "how", ["ddp gather=True", "ddp attached to the wrapper", "fsdp hook before", "fsdp hook after"]
)
def test_gathered_processes_equal_one(two, how):
    # mutation: `AllGather.backward` without all_reduce (own slot only): the regulariser's part is halved
    assert relative(two[how], one_process()) < 1e-5


def test_local_processes_average_their_own_losses(two):
    # mutation: gather=True by default
    halves = [one_process(slice(0, 3)), one_process(slice(3, 6))]
    mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    assert relative(two["ddp gather=False"], mean) < 1e-5
    assert relative(two["ddp gather=False"], one_process()) > 1e-3


def test_the_dispersion_batch_is_logged(two):
    assert (two["batch gather=False"], two["batch gather=True"]) == (3, 6)


def test_features_that_differ_between_processes_are_refused_in_every_process(two):
    assert "blocks.1" in two["uneven"] and "drop_last" in two["uneven"]
    for how in ("shapes", "axes", "dtypes"):
        assert "all need one shape and dtype" in two[how]


def test_gather_outside_a_process_group_raises():
    with pytest.raises(DispersiveError, match="init_process_group"):
        all_gather(torch.zeros(2, 3))
    reg = Dispersive(nn.Sequential(nn.Linear(3, 3)), "0", gather=True)
    seen(reg, torch.zeros(2, 3))
    with pytest.raises(DispersiveError, match=r"tap '0'.*init_process_group"):
        reg.loss()
