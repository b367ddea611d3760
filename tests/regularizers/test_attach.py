"""Where it attaches, what it reads, how it is weighed. A `mutation` was tried and fails the test."""

import copy
import warnings

import pytest
import torch
from torch import nn

from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.errors import DispersiveError
from dispersive_kit.models import MLP, build_dit
from dispersive_kit.regularizers import Dispersive, Schedule, dispersive_loss

X = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.1, 0.9, 6)


def make_model(**overrides):
    model = build_dit("DiT-T/4", input_size=8, depth=2, num_classes=0, **overrides)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:  # the published initialisation makes every block the identity
            nn.init.normal_(p, std=0.05, generator=generator)
    return model.train()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(model, reg, call=None, **labels):
    model.zero_grad()
    with reg:
        out = (model if call is None else call)(X, T)
    loss = reg.loss(**labels)
    (out.square().mean() + loss).backward()
    return loss.detach(), gradient(model)


# ---- outputs -----------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A block with the output of a transformers or diffusers block."""

    def __init__(self, form):
        super().__init__()
        self.lin, self.form = nn.Linear(5, 5), form

    def forward(self, x):
        h = self.lin(x)
        return self.form(h)


@pytest.mark.parametrize(
    ("form", "select"),
    [
        (lambda h: (h, None), None),
        (lambda h: (h, (h, h)), None),
        (lambda h: (h * 0, h), 1),
        (lambda h: {"sample": h}, "sample"),
        (lambda h: {"deep": [h]}, lambda output: output["deep"][0]),
        (lambda h: h.view(4, 5, 1, 1), None),
        (lambda h: h.view(4, 1, 1, 5, 1), None),
    ],
)
def test_tuple_dict_and_channels_first_outputs(form, select):
    block = Wrapped(form)
    model = nn.Sequential(block).train()
    reg = Dispersive(model, "0", select=select)
    x = torch.randn(4, 5)
    with reg:
        model(x)
    torch.testing.assert_close(reg.loss(), 0.5 * dispersive_loss(block.lin(x)))


@pytest.mark.parametrize(
    ("form", "select"),
    [
        (lambda h: (h, h), None),
        (lambda h: {"sample": h}, None),
        (lambda h: {"sample": h}, "simple"),
        (lambda h: (h,), 3),
        (lambda h: h, 0),
        (lambda h: (h, None), 1),
        (lambda h: None, None),
    ],
)
def test_an_ambiguous_output_asks_for_select(form, select):
    model = nn.Sequential(Wrapped(form)).train()
    reg = Dispersive(model, "0", select=select)
    with reg:
        model(torch.randn(4, 5))
    with pytest.raises(DispersiveError, match=r"tap '0'.*select"):
        reg.loss()


def test_several_taps_give_the_mean():
    model = make_model()
    reg = Dispersive(model, "blocks.*")
    assert reg.paths == ["blocks.0", "blocks.1"]
    got = step(model, reg)
    _, taps = make_model()(X, T, taps=(0, 1))
    assert got[0].item() == pytest.approx(0.5 * sum(dispersive_loss(z).item() for z in taps) / 2, rel=1e-6)
    assert [record.path for record in reg.stats._records] == ["blocks.0", "blocks.1"]


# ---- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "blocks", "path"),
    [
        (1 / 4, 12, "blocks.2"),
        (1 / 4, 28, "blocks.6"),
        (1 / 4, 4, "blocks.0"),
        (1 / 4, 2, "blocks.0"),
        (1, 5, "blocks.4"),
    ],
)
def test_depth_picks_the_published_block(depth, blocks, path):
    assert Dispersive(MLP(depth=blocks, hidden_size=4), depth=depth).paths == [path]


def test_a_module_or_a_wrapped_name_is_found():
    model = make_model()
    assert Dispersive(model, model.blocks[1]).paths == ["blocks.1"]
    assert Dispersive(model, "module._orig_mod.blocks.1").paths == ["blocks.1"]
    assert Dispersive(torch.compile(model, backend="eager"), "blocks.1").paths == ["blocks.1"]
    assert Dispersive(model, ["blocks.1", model.blocks[1]]).paths == ["blocks.1"]


def test_a_model_without_blocks_needs_at():
    with pytest.raises(DispersiveError, match="name the module with at="):
        Dispersive(nn.Sequential(nn.Linear(2, 2)))


def test_presets_attach_where_published():
    model = MLP(depth=12, hidden_size=4)
    assert Dispersive.from_preset(model, "paper").paths == ["blocks.2"]
    assert Dispersive.from_preset(model, "official-pytorch").paths == ["blocks.11"]
    small = Dispersive.from_preset(model, "small", kind="hinge", weight=0.1)
    assert (small.options.kind, small.options.scale, small.weight) == ("hinge", 1.0, 0.1)


# ---- batches and numbers -----------------------------------------------------------------------------------


def test_a_batch_of_one_raises_in_training():
    model = make_model()
    reg = Dispersive(model, "blocks.1")
    with reg:
        model(X[:1], T[:1])
    with pytest.raises(DispersiveError, match=r"blocks\.1.*at least 2"):
        reg.loss()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_nan_or_infinity_raises_with_the_path(bad, weight):
    # mutation: `Watch.look` not called
    model = make_model()
    reg = Dispersive(model, "blocks.1", weight=weight)
    with reg:
        model(X * bad, T)
    with pytest.raises(DispersiveError, match=r"blocks\.1.*NaN"):
        reg.loss()


def test_it_warns_once_at_the_floor():
    # mutation: `_warned` never set
    model = nn.Sequential(nn.Linear(5, 5)).train()
    reg = Dispersive(model, "0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            with reg:
                model(1e3 * torch.randn(8, 5))
            reg.loss()
    assert len(caught) == 1 and "'0'" in str(caught[0].message) and "diagonal=False" in str(caught[0].message)


# ---- weight ------------------------------------------------------------------------------------------------


def test_three_lines_with_an_objective():
    model = make_model()
    reg = Dispersive(model, "blocks.1", weight=0.5, tau=0.5, t_window=0.5)
    with reg:
        loss, aux = FlowMatching()(model, X, generator=torch.Generator().manual_seed(0))
    (loss + reg.loss(t=aux.t, step=0)).backward()
    assert reg.stats.pairs < 36


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(), [1, 1, 1, 1]),
        (Schedule("warmup", 4), [0.25, 0.5, 1, 1]),
        (Schedule("cosine-to-zero", 8), [1, 0.9619397662556434, 0.5, 0]),
        (Schedule("stop-at", 4), [1, 1, 0, 0]),
    ],
)
def test_schedules_weigh_the_loss(schedule, factors):
    model = make_model()
    reg = Dispersive(model, "blocks.1", weight=0.5, schedule=schedule)
    for number, factor in zip((0, 1, 4, 100), factors, strict=True):
        loss, _ = step(model, reg, step=number)
        assert loss.item() == pytest.approx(0.5 * factor * reg.stats.loss, abs=1e-7)
        assert reg.stats.weight == pytest.approx(0.5 * factor)


def test_weight_zero_measures_without_touching_the_gradient():
    model, bare = make_model(), make_model()
    _, got = step(model, Dispersive(model, "blocks.1", weight=0))
    bare(X, T).square().mean().backward()
    assert torch.equal(got, gradient(bare))


# ---- copies ------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module that holds its network and the regulariser on it, as a Lightning module does."""

    def __init__(self, first):
        super().__init__()
        if first == "model":
            self.model = make_model()
            self.reg = Dispersive(self.model, "blocks.1")
        else:
            model = make_model()
            self.reg = Dispersive(model, "blocks.1")
            self.model = model


@pytest.mark.parametrize("first", ["model", "regulariser"])
def test_a_copy_of_model_and_regulariser_has_taps_of_its_own(first):
    a = Holder(first)
    want, _ = step(a.model, a.reg)
    b = copy.deepcopy(a)
    assert b.reg.model is b.model and b.reg.taps[0].module is b.model.blocks[1]
    with pytest.raises(DispersiveError, match="no statistics"):
        b.reg.stats  # noqa: B018
    assert torch.equal(step(b.model, b.reg)[0], want)
    b.reg.remove()
    assert torch.equal(step(a.model, a.reg)[0], want)
    with pytest.raises(DispersiveError, match="removed"):
        step(b.model, copy.deepcopy(b.reg))


def test_a_memory_that_no_second_micro_batch_meets_is_said_once():
    model = make_model()
    reg = Dispersive(model, "blocks.1", memory=64)
    with pytest.warns(UserWarning, match="count optimizer steps") as said:
        for k in range(8):
            step(model, reg, step=k)
    assert len(said) == 1
    used = Dispersive(model, "blocks.1", memory=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(16):
            step(model, used, step=k // 2)


def test_times_in_whole_numbers_of_any_kind_give_the_same_window():
    z, t = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 250])
    want = dispersive_loss(z, t=t.float(), t_window=3.0)
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.float64):
        assert torch.equal(dispersive_loss(z, t=t.to(dtype), t_window=3.0), want), dtype
