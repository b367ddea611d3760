"""Measures of one set of features: closed forms, invariances, and the traps they are known for."""

import copy
import math
from itertools import permutations

import pytest
import skdim
import torch
from nets import normal
from scipy.special import hyp0f1
from scipy.stats import f_oneway
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from dispersive_kit.analysis import (
    Split,
    cka_matrix,
    encoder,
    extract,
    geometry,
    gradient_pull,
    mutual_knn,
    projection,
    sweep,
)
from dispersive_kit.analysis.sweep import _grid_measures
from dispersive_kit.diffusion.objectives import FlowMatching
from dispersive_kit.errors import DataError
from dispersive_kit.training.batches import DeviceSet


def simplex(B: int) -> torch.Tensor:
    return torch.eye(B, dtype=torch.float64)


def test_the_cosine_is_about_the_mean_or_one_large_channel_would_make_it_one():
    x = normal(2000, 64)
    x[:, 0] += 3000
    assert float(geometry.mean_cosine(x)) == pytest.approx(-0.0005, abs=1e-4)
    assert float(geometry.mean_cosine(simplex(9))) == pytest.approx(-1 / 8)


def test_signal_to_noise_is_the_analysis_of_variance():
    x = normal(3, 40, 1, seed=1) + 2 * normal(40, 1, seed=2)
    expected = (f_oneway(*x[..., 0].T.numpy()).statistic - 1) / 3
    assert float(geometry.signal_to_noise(x)) == pytest.approx(expected)


@pytest.mark.parametrize(("dim", "embedded"), [(2, 10), (5, 40)])
def test_two_nn_agrees_with_scikit_dimension(dim, embedded):
    x = normal(800, dim, seed=dim) @ normal(dim, embedded, seed=9)
    theirs = skdim.id.TwoNN(discard_fraction=0.1).fit(x.numpy()).dimension_
    assert float(geometry.two_nn(x)) == pytest.approx(theirs, rel=1e-6)
    assert float(geometry.two_nn(1000 + x)) == pytest.approx(theirs, rel=1e-4)


def test_tokens_of_two_halves_have_structure_and_independent_ones_none():
    side = torch.arange(8).repeat(8) < 4  # left half of an 8 x 8 grid
    z = torch.where(side[None, :, None], normal(50, 1, 32, seed=1), normal(50, 1, 32, seed=2))
    assert float(geometry.token_structure(z)) > 0.4
    assert float(geometry.token_structure(normal(50, 64, 32))) == pytest.approx(0, abs=0.01)


def test_a_fixed_position_code_is_no_structure():
    z = normal(50, 64, 32)
    code = torch.linspace(-9, 9, 64, dtype=torch.float64)[:, None] * normal(1, 32)
    assert float(geometry.token_structure(z + code)) == pytest.approx(float(geometry.token_structure(z)), abs=1e-9)


@pytest.mark.parametrize(("dim", "value"), [(2, -1.57503), (768, -3.98958)])
def test_a_uniform_cloud_is_at_the_floor_of_uniformity_which_sees_neither_scale_nor_mean(dim, value):
    floors = [-2 * t + math.log(hyp0f1(dim / 2, t * t)) for t in (0.5, 2.0)]
    x = normal(1000, dim)
    assert floors[1] == pytest.approx(value, abs=2e-5)
    assert geometry.uniformity(x, (0.5, 2.0)).tolist() == pytest.approx(floors, abs=0.03 if dim == 2 else 5e-3)
    assert geometry.uniformity(7 * x + 100).tolist() == pytest.approx(geometry.uniformity(x).tolist(), abs=1e-9)


def test_saturation_of_a_simplex_is_the_closed_form():
    B, dim, tau = 16, 64, 0.5
    z = torch.zeros(B, dim, dtype=torch.float64)
    z[:, :B] = 6 * simplex(B)
    found = _grid_measures([z.reshape(B, 16, 4)])
    gap, mass = float(found["saturation_gap"]), float(found["off_diagonal_mass"])
    assert gap == pytest.approx(math.log(1 / B + (1 - 1 / B) * math.exp(-2 * 36 / dim / tau)) + math.log(B))
    assert mass == pytest.approx(1 - math.exp(-gap))


@pytest.mark.parametrize("rank", [geometry.rankme, geometry.entropy_rank])
def test_a_flat_spectrum_of_rank_r_has_rank_r(rank):
    x = torch.zeros(14, 20, dtype=torch.float64)
    x[:7, :7], x[7:, :7] = simplex(7), -simplex(7)  # seven axes, both ways: mean zero
    assert float(rank(geometry.spectrum(x))) == pytest.approx(7)
    turned, _ = torch.linalg.qr(normal(20, 20))
    assert float(rank(geometry.spectrum(3 * x @ turned + 5))) == pytest.approx(7)


X = normal(3, 90, 6) * torch.arange(1.0, 7) + 50
LABELS = torch.arange(90) % 4


def test_the_mean_pairwise_distance_is_twice_the_trace_over_the_dimension_also_of_float32_rows_far_away():
    apart = torch.stack([torch.pdist(x).square().mean() / 6 for x in X])
    assert torch.allclose(geometry.mean_pairwise(X), apart)
    x = (X[0] / 100 + 3000).float()
    exact = 2 * x.double().var(0).mean()
    assert float(geometry.mean_pairwise(x)) == pytest.approx(float(exact), rel=1e-10)
    pairs = torch.cdist(x, x).square().sum() / (90 * 89 * 6)  # in float32, through the Gram matrix
    assert abs(float(pairs / exact) - 1) > 1e-2


def test_the_participation_ratio_is_the_mean_over_all_quadruples():
    x = X[0, :6, :3]
    products, squares = [], []
    for a, b, c, e in permutations(x, 4):
        squares.append((a - b).square().sum() * (c - e).square().sum())
        products.append(((a - b) @ (c - e)).square())
    expected = torch.stack(squares).mean() / torch.stack(products).mean()
    assert float(geometry.participation_ratio(x)) == pytest.approx(float(expected))


def test_class_scatter_is_that_of_discriminant_analysis():
    within, between = geometry.class_scatter(X, LABELS)
    lda = LinearDiscriminantAnalysis(solver="eigen", store_covariance=True).fit(X[0].numpy(), LABELS.numpy())
    assert torch.allclose(within[0], torch.from_numpy(lda.covariance_))
    assert torch.allclose(within + between, torch.stack([torch.cov(x.T, correction=0) for x in X]))


def test_nc1_of_isotropic_noise_around_a_simplex_is_the_closed_form():
    centres, s = torch.eye(4, dtype=torch.float64), 0.1
    rows = torch.cat([centres + s * e for e in (*torch.eye(4), *-torch.eye(4))]).double()
    scatter = geometry.class_scatter(rows, torch.arange(4).repeat(8))
    # S_W = s^2 / 4 I on 4 axes, S_B = (I - 11^T / 4) / 4 of rank 3: tr(S_W S_B^+) = 3 s^2
    assert float(geometry.nc1(*scatter, 4)) == pytest.approx(3 * s**2 / 4)
    assert float(geometry.fisher_ratio(*scatter)) == pytest.approx((3 / 4) / s**2)


class Linear(nn.Module):
    """v = W2 W1 x, tapped after each product."""

    null_label = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)).double()
        for block in self.blocks:
            block.weight.data.normal_(0, 0.2, generator=generator)

    def forward(self, x, t, y=None, taps=()):
        first = self.blocks[0](x.flatten(1).double())
        second = self.blocks[1](first)
        return second.view_as(x), [first, second]


def closed_forms(model, batch, tau):
    """(dispersive, denoising) gradients at both taps: facts of the l2 form, and of a mean square."""
    x_t = FlowMatching().path.x_t(batch.x0, batch.draws.eps, batch.draws.t).flatten(1).double()
    w1, w2 = (block.weight.detach() for block in model.blocks)
    features = x_t @ w1.T, x_t @ w1.T @ w2.T
    target = (batch.draws.eps - batch.x0).flatten(1).double()
    at_end = 2 * (features[1] - target) / target.numel()
    denoise = at_end @ w2, at_end
    spread = []
    for z in features:
        p = torch.softmax(-torch.cdist(z, z).square().flatten() / 64 / tau, 0).view(len(z), -1)
        spread.append(-4 / (tau * 64) * (p.sum(1, keepdim=True) * z - p @ z))
    return spread, denoise


def test_ratio_and_cosine_are_those_of_the_closed_forms(digits):
    model, bins = Linear(), 4
    pull = gradient_pull(model, digits, batches=1)
    batch = DeviceSet.of(digits, "cpu").batch(FlowMatching(), seed=0, step=0, size=64, null_label=None, drop_prob=0.1)
    part = (batch.draws.t * bins).long()
    for b, (d, g) in enumerate(zip(*closed_forms(model, batch, 0.5), strict=True)):
        for k in range(bins):
            dk, gk = 0.5 * d[part == k].flatten(), g[part == k].flatten()
            assert float(pull.ratio[k, b]) == pytest.approx(float(dk.norm() / gk.norm()), rel=1e-5)
            assert float(pull.cosine[k, b]) == pytest.approx(float(dk @ gk / dk.norm() / gk.norm()), abs=1e-6)


ROWS = normal(2, 12, 5)
ENTRIES = {
    "mean pairwise distance": geometry.mean_pairwise,
    "mean cosine": geometry.mean_cosine,
    "uniformity": geometry.uniformity,
    "signal to noise": geometry.signal_to_noise,
    "spectrum": geometry.spectrum,
    "two nn": geometry.two_nn,
    "token structure": lambda x: geometry.token_structure(x[:, :9]),
    "participation ratio": geometry.participation_ratio,
    "class scatter": lambda x: geometry.class_scatter(x, torch.arange(12) % 3),
    "cka": cka_matrix,
    "cka with another": lambda x: cka_matrix(ROWS, x),
    "neighbours": lambda x: mutual_knn(x, k=3),
    "probe": lambda x: Split(x, torch.arange(12)),
    "pca": lambda x: projection.pca(x[0]),
    "token maps": lambda x: projection.token_maps({"a": x[:, :9]}),
    "umap": lambda x: projection.umap(x[0]),
    "umap over stages": lambda x: projection.aligned_umap([x[0], x[0]]),
    "trustworthiness": lambda x: projection.trustworthiness(x[0], ROWS[0, :, :2].numpy(), neighbours=3),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_number_is_made_of_nan(entry, bad):
    x = ROWS.clone()
    x[0, 3, 1] = bad
    with pytest.raises(DataError, match="hold NaN or infinite values"):
        ENTRIES[entry](x)


@pytest.mark.parametrize("of", [sweep, gradient_pull, lambda model, data: extract(encoder(model), data.images)])
def test_no_map_is_made_of_a_network_that_gives_nan(of, network, digits):
    broken = copy.deepcopy(network)
    broken.blocks[2].mlp.fc1.weight.data[0, 0] = math.nan
    with pytest.raises(DataError, match="hold NaN or infinite values"):
        of(broken, digits)
