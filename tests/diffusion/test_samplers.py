"""Samplers against closed forms and other libraries: order, marginals, and one seed per image."""

import math
from functools import partial

import pytest
import torch
from nets import small_dit

from dispersive_kit.diffusion import samplers
from dispersive_kit.diffusion.guidance import ClassifierFree
from dispersive_kit.diffusion.paths import PREDICTIONS, DDPMPath, LinearPath
from dispersive_kit.diffusion.samplers import ddim, ddpm, dopri5, euler, euler_maruyama, initial_noise, time_grid
from dispersive_kit.errors import ConfigError

ORDERS = {"euler": 1, "heun": 2, "rk4": 4, "ddim": 1}


@pytest.mark.parametrize("name", ORDERS)
def test_measured_order_on_the_closed_form_flow(path, gaussian_of, name):
    # A discrete schedule is a table: between 0.1 and 0.9 the steps below are multiples of its timesteps.
    discrete = isinstance(path, DDPMPath)
    low, high, steps = (0.1, 0.9, (80, 160, 320)) if discrete else (0.02, 0.98, (80, 160, 320))
    gaussian = gaussian_of(path, 2.0 if discrete else 0.5)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    options = {"path": gaussian.path, "prediction": "x0"} if name == "ddim" else {}
    model, exact = gaussian.model(options.get("prediction", "v")), gaussian.flow(x, high, low)
    runs = [getattr(samplers, name)(model, x, time_grid(n, low, high), **options) for n in steps]
    errors = [float((run - exact).abs().max()) for run in runs]
    if discrete and name == "rk4":
        assert errors[-1] < 1e-7  # the table's cubics have a jump in the second derivative: no order 4 can be seen
    else:
        assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_the_same_samples(gaussian, prediction):
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ts = time_grid(10, 0.01, 0.99)
    for sampler in (ddim, partial(ddpm, seeds=range(5)), partial(euler_maruyama, seeds=range(5))):
        by = [sampler(gaussian.model(kind), x, ts, path=gaussian.path, prediction=kind) for kind in (prediction, "x0")]
        torch.testing.assert_close(*by, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    "sampler,options,steps", [(ddpm, {}, 800), (euler_maruyama, {}, 500), (euler_maruyama, {"churn": 0.3}, 500)]
)
def test_marginals_of_the_stochastic_samplers(gaussian, sampler, options, steps):
    """20,000 samples of each at half way and at the data: mean and variance within three standard errors."""
    low, high, n = 0.0, 0.98, 20_000
    x = gaussian.std(high) * initial_noise([0], (n,), dtype=torch.float64)
    seen = {}
    ts = time_grid(steps, low, high)
    prediction = "x0" if isinstance(gaussian.path, DDPMPath) else "v"
    out = sampler(
        gaussian.model(prediction), x, ts, path=gaussian.path, prediction=prediction, seeds=[1],
        callback=lambda i, t, x: seen.__setitem__(i, (t, x)), **options,
    )  # fmt: skip
    t, middle = seen[steps // 2]
    for x, std in ((middle, float(gaussian.std(t))), (out, gaussian.data_std)):
        assert abs(x.mean()) < 3 * std / math.sqrt(n)
        assert abs(x.var() / std**2 - 1) < 3 * math.sqrt(2 / n)


def tanh_field(x, t):
    return torch.tanh(3 * x) * (1 + 2 * t[:, None]) - x.roll(1, 1) * torch.cos(5 * t)[:, None]


def test_adaptive_solver_equals_torchdiffeq():
    from torchdiffeq import odeint

    x = initial_noise(range(6), (3,), dtype=torch.float64)
    expected = odeint(
        lambda t, x: tanh_field(x, t.expand(6)), x, torch.tensor([1.0, 0.0]).double(), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(dopri5(tanh_field, x, [1, 0], rtol=1e-7, atol=1e-7), expected[-1], atol=1e-5, rtol=0)


def test_adaptive_solver_controls_the_error_of_each_sample_by_itself():
    x = initial_noise(range(6), (3,), dtype=torch.float64) * torch.tensor([[1.0], [1], [1], [1], [1], [40]])
    stiff = lambda x, t: tanh_field(x, t) * (1 + x.abs().mean(1, keepdim=True))  # noqa: E731
    together = dopri5(stiff, x, [1, 0])
    alone = torch.cat([dopri5(stiff, row, [1, 0]) for row in x.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)
    with pytest.raises(ConfigError, match="after 3 steps"):
        dopri5(stiff, x, [1, 0], max_steps=3)


def toy_eps(x, t):
    """A noise model that is no Gaussian's, so that no error cancels."""
    return torch.tanh(x.roll(1, -1) * (1 + t.reshape(-1, 1, 1, 1))) + 0.3 * x


def diffusers_samples(scheduler, x, seeds, steps):
    generators = [torch.Generator().manual_seed(s ^ samplers.NOISE_STREAM) for s in seeds]
    scheduler.set_timesteps(steps)
    for k in scheduler.timesteps:
        eps = toy_eps(x, ((k + 1) / 1000).expand(len(x)).to(x))
        x = scheduler.step(eps, k, x, **({"generator": generators} if seeds else {})).prev_sample
    return x


@pytest.mark.parametrize("schedule,beta", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_and_ddim_equal_diffusers_with_the_same_noise(schedule, beta, steps):
    from diffusers import DDIMScheduler, DDPMScheduler

    seeds, path, ts = [3, 4], DDPMPath(schedule), time_grid(steps)
    x = initial_noise(seeds, (2, 4, 4))
    common = {"beta_schedule": beta, "timestep_spacing": "trailing", "clip_sample": False}
    pairs = [
        (ddpm(toy_eps, x, ts, path=path, seeds=seeds), DDPMScheduler(**common), seeds),
        (ddim(toy_eps, x, ts, path=path), DDIMScheduler(**common), []),
    ]
    for ours, scheduler, noise in pairs:
        expected = diffusers_samples(scheduler, x, noise, steps)
        scale = expected.abs().max()
        torch.testing.assert_close(
            ours / scale, expected / scale, atol=1e-5, rtol=0, msg=lambda m, s=scheduler: f"{s}{m}"
        )


def test_learned_variance_interpolates_its_bounds():
    x, path, noises = initial_noise([1, 2], (1, 2, 2)), DDPMPath(), {}
    a, b, low, high = path.posterior(samplers._at(0.5), samplers._at(0.4))
    x0, _ = path.x0_and_eps(toy_eps(x, torch.full((2,), 0.5)), x, samplers._at(0.5), "eps")
    for share in (-1.0, 0.0, 1.0):
        model = lambda x, t: torch.cat([toy_eps(x, t), torch.full_like(x, share)], 1)  # noqa: B023, E731
        one = ddpm(model, x, [0.5, 0.4], seeds=[1, 2], learned_variance=True)
        noises[share] = (one - a * x - b * x0) / (low ** ((1 - share) / 4) * high ** ((1 + share) / 4))
    torch.testing.assert_close(noises[-1.0], noises[0.0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noises[1.0], noises[0.0], atol=1e-4, rtol=1e-4)
    plain = ddpm(toy_eps, x, [0.5, 0.4], seeds=[1, 2])
    torch.testing.assert_close((plain - a * x - b * x0) / low.sqrt(), noises[-1.0], atol=1e-4, rtol=1e-4)


def test_meanflow_is_exact_in_any_number_of_steps_on_the_closed_form(gaussian_of):
    gaussian = gaussian_of(LinearPath())

    def u(x, t, r):
        return x * (1 - gaussian.std(r) / gaussian.std(t))[:, None] / (t - r)[:, None]

    x = initial_noise(range(4), (3,), dtype=torch.float64)
    for steps in (1, 2, 7):
        torch.testing.assert_close(samplers.meanflow(u, x, time_grid(steps)), gaussian.flow(x, 1.0, 0.0))


# One image, one seed ------------------------------------------------------------------------------------------------

SHAPE = (4, 8, 8)
SAMPLERS = {
    "euler": euler,
    "heun": samplers.heun,
    "rk4": samplers.rk4,
    "dopri5": partial(dopri5, rtol=1e-3, atol=1e-3),
    "ddpm": partial(ddpm, path=LinearPath(), prediction="v"),
    "ddim": partial(ddim, path=LinearPath(), prediction="v"),
    "euler_maruyama": euler_maruyama,
    "meanflow": samplers.meanflow,
}


@pytest.fixture(scope="module")
def network():
    return small_dit(num_classes=5, interval=True).eval()


def images(network, sampler, seeds, batch_size, dtype):
    parts = []
    for start in range(0, len(seeds), batch_size):
        part = list(seeds[start : start + batch_size])
        y = torch.tensor([s % 5 for s in part])
        guidance = ClassifierFree(y, 5, scale=1.5, low=0.2, high=0.9)
        x = initial_noise(part, SHAPE, dtype=dtype)
        parts.append(sampler(network, x, time_grid(4), guidance=guidance, seeds=part))
    return torch.cat(parts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_image_for_the_same_seed_at_batch_1_7_and_64(network, name):
    # MeanFlow's network runs with r, and the adaptive solver passes a time for each sample: guidance handles both.
    sampler = SAMPLERS[name]
    seeds, before = list(range(40, 104)), torch.get_rng_state()
    count = {1: 2, 7: 14}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1 / 127.5)):
        model = network.to(dtype)
        whole = images(model, sampler, seeds, 64, dtype)
        assert whole.std() > 0.1 and whole.dtype == dtype and not whole.requires_grad
        for batch_size in (1, 7):
            part = images(model, sampler, seeds[: count[batch_size]], batch_size, dtype)
            assert (part - whole[: len(part)]).abs().max() < tolerance
        assert torch.equal(images(model, sampler, seeds[:7], 7, dtype), part[:7])  # the same shape: the same bits
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_on_the_way_is_not_the_noise_at_the_start():
    start = initial_noise([5], (2000,))
    later = samplers._Field(None, None, [5]).noise(start)
    assert abs(float((start * later).mean())) < 3 / math.sqrt(2000)


def test_half_precision_state_gets_exact_times():
    seen = []
    euler(lambda x, t: seen.append(t) or x, torch.ones(1, 1, dtype=torch.bfloat16), time_grid(1000))
    assert seen[0].dtype == torch.float32 and len({float(t) for t in seen}) == 1000
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert dopri5(lambda x, t: -x, x, [1.0, 0.0], rtol=0.1, atol=0.1).dtype == torch.bfloat16


def test_callback_sees_every_step_and_a_learned_variance_is_dropped():
    seen, x = [], torch.ones(2, 1)
    plain = euler(lambda x, t: x, x, time_grid(4), callback=lambda i, t, x: seen.append((i, t, x.shape)))
    assert seen == [(0, 0.75, (2, 1)), (1, 0.5, (2, 1)), (2, 0.25, (2, 1)), (3, 0.0, (2, 1))]
    torch.testing.assert_close(euler(lambda x, t: torch.cat([x, 100 * x], 1), x, time_grid(4)), plain)


IDENTITY, FOUR = (lambda x, t: x), time_grid(4)
NOISE = [
    (partial(sampler, IDENTITY, ts=FOUR, path=LinearPath(), prediction=prediction), r"x is pure noise.*t_max=1 - 1e-3")
    for sampler in (ddim, ddpm, euler_maruyama)
    for prediction in ("eps", "score")
]
TIMES = [
    (partial(ddim, IDENTITY, ts=ts), rf"ts must decrease within \[0, 1\].*{ts[0]}")
    for ts in ([0, 0.5, 1], [999, 500, 0], [1.0, math.nan, 0.0], [1.0], [0.5, 0.5], [1.0, -0.1])
]


@pytest.mark.parametrize(("call", "words"), [
    *NOISE,
    *TIMES,
    (lambda x: time_grid(0), "at least 1"),
    (partial(ddpm, IDENTITY, ts=FOUR), "seeds=, one for each of the 2 samples"),
    (partial(euler, lambda x, t: x.expand(-1, 3), ts=FOUR), r"returned \(2, 3\).* takes 1 channels, or 2"),
    (partial(ddpm, IDENTITY, ts=FOUR, seeds=[0, 1], learned_variance=True), "learn_sigma"),
    (partial(dopri5, lambda x, t: x * math.nan, ts=[1.0, 0.0], max_steps=2), "NaN"),
])  # fmt: skip
def test_misuse_is_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call(x=torch.ones(2, 1))
