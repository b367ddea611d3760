"""Learn a few images by heart: the first thing to try when a training does not learn."""

import torch

from dispersive_kit.data import ImageSet
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.draws import DeviceSet
from dispersive_kit.training.loop import learning_rate
from dispersive_kit.training.run import build_model, build_objective
from dispersive_kit.training.sources import describe_images


def overfit(data: ImageSet, *, steps: int, until: float = 0.1, config: TrainConfig | None = None) -> list[float]:
    """Denoising losses of training on one batch, all of `data`, with its times and noise frozen.

    Ends as soon as the loss is below `until` of its first value, or after `steps`.

    config: model, objective and peak of the learning rate; DiT-T/4 at 3e-3 if not given.
    """
    config = config or TrainConfig(model="DiT-T/4", learning_rate=3e-3, warmup_steps=20, schedule="constant")
    config = config.changed(steps=steps)  # which the schedule ends with
    model, objective = build_model(config, describe_images(data)), build_objective(config)
    batch = DeviceSet.of(data, "cpu").batch(
        objective, seed=config.seed, step=0, size=len(data), null_label=None, drop_prob=0.0
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    losses: list[float] = []
    while len(losses) < steps and (not losses or losses[-1] >= until * losses[0]):
        loss, _ = objective(model, batch.x0, batch.y, draws=batch.draws)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(config, len(losses) - 1)
        optimizer.step()
        optimizer.zero_grad()
    return losses
