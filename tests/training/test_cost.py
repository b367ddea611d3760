"""What a training will cost, against what one does."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from dispersive_kit.training import train, train_preset
from dispersive_kit.training.cost import training_cost
from dispersive_kit.training.draws import DeviceSet
from dispersive_kit.training.run import build_model, build_objective
from dispersive_kit.training.sources import open_source

DIGITS = {"channels": 1, "size": 8, "num_classes": 10}


@pytest.mark.parametrize("objective", ["flow", "ddpm", "meanflow"])
def test_operations_are_those_of_the_objective_on_real_images(objective):
    config = train_preset("smoke", objective=objective)
    source = open_source(config)
    model, rule = build_model(config, source.card), build_objective(config)
    batch = DeviceSet.batch(source.train, rule, seed=0, step=0, size=8, null_label=None, drop_prob=0.0)
    with FlopCounterMode(display=False) as counter:
        rule(model, batch.x0, batch.y, draws=batch.draws)[0].backward()
    assert training_cost(config, **DIGITS).flops_per_image == pytest.approx(counter.get_total_flops() / 8, rel=0.05)


def test_bytes_are_those_that_lie_on_the_disk(tmp_path):
    config = train_preset("smoke", preview_images=0)
    config = config.changed(steps=13, checkpoint_every=4, keep_last=2)
    list(train(config, tmp_path / "run"))
    found = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert training_cost(config, **DIGITS).checkpoint_bytes == pytest.approx(found, rel=0.02)
