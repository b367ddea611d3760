"""A small AutoencoderKL of diffusers, trained for a minute: what stands in where the published one is not at hand."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dispersive_kit.data.folder import list_images, read_image
from dispersive_kit.data.images import to_float
from dispersive_kit.errors import DataError
from dispersive_kit.training.batches import sample_index, stream

KL_WEIGHT = 1e-6  # of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2112.10752)
LEARNING_RATE = 4e-3


def _network(seed: int = 0) -> Any:
    """An untrained AutoencoderKL, four times smaller each way, of the published one's parts."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )


def train_small_autoencoder(
    images: Path, out: Path, *, image_size: int, steps: int, batch_size: int = 16, seed: int = 0
) -> float:
    """Train on a folder of images, write a folder that `load_autoencoder` reads, and return the last mean |error|.

    |x - decoded| and a little KL divergence; the published one also has a perceptual and an adversarial term. As
    there, the scaling factor is one over the spread of the latents of the data.

    Raises:
        DataError: no image can be read.
    """
    read = (read_image(images, file, image_size).pixels for file in list_images(images).files)
    pixels = [one for one in read if one is not None]
    if not pixels:
        raise DataError(f"no image below {images} can be read")
    x = to_float(torch.stack(pixels))  # (N, 3, S, S)
    network = _network(seed).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    error = torch.zeros(())
    for step in range(steps):
        part = x[sample_index(seed, step, batch_size, len(x))]
        generator = stream(seed, "autoencoder", step)
        posterior = network.encode(part).latent_dist
        error = F.l1_loss(network.decode(posterior.sample(generator)).sample, part)
        optimizer.zero_grad()
        (error + KL_WEIGHT * posterior.kl().mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        latents = torch.cat([network.eval().encode(part).latent_dist.mean for part in x.split(64)])
    network.register_to_config(scaling_factor=1 / float(latents.std()))
    network.save_pretrained(out)
    return float(error.detach())
