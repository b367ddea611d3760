"""What stands in where ImageNet and its autoencoder are not at hand: photographs that come with packages, and a small
AutoencoderKL that is trained on them for a minute.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dispersive_kit.data.encode import Encoder
from dispersive_kit.data.folder import list_images, read_image
from dispersive_kit.data.images import to_float
from dispersive_kit.errors import DataError
from dispersive_kit.training.batches import sample_index, stream

_SIZE = 32  # pixels, which the autoencoder turns into latents 4 x 8 x 8
_IN_SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
_BATCH, _LEARNING_RATE = 16, 4e-3
_KL_WEIGHT = 1e-6  # of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2112.10752)


def practice(out: Path, *, per_class: int, vae_steps: int, shard_size: int, seed: int = 0) -> Encoder:
    """Write the photographs and the autoencoder into `out`; returns how the first are encoded with the second.

    Raises:
        DataError: scikit-image or scikit-learn, which bring the photographs, is not installed.
    """
    images, vae = out / "images", out / "vae"
    rng = np.random.default_rng(0)
    for name, photograph in _photographs().items():
        (images / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):  # random square cuts
            side = int(rng.integers(2 * _SIZE, min(4 * _SIZE, *photograph.shape[:2]) + 1))
            top, left = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
            cut = Image.fromarray(photograph[top : top + side, left : left + side])
            cut.save(images / name / f"{number:04d}.png", compress_level=1)
    pixels = [read_image(images, file, _SIZE).pixels for file in list_images(images).files]
    _train(to_float(torch.stack([one for one in pixels if one is not None])), vae_steps, seed).save_pretrained(vae)
    return Encoder(images, str(vae), out / "store", image_size=_SIZE, shard_size=shard_size, batch_size=8)


def _photographs() -> dict[str, np.ndarray]:
    try:
        from skimage import data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError("the photographs need both: pip install 'dispersive-kit[notebooks,latents]'") from error
    china, flower = load_sample_images().images
    found = {name: getattr(data, name)() for name in _IN_SCIKIT_IMAGE}
    return found | {"motorcycle": data.stereo_motorcycle()[0], "china": china, "flower": flower}


def _train(x: Tensor, steps: int, seed: int) -> Any:
    """An AutoencoderKL of the published one's parts, four times smaller each way; x: (N, 3, S, S).

    |x - decoded| and a little KL divergence; the published one also has a perceptual and an adversarial term. As
    there, the scaling factor is one over the spread of the latents of the data.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = AutoencoderKL(
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        part = x[sample_index(seed, step, _BATCH, len(x))]
        posterior = network.encode(part).latent_dist
        error = F.l1_loss(network.decode(posterior.sample(stream(seed, "autoencoder", step))).sample, part)
        optimizer.zero_grad()
        (error + _KL_WEIGHT * posterior.kl().mean()).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        spread = torch.cat([network.encode(part).latent_dist.mean for part in x.split(64)]).std()
    network.register_to_config(scaling_factor=1 / float(spread))
    return network
