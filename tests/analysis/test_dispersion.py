"""Measures of one set of features: closed forms, invariances, and the traps they are known for."""

import math

import pytest
import skdim
import torch
from scipy.stats import f_oneway

from dispersive_kit.analysis import dispersion as d
from dispersive_kit.errors import DataError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(B: int) -> torch.Tensor:
    return torch.eye(B, dtype=torch.float64)


def test_rms_scales_and_the_share_of_the_largest_channel_does_not():
    square = torch.tensor([4.0, 1.0, 1.0, 2.0])
    rms, share = d.channel_scale(square)
    scaled = d.channel_scale(9 * square)
    assert (float(rms), float(share)) == (pytest.approx(2**0.5), 0.5)
    assert (float(scaled[0]), float(scaled[1])) == (pytest.approx(3 * 2**0.5), 0.5)


def test_one_large_mean_channel_makes_every_raw_cosine_one_and_no_centred_one():
    x = normal(2000, 64)
    x[:, 0] += 3000
    raw = torch.nn.functional.normalize(x, dim=1)
    raw = (raw.sum(0).square().sum() - 2000) / (2000 * 1999)
    assert float(raw) > 0.9999
    assert float(d.mean_cosine(x)) == pytest.approx(-0.0005, abs=1e-4)


def test_orthonormal_rows_have_the_simplex_cosine_about_their_mean():
    assert float(d.mean_cosine(simplex(9))) == pytest.approx(-1 / 8)


@pytest.mark.parametrize(("dim", "value"), [(2, -1.57503), (768, -3.98958)])
def test_the_floor_of_uniformity_is_the_bessel_integral(dim, value):
    assert d.uniformity_floor(dim, 2) == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("dim", [2, 768])
def test_a_uniform_cloud_reaches_the_floor_of_uniformity(dim):
    value = d.uniformity(normal(1000, dim), (0.5, 2.0), raw=True)
    floors = [d.uniformity_floor(dim, t) for t in (0.5, 2.0)]
    assert value.tolist() == pytest.approx(floors, abs=0.03 if dim == 2 else 1e-3)


def test_uniformity_sees_no_scale_and_without_raw_no_mean():
    x = normal(60, 5)
    assert d.uniformity(7 * x + 100).tolist() == pytest.approx(d.uniformity(x).tolist(), abs=1e-9)
    assert float(d.uniformity(x + 100, raw=True)) == pytest.approx(0, abs=1e-2)


def test_alignment_is_0_where_noise_changes_nothing_and_2_where_it_changes_all():
    x = normal(500, 96)
    assert float(d.alignment(torch.stack([x, x, x]))) == pytest.approx(0, abs=1e-12)
    assert float(d.alignment(normal(3, 500, 96))) == pytest.approx(2, abs=0.02)


def test_signal_to_noise_is_the_analysis_of_variance():
    x = normal(3, 40, 1, seed=1) + 2 * normal(40, 1, seed=2)
    expected = (f_oneway(*x[..., 0].T.numpy()).statistic - 1) / 3
    assert float(d.signal_to_noise(x)) == pytest.approx(expected)


def test_signal_to_noise_finds_the_truth_and_sees_no_scale():
    x = normal(3, 3000, 8, seed=1) + 1.5 * normal(3000, 8, seed=2)
    assert float(d.signal_to_noise(x)) == pytest.approx(1.5**2, rel=0.05)
    assert float(d.signal_to_noise(40 * x + 9)) == pytest.approx(float(d.signal_to_noise(x)))
    assert float(d.signal_to_noise(normal(3, 3000, 8))) == pytest.approx(0, abs=0.01)


def test_saturation_of_a_simplex_is_the_closed_form():
    B, dim, tau = 16, 64, 0.5
    z = torch.zeros(B, dim, dtype=torch.float64)
    z[:, :B] = 6 * simplex(B)
    gap, mass = d.saturation(z.reshape(B, 8, 8), tau)
    loss = math.log(1 / B + (1 - 1 / B) * math.exp(-2 * 36 / dim / tau))
    assert float(gap) == pytest.approx(loss + math.log(B))
    assert float(mass) == pytest.approx(1 - math.exp(-float(gap)))


@pytest.mark.parametrize("rank", [d.rankme, d.eigenvalue_rank, d.stable_rank])
def test_a_flat_spectrum_of_rank_r_has_rank_r(rank):
    x = torch.zeros(14, 20, dtype=torch.float64)
    x[:7, :7], x[7:, :7] = simplex(7), -simplex(7)  # seven axes, both ways: mean zero
    assert float(rank(d.spectrum(x))) == pytest.approx(7)
    turned, _ = torch.linalg.qr(normal(20, 20))
    assert float(rank(d.spectrum(3 * x @ turned + 5))) == pytest.approx(7)


def test_rankme_is_31_at_most_with_32_rows_of_a_true_256():
    assert 30 < float(d.rankme(d.spectrum(normal(32, 256)))) <= 31
    assert float(d.rankme(d.spectrum(normal(10_000, 256)))) == pytest.approx(256, rel=0.01)


def test_the_spectrum_is_the_same_through_either_product():
    x = normal(30, 12)
    wide = torch.cat([x, torch.zeros(30, 40)], 1)
    assert torch.allclose(d.spectrum(wide)[:12], d.spectrum(x))


@pytest.mark.parametrize(("dim", "embedded"), [(2, 10), (5, 40)])
def test_two_nn_agrees_with_scikit_dimension(dim, embedded):
    x = normal(800, dim, seed=dim) @ normal(dim, embedded, seed=9)
    theirs = skdim.id.TwoNN(discard_fraction=d.TWONN_DISCARD).fit(x.numpy()).dimension_
    assert float(d.two_nn(x)) == pytest.approx(theirs, rel=1e-6)
    assert float(d.two_nn(1000 + x)) == pytest.approx(theirs, rel=1e-4)


def test_tokens_of_two_halves_have_structure_and_independent_ones_none():
    side = torch.arange(8).repeat(8) < 4  # left half of an 8 x 8 grid
    z = torch.where(side[None, :, None], normal(50, 1, 32, seed=1), normal(50, 1, 32, seed=2))
    assert float(d.token_structure(z)) > 0.4
    assert float(d.token_structure(normal(50, 64, 32))) == pytest.approx(0, abs=0.01)


def test_a_fixed_position_code_is_no_structure():
    z = normal(50, 64, 32)
    code = torch.linspace(-9, 9, 64, dtype=torch.float64)[:, None] * normal(1, 32)
    assert float(d.token_structure(z + code)) == pytest.approx(float(d.token_structure(z)), abs=1e-9)


def test_one_row_has_no_pairs():
    with pytest.raises(DataError, match="at least 2"):
        d.mean_cosine(normal(1, 4))
