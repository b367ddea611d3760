"""CKA and neighbour overlap: 1 for the same features turned, chance for independent ones."""

import pytest
import torch
from nets import normal

from dispersive_kit.analysis import cka_matrix
from dispersive_kit.analysis import mutual_knn as knn_matrix
from dispersive_kit.analysis.geometry import centred
from dispersive_kit.errors import DataError


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(cka_matrix(x[None], y[None]))


def mutual_knn(x: torch.Tensor, y: torch.Tensor, k: int = 10) -> float:
    return float(knn_matrix(x[None], y[None], k))


def turned(x: torch.Tensor) -> torch.Tensor:
    return 3 * x @ torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=5)).Q + 7


def test_independent_features_have_cka_0_in_the_mean_where_the_biased_one_says_86_percent():
    pairs = [(normal(64, 384, seed=2 * i), normal(64, 384, seed=2 * i + 1)) for i in range(20)]
    values = torch.tensor([linear_cka(x, y) for x, y in pairs])
    assert float(values.mean()) == pytest.approx(0, abs=0.03)
    x, y = map(centred, pairs[0])
    biased = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert float(biased) == pytest.approx(0.86, abs=0.01)
    assert linear_cka(x, turned(x)) == pytest.approx(1)


def test_it_is_the_ratio_of_unbiased_hsic_by_its_own_formula():
    x, y = normal(9, 3), normal(9, 5, seed=1) + 0.5 * normal(9, 5)

    def hsic(k: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741  # Song et al. (2012), equation 5
        n = len(k)
        k, l = (m - m.diagonal().diag() for m in (k, l))  # noqa: E741
        return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k @ l).sum() / (n - 2)

    k, gram = x @ x.T, y @ y.T
    expected = hsic(k, gram) / (hsic(k, k) * hsic(gram, gram)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected))


def test_the_matrix_holds_every_pair_of_blocks():
    x, y = normal(3, 30, 8), normal(2, 30, 5, seed=3)
    matrix = cka_matrix(x, y)
    assert matrix.shape == (3, 2)
    assert float(matrix[2, 1]) == pytest.approx(linear_cka(x[2], y[1]))
    assert torch.allclose(cka_matrix(x).diagonal(), torch.ones(3, dtype=torch.double))


def test_neighbours_are_shared_by_a_turned_copy_and_else_by_chance_for_every_two_blocks():
    x, k = normal(300, 10), 10
    assert mutual_knn(x, turned(x), k) == pytest.approx(1)
    assert mutual_knn(x, normal(300, 10, seed=4), k) == pytest.approx(k / 299, abs=0.01)
    x = normal(3, 60, 4)
    table = knn_matrix(x)
    assert float(table[0, 2]) == pytest.approx(mutual_knn(x[0], x[2])) and table.diagonal().tolist() == [1, 1, 1]


def test_features_of_other_images_are_refused():
    for measure, rows, words in (
        (linear_cka, (8, 9), "same images"),
        (linear_cka, (3, 3), "at least 4"),
        (lambda x, y: mutual_knn(x, y, k=8), (8, 8), "at least 9"),
    ):
        with pytest.raises(DataError, match=words):
            measure(*(normal(n, 2) for n in rows))
