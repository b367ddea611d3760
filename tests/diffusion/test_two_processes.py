"""Two real processes against one: the same images, and under DDP the same gradients, MeanFlow's among them."""

from pathlib import Path

import pytest
import torch
import two_processes as worker
import warm


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    warm.run(Path(worker.__file__), folder, processes=2)
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(2)]


def test_images_over_two_processes_are_those_of_one(results):
    model = worker.network()
    images = torch.cat([r["images"] for r in results])
    assert torch.equal(images[:4], worker.sample(model, [0, 1, 2, 3]))  # the same batch shape: the same bits
    torch.testing.assert_close(images, worker.sample(model, list(range(8))), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["flow", "ddpm", "meanflow"])
def test_gradients_under_ddp_are_those_of_the_whole_batch(results, name):
    expected = worker.gradients(worker.network(), worker.OBJECTIVES[name], 0, 1)
    assert len(expected) > 20 and max(g.abs().max() for g in expected) > 1e-4
    for ours in results:
        for a, b in zip(ours[name], expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-7)
