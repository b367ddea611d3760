"""What is read from a network, and how its tokens become rows: alike for every pooling, level, network and control."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from dispersive_kit.analysis import POOLS, candidates, encoder, extract, load_with_images, noisy, raw_pixels, tokens
from dispersive_kit.analysis.features import pooling
from dispersive_kit.data import load_images, to_float
from dispersive_kit.errors import ConfigError, DataError
from dispersive_kit.training import train, train_preset

BY_HAND = {"tokens": lambda z: z.flatten(1), "mean": lambda z: z.mean(1), "patch": lambda z: z[:, 10]}


@pytest.mark.parametrize("pool", POOLS)
def test_rows_of_every_pooling_are_tokens_pooled_by_hand(pool):
    """Of the last block at log-SNR 2; whatever the axes of the components, distances are those of scikit-learn's."""
    model, _, seen, held_out = load_with_images("digits-base")
    parts = [seen.subset(torch.arange(560)), seen.subset(torch.arange(560, 600)), held_out.subset(torch.arange(60))]
    rows = []
    for seed, part in enumerate(parts):
        ((_, _, x, t),) = noisy(part.images, (2.0,), seed=seed, batch_size=1000)
        rows.append(BY_HAND[pool](tokens(model, x, t)[-1]).double().numpy())
    if pool == "tokens":  # 16 x 96
        fitted = PCA(256, svd_solver="full").fit(rows[0][:512])
        rows = [fitted.transform(one) for one in rows]
    found = candidates(encoder(model), parts, (2.0,), pool=pool)[0, 3]
    for one, expected in zip(found, rows, strict=True):
        assert torch.allclose(torch.pdist(one.rows), torch.pdist(torch.from_numpy(expected)), rtol=1e-3)


def test_controls_are_pooled_as_networks_are(digits, network):
    x = to_float(digits.images)
    flat = extract(raw_pixels(2), digits.images, (math.inf, 0.0), draws=2)
    assert flat[0].shape == (1, 1, 200, 64) and flat[1].shape == (2, 1, 200, 64)
    assert torch.equal(flat[0].flatten(0, 2).sort(1).values, x.flatten(1).sort(1).values)
    (mean,), (patch,) = (extract(raw_pixels(2), digits.images, (math.inf,), pool=pool) for pool in ("mean", "patch"))
    assert torch.allclose(mean[0, 0].mean(1), x.mean((1, 2, 3)), atol=1e-6)
    assert torch.equal(patch[0, 0], x[:, :, 4:6, 4:6].flatten(1))
    shapes = [extract(encoder(network), digits.images, (0.0,), pool=pool)[0].shape for pool in POOLS]
    assert shapes == [(1, 3, 200, 199), (1, 3, 200, 24), (1, 3, 200, 24)]  # of 200 images no more axes than 199


def test_long_rows_keep_their_distances_and_no_column_stands_out(digits, network):
    (x,), (z,) = (
        extract(encode, digits.images, (0.0,))
        for encode in (encoder(network), lambda *batch: encoder(network)(*batch)[..., :8])
    )
    assert z.shape == (1, 3, 200, 128)  # short rows stay as they are
    ((_, _, noised, t),) = noisy(digits.images, (0.0,))
    raw = tokens(network, noised, t)[1].flatten(1).double()
    assert torch.allclose(torch.pdist(x[0, 1].double()), torch.pdist(raw), rtol=1e-4)
    variance = x[0, 1].var(0)
    assert variance.max() < 8 * variance.mean()  # of the components themselves it would be 40 times


def test_the_components_are_of_the_images_they_were_fitted_to(digits, network):
    fitted = pooling("tokens", encoder(network), digits.images[:100], (0.0,))
    whole, part = (extract(encoder(network), digits.images[:n], (0.0,), pool=fitted)[0] for n in (200, 20))
    assert whole.shape[-1] == 99 and torch.allclose(whole[:, :, :20], part, atol=1e-4)
    with pytest.raises(ConfigError, match="unknown pooling 'max'; there are: tokens, mean, patch"):
        extract(encoder(network), digits.images, pool="max")


@pytest.fixture
def photos(tmp_path):
    """A folder of images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder := tmp_path / "photos" / ("ash", "birch")[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_a_run_comes_with_the_images_labels_and_classes_of_its_own_data(tmp_path, photos):
    settings = {"steps": 1, "batch_size": 4, "model": "DiT-T/8", "data": str(photos), "image_size": 16}
    list(train(train_preset("digits", **settings), tmp_path / "run"))
    model, card, seen, held_out = load_with_images(tmp_path / "run")
    assert seen.classes == ("ash", "birch") and (len(seen), len(held_out)) == (36, 4)
    assert torch.equal(seen.images, load_images(str(photos), size=16).images) and card["step"] == 1
    assert extract(encoder(model), held_out.images, (0.0,), pool="mean")[0].shape[2] == 4
    (photos / "birch").rename(photos / "larch")
    with pytest.raises(DataError, match="has the classes ash, larch"):
        load_with_images(tmp_path / "run")
    list(train(train_preset("toy", steps=1), tmp_path / "points"))
    list(train(train_preset("smoke", steps=1, objective="ddpm", model="DiT-T/4"), tmp_path / "ddpm"))
    for folder in ("points", "ddpm"):
        with pytest.raises(ConfigError, match="points or latents, or by ddpm"):
            load_with_images(tmp_path / folder)
