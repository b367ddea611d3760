"""The numbers beside the loss: right, and free until read."""

import math

import pytest
import torch
from nets import features, seen
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import KINDS, Dispersive, depth_use, dispersive_loss, floor
from dispersive_kit.training import load_run, train, train_preset


class Operations(TorchDispatchMode):
    """Counts the tensor operations in its block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def measured(z, **options):
    """A `Dispersive` that has seen z as the output of a module."""
    reg = Dispersive(nn.Sequential(nn.Identity()), "0", **options)
    seen(reg, z.requires_grad_())
    reg.loss()
    return reg


def test_stats_do_nothing_until_the_first_number_is_read_and_then_everything_once():
    reg = measured(features(6, 4))
    with Operations() as operations:
        stats = reg.stats
        assert operations.count == 0
        assert stats.gap >= 0
        first = operations.count
        assert stats.read() and stats.loss == stats.read()["loss"]
        assert 0 < first == operations.count


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_what_they_say(kind, diagonal):
    z = features(7, 5, 2)
    reg = measured(z, kind=kind, diagonal=diagonal, weight=0.3)
    numbers = reg.stats.read()
    assert numbers["loss"] == pytest.approx(dispersive_loss(z, kind=kind, diagonal=diagonal).item())
    assert numbers["floor"] == pytest.approx(floor(kind, 7, diagonal=diagonal, dim=10))
    assert not any(t.requires_grad for record in reg._records for t in (record.vitals, record.gram))
    assert numbers["gap"] == pytest.approx(numbers["loss"] - numbers["floor"])
    assert numbers["feature_rms"] == pytest.approx(z.square().mean().sqrt().item())
    assert (numbers["batch_size"], numbers["weight"]) == (7, 0.3)
    if kind not in ("covariance", "vicreg"):
        assert numbers["pairs"] == (49 if diagonal else 42)


def test_off_diagonal_mass_is_the_share_of_the_softmax():
    z = features(7, 10).detach()
    p = torch.softmax(-(torch.cdist(z, z).square() / 10 / 0.5).flatten(), 0).view(7, 7)
    assert measured(z).stats.off_diagonal_mass == pytest.approx(1 - p.diagonal().sum().item())


def test_the_dispersion_batch_counts_images_and_pairs_count_rows():
    stats = measured(features(4, 3, 5), pool="tokens").stats
    assert (stats.batch_size, stats.pairs) == (4, 144) and stats.floor == pytest.approx(-math.log(12))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_effective_rank_of_equal_directions_is_their_number(rank):
    q, _ = torch.linalg.qr(torch.cat([torch.ones(12, 1, dtype=torch.float64), features(12, rank).detach()], 1))
    rows = q[:, 1:]  # centred, orthonormal
    assert measured(rows.clone()).stats.effective_rank == pytest.approx(rank, rel=1e-6)
    mixed = rows @ features(rank, 30, seed=1).detach()
    p = torch.linalg.svdvals(mixed)
    entropy = torch.special.entr(p / p.sum()).sum().item()
    assert measured(mixed).stats.effective_rank == pytest.approx(math.exp(entropy), rel=1e-5)


def test_many_rows_keep_a_corner_of_the_gram_matrix_which_is_centred_again():
    z = torch.zeros(4160, 4)  # in several blocks
    z[:, :3], z[1024:, 3] = torch.randn(4160, 3), 200.0
    stats = measured(z).stats
    assert stats._records[0].gram.shape == (1024, 1024) and stats.effective_rank == pytest.approx(3, abs=0.1)


def test_stats_before_the_first_loss_raise():
    with pytest.raises(DispersiveError, match="statistics of 0 yet: call loss"):
        Dispersive(nn.Sequential(nn.Linear(2, 2)), "0").stats  # noqa: B018
    with pytest.raises(AttributeError, match="entropy"):
        measured(features(4, 3)).stats.entropy  # noqa: B018


# ---- how much each block does


class Scaling(nn.Module):
    """A residual block whose update is `share` of its stream; `form` is how it takes and gives the stream."""

    def __init__(self, share, form):
        super().__init__()
        self.share, self.form = nn.Parameter(torch.tensor(share)), form

    def forward(self, x=None, *, hidden_states=None):
        x = (x if hidden_states is None else hidden_states) * (1 + self.share)
        return x if self.form == "tensor" else (x, None)


class Stack(nn.Module):
    def __init__(self, form="tensor", name="blocks", make=nn.ModuleList):
        super().__init__()
        self.form, self.name = form, name
        setattr(self, name, make([Scaling(share, form) for share in (3.0, -0.5, 0.25)]))

    def forward(self, x):
        for block in getattr(self, self.name):
            x = block(hidden_states=x) if self.form == "keyword" else block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


@pytest.mark.parametrize("form", ["tensor", "tuple", "keyword"])
@pytest.mark.parametrize(("name", "at", "make"), [("blocks", None, nn.ModuleList), ("layers", "layers", nn.Sequential)])
@pytest.mark.parametrize("how", ["eager", "block by block", "whole"])
def test_depth_use_is_the_share_of_each_update_and_leaves_no_hook(form, name, at, make, how):
    model = Stack(form, name, lambda blocks: make(blocks) if make is nn.ModuleList else make(*blocks))
    call = torch.compile(model, backend="eager") if how == "whole" else model
    for block in getattr(model, name) if how == "block by block" else ():
        block.compile(backend="eager")
    x = torch.randn(4, 5)
    with torch.no_grad():
        call(x)  # compiled before it is measured, just so
        with depth_use(model, at) as use:
            call(2 * x.bfloat16())
            call(x)
    assert {path: round(float(value), 5) for path, value in use.items()} == {
        f"{name}.{i}": share for i, share in enumerate((3.0, 0.5, 0.25))
    }
    assert not any(m._forward_hooks for m in model.modules())


class Adding(nn.Module):
    def forward(self, x):
        x += 2 * x
        return x + x


def test_depth_use_of_a_block_that_changes_its_input_is_of_what_it_was():
    model = nn.ModuleDict({"blocks": nn.Sequential(Adding(), nn.Identity())})
    with torch.no_grad(), depth_use(model) as use:
        model["blocks"](torch.ones(2, 3))
    assert list(map(float, use.values())) == [5, 0]


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + self.calls)


def test_depth_use_of_a_module_at_two_places_is_of_each_call():
    shared = Growing()
    model = nn.ModuleDict({"blocks": nn.Sequential(shared, nn.Identity(), shared)})
    with torch.no_grad(), depth_use(model) as use:
        model["blocks"](torch.ones(2, 3))
    assert {path: float(value) for path, value in use.items()} == {"blocks.0": 1, "blocks.1": 0, "blocks.2": 2}
    with pytest.raises(DispersiveError, match=r"blocks\.2: the block was not called"), depth_use(model):
        model["blocks"][:2](torch.ones(2, 3))


def test_depth_use_that_cannot_be_had_is_refused():
    changing = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))})
    for model, call, at, words in (
        (Stack(), lambda m: None, None, r"blocks\.0, blocks\.1, blocks\.2: the block was not called"),
        (changing, lambda m: m["blocks"](torch.randn(2, 4)), None, r"^blocks\.1: .*another shape"),
        (Stack(), lambda m: None, "layers", "0 lists named 'layers'"),
    ):
        with pytest.raises(DispersiveError, match=words), depth_use(model, at):
            call(model)
        with pytest.raises(ZeroDivisionError), depth_use(model, None):  # an error inside is not hidden by another
            raise ZeroDivisionError
        assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "first", "others"), [("digits-base", (0.3, 0.7), 0.2), ("digits-paper", (6, 20), 0.05)]
)
def test_the_shipped_runs_show_who_holds_the_stream(name, first, others):
    model, x = load_run(name)[0], torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), depth_use(model) as use:
        model(x, torch.full((64,), 0.9), torch.full((64,), 10))
    one, *later = map(float, use.values())
    assert first[0] < one < first[1] and all(others < value < 0.6 for value in later)


def test_training_logs_depth_use_of_its_average_at_logged_steps_alone(tmp_path):
    config = train_preset("smoke").changed(steps=4, log_every=2, objective="meanflow", preview_images=0)
    records = [record.values for record in train(config, tmp_path / "run")]
    blocks = [f"depth_use_{i}" for i in range(4)]
    for values in records[0::2]:
        assert values == {}
    for values in records[1::2]:
        assert all(values[name] > 0 for name in blocks) and "depth_use_4" not in values
