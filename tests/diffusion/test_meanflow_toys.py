"""MeanFlow learns to sample in one step: a set of points in the plane."""

import torch
from scipy.optimize import linear_sum_assignment

from dispersive_kit.data.toy import TOY_SETS, sample_toy
from dispersive_kit.diffusion.objectives import FlowMatching, MeanFlow
from dispersive_kit.diffusion.samplers import heun, initial_noise, meanflow, time_grid
from dispersive_kit.models.mlp import MLP

# In two dimensions |error|^2 hardly concentrates, and the weight of power 1 would pull the minimiser off the mean.
# With r = t in a quarter of the samples the velocity itself, and so the 32 steps, are learnt too slowly.
MEANFLOW = MeanFlow(power=0.0, equal_share=0.6, t_sampling="uniform")


def trained(objective, seed=0, steps=400):
    torch.manual_seed(seed)
    model = MLP(hidden_size=64, depth=3, time_scale=10.0, interval=isinstance(objective, MeanFlow))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss, _ = objective(model, TOY_SETS["spirals"](256, generator)[0], generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def w2(x, real):
    """Exact 2-Wasserstein distance of two point sets of equal size."""
    cost = torch.cdist(x.double(), real.double()) ** 2
    return float(cost[linear_sum_assignment(cost.numpy())].mean().sqrt())


def test_one_step_is_nearly_as_good_as_32_and_those_as_flow_matching():
    one_step, flow = trained(MEANFLOW), trained(FlowMatching())
    noise, real = initial_noise(range(1024), (2,)), sample_toy("spirals", 1024, seed=100)[0]
    one, many = (w2(meanflow(one_step, noise, time_grid(n)), real) for n in (1, 32))
    assert one <= 1.3 * many
    assert many <= 1.5 * w2(heun(flow, noise, time_grid(50)), real)
