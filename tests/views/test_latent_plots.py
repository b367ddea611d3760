"""Views of latents, over the corners of their sliders, with an autoencoder of diffusers from a configuration."""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dispersive_kit.data import to_uint8
from dispersive_kit.data.autoencoders import load_autoencoder
from dispersive_kit.training.small_autoencoder import small_autoencoder
from dispersive_kit.views import latent_plots

pytest.importorskip("diffusers")

ORIGINALS = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    small_autoencoder().save_pretrained(folder)
    return load_autoencoder(str(folder))


@pytest.fixture(scope="module")
def posterior(autoencoder):
    return autoencoder.posterior(ORIGINALS / 127.5 - 1)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(figure):
    """Title -> pixels (H, W, 3) as given to the axes."""
    return {axis.get_title(): axis.images[0].get_array() for axis in figure.axes}


def test_the_way_begins_and_ends_at_the_images_whatever_is_mixed(autoencoder, posterior):
    x0 = autoencoder.card.to_model(posterior[:, 0])
    for other, share in product((1, 7), (0.0, 1.0)):
        panels = drawn(latent_plots.between(autoencoder, x0, share, other))
        end = panels[f"image {other}" if share else "image 0"]
        for mixed in ("pixels mixed", "latents mixed"):
            assert np.abs(panels[mixed].astype(int) - end).max() <= 1
        assert np.abs(panels["image 0"].astype(int) - panels[f"image {other}"]).max() > 1


def test_a_draw_of_no_spread_is_the_mean_and_one_of_much_is_not(autoencoder, posterior):
    for image, spread in product((0, 7), (0.0, 30.0)):
        panels = drawn(latent_plots.posterior_draw(autoencoder, ORIGINALS, posterior, image, spread))
        assert np.array_equal(panels[f"image {image}"], ORIGINALS[image].permute(1, 2, 0))
        mean = to_uint8(autoencoder.images(autoencoder.card.to_model(posterior[image : image + 1, 0])))[0]
        assert np.abs(panels["mean, decoded"].astype(int) - mean.permute(1, 2, 0).numpy()).max() <= 1
        change = np.abs(panels["what it changed"].astype(int) - 128).max()
        assert change <= 1 if spread == 0 else change > 5


def test_differences_are_grey_where_there_are_none():
    figure = latent_plots.reconstructions(ORIGINALS, ORIGINALS.flip(-1).flip(-1))
    assert all((axis.images[0].get_array() == 128).all() for axis in figure.axes[-8:])


def test_channels_are_drawn_on_one_scale():
    figure = latent_plots.latent_channels(ORIGINALS[:3], torch.randn(3, 4, 8, 8))
    latents = [axis.images[0] for axis in figure.axes[:-1] if axis.images[0].get_array().ndim == 2]
    assert len(latents) == 12 and {image.get_clim() for image in latents} == {(-3.0, 3.0)}
