"""Objectives: their minimisers on a Gaussian target, what they draw, and the terms of DDPM."""

import math

import pytest
import torch
from nets import randomised

from dispersive_kit.diffusion.objectives import DDPM, Draws, FlowMatching, MeanFlow
from dispersive_kit.diffusion.paths import PREDICTIONS, DDPMPath, VPPath, expand
from dispersive_kit.errors import ConfigError
from dispersive_kit.models.dit import build_dit
from dispersive_kit.models.mlp import MLP

OBJECTIVES = [FlowMatching(), FlowMatching(t_sampling="logit_normal"), DDPM(), MeanFlow(t_sampling="uniform")]


def scaled(gaussian, kind, scale):
    model = gaussian.model(kind)
    return lambda x, t: scale * model(x, t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_conditional_mean_minimises_flow_matching(gaussian, generator, prediction):
    """At the closed-form mean m x, d loss / d scale = E[2 w (m x - target) m x] vanishes, within three standard
    errors.
    """
    x0 = gaussian.data_std * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    objective = FlowMatching(gaussian.path, prediction)
    draws = objective.draw(x0, generator)
    draws = Draws(t=0.02 + 0.96 * draws.t, eps=draws.eps)  # the ends have infinite variance for some predictions
    losses = [objective(scaled(gaussian, prediction, c), x0, draws=draws)[1].per_sample for c in (0.9, 1, 1.1)]
    slope = (losses[2] - losses[0]) / 0.2
    assert abs(slope.mean()) < 3 * slope.std() / math.sqrt(len(slope))
    assert losses[1].mean() < min(losses[0].mean(), losses[2].mean())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_conditional_mean_minimises_ddpm(gaussian_of, generator, schedule):
    gaussian = gaussian_of(DDPMPath(schedule))
    x0 = gaussian.data_std * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    objective = DDPM(gaussian.path)
    draws = objective.draw(x0, generator)
    low, best, high = (objective(scaled(gaussian, "eps", c), x0, draws=draws)[0] for c in (0.9, 1, 1.1))
    assert best < min(low, high) and abs(high - low) < 0.02 * (high - best)


def test_the_average_velocity_minimises_meanflow(gaussian_of, generator):
    """u = (x_t - x_r) / (t - r) along the exact flow is a fixed point: its gradient vanishes within three
    standard errors.
    """
    gaussian, scale = gaussian_of(FlowMatching().path), None

    def model(x, t, r):
        t, r = expand(t, x), expand(r, x)
        s2 = gaussian.data_std**2
        std_t, std_r = (((1 - u) ** 2 * s2 + u**2).sqrt() for u in (t, r))
        return scale * x * (1 - std_r / std_t) / (t - r)

    x0 = gaussian.data_std * torch.randn(100_000, 1, generator=generator, dtype=torch.float64)
    objective = MeanFlow(equal_share=0.0, power=0.0, t_sampling="uniform")
    draws = objective.draw(x0, generator)
    keep = draws.t - draws.r > 0.05
    x0, draws = x0[keep], draws[keep]

    def slope(scaled_by, rows):
        nonlocal scale
        scale = torch.tensor(scaled_by, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(objective(model, x0[rows], draws=draws[rows])[0], scale)[0]

    parts = torch.stack([slope(1.0, rows) for rows in torch.arange(len(x0)).chunk(50)])
    error = parts.std() / math.sqrt(len(parts))
    assert abs(parts.mean()) < 3 * error and slope(1.1, slice(None)) > 20 * error


def test_meanflow_target_has_the_total_derivative_of_the_network():
    """The same loss from central differences along (v, 1) in place of forward-mode differentiation."""
    options = {"input_size": 4, "num_classes": 3, "depth": 2, "interval": True, "checkpointing": True}
    model = randomised(build_dit("DiT-T/2", **options).double())
    torch.manual_seed(0)
    x0, y = torch.randn(4, 4, 4, 4).double(), torch.tensor([0, 1, 2, 3])
    objective = MeanFlow(equal_share=0.25)
    draws = objective.draw(x0, torch.Generator().manual_seed(3))
    loss, aux = objective(model, x0, y, draws=draws, taps=(0, 1))
    t, r, h = draws.t, draws.r, 1e-5
    x, v = objective.path.x_t(x0, draws.eps, t), draws.eps - x0
    with torch.no_grad():
        u = model(x, t, y, r=r)
        du_dt = (model(x + h * v, t + h, y, r=r) - model(x - h * v, t - h, y, r=r)) / (2 * h)
        error = (u - (v - expand(t - r, x) * du_dt)).square().flatten(1)
    torch.testing.assert_close(aux.per_sample, error.mean(1), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(loss, (error.sum(1) / (error.sum(1) + 1e-3)).mean(), atol=1e-7, rtol=1e-6)
    # The taps, and their gradient, are those of an ordinary forward pass.
    weight = model.blocks[0].mlp.fc1.weight
    _, taps = model(x, t, y, r=r, taps=(0, 1))
    slopes = [torch.autograd.grad(sum(z.square().mean() for z in zs), weight)[0] for zs in (aux.taps, taps)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().max() > 0
    for ours, theirs in zip(aux.taps, taps, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_slices_of_the_draws_give_the_losses_of_the_whole_and_no_global_number_is_drawn(objective, generator):
    model, x0 = MLP(interval=True), torch.randn(8, 2, generator=generator)
    before, draws = torch.get_rng_state(), objective.draw(x0, generator)
    _, whole = objective(model, x0, draws=draws)
    parts = [objective(model, x0[a : a + 2], draws=draws[a : a + 2])[1] for a in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat([p.per_sample for p in parts]), whole.per_sample)
    torch.testing.assert_close(torch.cat([p.t for p in parts]), whole.t)
    assert whole.per_sample.requires_grad is False and whole.t.shape == (8,)
    twice = [objective(model, x0, generator=torch.Generator().manual_seed(7))[0] for _ in range(2)]
    assert torch.equal(*twice) and torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="give draws= or generator="):
        objective(model, x0)


def test_times_are_drawn_from_the_named_distributions(generator):
    x0 = torch.zeros(40_000, 1, dtype=torch.float64)
    uniform = FlowMatching(VPPath()).draw(x0, generator).t
    assert uniform.min() >= 1e-5 and abs(uniform.mean() - 0.5) < 3 * 0.2887 / 200
    logit = FlowMatching(t_sampling="logit_normal").draw(x0, generator).t.logit()
    assert abs(logit.mean()) < 3 / 200 and abs(logit.std() - 1) < 3 / 200
    draws = MeanFlow(equal_share=0.0).draw(x0, generator)
    assert abs((draws.t.logit() + draws.r.logit()).mean() / 2 + 0.4) < 3 / 200
    draws = MeanFlow().draw(x0, generator)
    assert (draws.r <= draws.t).all()
    assert abs((draws.r == draws.t).double().mean() - 0.75) < 3 * 0.433 / 200
    steps = DDPM().draw(x0, generator).t * 1000
    torch.testing.assert_close(steps, steps.round())
    assert steps.round().min() == 1 and steps.round().max() == 1000


def hybrid(model_out, x0, k, eps, T=1000):
    """DDPM with learned sigma, restated with torch.distributions from the betas; k are the papers' timesteps."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    posterior = beta * (1 - before) / (1 - alpha_bar)
    low = torch.cat([posterior[1:2], posterior[1:]])
    terms = []
    for i, j in enumerate(k.tolist()):
        x = alpha_bar[j].sqrt() * x0[i] + (1 - alpha_bar[j]).sqrt() * eps[i]
        pred, share = model_out[i].chunk(2)
        x0_pred = (x - (1 - alpha_bar[j]).sqrt() * pred) / alpha_bar[j].sqrt()
        b = before[j].sqrt() * beta[j] / (1 - alpha_bar[j])
        a = (1 - beta[j]).sqrt() * (1 - before[j]) / (1 - alpha_bar[j])
        variance = ((share + 1) / 2 * beta[j].log() + (1 - share) / 2 * low[j].log()).exp()
        ours = torch.distributions.Normal(b * x0_pred + a * x, variance.sqrt())
        if j == 0:
            level = ((x0[i] + 1) * 127.5).round()
            upper = torch.where(level == 255, 1.0, ours.cdf(x0[i] + 1 / 255))
            bound = -(upper - torch.where(level == 0, 0.0, ours.cdf(x0[i] - 1 / 255))).log()
        else:
            truth = torch.distributions.Normal(b * x0[i] + a * x, low[j].sqrt())
            bound = torch.distributions.kl_divergence(truth, ours)
        terms.append((pred - eps[i]).square().mean() + bound.mean() / math.log(2))
    return torch.stack(terms).mean()


def test_learned_sigma_is_the_hybrid_loss_of_the_paper(generator):
    x0 = torch.randint(256, (6, 3, 2, 2), generator=generator).double() / 127.5 - 1
    x0[0, 0], x0[1, 0] = -1.0, 1.0
    k = torch.tensor([0, 0, 1, 17, 500, 999])
    eps = torch.randn(6, 3, 2, 2, generator=generator, dtype=torch.float64)
    out = torch.randn(6, 6, 2, 2, generator=generator, dtype=torch.float64) * 0.5
    out.requires_grad_()
    loss, aux = DDPM(learn_sigma=True)(lambda x, t: out, x0, draws=Draws(t=(k + 1) / 1000.0, eps=eps))
    torch.testing.assert_close(loss, hybrid(out, x0, k, eps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(aux.per_sample, (out[:, :3] - eps).square().flatten(1).mean(1).detach())
    (gradient,) = torch.autograd.grad(loss, out)
    simple = 2 * (out[:, :3] - eps) / (6 * 12)
    torch.testing.assert_close(gradient[:, :3], simple.detach())  # the bound trains the variance alone
    assert (gradient[:, 3:].abs() > 0).any()


def test_disagreement_about_learned_sigma_is_named(generator):
    x0 = torch.zeros(2, 4, 4, 4)
    twice = lambda x, t: torch.cat([x, x], 1)  # noqa: E731
    for call, words in (
        (lambda: FlowMatching()(twice, x0, generator=generator), r"expects 4 channels .* returned \(2, 8, 4, 4\)"),
        (lambda: DDPM(learn_sigma=True)(lambda x, t: x, x0, generator=generator), "expects 8 channels"),
        (lambda: MeanFlow()(twice, x0, draws=FlowMatching().draw(x0, generator)), "with r"),
        (lambda: FlowMatching(prediction="u"), "is unknown"),
        (lambda: FlowMatching(t_sampling="beta").draw(x0, generator), "'uniform' or 'logit_normal'"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


@pytest.mark.parametrize("objective", [*OBJECTIVES, DDPM(learn_sigma=True)])
def test_half_precision_images_have_exact_times_and_a_finite_loss(objective, generator):
    interval = isinstance(objective, MeanFlow)
    learn_sigma = getattr(objective, "learn_sigma", False)
    model = build_dit("DiT-T/2", input_size=8, depth=1, num_classes=5, learn_sigma=learn_sigma, interval=interval)
    x0, y = torch.randn(16, 4, 8, 8, generator=generator).bfloat16(), torch.arange(16) % 5
    draws = objective.draw(x0, generator)
    assert draws.t.dtype == torch.float32 and draws.eps.dtype == torch.bfloat16
    assert len(objective.draw(torch.zeros(20_000, 1).bfloat16(), generator).t.unique()) > 990
    loss, aux = objective(model.bfloat16(), x0, y, draws=draws)
    exact, _ = objective(model.float(), x0.float(), y, draws=Draws(draws.t, draws.eps.float(), draws.r))
    assert loss.dtype == aux.per_sample.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.05)
