"""Where it attaches, what it reads, how it is weighed."""

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from nets import T, X, gradient, seen, small_dit, step
from torch import nn

from dispersive_kit.errors import DispersiveError
from dispersive_kit.models import MLP
from dispersive_kit.regularizers import Dispersive, Schedule, dispersive_loss
from dispersive_kit.regularizers.pairwise import Pairs

# ---- outputs -----------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A block with the output of a transformers or diffusers block."""

    def __init__(self, form):
        super().__init__()
        self.lin, self.form = nn.Linear(5, 5), form

    def forward(self, x):
        return self.form(self.lin(x))


READ = [
    (lambda h: (h, None), None),
    (lambda h: (h, (h, h)), None),
    (lambda h: (h * 0, h), 1),
    (lambda h: {"sample": h}, "sample"),
    (lambda h: {"deep": [h]}, lambda out: out["deep"][0]),
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
    reg = Dispersive(nn.Sequential(block), "0", select=select)
    seen(reg, x)
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
    ("depth", "blocks", "number"), [(1 / 4, 12, 2), (1 / 4, 28, 6), (1 / 4, 4, 0), (1 / 4, 2, 0), (1, 5, 4)]
)
def test_depth_picks_the_published_block(depth, blocks, number):
    assert Dispersive(MLP(depth=blocks, hidden_size=4), depth=depth).paths == [f"blocks.{number}"]


def test_a_module_or_a_wrapped_name_is_found():
    model = small_dit()
    whole = torch.compile(model, backend="eager")
    for of, at in (
        (model, model.blocks[1]),
        (model, "module._orig_mod.blocks.1"),
        (whole, "blocks.1"),
        (model, ["blocks.1", model.blocks[1]]),
    ):
        assert Dispersive(of, at).paths == ["blocks.1"]


class Around(nn.Module):
    """It holds a module by the name that a wrapper gives it, and is none."""

    def __init__(self):
        super().__init__()
        self.net, self.module = nn.Linear(4, 4), nn.ModuleDict({"net": nn.Linear(4, 4)})

    def forward(self, x):
        return self.module["net"](self.net(x))


def test_a_module_that_is_called_module_is_not_taken_for_a_wrapper():
    model = Around()
    for of in (model, torch.compile(model)):
        for at, found in (
            ("net", model.net),
            ("module.net", model.module["net"]),
            (model.net, model.net),
            (model.module["net"], model.module["net"]),
            ("_orig_mod.net", model.net),
        ):
            assert [tap.module for tap in Dispersive(of, at).taps] == [found]


def test_shared_weights_are_tapped_at_their_first_call_alone():
    shared = nn.ModuleDict({"blocks": nn.Sequential(*[nn.Linear(4, 4)] * 3)})
    for how in ({"at": "blocks.2"}, {"depth": 1.0}):
        with pytest.raises(DispersiveError, match=r"'blocks\.2' is the module 'blocks\.0'"):
            Dispersive(shared, **how)


def test_presets_attach_where_published():
    model = MLP(depth=12, hidden_size=4)
    for name, block, numbers in (("paper", 2, (0.5, 0.5)), ("official-pytorch", 11, (0.25, 1.0))):
        reg = Dispersive.from_preset(model, name)
        assert reg.paths == [f"blocks.{block}"] and (reg.weight, reg.options.tau) == numbers
    small = Dispersive.from_preset(model, "small", kind="hinge", weight=0.1)
    assert (small.options.kind, small.options.scale, small.weight) == ("hinge", 1.0, 0.1)


# ---- batches and numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize(
    ("x", "words"), [(X * math.nan, "NaN"), (X * math.inf, "NaN"), (X[:1], "at least 2")], ids=["nan", "inf", "one"]
)
def test_nan_infinity_and_a_batch_of_one_raise_with_the_path(x, words, weight):
    model = small_dit()
    reg = Dispersive(model, "blocks.1", weight=weight)
    seen(reg, x, T[: len(x)])
    with pytest.raises(DispersiveError, match=rf"blocks\.1.*{words}"):
        reg.loss()


def test_an_empty_batch_in_groups_is_refused():
    seen(reg := Dispersive(nn.Sequential(nn.Linear(4, 4)), "0", group_size=2), torch.randn(0, 4))
    with pytest.raises(DispersiveError, match="no axis of size 0"):
        reg.loss()


def test_it_warns_once_at_the_floor():
    reg = Dispersive(nn.Sequential(nn.Linear(5, 5)), "0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            seen(reg, 1e3 * torch.randn(8, 5))
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
        model.own = parts["reg"] if first == "inside" else None


@pytest.mark.parametrize("first", ["model", "regulariser", "inside"])
def test_a_copy_of_model_and_regulariser_has_taps_of_its_own(first):
    a = Holder(first)
    want, _ = step(a.model, a.reg)
    b = copy.deepcopy(a)
    assert b.reg.model is b.model and b.reg.taps[0].module is b.model.blocks[1]
    with pytest.raises(DispersiveError, match="no statistics"):
        b.reg.stats  # noqa: B018
    assert torch.equal(step(b.model, b.reg)[0], want)
    assert torch.equal(step(*pickle.loads(pickle.dumps((b.model, b.reg))))[0], want)
    b.reg.remove()
    assert torch.equal(step(a.model, a.reg)[0], want)
    with pytest.raises(DispersiveError, match="removed"):
        step(b.model, copy.deepcopy(b.reg))


# ---- whose batch? ------------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """A block in its usual surroundings, on x (B, T, D), or (T, B, D) where the block wants that."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x, x, x) if isinstance(self.block, nn.MultiheadAttention) else self.block(x)


def layer(**options):
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, **options)


def encoder(**options):
    return nn.TransformerEncoder(layer(**options), 2, enable_nested_tensor=False)


BUILT = {
    "lstm": (partial(nn.LSTM, 4, 4), "block"),
    "gru": (partial(nn.GRU, 4, 4), "block"),
    "rnn": (partial(nn.RNN, 4, 4), "block"),
    "attention": (partial(nn.MultiheadAttention, 4, 2), "block"),
    "layer": (layer, "block"),
    "inside a layer": (layer, "block.linear1"),
    "encoder": (encoder, "block"),
    "in an encoder": (encoder, "block.layers.1"),
    "around": (lambda **options: nn.Sequential(nn.Identity(), layer(**options)), "block"),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_batch_on_the_second_axis_is_refused_with_the_cure_and_on_the_first_it_works(name):
    (build, path), x = BUILT[name], torch.randn(5, 3, 4)
    select = 0 if name in ("lstm", "gru", "rnn", "attention") else None
    with pytest.raises(DispersiveError, match=rf"'{path}'.*batch_first=False.*select=lambda"):
        Dispersive(Sequences(build()), path, select=select)
    for options, turned in (({"batch_first": True}, x.transpose(0, 1)), ({}, x)):
        turn = select if options else lambda out: (out[0] if isinstance(out, tuple) else out).transpose(0, 1)
        reg = Dispersive(Sequences(build(**options)), path, select=turn)
        seen(reg, turned)
        assert reg.captured[0].shape[:2] == (3, 5) and reg.loss().requires_grad


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_have_the_batch_on_their_first_axis(cell):
    reg = Dispersive(Sequences(cell(4, 6)), "block", select=0 if cell is nn.LSTMCell else None)
    seen(reg, torch.randn(3, 4))
    assert reg.captured[0].shape == (3, 6) and reg.loss().requires_grad


def test_states_and_single_sequences_are_no_batch():
    gru = Sequences(nn.GRU(4, 4, 2, batch_first=True))
    with pytest.raises(DispersiveError, match=r"select=1 takes the last state.*select=0"):
        Dispersive(gru, "block", select=1)
    reg = Dispersive(gru, "block", select=0)
    seen(reg, torch.randn(5, 4))
    with pytest.raises(DispersiveError, match=r"\(5, 4\), of one sequence without a batch"):
        reg.loss()


def test_blocks_are_found_in_a_sequential_and_where_there_are_none_at_is_asked_for():
    blocks = [nn.Linear(4, 4) for _ in range(8)]
    model = nn.ModuleDict({"blocks": nn.Sequential(*blocks), "head": nn.Linear(4, 4)})
    assert Dispersive(model).paths == ["blocks.1"]
    assert Dispersive(model, depth=1.0).paths == ["blocks.7"]
    two = nn.ModuleDict({"a": nn.ModuleDict({"blocks": nn.Sequential(*blocks)}), "blocks": nn.ModuleList(blocks)})
    for model, n in ((nn.Sequential(nn.Linear(2, 2)), 0), (two, 2)):
        with pytest.raises(DispersiveError, match=f"has {n} lists named 'blocks': name the module with at="):
            Dispersive(model)


@pytest.mark.parametrize(("option", "given"), [({"t_window": 0.5}, "t"), ({"ignore_same_class": True}, "y")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_labels_that_are_no_numbers_are_refused(option, given, bad):
    labels = {given: torch.tensor([0.1, bad, 0.3, 0.4])}
    with pytest.raises(DispersiveError, match=f"{given}, and it holds NaN"):
        dispersive_loss(torch.randn(4, 3), **option, **labels)


def test_a_time_that_is_nan_has_no_pairs_where_nobody_looked():
    drop = Pairs(t=torch.tensor([0.0, math.nan, 0.1]), t_window=0.5).dropped(0, 3, torch.zeros(3, 3))
    assert drop.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


# ---- what was captured, and by whom -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_with_forgets_what_was_captured(error):
    model = small_dit()
    reg = Dispersive(model, "blocks.1")
    with pytest.raises(error), reg:
        model(X, T)
        raise error
    assert not reg.captured
    with pytest.raises(DispersiveError, match="captured nothing"):
        reg.loss()
    step(model, reg)


def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_two_threads_on_one_regulariser_are_refused_and_a_second_may_follow_a_first():
    model = small_dit()
    reg = Dispersive(model, "blocks.1")
    with reg:
        in_thread(lambda: model(5 * X, T))  # an evaluation beside the training
        assert not reg.captured
        for use in (reg.__enter__, reg.loss, lambda: reg.loss(taps=[X])):
            with pytest.raises(DispersiveError, match=r"blocks\.1 were armed by another thread"):
                in_thread(use)
        model(X, T)
    want = reg.loss()
    assert in_thread(lambda: step(model, reg))[0] == want
    in_thread(reg.__enter__)  # its thread has ended since
    assert step(model, reg)[0] == want


# ---- groups ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kind": "covariance"}, {"ignore_same_class": True, "t_window": 0.5}])
def test_groups_of_a_batch_are_dispersion_batches_of_their_own(options):
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(6, 3)
    t, y = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.8, 0.9]), torch.tensor([0, 1, 1, 2, 0, 2])
    reg, wrong = (Dispersive(model, "0", group_size=size, weight=0.5, **options) for size in (3, 4))
    z = seen(reg, x)
    whole, *halves = (
        dispersive_loss(z[rows], **options, t=t[rows], y=y[rows]) for rows in (slice(6), slice(3), slice(3, 6))
    )
    loss = reg.loss(t=t, y=y)
    torch.testing.assert_close(loss, 0.5 * (halves[0] + halves[1]) / 2)
    assert reg.stats.batch_size == 3 and loss.item() != pytest.approx(0.5 * whole.item())
    seen(wrong, x)
    with pytest.raises(DispersiveError, match="batch of 6 cannot be split into groups of 4"):
        wrong.loss()
    for odd in ({"gather": True}, {"memory": 4}):
        with pytest.raises(DispersiveError, match="leave out one of the two"):
            Dispersive(model, "0", group_size=3, **odd)
