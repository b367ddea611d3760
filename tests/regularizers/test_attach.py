"""Where it attaches, what it reads, how it is weighed. A `mutation` was tried and fails the test."""

import copy
import math
import warnings

import pytest
import torch
from nets import T, X, gradient, small_dit, step
from torch import nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.models import MLP
from dispersive_kit.regularizers import PRESETS, Dispersive, Schedule, dispersive_loss

# ---- outputs -----------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A block with the output of a transformers or diffusers block."""

    def __init__(self, form):
        super().__init__()
        self.lin, self.form = nn.Linear(5, 5), form

    def forward(self, x):
        return self.form(self.lin(x))


def deep(output):
    return output["deep"][0]


READ = [
    (lambda h: (h, None), None),
    (lambda h: (h, (h, h)), None),
    (lambda h: (h * 0, h), 1),
    (lambda h: {"sample": h}, "sample"),
    (lambda h: {"deep": [h]}, deep),
    (lambda h: h.view(4, 5, 1, 1), None),
    (lambda h: h.view(4, 1, 1, 5, 1), None),
]
AMBIGUOUS = [
    (lambda h: (h, h), None),
    (lambda h: {"sample": h}, None),
    (lambda h: {"sample": h}, "simple"),
    (lambda h: (h,), 3),
    (lambda h: h, 0),
    (lambda h: (h, None), 1),
    (lambda h: None, None),
]


@pytest.mark.parametrize(("form", "select", "right"), [*((*c, 1) for c in READ), *((*c, 0) for c in AMBIGUOUS)])
def test_tuples_dicts_and_maps_are_read_and_an_ambiguous_output_asks_for_select(form, select, right):
    block, x = Wrapped(form), torch.randn(4, 5)
    model = nn.Sequential(block).train()
    reg = Dispersive(model, "0", select=select)
    with reg:
        model(x)
    if right:
        torch.testing.assert_close(reg.loss(), 0.5 * dispersive_loss(block.lin(x)))
    else:
        with pytest.raises(DispersiveError, match=r"tap '0'.*select"):
            reg.loss()


def test_several_taps_give_the_mean():
    model = small_dit()
    reg = Dispersive(model, "blocks.*")
    assert reg.paths == ["blocks.0", "blocks.1"]
    got = step(model, reg)
    _, taps = small_dit()(X, T, taps=(0, 1))
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
    model = small_dit()
    assert Dispersive(model, model.blocks[1]).paths == ["blocks.1"]
    assert Dispersive(model, "module._orig_mod.blocks.1").paths == ["blocks.1"]
    assert Dispersive(torch.compile(model, backend="eager"), "blocks.1").paths == ["blocks.1"]
    assert Dispersive(model, ["blocks.1", model.blocks[1]]).paths == ["blocks.1"]


def test_presets_attach_where_published():
    model = MLP(depth=12, hidden_size=4)
    assert Dispersive.from_preset(model, "paper").paths == ["blocks.2"]
    assert Dispersive.from_preset(model, "official-pytorch").paths == ["blocks.11"]
    assert (PRESETS["paper"]["weight"], PRESETS["paper"]["tau"]) == (0.5, 0.5)
    assert (PRESETS["official-pytorch"]["weight"], PRESETS["official-pytorch"]["tau"]) == (0.25, 1.0)
    small = Dispersive.from_preset(model, "small", kind="hinge", weight=0.1)
    assert (small.options.kind, small.options.scale, small.weight) == ("hinge", 1.0, 0.1)


# ---- batches and numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize(
    ("x", "words"), [(X * math.nan, "NaN"), (X * math.inf, "NaN"), (X[:1], "at least 2")], ids=["nan", "inf", "one"]
)
def test_nan_infinity_and_a_batch_of_one_raise_with_the_path(x, words, weight):
    # mutation: `Watch.look` not called
    model = small_dit()
    reg = Dispersive(model, "blocks.1", weight=weight)
    with reg:
        model(x, T[: len(x)])
    with pytest.raises(DispersiveError, match=rf"blocks\.1.*{words}"):
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
    model = small_dit()
    reg = Dispersive(model, "blocks.1", weight=0.5, schedule=schedule)
    for number, factor in zip((0, 1, 4, 100), factors, strict=True):
        loss, _ = step(model, reg, step=number)
        assert loss.item() == pytest.approx(0.5 * factor * reg.stats.loss, abs=1e-7)
        assert reg.stats.weight == pytest.approx(0.5 * factor)


def test_weight_zero_measures_without_touching_the_gradient():
    model, bare = small_dit(), small_dit()
    _, got = step(model, Dispersive(model, "blocks.1", weight=0))
    bare(X, T).square().mean().backward()
    assert torch.equal(got, gradient(bare))


# ---- copies ------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module that holds its network and the regulariser on it, as a Lightning module does."""

    def __init__(self, first):
        super().__init__()
        model = small_dit()
        parts = {"model": model, "reg": Dispersive(model, "blocks.1")}
        for name in parts if first == "model" else reversed(parts):
            setattr(self, name, parts[name])


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
