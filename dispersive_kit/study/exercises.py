"""The exercises of the notebooks: each answer is a function, and is held against the right one on several cases."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispersive_kit.analysis import mcnemar
from dispersive_kit.diffusion.paths import LINEAR
from dispersive_kit.diffusion.samplers import meanflow, time_grid
from dispersive_kit.errors import ConfigError
from dispersive_kit.models.dit import modulate
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.study.verdict import LEVEL, _tost_p, holm


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


def heun_step(f: Callable[[Tensor, float], Tensor], x: Tensor, t: float, s: float) -> Tensor:
    slope = f(x, t)
    return x + (s - t) / 2 * (slope + f(x + (s - t) * slope, s))


def steps_of_a_field() -> list[tuple[Any, ...]]:
    return [
        (lambda x, t: torch.sin(x) + t * x, random_points(5, 2, seed=k), 1 - 0.2 * k, 0.5 - 0.1 * k) for k in (0, 1)
    ]


def times_of_points() -> list[tuple[Any, ...]]:
    return [(x, t) for x, _, t in points_in_time()]


def kernel_matrices() -> list[tuple[Any, ...]]:
    """K_xx, K_yy and K_xy of the cubic kernel on two clouds of unlike sizes."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    clouds = [(random_points(n, 4, seed=n), 1 + random_points(m, 4, seed=50 + m)) for n, m in ((6, 6), (5, 9), (12, 3))]
    return [(kernel(x, x), kernel(y, y), kernel(x, y)) for x, y in clouds]


def unbiased_mmd(K_xx: Tensor, K_yy: Tensor, K_xy: Tensor) -> Tensor:
    within = [(K.sum() - K.trace()) / (len(K) * (len(K) - 1)) for K in (K_xx, K_yy)]
    return within[0] + within[1] - 2 * K_xy.mean()


def sets_of_rows() -> list[tuple[Any, ...]]:
    """Rows (N, D) off the origin, for what must be centred."""
    return [(3 + random_points(N, D, seed=N),) for N, D in ((6, 2), (9, 4), (20, 7))]


def two_answers() -> list[tuple[Any, ...]]:
    """Which images two probes got right: bool (N,) each; in the last case the same ones."""
    answers = [(random_points(n, seed=n) > -1, random_points(n, seed=n + 1) > -0.5) for n in (12, 40, 90)]
    return [*answers, (answers[0][0], answers[0][0])]


def neighbour_lists() -> list[tuple[Any, ...]]:
    """Indices (N, k) of each row's neighbours in two feature spaces."""
    return [
        tuple(random_points(n, n, seed=s).topk(k, 1).indices for s in (n, n + 1))
        for n, k in ((8, 3), (20, 5), (30, 10))
    ]


def log_ratios_and_margins() -> list[tuple[Any, ...]]:
    """Six pairs each, a margin, and the quantile 0.95 of Student's distribution with five degrees of freedom.

    The last two lie just beyond the margin (within it for a normal quantile, or the deviation over n) and just within
    it (beyond for the quantile 0.975).
    """
    cases = [(0.005, 0.015, 0.05), (0.03, 0.002, 0.05), (0.01, 0.25, 0.05), (-0.3, 0.01, 0.05), (0.3, 0.01, 0.05)]
    cases += [(0.02, 0.0362, 0.05), (0.02, 0.0349, 0.05)]
    pattern = torch.tensor([-1.4, -0.8, -0.2, 0.3, 0.7, 1.4], dtype=torch.float64)
    return [(mean + spread * pattern, margin, 2.015) for mean, spread, margin in (*cases, (0.0, 0.04, 0.05))]


EXERCISES: dict[str, Exercise] = {
    "epochs": Exercise(
        lambda steps, batch_size, images: steps * batch_size / images,
        lambda: [(10_000, 64, 50_000), (600, 64, 1297), (3, 7, 5)],
        "each step shows batch_size images, and a pass is as many as there are",
    ),
    "warm-up and cosine": Exercise(
        lambda peak, k, warmup, steps: peak * min(1, (k + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * k / steps)),
        lambda: [(1.0, 0, 200, 10_000), (1.0, 199, 200, 10_000), (0.5, 60, 20, 100), (2.0, 30, 50, 100)],
        "two factors: one that reaches 1 at step warmup - 1, and half a cosine that is 1 at step 0 and 0 at the end",
    ),
    "time on the line": Exercise(
        lambda log_snr: torch.sigmoid(-log_snr / 2),
        lambda: [(3 * random_points(5, seed=seed),) for seed in range(3)],
        "log-SNR = 2 log((1 - t) / t): divide by two, take exp, and solve for t",
    ),
    "change of path": Exercise(
        lambda x_t, t: x_t / ((1 - t) ** 2 + t**2).sqrt(),
        times_of_points,
        "the same log-SNR means the same sigma / alpha: alpha = c (1 - t), sigma = c t, and only c is to be found",
    ),
    "heun step": Exercise(
        heun_step,
        steps_of_a_field,
        "the second slope is taken at the time s and at the place x + (s - t) f(x, t); the step is the mean of both",
    ),
    "guidance": Exercise(
        lambda weak, strong, g: weak + (1 + g) * (strong - weak),
        lambda: [
            (random_points(4, 2, seed=k), random_points(4, 2, seed=9 + k), g) for k, g in enumerate((0.0, 0.5, 3.0))
        ],
        "at g = 0 the result is the conditional one, and it moves away from the unconditional one as g grows",
    ),
    "adaptive norm": Exercise(
        lambda z, shift, scale: modulate(torch.nn.functional.layer_norm(z, z.shape[-1:], eps=1e-6), shift, scale),
        lambda: [(30 * random_points(2, 3, 8, seed=k), *random_points(2, 2, 8, seed=9 + k)) for k in range(2)],
        "mean 0 and variance 1 over the last axis (divided by D), times (1 + scale), plus shift, for all tokens alike",
    ),
    "tap index": Exercise(
        lambda depth: max(1, depth // 4) - 1,
        lambda: [(depth,) for depth in (4, 12, 28, 6, 2)],
        "depth 12: the third block, which has index 2; depth 2: the first, index 0",
    ),
    "average of averages": Exercise(
        lambda u_rs, u_st, r, s, t: ((s - r) * u_rs + (t - s) * u_st) / (t - r),
        lambda: [(*random_points(2, 5, 2, seed=k), 0.1 * k, 0.3 + 0.1 * k, 0.9) for k in range(3)],
        "the integral over the whole is the sum of both integrals; an average is an integral over its length",
    ),
    "jumps": Exercise(
        lambda u, x, n: meanflow(lambda x, t, r: u(x, r[0].item(), t[0].item()), x, time_grid(n)),
        lambda: [(lambda x, r, t: torch.sin(x) + r * x - t, random_points(4, 2, seed=n), n) for n in (1, 2, 5)],
        "one jump goes from t to r = t - 1 / n, and is x - (t - r) u(x, r, t), beginning at t = 1",
    ),
    "pull": Exercise(
        lambda D, tau: 2 / tau * (torch.softmax(-D.flatten() / tau, 0).view_as(D) * D).sum(),
        lambda: [(torch.cdist(z, z).square() / z.shape[1], tau) for z, tau in features()],
        "p is one softmax over all pairs at once, of sum 1; the factor 2 / tau stands outside",
    ),
    "select": Exercise(
        lambda out: out[0].mean(1),
        lambda: [((h, h[None, :, -1]),) for h in (random_points(3, 4, 5, seed=k) for k in range(2))],
        "out[0] is (B, T, D), and its second axis is time; every image keeps a row of its own",
    ),
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
    "store bytes": Exercise(
        lambda images, C, h, w, flip: 2 * (1 + flip) * images * C * h * w * 2,
        lambda: [(1_281_167, 4, 32, 32, True), (1_281_167, 4, 32, 32, False), (50_000, 16, 16, 16, True)],
        "mean and std, two bytes a value, and all of it twice where mirror images are stored",
    ),
    "sample a posterior": Exercise(
        lambda mean, std, eps, scale, shift: (mean + std * eps - shift) * scale,
        lambda: [(*(random_points(2, 3, seed=10 * k + j) for j in range(3)), 0.2 + k, 0.5 * k) for k in range(3)],
        "first draw z = mean + std eps, as the encoder means it; then bring z to the scale of the model",
    ),
    "gpu hours": Exercise(
        lambda flops, epochs, images, tflops: flops * epochs * images / (tflops * 1e12) / 3600,
        lambda: [(711_690_190_848, 80, 1_281_167, 150), (36_321_263_616, 80, 1_281_167, 150), (1e12, 1, 3600, 1)],
        "operations of all images of all epochs, over operations in an hour; tera is 1e12",
    ),
    "dispersion batch": Exercise(
        lambda global_batch, processes, accumulation: global_batch // (processes * accumulation),
        lambda: [(256, 8, 1), (256, 16, 1), (256, 4, 2), (512, 1, 4)],
        "what one process feeds the model at once is all that the loss sees",
    ),
    "distance along one axis": Exercise(
        lambda m1, s1, m2, s2: (m1 - m2) ** 2 + (s1 - s2) ** 2,
        lambda: [(0.0, 1.0, 0.0, 3.0), (1.0, 2.0, -2.0, 2.0), (0.5, 0.1, 0.2, 4.0)],
        "tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2) is s1^2 + s2^2 - 2 s1 s2 on one axis",
    ),
    "unbiased MMD": Exercise(
        unbiased_mmd,
        kernel_matrices,
        "k(x_i, x_i) compares an image with itself: leave the diagonals of K_xx and K_yy out, and divide by n (n - 1)",
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
    "equivalent": Exercise(
        lambda x, margin, t: _tost_p(x.numpy(), margin) < LEVEL,
        log_ratios_and_margins,
        "the mean give or take t standard errors, both ends; a standard error is the deviation over the root of n",
    ),
    "holm": Exercise(
        lambda p: holm(p.tolist()),
        lambda: [(torch.tensor(p, dtype=torch.float64),) for p in ([0.02, 0.5, 0.01, 0.03], [0.6, 0.7], [0.04])],
        "the least p times m, the next times m - 1, ...; none below an earlier one, none above 1; in the order given",
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
