"""The block x log-SNR map: one pass, the same whatever the batch, the null class always."""

import json
import math
import sys
from functools import partial

import pytest
import torch

from dispersive_kit.analysis import (
    LEVELS,
    cka_matrix,
    encoder,
    extract,
    geometry,
    gradient_pull,
    noisy,
    random_network,
    sweep,
    tokens,
)
from dispersive_kit.analysis.features import time_of
from dispersive_kit.data import to_float
from dispersive_kit.diffusion.paths import GVPPath
from dispersive_kit.errors import ConfigError
from dispersive_kit.evaluation import weights_sha256
from dispersive_kit.models import build_dit
from dispersive_kit.regularizers.losses import LossOptions, measure

module = sys.modules["dispersive_kit.analysis.sweep"]  # the name is the function's
SMALL = (math.inf, 1.0, -3.0)
VALUES = {
    "pairwise": 0.0372758440, "cosine": -0.0068768741, "rankme": 11.6638709188,
    "eigenvalue_rank": 4.8960954249, "participation_ratio": 3.6222980618, "stable_rank": 2.2521315106,
    "fisher_ratio": 0.0929315512, "nc1": 16.8409770016, "two_nn": 7.2140229444, "uniformity_t0.5": -0.9044936368,
    "uniformity_t2": -2.6561596654, "uniformity_t8": -5.4737372511, "feature_rms": 1.8773673812,
    "largest_channel": 0.1641594254, "saturation_gap": 3.5484509502, "off_diagonal_mass": 0.9712308298,
    "token_structure": -0.0169779237,
}  # fmt: skip
NULL = {"pairwise": 0.0371613845, "rankme": 11.5202261915, "nc1": 48.4534586, "two_nn": 7.2476557727,
        "saturation_gap": 3.5424695910, "uniformity_t8": -5.3163800006}  # fmt: skip


@pytest.fixture(scope="module")
def swept(network, digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEEP", 120)
        patch.setattr(module, "noisy", partial(noisy, batch_size=100))
        yield sweep(network, digits, SMALL, pool="mean")


def test_the_time_of_a_level_has_this_log_snr():
    for level in LEVELS[1:]:
        assert time_of(level) == pytest.approx(1 / (1 + math.exp(level / 2)), abs=1e-9)
        assert float(GVPPath().log_snr(torch.tensor(time_of(level, GVPPath())))) == pytest.approx(level, abs=1e-5)
    assert time_of(math.inf) == 0


def test_an_image_has_one_noise_at_all_levels_and_batch_sizes(digits):
    whole = {i: x for _, i, x, _ in noisy(digits.images, SMALL, batch_size=200)}
    parts = [(where, i, x) for where, i, x, _ in noisy(digits.images, SMALL, batch_size=64)]
    assert all(torch.equal(x, whole[i][where]) for where, i, x in parts)
    x0 = to_float(digits.images)
    eps = [(whole[i] - (1 - time_of(SMALL[i])) * x0) / time_of(SMALL[i]) for i in (1, 2)]
    assert torch.allclose(*eps, atol=1e-5)
    other = next(x for _, i, x, _ in noisy(digits.images, SMALL, draw=1) if i == 1)
    assert not torch.allclose(other, whole[1])


def test_every_measure_and_its_null_stand_at_every_block_and_level(swept):
    assert swept.values.keys() - swept.gaussian.keys() == {"feature_rms", "largest_channel"}  # the null has them alike
    for name, value in (*swept.values.items(), *swept.gaussian.items()):
        assert value.shape == (3, 3) and value.isfinite().all(), name
    assert swept.rows.shape == (3, 3, 120, 24) and swept.spectra.shape == (3, 3, 24)
    assert swept.cka.shape == (3, 3, 3)


def test_numbers_of_a_fixed_network_do_not_change(swept, network, digits):
    values = {name: float(value[1, 2]) for name, value in swept.values.items()}
    assert values == pytest.approx(VALUES, rel=2e-3)  # of float32 features
    null = {name: float(swept.gaussian[name][1, 2]) for name in NULL}
    assert null == pytest.approx(NULL, rel=2e-3)
    assert float(swept.cka[1, 0, 2]) == pytest.approx(0.9030922, rel=1e-3)
    pull = gradient_pull(network, digits, batches=2)
    assert (float(pull.ratio[1, 2]), float(pull.cosine[1, 2])) == pytest.approx((0.3003035, 0.0914262), rel=2e-3)


def test_the_map_does_not_depend_on_the_batch_size(swept, network, digits, monkeypatch):
    monkeypatch.setattr(module, "noisy", partial(noisy, batch_size=64))
    other = sweep(network, digits, SMALL, pool="mean")
    for name, value in swept.values.items():
        assert torch.allclose(value, other.values[name], rtol=2e-3, atol=1e-5), name  # two_nn magnifies float32


def test_a_cell_is_what_the_features_of_that_block_and_level_give(swept, network, digits):
    level = extract(encoder(network), digits.images, SMALL, pool="mean")[1]  # (1, blocks, N, D)
    x = level[0, 2]
    expected = {
        "pairwise": 2 * x.double().var(0).mean(),
        "rankme": geometry.rankme(geometry.spectrum(x)),
        "two_nn": geometry.two_nn(x[:120]),
        "fisher_ratio": geometry.fisher_ratio(*geometry.class_scatter(x, digits.labels)),
    }
    for name, value in expected.items():
        assert float(swept.values[name][1, 2]) == pytest.approx(float(value), rel=1e-4), name
    where, t = next((x, t) for _, i, x, t in noisy(digits.images, SMALL) if i == 1)
    z = tokens(network, where, t)[2]
    assert float(swept.values["feature_rms"][1, 2]) == pytest.approx(float(z.square().mean().sqrt()), rel=1e-5)
    assert float(swept.cka[1, 0, 2]) == pytest.approx(float(cka_matrix(level[0, :, :120])[0, 2]), rel=1e-4)
    gap = measure(z[:64].double(), LossOptions("infonce_l2", 0.5)).loss + math.log(64)
    assert float(swept.values["saturation_gap"][1, 2]) == pytest.approx(float(gap), rel=1e-4)


def test_the_gaussian_null_has_the_covariance_and_knows_no_classes(swept, digits):
    ratio = swept.gaussian["pairwise"] / swept.values["pairwise"]
    assert torch.allclose(ratio, torch.ones(3, 3, dtype=torch.double), atol=0.15)
    chance = (len(digits.classes) - 1) / (len(digits) - 1)
    assert float(swept.gaussian["fisher_ratio"].mean()) == pytest.approx(chance, abs=0.04)
    assert float(swept.values["fisher_ratio"][0, 0]) > 2 * chance  # clean pixels do


def test_the_label_is_always_the_null_class(network, digits):
    _, _, x, t = next(noisy(digits.images[:3], (0.0,)))
    given = tokens(network, x, t, torch.full((3,), 10))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tokens(network, x, t), given, strict=True))
    for classes in (10, 0):
        model = build_dit("DiT-T/2", input_size=8, in_channels=1, num_classes=classes, class_dropout_prob=0.0)
        if classes:
            with pytest.raises(ConfigError, match="would hold the label"):
                tokens(model, x, t)
        else:
            assert len(tokens(model, x, t)) == len(model.blocks)


def test_the_random_network_acts_in_every_block_and_leaves_the_model_alone(digits):
    model = build_dit("DiT-T/2", input_size=8, in_channels=1, depth=2, num_classes=10)
    before, state = model.blocks[0].mlp.fc1.weight.clone(), torch.get_rng_state()
    network = random_network(model)
    _, _, x, t = next(noisy(digits.images[:8], (0.0,)))
    first, second = tokens(network, x, t)
    assert (first - second).abs().mean() > 0.1 * first.abs().mean()
    assert torch.equal(before, model.blocks[0].mlp.fc1.weight) and torch.equal(state, torch.get_rng_state())


def test_the_protocol_names_the_weights_the_images_and_the_noise(swept, network, digits):
    assert swept.protocol["checkpoint_sha256"] == weights_sha256(network.state_dict())
    assert swept.protocol["sha256"] == digits.sha256 and swept.protocol["log_snr"] == ["clean", 1.0, -3.0]
    assert json.loads(json.dumps(swept.protocol)) == swept.protocol


def test_the_pooling_is_said_and_is_all_tokens_unless_another_is_asked_for(swept, network, digits):
    assert swept.protocol["pooling"] == "residual stream after each block, mean over tokens"
    other = sweep(network, digits, SMALL[1:2])
    assert "all tokens" in other.protocol["pooling"]
    (rows,) = extract(encoder(network), digits.images, SMALL[1:2])
    assert torch.allclose(other.rows[0], rows[0, :, :120], atol=1e-4)  # KEEP
    assert torch.equal(other.values["saturation_gap"], swept.values["saturation_gap"][1:2])  # the loss sees all tokens


def test_too_few_images_for_the_local_batch_are_refused(network, digits):
    with pytest.raises(ConfigError, match="40 images: give at least 64"):
        sweep(network, digits.subset(torch.arange(40)))
