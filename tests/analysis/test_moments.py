"""Streamed moments: the same as from all rows at once, whatever the batches; unbiased where they say so."""

from itertools import permutations

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dispersive_kit.analysis import Moments
from dispersive_kit.errors import DataError

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 90, 6, generator=GENERATOR, dtype=torch.float64) * torch.arange(1.0, 7) + 50
LABELS = torch.arange(90) % 4


def streamed(x: torch.Tensor, sizes: tuple[int, ...], labels: torch.Tensor = LABELS, classes: int = 4) -> Moments:
    moments = Moments(classes)
    for part, own in zip(x.split(sizes, -2), labels.split(sizes), strict=True):
        moments.update(part, own)
    return moments


@pytest.mark.parametrize("sizes", [(90,), (1, 89), (40, 40, 10)])
def test_batches_of_any_size_give_the_covariance_of_all_rows(sizes):
    moments = streamed(X, sizes)
    assert torch.allclose(moments.mean, X.mean(1))
    assert torch.allclose(moments.covariance, torch.stack([torch.cov(x.T) for x in X]), rtol=1e-10)
    k = (X - X.mean(1, keepdim=True)).square().sum(-1)
    assert torch.allclose(torch.stack(moments.norms()), torch.stack([k.sum(1), k.square().sum(1)]), rtol=1e-10)
    assert torch.allclose(moments.participation_ratio(), streamed(X, (90,)).participation_ratio(), rtol=1e-9)


def test_the_mean_pairwise_distance_is_twice_the_trace_over_the_dimension():
    apart = torch.stack([torch.pdist(x).square().mean() / 6 for x in X])
    assert torch.allclose(streamed(X, (50, 40)).mean_pairwise(), apart)


def test_a_large_mean_costs_float32_rows_their_digits_and_not_the_streamed_ones():
    x = (X[0] / 100 + 3000).float()
    exact = 2 * x.double().var(0).mean()
    naive = 2 * (x.square().mean(0) - x.mean(0).square()).mean() * 90 / 89
    assert abs(float(streamed(x, (45, 45)).mean_pairwise() / exact) - 1) < 1e-10
    assert abs(float(naive / exact) - 1) > 1e-2
    pairs = torch.cdist(x, x).square().sum() / (90 * 89 * 6)  # in float32, through the Gram matrix
    assert abs(float(pairs / exact) - 1) > 1e-2


def test_raw_cosine_of_orthonormal_rows_is_0_and_of_one_row_repeated_1():
    assert float(streamed(torch.eye(8), (3, 5), LABELS[:8]).mean_cosine()) == pytest.approx(0)
    assert float(streamed(torch.ones(8, 3), (3, 5), LABELS[:8]).mean_cosine()) == pytest.approx(1)


def test_the_participation_ratio_is_the_mean_over_all_quadruples():
    x = X[0, :6, :3]
    products, squares = [], []
    for a, b, c, e in permutations(x, 4):
        squares.append((a - b).square().sum() * (c - e).square().sum())
        products.append(((a - b) @ (c - e)).square())
    expected = torch.stack(squares).mean() / torch.stack(products).mean()
    assert float(streamed(x, (2, 4), LABELS[:6]).participation_ratio()) == pytest.approx(float(expected))


def test_the_participation_ratio_of_few_rows_is_near_the_truth_where_the_plain_one_is_not():
    x = torch.randn(200, 16, 64, generator=GENERATOR, dtype=torch.float64)
    moments = streamed(x, (16,), LABELS[:16])
    plain = moments.scatter.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / moments.scatter.square().sum((-2, -1))
    assert float(moments.participation_ratio().median()) == pytest.approx(64, rel=0.06)
    assert float(plain.max()) < 15


def test_class_scatter_is_that_of_discriminant_analysis():
    between = streamed(X, (40, 50)).class_scatter()[1][0]
    within = streamed(X, (40, 50)).class_scatter()[0][0]
    lda = LinearDiscriminantAnalysis(solver="eigen", store_covariance=True).fit(X[0].numpy(), LABELS.numpy())
    assert torch.allclose(within, torch.from_numpy(lda.covariance_))
    assert torch.allclose(within + between, torch.cov(X[0].T, correction=0))


def test_collapsed_classes_have_no_nc1_and_an_endless_fisher_ratio():
    centres = torch.eye(4, dtype=torch.float64)
    wide, narrow = (streamed(centres[LABELS] + s * X[0, :, :4] / 100, (90,)) for s in (1.0, 0.01))
    assert float(narrow.nc1()) == pytest.approx(1e-4 * float(wide.nc1()), rel=0.1)
    assert float(narrow.fisher_ratio()) > 1e3 * float(wide.fisher_ratio())


def test_nc1_of_isotropic_noise_around_a_simplex_is_the_closed_form():
    centres, s = torch.eye(4, dtype=torch.float64), 0.1
    rows = torch.cat([centres + s * e for e in (*torch.eye(4), *-torch.eye(4))]).double()
    moments = streamed(rows, (len(rows),), torch.arange(4).repeat(8))
    # S_W = s^2 / 4 I on 4 axes, S_B = (I - 11^T / 4) / 4 of rank 3: tr(S_W S_B^+) = 3 s^2
    assert float(moments.nc1()) == pytest.approx(3 * s**2 / 4)
    assert float(moments.fisher_ratio()) == pytest.approx((3 / 4) / s**2)


def test_one_row_has_no_covariance():
    with pytest.raises(DataError, match="at least 2"):
        streamed(X[0, :1], (1,), LABELS[:1]).covariance  # noqa: B018
