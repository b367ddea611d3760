"""The plug-in where it is used: compiled, in bf16, checkpointed, on two devices; against float64. Needs torch alone."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dispersive_kit.diffusion.objectives import Draws, FlowMatching, MeanFlow
from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import Dispersive, dispersive_loss
from dispersive_kit.regularizers.losses import KINDS

sys.path.insert(0, str(Path(__file__).parents[1]))

from nets import features, gradient, small_dit, value_and_gradient

X, Y = features(8, 4, 8, 8).detach(), torch.arange(8) % 3
ALONE = os.environ.get("GPU_TESTS") != "cpu" and torch.cuda.device_count() < 2


def batch(objective, device, dtype=torch.float32, rows=slice(None)):
    """The same data and draws wherever they are computed with."""
    draws = vars(objective.draw(X, torch.Generator().manual_seed(2))).items()
    moved = {k: None if v is None else v[rows].to(device, dtype) for k, v in draws}
    return X[rows].to(device, dtype), Y[rows].to(device), Draws(**moved)


def finish(loss, model):
    """The loss, and the gradient of all parameters in float64 on the CPU."""
    loss.backward()
    return loss.item(), gradient(model).double().cpu()


def step(model, reg, objective, device, *, call=None, taps=(), half=False, rows=slice(None)):
    x, y, draws = batch(objective, device, rows=rows)
    model.zero_grad()
    cast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)
    with cast, contextlib.nullcontext() if taps else reg:
        loss, aux = objective(model if call is None else call, x, y, draws=draws, taps=taps)
    return finish(loss + reg.loss(t=aux.t, y=y, taps=aux.taps or None), model)


def exact(objective, **overrides):
    """By hand, in float64 on the CPU."""
    model = small_dit(num_classes=3, **overrides).double()
    x, y, draws = batch(objective, "cpu", torch.float64)
    loss, aux = objective(model, x, y, draws=draws, taps=(0,))
    return finish(loss + 0.5 * dispersive_loss(aux.taps[0], tau=0.5), model)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "way", ["eager", "whole", "blocks", "checkpoint", "checkpoint, blocks", "checkpoint, fullgraph", "meanflow"]
)
def test_loss_and_gradient_in_every_way_of_running_a_model(way, half, device):
    objective, options = (MeanFlow(), {"interval": True}) if way == "meanflow" else (FlowMatching(), {})
    model = small_dit(num_classes=3, checkpointing="checkpoint" in way, **options).to(device)
    reg = Dispersive(model, "blocks.0", tau=0.5)
    call = torch.compile(model, fullgraph="fullgraph" in way) if way.endswith(("whole", "fullgraph")) else model
    for block in model.blocks if "blocks" in way else ():
        block.compile()
    taps = (0,) if way.endswith(("fullgraph", "meanflow")) else ()  # a hook would be a side effect in these
    loss, slope = exact(objective, **options)
    for _ in range(2):  # the second time from what was compiled
        got = step(model, reg, objective, device, call=call, taps=taps, half=half)
        rtol = 5e-2 if half else 1e-3 if way == "meanflow" else 1e-4
        assert abs(got[0] - loss) <= rtol * abs(loss)
        assert (got[1] - slope).norm() <= rtol * slope.norm(), (got[1] - slope).norm() / slope.norm()


def test_no_step_waits_for_the_device(device):
    model = small_dit(num_classes=3).to(device)
    reg, (x, y, draws) = Dispersive(model, "blocks.0", t_window=0.5), batch(FlowMatching(), device)
    mode = torch.cuda.set_sync_debug_mode if device == "cuda" else lambda mode: None
    try:
        for waits in ("default", "error", "error", "error"):  # the first one loads kernels
            mode(waits)
            with reg:
                loss, aux = FlowMatching()(model, x, y, draws=draws)
            (loss + reg.loss(t=aux.t, y=y)).backward()
    finally:
        mode("default")
    assert reg.stats.gap > 0


def test_nan_is_noticed_a_step_late_at_most(device):
    model = small_dit(num_classes=3).to(device)
    reg, (x, y, draws) = Dispersive(model, "blocks.0"), batch(FlowMatching(), device)
    with pytest.raises(DispersiveError, match=r"blocks\.0.*NaN"):
        for _ in range(2):
            with reg:
                model(x * float("nan"), draws.t, y)
            reg.loss()
            torch.accelerator.synchronize() if device == "cuda" else None


@pytest.mark.parametrize("shape", [(64, 4096), (4200, 16)], ids=["one Gram matrix", "blocks of rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_float64(kind, dtype, shape, device):
    """TF32 is allowed, and it is inside autocast: neither may reach the distances."""
    z = (1 + features(*shape)).to(dtype).detach()
    exact, own = z.double().requires_grad_(), z.to(device).requires_grad_()
    value, slope = value_and_gradient(dispersive_loss(exact, kind=kind), exact)
    torch.set_float32_matmul_precision("high")
    with torch.autocast(device, torch.bfloat16):
        got, gradient = (part.cpu() for part in value_and_gradient(dispersive_loss(own, kind=kind), own))
    assert abs(got - value) <= 1e-5 * max(abs(value), 1)
    assert (gradient - slope).norm() <= (1e-4 if dtype == torch.float32 else 5e-3) * slope.norm()


@pytest.mark.skipif(ALONE, reason="one GPU alone")
def test_two_processes_with_gather_are_one(device, tmp_path):
    workers = [subprocess.Popen([sys.executable, __file__, device, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    gathered, local = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = small_dit(num_classes=3).to(device)
    _, one = step(model, Dispersive(model, "blocks.0"), FlowMatching(), device)
    assert (gathered - one).norm() <= 1e-4 * one.norm()
    assert (local - one).norm() > 1e-3 * one.norm()


def work(kind, rank, folder):
    """One of the two processes: half the batch, on a GPU of its own."""
    backend, device = ("nccl", f"cuda:{rank}") if kind == "cuda" else ("gloo", "cpu")
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for gather in (True, False):
        model = small_dit(num_classes=3).to(device)
        reg, network = Dispersive(model, "blocks.0", gather=gather), DistributedDataParallel(model)
        found.append(step(model, reg, FlowMatching(), device, call=network, rows=slice(4 * rank, 4 * rank + 4))[1])
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
