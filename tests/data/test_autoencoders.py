"""Autoencoders of diffusers, built from a configuration: what is read of them, and what is refused."""

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encode_jobs import make
from small_autoencoders import Patches

from dispersive_kit.cli import main
from dispersive_kit.data.autoencoders import load_autoencoder, load_named, register_autoencoder
from dispersive_kit.errors import CheckpointError, ConfigError, DataError

diffusers = pytest.importorskip("diffusers")
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"

SMALL = {  # the form of stabilityai/sd-vae-ft-ema, whose scaling factor too is the class's default
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
KNOWN = {**SMALL, "_class_name": "AutoencoderKL"}


def saved(folder, **changes):
    torch.manual_seed(0)
    diffusers.AutoencoderKL.from_config({**SMALL, **changes}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vae") / "small")


def test_the_posterior_and_the_images_are_those_of_diffusers(small):
    network, loaded = diffusers.AutoencoderKL.from_pretrained(small).eval(), load_autoencoder(str(small))
    network.requires_grad_(False)  # with it, convolutions on a CPU take another way and round otherwise
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = network.encode(x).latent_dist
        decoded = network.decode(posterior.mean).sample
    assert torch.equal(loaded.posterior(x), torch.stack([posterior.mean, posterior.std], 1))
    x0 = loaded.card.to_model(posterior.mean)
    assert torch.equal(x0, posterior.mean * 0.18215)
    torch.testing.assert_close(loaded.images(x0), decoded)


def test_scale_and_shift_come_from_the_configuration(tmp_path):
    card = load_autoencoder(str(saved(tmp_path, scaling_factor=0.3611, shift_factor=0.1159))).card
    assert (card.scale, card.shift) == (0.3611, 0.1159)
    z = torch.randn(2, 4, 2, 2)
    torch.testing.assert_close(card.to_model(z), (z - 0.1159) * 0.3611)


def test_the_tiny_autoencoder_is_a_point_without_spread(tmp_path):
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=1.5,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = tiny.eval().encode(x).latents
    assert loaded.card.kind == "AutoencoderTiny" and loaded.card.scale == 1.5
    assert torch.equal(loaded.posterior(x)[:, 0], latents) and not loaded.posterior(x)[:, 1].any()
    assert loaded.images(latents * 1.5).shape == x.shape


def test_the_hash_is_of_the_weights_and_not_of_the_file(small, tmp_path):
    card = load_autoencoder(str(small)).card
    diffusers.AutoencoderKL.from_pretrained(small).save_pretrained(tmp_path, max_shard_size="20KB")
    assert load_named(card, path=str(tmp_path)).card == card
    (tmp_path / "link").symlink_to(small)  # moved, with a link at its old place
    assert load_named(replace(card, id=str(tmp_path / "link"))).card == card
    other = diffusers.AutoencoderKL.from_pretrained(small)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="weights_sha256"):
        load_named(card, path=str(tmp_path / "other"))


def test_weights_that_do_not_fill_the_configuration_are_refused(small, tmp_path):
    from safetensors.torch import load_file, save_file

    diffusers.AutoencoderKL.from_pretrained(small).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["quant_conv.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing keys"):
        load_autoencoder(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, r"OSError: .*folder of a diffusers autoencoder .*; the folder vae of a whole pipeline"),
        ({"_class_name": "UNet2DModel"}, "ValueError: it is a UNet2DModel; the kit reads AutoencoderKL"),
        (KNOWN | {"latents_mean": [0.5, -1.0, 0.0, 2.0]}, "ValueError: it is a AutoencoderKL.*without latents_mean"),
        ([], r"\w+: .*folder of a diffusers autoencoder"),
        (KNOWN | {"layers_per_block": ""}, r"\w+Error: "),
        (KNOWN, "OSError: "),
    ],
)
def test_what_is_no_autoencoder_is_refused_with_the_reason(tmp_path, config, said):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"cannot be loaded \({said}"):
        load_autoencoder(str(tmp_path), download=False)


# ---- one's own


def changed(**parts):
    return type("Changed", (Patches,), parts)


def without(name):
    return type("Less", (), {k: v for k, v in vars(Patches).items() if k != name})


FAULTS = {  # each is one change of an autoencoder that is right
    "a tensor": (changed(encode=lambda self, x: x[:, :, ::8, ::8]), "must be tuple of Tensors, not Tensor"),
    "a distribution": (changed(encode=lambda self, x: torch.distributions.Normal(x, 1.0)), "Tensors, not Normal"),
    "three parts": (changed(encode=lambda self, x: (x, x, x)), "too many values to unpack"),
    "other shapes": (changed(encode=lambda self, x: (x, x[:, :1])), r"\[1, 3, 16, 16\] .* \[1, 1, 16, 16\]"),
    "flat latents": (changed(encode=lambda self, x: (x.flatten(1), x.flatten(1))), "not enough values to unpack"),
    "log std": (changed(encode=lambda self, x: (x, x - 9)), r"a std below 0 \(the least is -10\)"),
    "NaN": (changed(encode=lambda self, x: (x / 0, x.abs())), "encode gave NaN, infinity"),
    "its own error": (changed(encode=lambda self, x: x.reshape(-1, 7)), "RuntimeError: shape '.* is invalid"),
    "decode to NaN": (changed(decode=lambda self, z: Patches().decode(z) / 0), "values that are not finite"),
    "decode to nothing": (changed(decode=lambda self, z: None), "'NoneType' object has no attribute"),
    "decode to another size": (changed(decode=lambda self, z: z), r"decode gave \(1, 3, 2, 2\)"),
    "no encode": (without("encode"), "'Less' object has no attribute 'encode'"),
    "no scale": (without("scale"), "'Less' object has no attribute 'scale'"),
    "scale by channel": (changed(scale=[1.0, 2.0]), r"scale = \[1\.0, 2\.0\]: Input should be a valid number"),
    "scale of nothing": (changed(scale=0.0), r"scale = 0\.0: .*greater than 0"),
    "shift that is none": (changed(shift=float("nan")), "shift = nan: .*finite number"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_ones_own_autoencoder_is_tried_on_an_image_before_anything_is_encoded(photos, tmp_path, fault):
    factory, said = FAULTS[fault]
    register_autoencoder("faulty")(factory)
    with pytest.raises(ConfigError, match=said) as caught:
        make(photos, tmp_path / "store", "faulty")
    assert "autoencoder faulty" in str(caught.value) and not (tmp_path / "store").exists()
    assert "encode(x): images (B, 3, H, W)" in str(caught.value) or said.startswith(("scale =", "shift ="))


def test_a_name_that_is_not_registered_is_refused():
    for name, said in (("small_autoencoders:tiles", "registers no autoencoder 'tiles'; there are: .*patches"),
                       ("no.such:mine", "from 'no.such' .*PYTHONPATH")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            load_autoencoder(name)


def test_an_image_size_that_it_does_not_divide_is_said(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"decode gave \(1, 3, 16, 16\) .*; image_size may be no multiple"):
        make(photos, tmp_path / "store", image_size=20)


def test_the_ten_lines_of_the_docstring_make_an_autoencoder(photos, tmp_path):
    shown = [line for line in register_autoencoder.__doc__.splitlines() if line.startswith("        ")]
    assert len(shown) <= 10
    code = textwrap.dedent("\n".join(shown))
    exec(code, {"register_autoencoder": register_autoencoder, "torch": torch})
    store = make(photos, tmp_path / "store", "mine")
    assert store.spec.autoencoder.kind == "Mine" and store.spec.autoencoder.scale == 0.5
    grid = store.decoded_grid(load_named(store.spec.autoencoder))
    assert grid.shape == (16, 3, 16, 16) and grid.float().std() > 1


def test_the_one_that_notebook_12_shows_is_found_on_the_python_path(photos, tmp_path, monkeypatch, capsys):
    cells = json.loads((NOTEBOOKS / "12_imagenet_latents.ipynb").read_text())["cells"]
    text = "".join(line for cell in cells for line in cell["source"])
    code = re.search(r"such as `mine\.py`:\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)  # what PYTHONPATH does
    main(f"encode --images {photos} --vae mine:small --out {tmp_path / 'store'} --image-size 16".split())
    assert "done: " in capsys.readouterr().out
