"""The exercises of the notebooks: each answer is a function, and is held against the right one on several cases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.analysis import mcnemar
from dispersive_kit.diffusion.paths import LINEAR
from dispersive_kit.errors import ConfigError
from dispersive_kit.regularizers import dispersive_loss


@dataclass(frozen=True)
class Exercise:
    """The right answer, the arguments of each case, and what to think of when the answer is another."""

    right: Callable[..., Any]
    cases: Callable[[], list[tuple[Any, ...]]]
    hint: str


def random_points(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points_in_time() -> list[tuple[Any, ...]]:
    """Two tensors (B, 2) and times (B, 1) away from both ends."""
    times = [0.1 + 0.8 * random_points(5, 1, seed=10 + k).sigmoid() for k in range(3)]
    return [(random_points(5, 2, seed=k), random_points(5, 2, seed=20 + k), t) for k, t in enumerate(times)]


def features() -> list[tuple[Any, ...]]:
    """Features (B, dim) of other sizes, scales and temperatures."""
    sizes = ((4, 3, 0.5, 1.0), (7, 5, 0.25, 3.0), (2, 8, 2.0, 0.2))
    return [(scale * random_points(B, dim, seed=B), tau) for B, dim, tau, scale in sizes]


def without_diagonal(L: float, B: int) -> float:
    loss = torch.as_tensor(L, dtype=torch.float64)
    return float(((loss.exp() - 1 / B) / (1 - 1 / B)).log())


def sets_of_rows() -> list[tuple[Any, ...]]:
    """Rows (N, D) off the origin, for what must be centred."""
    return [(3 + random_points(N, D, seed=N),) for N, D in ((6, 2), (9, 4), (20, 7))]


def two_answers() -> list[tuple[Any, ...]]:
    """Which images two probes got right: bool (N,) each."""
    return [(random_points(n, seed=n) > -1, random_points(n, seed=n + 1) > -0.5) for n in (12, 40, 90)]


def neighbour_lists() -> list[tuple[Any, ...]]:
    """Indices (N, k) of each row's neighbours in two feature spaces."""
    return [
        tuple(random_points(n, n, seed=s).topk(k, 1).indices for s in (n, n + 1))
        for n, k in ((8, 3), (20, 5), (30, 10))
    ]


EXERCISES: dict[str, Exercise] = {
    "score": Exercise(
        lambda x, x0, t: LINEAR.convert(x0, x, t.squeeze(1), "x0", "score"),
        points_in_time,
        "the score is -E[eps | x_t] / sigma, and x_t = (1 - t) x0 + t eps gives E[eps | x_t] from E[x0 | x_t]",
    ),
    "denoise": Exercise(
        lambda x, v, t: LINEAR.convert(v, x, t.squeeze(1), "v", "x0"),
        points_in_time,
        "x_t = (1 - t) x0 + t eps and v = eps - x0 are two equations: get rid of eps",
    ),
    "cosine loss": Exercise(
        lambda z, tau: dispersive_loss(z, kind="infonce_cosine", tau=tau),
        features,
        "u_i = z_i / |z_i|, D_ij = -<u_i, u_j>, and then the log of the mean over all B^2 pairs, i = j among them",
    ),
    "without the diagonal": Exercise(
        without_diagonal,
        lambda: [(-1.0, 4), (-2.0, 16), (-0.1, 2), (-4.0, 128)],
        "exp(L) = 1 / B + (1 - 1 / B) exp(L'), to be solved for L'",
    ),
    "mean distance": Exercise(
        lambda x: 2 * x.var(0).sum() / x.shape[1],
        sets_of_rows,
        "E |x_i - x_j|^2 = 2 tr S over pairs i != j, with S the covariance over N - 1; then / D",
    ),
    "discordant": Exercise(
        lambda first, second: mcnemar(first, second),
        two_answers,
        "only images that one probe got right and the other wrong count; under the null each is a fair coin",
    ),
    "shared neighbours": Exercise(
        lambda a, b: (a[:, :, None] == b[:, None]).double().sum((1, 2)).mean() / a.shape[1],
        neighbour_lists,
        "for each row the size of the intersection of two sets of k, over k; their order does not matter",
    ),
}


def judge(name: str, answer: Callable[..., Any]) -> bool:
    """Say whether `answer` gives what the exercise `name` asks for, and if not, on what it goes wrong.

    Raises:
        ConfigError: no exercise has this name.
    """
    if name not in EXERCISES:
        raise ConfigError(f"no exercise is named {name!r}; there are: {', '.join(EXERCISES)}")
    exercise = EXERCISES[name]
    for number, case in enumerate(exercise.cases(), 1):
        fault = _fault(answer, case, exercise.right(*case))
        if fault:
            print(f"not yet, case {number}: {fault}\nhint: {exercise.hint}")
            return False
    print(f"✓ {name}: right")
    return True


def _fault(answer: Callable[..., Any], case: tuple[Any, ...], right: Any) -> str:
    try:
        given = answer(*case)
        if given is None:
            return "the function returns nothing yet"
        given, right = (torch.as_tensor(value, dtype=torch.float64) for value in (given, right))
    except Exception as error:  # whatever a student's function may raise
        return f"it raised {type(error).__name__}: {error}"
    if given.shape != right.shape:
        return f"the result has shape {tuple(given.shape)}, not {tuple(right.shape)}"
    if not torch.allclose(given, right, rtol=1e-4, atol=1e-6):
        return f"the result begins {given.flatten()[:2].tolist()}, not {right.flatten()[:2].tolist()}"
    return ""
