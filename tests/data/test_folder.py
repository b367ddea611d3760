"""A folder of images as it is met: read or listed, never lost in silence; and the crop is ADM's."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from encode_jobs import SMALL, make, write_photos
from PIL import Image

from dispersive_kit.data import folder, load_images
from dispersive_kit.data.encode import Encoder, encode
from dispersive_kit.data.folder import _adm_crop, list_images, read_image
from dispersive_kit.errors import DataError


def test_every_kind_of_image_is_read_or_listed(tmp_path):
    root = write_photos(tmp_path / "photos", ["n01"], 3)
    deep = root / "n02" / "deeper" / "still"
    deep.mkdir(parents=True)
    whole = Image.open(root / "n01" / "0000.png")
    for mode in ("CMYK", "L"):
        whole.convert(mode).save(deep / f"{mode}.jpg")
    whole.convert("RGBA").save(deep / "alpha.png")
    (deep / "link.png").symlink_to(tmp_path / "nowhere.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    whole.save(deep / "turned.jpg", exif=exif)
    (deep / "empty.JPEG").write_bytes(b"")
    (deep / "half.jpg").write_bytes((deep / "CMYK.jpg").read_bytes()[:700])
    (deep / "text.png").write_text("not an image")
    (deep / "notes.txt").write_text("not even named like one")
    spec = make(root, tmp_path / "store").spec
    assert spec.classes == ("n01", "n02") and spec.class_counts == (3, 4)
    assert spec.images["odd"] == {"CMYK": 1, "EXIF-rotated": 1, "L": 1, "RGBA": 1}
    left_out = {photo["file"]: photo["fault"] for photo in spec.images["left_out"]}
    assert [Path(file).name for file in left_out] == ["empty.JPEG", "half.jpg", "link.png", "text.png"]
    assert left_out["n02/deeper/still/empty.JPEG"] == "empty file"
    assert left_out["n02/deeper/still/text.png"] == "UnidentifiedImageError: cannot identify image file"
    upright = read_image(root, "n02/deeper/still/turned.jpg", 16).pixels
    lying = _adm_crop(Image.open(deep / "turned.jpg").convert("RGB"), 16)
    turned = lying.rot90(-1, (1, 2))
    assert (upright.int() - turned.int()).abs().max() <= 2  # resized in another order
    for store in ("strict", "store"):  # a new one, and one that left images out before
        with pytest.raises(DataError, match=r"empty\.JPEG cannot be read .*--strict"):
            make(root, tmp_path / store, strict=True)


def test_classes_that_are_links_to_folders_are_found(tmp_path):
    real = write_photos(tmp_path / "real", ["n01", "n02", "n03"], 6)
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for name in ("n01", "n03"):
        (chosen / name).symlink_to(real / name)
    listed = list_images(chosen)
    assert listed.classes == ("n01", "n03") and len(listed.files) == 4
    assert listed.label("n03/0002.png") == 1
    assert all(read_image(chosen, file, 16).pixels is not None for file in listed.files)


def test_sixteen_bits_keep_their_shades_and_thirty_two_are_listed(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp / 257).astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "32.tif")
    sixteen, eight, float32 = (read_image(tmp_path, name, 32) for name in ("16.png", "8.png", "32.tif"))
    assert sixteen.oddities == ("I;16",)
    assert (sixteen.pixels.int() - eight.pixels.int()).abs().max() <= 1
    assert float32.pixels is None and "32 bits" in float32.fault


def test_a_disk_that_fails_is_no_fault_of_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAITS_S", (0.0, 0.0))
    root = write_photos(tmp_path / "photos", ["a"], 12)
    encoder = Encoder(root, "patches", tmp_path / "store", **SMALL)
    assert len(encoder.folder.files) == 12
    away = root.rename(tmp_path / "elsewhere")  # as a network folder may be
    with pytest.raises(DataError, match=r"No such file or directory\. That says nothing of the image"):
        encode(encoder)
    away.rename(root)
    assert make(root, tmp_path / "store").spec.images["left_out"] == []


def test_a_disk_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAITS_S", (0.1, 0.3, 3.0))
    root = write_photos(tmp_path / "photos", ["a"], 1)
    away = root.rename(tmp_path / "elsewhere")
    comes_back = threading.Timer(0.2, os.rename, (away, root))
    comes_back.start()
    assert read_image(root, "a/0000.png", 16).pixels is not None
    comes_back.join()


@pytest.mark.parametrize("size", [(500, 375), (64, 64), (31, 90), (129, 257)])
def test_the_crop_is_that_of_adm(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    # center_crop_arr of guided-diffusion, as DiT and SiT copied it
    pil, S = image, 64
    while min(*pil.size) >= 2 * S:
        pil = pil.resize(tuple(x // 2 for x in pil.size), resample=Image.BOX)
    scale = S / min(*pil.size)
    pil = pil.resize(tuple(round(x * scale) for x in pil.size), resample=Image.BICUBIC)
    arr = np.array(pil)
    y, x = (arr.shape[0] - S) // 2, (arr.shape[1] - S) // 2
    assert np.array_equal(_adm_crop(image, S).permute(1, 2, 0).numpy(), arr[y : y + S, x : x + S])


@pytest.mark.parametrize("parts", [["train"], ["train", "val"], ["test"]])
def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path, parts):
    for part in parts:
        write_photos(tmp_path / "set" / part, ["cat", "dog"], 4)
    with pytest.raises(DataError, match=r"parts of a data set and not its classes. Give .*set/" + parts[0]):
        list_images(tmp_path / "set")
    if parts != ["train", "val"]:
        with pytest.raises(DataError, match="parts of a data set"):
            load_images(str(tmp_path / "set"))
