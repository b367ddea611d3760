"""Published checkpoints: key names and shapes, round trips, refusals, and the conversion of time and sign."""

import argparse
import json

import pytest
import torch

from dispersive_kit.diffusion.paths import DDPMPath, velocity_field
from dispersive_kit.diffusion.samplers import ddim, euler, time_grid
from dispersive_kit.errors import CheckpointError, ConfigError
from dispersive_kit.models.dit import build_dit
from dispersive_kit.models.pretrained import PublishedDiT, PublishedSiT, load_published, save_published


def published_shapes(depth, D, patch, channels, grid, classes):
    """The key names and shapes of the public .pt files, written out."""
    shapes = {
        "pos_embed": (1, grid**2, D),
        "x_embedder.proj.weight": (D, channels, patch, patch),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (classes + 1, D),
        "final_layer.linear.weight": (patch**2 * 2 * channels, D),
        "final_layer.linear.bias": (patch**2 * 2 * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    layers = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    layers["adaLN_modulation.1"] = (6 * D, D)
    for i in range(depth):
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
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


@pytest.mark.parametrize("family", ["DiT", "SiT"])
def test_published_file_round_trips_bit_for_bit(tmp_path, family):
    state = random_state()
    torch.save(state, tmp_path / f"{family}-T-2.pt")
    published = load_published(tmp_path / f"{family}-T-2.pt")
    assert published.family == family and published.null_label == 10
    save_published(published, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_training_checkpoint_gives_its_ema(tmp_path):
    checkpoint = {"model": random_state(1), "ema": random_state(2), "args": argparse.Namespace(lr=1e-4)}
    torch.save(checkpoint, tmp_path / "0400000.pt")
    published = load_published(tmp_path / "0400000.pt", family="SiT")
    assert torch.equal(published.model.state_dict()["pos_embed"], checkpoint["ema"]["pos_embed"])
    with pytest.raises(ConfigError, match="Say family='DiT' or family='SiT'"):
        load_published(tmp_path / "0400000.pt")


def test_wrong_state_is_refused_with_the_list_of_what_differs(tmp_path):
    state = random_state()
    del state["blocks.2.mlp.fc1.bias"]
    state["blocks.0.attn.extra"] = torch.zeros(1)
    state["blocks.1.attn.proj.weight"] = torch.zeros(96, 95)
    torch.save(state, tmp_path / "DiT.pt")
    with pytest.raises(CheckpointError) as error:
        load_published(tmp_path / "DiT.pt")
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: blocks.2.mlp.fc1.bias (384,)",
        "unexpected: blocks.0.attn.extra",
        "shape: blocks.1.attn.proj.weight is (96, 95), expected (96, 96)",
    ]


def test_files_that_are_no_dit_are_refused_by_name(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "DiT-other.pt")
    with pytest.raises(CheckpointError, match=r"lacks x_embedder.proj.weight, pos_embed"):
        load_published(tmp_path / "DiT-other.pt")
    (tmp_path / "DiT-broken.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"DiT-broken\.pt cannot be read"):
        load_published(tmp_path / "DiT-broken.pt")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_published(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"needs config\.json"):
        load_published(tmp_path)


class Loud:
    def __reduce__(self):
        return (print, ("code ran while a checkpoint was read",))


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    torch.save({"x": Loud()}, tmp_path / "DiT-loud.pt")
    with pytest.raises(CheckpointError):
        load_published(tmp_path / "DiT-loud.pt")
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


def test_learned_variance_channels_are_ignored_by_the_samplers_that_have_no_use_for_them(tmp_path, inputs):
    torch.save(random_state(), tmp_path / "DiT.pt")
    published, (x, _, y) = load_published(tmp_path / "DiT.pt"), inputs
    a = ddim(lambda x, t: published(x, t, y), x, time_grid(4))
    b = ddim(lambda x, t: published(x, t, y)[:, :4], x, time_grid(4))
    assert torch.equal(a, b)
    flow = velocity_field(published, DDPMPath(), "eps")
    assert euler(lambda x, t: flow(x, t, y), x, time_grid(4, t_min=1e-3)).shape == x.shape


@pytest.fixture
def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        # diffusers spaces the frequencies by 1/127; the DiT it was converted from, and trained, by 1/128.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_diffusers_folder_gives_the_same_outputs_and_is_written_back(tmp_path, diffusers_dit, inputs):
    diffusers_dit.save_pretrained(tmp_path / "pipeline" / "transformer")
    published = load_published(tmp_path / "pipeline").eval()
    x, t, y = inputs
    with torch.no_grad():
        expected = diffusers_dit(x, t * 1000 - 1, y).sample
        torch.testing.assert_close(published(x, t, y), expected, atol=1e-5, rtol=1e-4)
    save_published(published, tmp_path / "back")
    again = type(diffusers_dit).from_pretrained(tmp_path / "back")
    state = again.state_dict()
    assert state.keys() == diffusers_dit.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in diffusers_dit.state_dict().items())
    for key in json.loads((tmp_path / "back" / "config.json").read_text()):
        if not key.startswith("_"):
            assert again.config[key] == diffusers_dit.config[key]


def test_diffusers_folders_that_cannot_be_a_dit_are_refused(tmp_path, diffusers_dit):
    emb = diffusers_dit.transformer_blocks[2].norm1.emb
    emb.timestep_embedder.linear_1.weight.data[0, 0] += 1
    diffusers_dit.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"from block to block .*timestep_embedder\.linear_1\.weight"):
        load_published(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"norm_type": "layer_norm"}))
    with pytest.raises(CheckpointError, match="ada_norm_zero"):
        load_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "sample_size"}))
    with pytest.raises(CheckpointError, match="lacks sample_size"):
        load_published(tmp_path)


def test_a_diffusers_folder_of_before_the_class_was_renamed_is_read(tmp_path, diffusers_dit, inputs):
    """The public DiT-XL/2 says Transformer2DModel, and diffusers reads it as what it is called now."""
    from diffusers import Transformer2DModel

    diffusers_dit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    assert type(Transformer2DModel.from_pretrained(tmp_path)) is type(diffusers_dit)
    x, t, y = inputs
    with torch.no_grad():
        expected = diffusers_dit(x, t * 1000 - 1, y).sample
        torch.testing.assert_close(load_published(tmp_path).eval()(x, t, y), expected, atol=1e-5, rtol=1e-4)


def test_sit_cannot_be_written_as_diffusers(tmp_path):
    published = PublishedSiT(build_dit("SiT-T/2", learn_sigma=True, time_scale=1.0))
    with pytest.raises(ConfigError, match="no SiT"):
        save_published(published, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"norm": "rms"}, "RMSNorm"),
        ({"qk_norm": True}, "QK-norm"),
        ({"mlp": "swiglu"}, "SwiGLU"),
        ({"mlp_ratio": 2.0}, "another ratio than 4"),
        ({"rope": True}, "RoPE"),
        ({"interval": True}, "a second time r"),
        ({"class_dropout_prob": 0.0}, "without a null class"),
        ({"time_scale": None}, "scales by 1000"),
    ],
)
@pytest.mark.parametrize("name", ["DiT-x.pt", "folder"])
def test_a_model_that_would_be_read_back_as_another_is_not_written(tmp_path, name, option, words):
    small = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 4, "learn_sigma": True}
    model = build_dit("DiT-T/4", **{"time_scale": 1.0, **small, **option})
    with pytest.raises(ConfigError, match=f"no place for .*{words}"):
        save_published(PublishedDiT(model), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
