"""What a MeanFlow network is told of the time decides whether it learns at all."""

from functools import partial

import pytest
import torch

from dispersive_kit.data import load_images
from dispersive_kit.evaluation import Panel, balanced_labels, generate, make_extractor
from dispersive_kit.models import build_dit
from dispersive_kit.training import load_run, runs, train, train_preset


@pytest.mark.long
def test_it_learns_where_it_is_told_t_and_not_where_it_is_told_a_thousand_times_t(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    config = train_preset("digits", steps=300, objective="meanflow", seed=90, eval_every=300, preview_images=0)
    real, held_out = load_images("digits", "train"), load_images("digits", "test")
    panel, distance = Panel(make_extractor("classifier", real, held_out), real, held_out, metrics=("FD",)), {}
    for scale in (1.0, 1000.0):
        monkeypatch.setattr(runs, "build_dit", partial(build_dit, time_scale=scale))
        for _ in train(config, tmp_path / str(scale)):
            pass
        images = generate(
            load_run(tmp_path / str(scale))[0], balanced_labels(2000, 10), objective="meanflow", num_steps=2
        )
        distance[scale] = panel.measure(images)[0].value
    with capsys.disabled():
        print(f"\n  FD[digits-classifier48, N=2000]: told t {distance[1.0]:.1f}, 1000 t {distance[1000.0]:.1f}")
    assert distance[1000.0] > 3 * distance[1.0]
