"""Random misuse: each case is either right, to the last digit, or a DispersiveError that names the tap and a cure.

A case draws a model, options and one to three things that go wrong; the judge computes the right answer by hand
from the tapped module's own output, so a silent wrong answer fails.
"""

import contextlib
import random
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dispersive_kit.errors import DispersiveError
from dispersive_kit.regularizers import KINDS, Dispersive, Schedule, dispersive_loss

CURE = re.compile(
    r"give|take|tap |use |pass |call |choose|leave|set |lower|name |attach|return|correct|did you mean|say which"
)
B, WIDTH = 6, 5


class Block(nn.Module):
    """`form` shapes its output."""

    def __init__(self, form):
        super().__init__()
        self.lin, self.form = nn.Linear(WIDTH, WIDTH), form

    def forward(self, x):
        return self.form(torch.tanh(self.lin(x)))


class Net(nn.Module):
    """The second of its blocks can misbehave; `how` is the way it is called."""

    def __init__(self, form, how):
        super().__init__()
        self.blocks = nn.ModuleList([Block(lambda h: h), Block(form), Block(lambda h: h)])
        self.head, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, x):
        x, block, how = self.blocks[0](x), self.blocks[1], self.how
        if how in ("no_grad", "inference_mode"):
            with getattr(torch, how)():
                block(x)
        elif how == "reentrant inside":
            checkpoint(lambda x: (block(x), x)[1].clone(), x, use_reentrant=True)
        elif how != "never called":
            out = checkpoint(block, x, use_reentrant=False) if how == "checkpointed" else block(x)
            if how == "overwritten" and isinstance(out, torch.Tensor):
                out.mul_(2)
        return self.head(self.blocks[2](x))


FORMS = {
    "tensor": lambda h: h,
    "tokens": lambda h: h[:, None].expand(-1, 3, -1),
    "map": lambda h: h[:, :, None, None],
    "tuple": lambda h: (h, None),
    "two": lambda h: (h, h),
    "dict": lambda h: {"z": h},
    "none": lambda h: None,
    "vector": lambda h: h.sum(1),
    "scalar": lambda h: h.sum(),
    "integer": lambda h: h.long(),
    "complex": lambda h: torch.complex(h, h),
    "detached": lambda h: h.detach(),
    "nan": lambda h: h * float("nan"),
    "huge": lambda h: h * 1e30,
    "half": lambda h: h.bfloat16(),
    "empty": lambda h: h[:, :0],
}
HOWS = [*["plain"] * 3, "never called", "no_grad", "inference_mode", "reentrant inside", "checkpointed", "overwritten"]
PATHS = [*["blocks.1"] * 3, "blocks.*", "blocks", "block.1", "blocks.9", "", "head.weight", 3, None, [], {}, b"x"]
SELECTS = [None, None, None, 0, 1, 9, "z", "y", lambda out: out, lambda out: 1 / 0, 2.5]
OPTIONS = {
    "kind": [*KINDS, "infonce", 3],
    "tau": [None, 0.5, 2, "auto", 0.0, -1.0, float("nan"), float("inf"), "big", True],
    "diagonal": [None, True, False, 2, "yes"],
    "pool": ["none", "mean", "tokens", "max", None],
    "normalize": ["none", "layer", "unit", "batch", 1],
    "norm_penalty": [0.0, 0.1, -0.1, float("inf"), "x"],
    "weight": [0.5, 0.0, 1, -0.5, float("nan"), "0.5", None],
    "t_window": [None, 0.2, 0.0, -1, "wide"],
    "ignore_same_class": [False, True, "no"],
    "gather": [False, True, 1],
    "memory": [0, 8, -1, float("inf"), "all"],
    "schedule": [None, Schedule("warmup", 10), Schedule("stop-at", 1), "warmup", lambda step: 1.0],
    "depth": [0.25, 1.0, 0.0, 2.0, "deep"],
    "lambda_": [1.0],
}
TAPS = torch.randn(B, 4, requires_grad=True), torch.randn(B, 4)
LABELS = {
    "t": [None, torch.linspace(0, 1, B), torch.linspace(0, 1, B - 1), torch.rand(B, 1), 0.5],
    "y": [None, torch.arange(B) % 3, torch.arange(B + 1), [0] * B, torch.zeros(B)],
    "step": [None, 0, 5, 2.5, "one", torch.tensor(3)],
    "taps": [*[None] * 3, *([z] for z in TAPS), torch.randn(1, B, 4), [], [None], 3],
}
MODES = [*["train"] * 5, "eval", "unarmed", "twice", "removed", "compiled first", "compiled after", "one image"]
MODES.append("all no_grad")
USE = {"form": "tensor", "how": "plain", "at": "blocks.1", "select": None, "mode": "train"}


def draw(rng):
    """A right use with one to three things drawn at random."""
    case = {**USE, "options": {}, "labels": {}}
    for _ in range(rng.randint(1, 3)):
        what = rng.choice(["form", "how", "at", "select", "mode", *["options"] * 4, *["labels"] * 2])
        table = {"form": list(FORMS), "how": HOWS, "at": PATHS, "select": SELECTS, "mode": MODES}.get(what)
        if table:
            case[what] = rng.choice(table)
        else:
            name, values = rng.choice(list((OPTIONS if what == "options" else LABELS).items()))
            case[what][name] = rng.choice(values)
    return case


def attempt(case):
    """(loss as the plug-in gives it, captured z, Dispersive)."""
    torch.manual_seed(0)
    net = Net(FORMS[case["form"]], case["how"]).train(case["mode"] != "eval")
    x = torch.randn(1 if case["mode"] == "one image" else B, WIDTH)
    model = net
    if case["mode"].startswith("compiled"):
        torch.compiler.reset()
        model = torch.compile(net, backend="eager")
        if case["mode"] == "compiled first":
            model(x)
    case["attached"] = False
    reg = Dispersive(net, case["at"], select=case["select"], **case["options"])
    case["attached"] = True
    armed = contextlib.nullcontext() if case["mode"] == "unarmed" else reg
    with torch.set_grad_enabled(case["mode"] != "all no_grad"), armed:
        model(x)
    zs = []
    with contextlib.suppress(DispersiveError):
        zs = reg.captured
    if case["mode"] == "removed":
        reg.remove()
    if case["mode"] == "twice":
        reg.loss(**case["labels"])
    return reg.loss(**case["labels"]), zs, reg


def judge(case, loss, zs, reg):
    """Whether a loss that was given is the right one."""
    if case["mode"] == "eval":
        return loss.item() == 0
    if case["labels"].get("taps") is not None:
        zs = case["labels"]["taps"]
    names = ("kind", "tau", "diagonal", "pool", "normalize", "norm_penalty", "t_window", "ignore_same_class")
    options = {name: case["options"][name] for name in names if name in case["options"]}
    labels = {name: case["labels"].get(name) for name in ("t", "y")}
    want = torch.stack([dispersive_loss(z.detach().double(), **options, **labels) for z in zs]).mean()
    weight = reg.weight * reg.schedule.factor(case["labels"].get("step"))
    right = abs(loss.item() - weight * want.item()) <= 1e-5 * max(1.0, abs(want.item()))
    return right and len(zs) == len(reg.paths) and (loss.requires_grad or weight == 0)


def run(seed):
    """'right' or 'refused', for one case; anything else fails."""
    case = draw(random.Random(seed))
    try:
        loss, zs, reg = attempt(case)
    except DispersiveError as error:
        text = str(error)
        assert CURE.search(text), f"no cure in {text!r} for {case}"
        assert not case["attached"] or "blocks." in text, f"no path in {text!r} for {case}"
        return "refused"
    assert judge(case, loss, zs, reg), f"a wrong loss passed silently: {loss} for {case}"
    return "right"


@pytest.mark.filterwarnings("ignore:Dispersive Loss")
@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 1600), marks=pytest.mark.long)], ids=str)
def test_random_misuse_is_refused_or_right(seeds):
    outcomes = [run(seed) for seed in seeds]
    # Neither the refusals nor the judge may be idle.
    assert min(outcomes.count("right"), outcomes.count("refused")) > len(outcomes) // 6, outcomes
