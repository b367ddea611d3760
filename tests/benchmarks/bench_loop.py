"""The whole training loop against the bare model step: `python tests/benchmarks/bench_loop.py [--quick]`.

Preset `cifar10-cpu` with the paper's regulariser, on random images of CIFAR's shape. The alternative is what a
step cannot do without: forward and backward of the same model on the same batch with the same loss, and the same
optimizer. What the loop does beside that is drawing the batch, clipping, the average, logging and finite checks.
Both take turns in one run, five steps each. Checkpoints and previews are left out: their share is a setting.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import is_quick, row

from dispersive_kit.training import RegularizerConfig, TrainConfig, train, train_preset
from dispersive_kit.training.regularizer import attach_regularizer
from dispersive_kit.training.train import Session

TURNS, BLOCK = 10, 5  # of each in a round: 50 steps, one of which is logged


def random_cifar(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "cifar10.npz",
        images=rng.integers(0, 256, (1200, 32, 32, 3), dtype=np.uint8),
        labels=np.arange(1200) % 10,
        split=(np.arange(1200) >= 1000).astype(int),
        classes=np.array([str(i) for i in range(10)]),
    )


def bare_steps(config: TrainConfig, folder: Path) -> Callable[[], None]:
    """One call is one step of the same model on the same batch; nothing is drawn, clipped, averaged or logged."""
    run = Session(config, folder, resume=False)
    regularizer, rows = attach_regularizer(run.model, config, run.source.train), run.batch(0)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)

    def step() -> None:
        with regularizer:
            loss, aux = run.objective(run.model, rows.x0, rows.y, draws=rows.draws)
        (loss + regularizer.loss(t=aux.t, y=rows.y)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def one_round(loop: Callable[[], object], bare: Callable[[], None]) -> tuple[float, float]:
    """Seconds a step of each, from a logged step to the next, in turns so short that a busy machine hits both."""
    seconds = [0.0, 0.0]
    for _ in range(TURNS):
        for which, call in enumerate((loop, bare)):
            start = time.perf_counter()
            for _ in range(BLOCK):
                call()
            seconds[which] += time.perf_counter() - start
    return seconds[0] / (TURNS * BLOCK), seconds[1] / (TURNS * BLOCK)


def main() -> None:
    rounds = 1 if is_quick(__doc__) else 9
    never = {"preview_images": 0, "eval_every": 10**6, "checkpoint_every": 10**6}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_cifar(folder)
        config = train_preset("cifar10-cpu", data_dir=name, regularizer=RegularizerConfig(preset="paper"), **never)
        assert config.log_every == TURNS * BLOCK
        records, bare = train(config, folder / "loop"), bare_steps(config, folder / "bare")
        times = [one_round(lambda: next(records), bare) for _ in range(rounds + 1)][1:]  # the first one warms up
    loop, step = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(b / a for a, b in times)  # of a round's own two: what slows the machine for a while slows both
    threads = torch.get_num_threads()
    print(f"preset cifar10-cpu, batch {config.batch_size}, torch {torch.__version__}, {threads} threads")
    got = f"{1e3 * step:.1f} ms / {1e3 * loop:.1f} ms = {statistics.median(ratios):.3f}"
    row("bare step / step of the loop", got, "at least 0.97")
    row(f"  of single rounds, of which there are {len(ratios)}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
