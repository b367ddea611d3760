"""What the page computes is what the package computes, to 1e-6, and fast enough to move."""

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from playwright.sync_api import Page
from torch import Tensor, nn

from dispersive_kit.data.toy import sample_toy
from dispersive_kit.diffusion.samplers import euler, euler_maruyama, heun, rk4, time_grid
from dispersive_kit.regularizers import dispersive_loss, floor
from dispersive_kit.views.lessons import T_END, cloud, exact_velocity
from dispersive_kit.views.widgets import MODULE

NAMES = (
    "VARIANTS, SETS, SAMPLERS, batch, cloud, descended, dispersive, effectiveRank, exactVelocity, floor, generator, "
    "network, signTest, trainStep, trajectory"
)


@pytest.fixture(scope="module")
def kit(watch: Callable[..., Page]) -> Iterator[Page]:
    """A page that is the module alone; `floats(...)` are what its functions take."""
    page = watch(("about:", "data:"))
    tail = f"\nwindow.kit = {{ {NAMES} }}; window.floats = rows => Float64Array.from(rows.flat());"
    page.add_script_tag(type="module", content=MODULE.read_text() + tail)
    page.wait_for_function("window.kit")
    yield page
    assert page.faults == []
    page.close()


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_loss_gradient_and_floor_of_every_variant(kit: Page) -> None:
    variants = kit.evaluate("Object.entries(kit.VARIANTS).map(([name, [options]]) => [name, options])")
    assert len(variants) == 4
    for (name, options), tau, (B, dim) in product(variants, (0.25, 2.0), ((2, 2), (8, 2), (32, 2), (64, 9))):
        z = (0.3 * dim * normal(B, dim)).requires_grad_()
        loss = dispersive_loss(z, tau=tau, **options)
        (gradient,) = torch.autograd.grad(loss, z)
        found, low = kit.evaluate(
            """([z, dim, options]) => { const { loss, gradient } = kit.dispersive(floats(z), dim, options);
            return [[loss, ...gradient], kit.floor(options, z.length, dim)]; }""",
            [z.tolist(), dim, {"tau": tau, **options}],
        )
        expected = torch.cat([loss.detach()[None], gradient.flatten()])
        assert (doubles(found) - expected).norm() <= 1e-6 * expected.norm(), (name, tau, B)
        known = floor(options["kind"], B, tau, diagonal=options["diagonal"], dim=dim)
        assert low == pytest.approx(known, abs=1e-9), (name, tau, B)


def test_points_go_down_the_gradient_and_their_rank_is_that_of_the_statistics(kit: Page) -> None:
    z = kit.evaluate("[...kit.cloud(32)]")
    assert torch.allclose(doubles(z).view(-1, 2), cloud(32), atol=1e-9)
    found, rank = kit.evaluate(
        """z => { let x = floats(z); const options = { ...kit.VARIANTS.l2[0], tau: 0.5 };
        for (let k = 0; k < 20; k += 1) x = kit.descended(x, options); return [[...x], kit.effectiveRank(x)]; }""",
        z,
    )
    x = doubles(z).view(-1, 2)
    for _ in range(20):
        leaf = x.clone().requires_grad_()
        x = x - 0.012 * len(x) * torch.autograd.grad(dispersive_loss(leaf, tau=0.5), leaf)[0]
    assert torch.allclose(doubles(found).view(-1, 2), x, atol=1e-6)
    p = torch.linalg.svdvals(x - x.mean(0))
    assert rank == pytest.approx(float((-torch.special.xlogy(p / p.sum(), p / p.sum()).sum()).exp()), abs=1e-9)


def test_points_without_a_floor_go_far_and_stay_numbers(kit: Page) -> None:
    far = kit.evaluate(
        """z => { let x = floats(z); const options = { ...kit.VARIANTS["l2, no diagonal"][0], tau: 0.25 };
        for (let k = 0; k < 3000; k += 1) x = kit.descended(x, options); return [...x]; }""",
        [0.1, 0.0, -0.1, 0.2],
    )
    assert 100 < doubles(far).abs().max() < 1e7


def test_exact_field_and_samplers(kit: Page) -> None:
    x, steps = normal(40, 2), 8
    for name, sampler in (("Euler", euler), ("Heun", heun), ("RK4", rk4)):
        ways = kit.evaluate("([name, steps, x]) => kit.trajectory(name, steps, x)", [name, steps, x.tolist()])
        expected = sampler(exact_velocity, x, time_grid(steps, t_min=T_END))
        assert len(ways) == steps + 1 and torch.allclose(doubles(ways[-1]), expected, atol=1e-6), name

    class Field:
        def __call__(self, x: Tensor, t: float) -> Tensor:
            return exact_velocity(x, torch.full((len(x),), t, dtype=torch.float64))

        def noise(self, x: Tensor) -> Tensor:
            return drawn

    drawn = doubles(kit.evaluate("() => { const r = kit.generator(7); return Array.from({ length: 80 }, r.normal); }"))
    drawn = drawn.view(40, 2)
    for t, s in pairwise((0.9, 0.5, 0.01)):
        found = kit.evaluate(
            """([x, t, s]) => { const r = kit.generator(7);
            return x.map(p => kit.SAMPLERS.SDE[0](kit.exactVelocity, p, t, s, r)); }""",
            [x.tolist(), t, s],
        )
        assert torch.allclose(doubles(found), euler_maruyama.__wrapped__(Field(), x, t, s), atol=1e-6)


@pytest.mark.parametrize(("variant", "tap"), [("l2", 1), ("l2, no diagonal", 2), ("cosine", 1), ("hinge", 2)])
def test_three_steps_of_training_with_adam(kit: Page, variant: str, tap: int) -> None:
    start, batches, ends = kit.evaluate(
        """([variant, tap]) => {
          const net = kit.network(kit.generator(1)), random = kit.generator(2), start = [...net.weights], batches = [];
          const options = { ...kit.VARIANTS[variant][0], tau: 0.5, weight: 0.7, tap };
          for (let k = 0; k < 3; k += 1) {
            const drawn = kit.batch(64, kit.SETS["two moons"], random);
            batches.push([[...drawn.x], [...drawn.v], [...drawn.t]]);
            kit.trainStep(net, drawn, options);
          }
          return [start, batches, [...net.weights]];
        }""",
        [variant, tap],
    )
    sizes, at, layers = (8, 128, 128, 2), 0, []
    for n, m in pairwise(sizes):
        W = doubles(start[at : at + n * m]).view(n, m)
        layers += [W.requires_grad_(), doubles(start[at + n * m : at + n * m + m]).requires_grad_()]
        at += (n + 1) * m
    assert at == len(start) == 17_922
    options = dict(kit.evaluate("name => Object.entries(kit.VARIANTS[name][0])", variant))
    optimizer = torch.optim.Adam(layers, lr=0.004)
    for x, v, t in batches:
        times = doubles(t)[:, None] * torch.arange(1, 7) * torch.pi
        h, kept = torch.cat([doubles(x).view(-1, 2), times.cos()], 1), []
        for W, b in zip(layers[::2], layers[1::2], strict=True):
            h = h @ W + b
            if len(kept) < 2:
                h = nn.functional.silu(h)
                kept.append(h)
        loss = (h - doubles(v).view(-1, 2)).square().mean() + 0.7 * dispersive_loss(kept[tap - 1], tau=0.5, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = torch.cat([one.detach().flatten() for one in layers])
    assert (doubles(ends) - doubles(start)).abs().max() > 0.005
    assert (doubles(ends) - expected).abs().max() < 1e-6


def test_the_sets_are_those_of_the_package(kit: Page) -> None:
    for name in kit.evaluate("Object.keys(kit.SETS)"):
        drawn = "name => { const r = kit.generator(3); return Array.from({ length: 4000 }, () => kit.SETS[name](r)); }"
        found = doubles(kit.evaluate(drawn, name))
        real = sample_toy(name.lower().replace(" ", "-"), 4000)[0].double()
        for power in (1, 2, 4):
            apart = (found**power).mean(0) - (real**power).mean(0)
            assert (apart.abs() < 5 * (real**power).std(0) / 4000**0.5 * 2**0.5).all(), (name, power)


def test_a_coin_would_part_them(kit: Page) -> None:
    given = kit.evaluate("[[10, 0], [0, 0], [3, 4], [7, 1]].map(pair => kit.signTest(...pair))")
    assert given == pytest.approx([2 / 1024, 1, 1, 18 / 256])


def test_both_networks_make_fifty_steps_a_second_on_one_core(kit: Page, busy: Any) -> None:
    taken, seconds = busy(kit), []
    for steps in (30, 60):
        before = taken()
        kit.evaluate(
            """steps => {
              const random = kit.generator(0), options = { ...kit.VARIANTS.l2[0], tau: 0.5, tap: 1 };
              const nets = [0, 0.3].map(weight => ({ weight, net: kit.network(kit.generator(2)) }));
              for (let k = 0; k < steps; k += 1) {
                const drawn = kit.batch(64, kit.SETS["two moons"], random);
                nets.forEach(({ net, weight }) => kit.trainStep(net, drawn, { ...options, weight }));
              }
            }""",
            steps,
        )
        seconds.append((taken() - before) / steps)
    print(f"training steps a second of processor time, both networks: {1 / seconds[1]:.0f}")
    assert 1 / seconds[1] >= 50
