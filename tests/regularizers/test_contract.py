"""The plug-in's contract on the kit's own DiT, line by line. A `mutation` was tried and fails the test."""

import copy
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from nets import T, X, backward, gradient, seen, small_dit, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from dispersive_kit.diffusion.objectives import MeanFlow
from dispersive_kit.errors import DispersiveError
from dispersive_kit.models import MLP, build_dit
from dispersive_kit.regularizers import Dispersive, LayerSync, dispersive_loss

HALVES = slice(0, 3), slice(3, 6)


def attached(at="blocks.1", *, of=None, **options):
    model = small_dit() if of is None else of
    return model, Dispersive(model, at, **options)


def expected(path="blocks.1", **options):
    """The same by hand: the block's output caught without Dispersive."""
    model, caught = small_dit(), []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: caught.append(output))
    return backward(model, model(X, T), 0.5 * dispersive_loss(caught[0], **options))


def assert_same(got, want, rtol=1e-5):
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=1e-7)
    assert (got[1] - want[1]).norm() <= rtol * want[1].norm()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_loss_and_gradient_are_those_of_the_blocks_output():
    # mutation: `self.output = output.detach()`
    assert_same(step(*attached()), expected())


# ---- torch.compile -----------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


def test_compile_of_the_whole_model_attached_before_the_first_call():
    model, reg = attached()
    call = compiled(model)
    for _ in range(2):
        assert_same(step(model, reg, call), expected())


@pytest.mark.parametrize("in_place", [True, False])
def test_compile_of_the_whole_model_attached_after_the_first_call_raises_with_the_cure(in_place):
    # mutation: `_checked` returns a zero where nothing was captured
    model = small_dit()
    if in_place:
        model.compile(backend="eager")
    call = model if in_place else compiled(model)
    call(X, T)
    reg = Dispersive(model, "blocks.1")
    with pytest.raises(DispersiveError, match=r"blocks\.1.*torch\.compile.*reset\(\)"):
        step(model, reg, call)
    torch.compiler.reset()  # the cure that the message names
    assert_same(step(model, reg, call), expected())


@pytest.mark.parametrize("attach_first", [True, False])
def test_compile_block_by_block_works_in_either_order(attach_first):
    model = small_dit()
    reg = Dispersive(model, "blocks.1") if attach_first else None
    for block in model.blocks:
        block.compile(backend="aot_eager")
    if reg is None:
        model(X, T)
        reg = Dispersive(model, "blocks.1")
    assert_same(step(model, reg), expected())


def test_fullgraph_with_checkpointing_works_through_taps():
    # The untreated row: with the hook, Dynamo refuses the side effect inside the checkpoint.
    model, reg = attached(of=small_dit(checkpointing=True))
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        step(model, reg, call)
    model.zero_grad()
    out, taps = call(X, T, taps=(1,))
    assert_same(backward(model, out, reg.loss(taps=taps)), expected())


# ---- checkpointing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn"])
def test_non_reentrant_checkpointing_with_backward_inside_the_with_block(path):
    # mutation: no check of the graph task in `_Tap.__call__`: the recomputation fills the slot of the next step, whose
    # loss is then that of the first batch
    model, reg = attached(path, of=small_dit(checkpointing=True))
    with reg:
        for scale in (3.0, 1.0):
            model.zero_grad()
            got = backward(model, model(scale * X, T), reg.loss())
            assert not reg.captured
            with torch.no_grad():
                next(model.parameters()).add_(0)
    assert_same(got, expected(path))


class Reentrant(nn.Module):
    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path", ["net", "net.1"])
def test_a_tap_inside_a_reentrant_checkpoint_raises_and_one_at_it_is_right(path, reentrant):
    # mutation: no check of `requires_grad` in `_checked`; no check of the graph task in `_Tap.__call__`
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
    x = torch.randn(4, 5, requires_grad=True)
    model, reg = attached(path, of=Reentrant(net, reentrant).train())
    with reg:
        model(x)
        if path == "net.1" and reentrant:
            with pytest.raises(DispersiveError, match=r"'net\.1'.*use_reentrant=False"):
                reg.loss()
            return
        reg.loss().backward()
    assert not reg.captured
    got = gradient(net)
    net.zero_grad()
    (0.5 * dispersive_loss(net(x) if path == "net" else net[:2](x))).backward()
    torch.testing.assert_close(got, gradient(net))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_features_or_a_loss_under_no_grad_raise(context):
    model, measuring = attached("blocks.0", weight=0)
    for reg in (Dispersive(model, "blocks.0"), LayerSync(model, "blocks.0", "blocks.1")):
        with context():
            seen(reg)
        with pytest.raises(DispersiveError, match=r"blocks\.0.*no gradient.*no_grad"):
            reg.loss()
        seen(reg)
        with context(), pytest.raises(DispersiveError, match=r"blocks\.0.*under no_grad.*weight=0"):
            reg.loss()
        reg.remove()
    with context():
        seen(measuring)
        assert measuring.loss().item() == 0 and measuring.stats.gap > 0


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"h": self.linear(x), "cache": torch.zeros(1)}


class Overwriting(nn.Module):
    """Its block returns a tensor in a container, beside one that is free to change; `touched` is written to after."""

    def __init__(self, touched):
        super().__init__()
        self.block, self.touched = Pair(), touched

    def forward(self, x):
        out = self.block(x)
        out[self.touched].mul_(2)
        return out["h"]


@pytest.mark.parametrize("select", ["h", lambda out: out["h"][:, :2], lambda out: out["h"] + 1])
def test_an_output_inside_a_container_that_is_overwritten_is_noticed(select):
    _, reg = attached("block", of=Overwriting("h"), select=select)
    seen(reg, torch.randn(6, 4))
    with pytest.raises(DispersiveError, match="overwritten"):
        reg.loss()


class Boxed(nn.Linear):
    def forward(self, x):
        return SimpleNamespace(h=super().forward(x))


def test_an_output_inside_an_object_that_is_overwritten_is_noticed():
    _, reg = attached("0", of=nn.Sequential(Boxed(4, 4)), select=lambda out: out.h)
    with reg:
        reg.model(torch.randn(6, 4)).h.relu_()
    with pytest.raises(DispersiveError, match="overwritten"):
        reg.loss()


@dataclass(slots=True)
class Slots:
    h: torch.Tensor


class Levels(nn.Module):
    """As the encoder of a U-Net, whose decoder takes the parts out of what it was given."""

    def __init__(self, form):
        super().__init__()
        self.levels, self.form = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), form

    def forward(self, x):
        return self.form(a := self.levels[0](x), self.levels[1](a))


@pytest.mark.parametrize(
    ("form", "select", "take"),
    [
        (lambda a, b: [a, b], -1, list.pop),
        (lambda a, b: {"h": [b, a]}, lambda out: out["h"][0], lambda out: out["h"].pop(0)),
        (lambda a, b: Slots(b), lambda out: out.h, lambda out: setattr(out, "h", out.h * 100)),
    ],
)
def test_a_part_that_is_taken_out_of_its_container_is_still_the_one_that_was_returned(form, select, take):
    model, reg = attached("0", of=nn.Sequential(Levels(form)), select=select)
    x = torch.randn(6, 4)
    with reg:
        take(model(x))
    levels = model[0].levels
    assert reg.loss() == 0.5 * dispersive_loss(levels[1](levels[0](x)))


def test_an_output_in_a_slot_that_is_overwritten_is_noticed():
    _, reg = attached("0", of=nn.Sequential(Levels(lambda a, b: Slots(b))), select=lambda out: out.h)
    with reg:
        reg.model(torch.randn(6, 4)).h.relu_()
    with pytest.raises(DispersiveError, match="overwritten"):
        reg.loss()


def test_what_else_is_in_the_container_may_be_overwritten():
    _, reg = attached("block", of=Overwriting("cache"), select="h")
    seen(reg, torch.randn(6, 4))
    assert reg.loss().requires_grad


# ---- precision ---------------------------------------------------------------------------------------------


def test_autocast_captures_bf16_and_computes_in_float32():
    # mutation: `full_precision` leaves autocast on; the products are then bf16
    _, reg = attached("0", of=nn.Sequential(nn.Linear(32, 4096), nn.Linear(4096, 4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen(reg, torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
        z = reg.captured[0].detach()
        got = reg.loss()
    assert z.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert abs(got.item() - 0.5 * dispersive_loss(z.double()).item()) < 1e-6


# ---- copies, modes, removal --------------------------------------------------------------------------------


def test_ema_by_deepcopy_does_not_overwrite_the_capture():
    # mutation: no `module is not self.module` in `_Tap.__call__`
    model, reg = attached()
    ema = copy.deepcopy(model)
    with reg:
        ema(5 * X, T)
        out = model(X, T)
    assert_same(backward(model, out, reg.loss()), expected())


def test_eval_captures_nothing_and_the_loss_is_zero():
    # mutation: armed without `self.model.training`
    model, reg = attached(of=small_dit().eval())
    seen(reg)
    with pytest.warns(UserWarning, match=r"blocks\.1 is 0 in eval mode.*model\.train"):
        assert not reg.captured and reg.loss().item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and never where no gradient is wanted
        assert not reg.loss().requires_grad
        with torch.no_grad():
            assert Dispersive(model, "blocks.1").loss().item() == 0


def test_a_block_that_was_compiled_by_itself_is_known_by_the_compiled_module():
    model = small_dit()
    model.blocks[1] = compiled(model.blocks[1])
    reg = Dispersive(model, model.blocks[1])
    assert reg.paths == ["blocks.1"]
    assert_same(step(model, reg), expected())


def test_state_dict_is_unchanged_and_remove_leaves_no_hook():
    model = small_dit()
    before = list(model.state_dict())
    reg = Dispersive(model, ["blocks.0", "blocks.1"])
    assert list(model.state_dict()) == before
    assert sum(len(m._forward_hooks) for m in model.modules()) == 2
    reg.remove()
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0
    for use in (reg.__enter__, reg.loss):
        with pytest.raises(DispersiveError, match=r"blocks\.0, blocks\.1 were removed"):
            use()


def test_the_hook_costs_nothing_unarmed_and_only_the_first_call_is_captured():
    # mutation: no `self.output is not None` in `_Tap.__call__`
    model, reg = attached()
    model(X, T)
    assert not reg.captured
    with reg:
        model(X, T)
        first = reg.captured[0]
        model(2 * X, T)
    assert reg.captured[0] is first


def test_features_are_let_go_after_the_loss():
    model, reg = attached()
    step(model, reg)
    assert not reg.captured
    with pytest.raises(DispersiveError, match=r"blocks\.1.*nothing since the last loss"):
        reg.loss()


def test_gradient_accumulation_sums_the_losses_of_the_micro_batches():
    (model, reg), by_hand = attached(), small_dit()
    for rows in HALVES:
        out = seen(reg, X[rows], T[rows])
        (reg.loss() + 0 * out.sum()).backward()
        out, (z,) = by_hand(X[rows], T[rows], taps=(1,))
        (0.5 * dispersive_loss(z) + 0 * out.sum()).backward()
    torch.testing.assert_close(gradient(model), gradient(by_hand), rtol=1e-4, atol=1e-7)


def test_memory_makes_the_last_micro_batch_see_the_whole_batch():
    # mutation: `_kept` never filled; never cleared
    model, reg = attached(memory=64)
    whole = Dispersive(model, "blocks.1")
    seen(whole)
    want = whole.loss()
    for number in range(2):
        for rows, batch in zip(HALVES, (3, 6), strict=True):
            seen(reg, X[rows], T[rows])
            loss = reg.loss(step=number)
            assert reg.stats.batch_size == batch
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(DispersiveError, match="step is None"):
        step(model, reg)


# ---- func transforms ---------------------------------------------------------------------------------------


def test_a_hook_inside_jvp_raises_and_names_has_aux():
    # mutation: no `is_functorch_wrapped_tensor`
    model, reg = attached(of=MLP(hidden_size=8))
    x, t = torch.randn(6, 2), torch.rand(6)
    with reg:
        torch.func.jvp(lambda x: model(x, t), (x,), (torch.ones_like(x),))
    with pytest.raises(DispersiveError, match=r"blocks\.1.*has_aux"):
        reg.loss()


def test_meanflow_gives_its_taps_through_has_aux():
    model, reg = attached(of=build_dit("DiT-T/4", input_size=8, depth=2, num_classes=0, interval=True))
    with reg:
        _, aux = MeanFlow()(model, X, generator=torch.Generator().manual_seed(0), taps=(1,))
    reg.loss(t=aux.t, taps=aux.taps).backward()
    assert model.x_embedder.proj.weight.grad.norm() > 0
    assert not reg.captured
