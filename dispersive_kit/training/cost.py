"""What a training will cost, before it starts: operations counted on shapes alone, hours by arithmetic."""

import math
from dataclasses import dataclass

import torch

from dispersive_kit.diffusion.objectives import Draws
from dispersive_kit.training.config import TrainConfig
from dispersive_kit.training.run import build_model, build_objective

COUNTED = 2  # images in the batch that is counted


@dataclass(frozen=True)
class Cost:
    """Of one run: flops of an image's forward and backward pass, and what is kept on the disk."""

    parameters: int
    flops_per_image: int
    images: int
    checkpoint_bytes: int

    def gpu_hours(self, tflops: float) -> float:
        """At so many tera-operations a second, sustained: a share of what the data sheet promises."""
        return self.flops_per_image * self.images / (tflops * 1e12) / 3600


def training_cost(config: TrainConfig, *, channels: int = 4, size: int = 32, num_classes: int = 1000) -> Cost:
    """The cost of `config` on latents (channels, size, size); nothing is computed, so XL takes no memory.

    Counts matrix products and attention, forward and backward, as torch.utils.flop_counter does: a multiplication
    and an addition are two. The optimizer, the average and Dispersive Loss are left out: together some per cent.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        objective = build_objective(config)
        model = build_model(config, {"shape": (channels, size, size), "classes": range(num_classes)})
        x0 = torch.zeros(COUNTED, channels, size, size)
        y = torch.zeros(COUNTED, dtype=torch.long)
        time = torch.zeros(COUNTED)
        with FlopCounterMode(display=False) as counter:
            objective(model, x0, y, draws=Draws(t=time, r=time, eps=x0))[0].backward()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = 2 * kept + 2 * 4 * trained  # model, average, AdamW's two moments
    return Cost(
        parameters=trained,
        flops_per_image=math.ceil(counter.get_total_flops() / COUNTED),
        images=config.steps * config.batch_size,
        checkpoint_bytes=config.keep_last * each,
    )
