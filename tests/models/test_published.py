"""Published checkpoints: key names and shapes, refusals, and the conversion of time and sign."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from dispersive_kit.diffusion.samplers import euler, time_grid
from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.models.dit import build_dit
from dispersive_kit.models.published import load_published


def published_shapes(depth, D, patch, channels, grid, classes):
    """The key names and shapes of the public .pt files, written out."""
    layers = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D), "x_embedder.proj": (D, channels, patch, patch)}
    layers |= {"final_layer.linear": (patch**2 * 2 * channels, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    block = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    block["adaLN_modulation.1"] = (6 * D, D)
    layers |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes = {"pos_embed": (1, grid**2, D), "y_embedder.embedding_table.weight": (classes + 1, D)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_state(seed=0):
    """A small file of the published form: T size, patch 2, 4 latent channels of 8 x 8, 10 classes."""
    g = torch.Generator().manual_seed(seed)
    shapes = published_shapes(4, 96, 2, 4, 4, 10)
    return {name: torch.randn(shape, generator=g) * 0.05 for name, shape in shapes.items()}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0.001, 0.4, 1.0]), torch.tensor([0, 9, 10])


def test_key_names_and_shapes_of_the_published_xl_2():
    with torch.device("meta"):
        model = build_dit("DiT-XL/2", learn_sigma=True)
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert ours == published_shapes(28, 1152, 2, 4, 16, 1000)


@pytest.mark.parametrize(("family", "objective"), [("DiT", "ddpm"), ("SiT", "flow")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_published_file_is_read_bit_for_bit_and_ready_to_sample(tmp_path, family, objective, suffix):
    state, file = random_state(), tmp_path / f"{family}-T-2{suffix}"
    torch.save(state, file) if suffix == ".pt" else save_file(state, file)
    published = load_published(file)
    assert (published.family, published.objective) == (family, objective)
    assert (published.null_label, published.sample_shape) == (10, (4, 8, 8)) and not published.training
    assert published.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in published.model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "blocks.0._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_training_checkpoint_gives_its_ema_whatever_wrapped_the_model(tmp_path, prefix, suffix):
    inside = "blocks.0." if prefix.startswith("blocks") else ""  # one block alone was compiled
    ema = {key.replace(inside, prefix, 1) if key.startswith(inside) else key: v for key, v in random_state(2).items()}
    file = tmp_path / f"0400000{suffix}"
    if suffix == ".pt":
        torch.save({"model": random_state(1), "ema": ema, "args": argparse.Namespace(lr=1e-4)}, file)
    else:
        save_file(ema, file)
    published = load_published(file, family="SiT").model.state_dict()
    assert all(torch.equal(published[key], value) for key, value in random_state(2).items())
    with pytest.raises(ConfigError, match="Begin its name with one of them, or say family='DiT'"):
        load_published(file)


def test_wrong_state_is_refused_with_the_list_of_what_differs(tmp_path):
    state = random_state()
    del state["blocks.2.mlp.fc1.bias"]
    state["blocks.0.attn.extra"] = torch.zeros(1)
    state["blocks.1.attn.proj.weight"] = torch.zeros(96, 95)
    torch.save(state, tmp_path / "DiT.pt")
    with pytest.raises(CheckpointError, match="is no DiT") as error:
        load_published(tmp_path / "DiT.pt")
    for key in ("blocks.2.mlp.fc1.bias", "blocks.0.attn.extra", "blocks.1.attn.proj.weight"):
        assert key in str(error.value)


class Loud:
    def __reduce__(self):
        return (print, ("code ran while a checkpoint was read",))


def test_files_that_are_no_dit_are_refused_by_name_and_run_no_code(tmp_path, capsys):
    file, state = tmp_path / "DiT-other.pt", random_state()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_published(file)
    deep = {key.replace("blocks.3", "blocks.4"): value for key, value in state.items()}
    for content, error, words in (
        ({"conv.weight": torch.zeros(1)}, CheckpointError, "lacks x_embedder.proj.weight, pos_embed"),
        ({**state, "pos_embed": torch.zeros(16)}, CheckpointError, "lacks pos_embed of their form"),
        ({"x": Loud()}, CheckpointError, r"DiT-other\.pt cannot be read"),
        ({"ema": [1]}, CheckpointError, "holds a list"),
        ({**state, **deep}, ConfigError, "depth 5 and width 96, no published size"),
    ):
        torch.save(content, file)
        with pytest.raises(error, match=words):
            load_published(file)
    assert "code ran" not in capsys.readouterr().out


def test_dit_in_the_kits_time_is_the_published_timestep(tmp_path, inputs):
    torch.save(random_state(), tmp_path / "DiT.pt")
    published = load_published(tmp_path / "DiT.pt")
    x, t, y = inputs
    plain = published.model  # time_scale 1: takes the public code's timesteps 0..999
    expected = plain(x, torch.tensor([0.0, 399.0, 999.0]), y)
    torch.testing.assert_close(published(x, t, y), expected, atol=1e-5, rtol=1e-5)


def test_sit_in_the_kits_time_samples_what_the_public_direction_does(tmp_path, inputs):
    torch.save(random_state(), tmp_path / "SiT.pt")
    published = load_published(tmp_path / "SiT.pt")
    x, _, y = inputs
    state = x
    for i in range(8):  # the public code: t from 0 (noise) to 1 (data), x + v dt, first half of the channels
        v = published.model(state, torch.full((3,), i / 8), y)[:, :4]
        state = state + v / 8
    with torch.no_grad():
        ours = euler(lambda x, t: published(x, t, y), x, time_grid(8))
    torch.testing.assert_close(ours, state, atol=1e-5, rtol=1e-5)


def test_taps_blocks_and_gradients_pass_through_the_wrapper(tmp_path, inputs):
    torch.save(random_state(), tmp_path / "SiT.pt")
    for published in (load_published(tmp_path / "SiT.pt"), load_published(tmp_path / "SiT.pt", family="DiT")):
        out, (z,) = published(*inputs, taps=(1,))
        assert out.shape[1] == (4 if published.family == "SiT" else 8) and z.shape == (3, 16, 96)
        assert published.get_submodule("blocks.1") is published.model.blocks[1]
        out.sum().backward()
        assert published.model.pos_embed.grad is None
        assert published.model.blocks[3].mlp.fc1.weight.grad.abs().max() > 0
