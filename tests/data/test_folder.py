"""A folder of images as it is met: read or listed, never lost in silence; and the crop is ADM's."""

import json
import os
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
from encode_jobs import SMALL, make, write_photos
from PIL import Image

from dispersive_kit.data import load_images
from dispersive_kit.data.encode import Encoder, encode
from dispersive_kit.data.files import artefact
from dispersive_kit.data.folder import ON_WHITE, _adm_crop, list_images, read_image
from dispersive_kit.data.latents import LatentStore, is_store
from dispersive_kit.errors import ConfigError, DataError


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
    left_out = {Path(photo["file"]).name: photo["fault"] for photo in spec.images["left_out"]}
    assert list(left_out) == ["empty.JPEG", "half.jpg", "link.png", "text.png"]
    assert left_out["empty.JPEG"] == "empty file"
    assert left_out["text.png"] == "UnidentifiedImageError: cannot identify image file"
    upright = read_image(root, "n02/deeper/still/turned.jpg", 16).pixels
    lying = _adm_crop(Image.open(deep / "turned.jpg").convert("RGB"), 16)
    assert (upright.int() - lying.rot90(-1, (1, 2)).int()).abs().max() <= 2  # resized in another order


# ---- walking


@pytest.mark.parametrize(
    "links",
    [
        {"photos/cat/up": ".."},
        {"photos/ant": "cat"},  # a class under a name that comes first
        {"photos/ant/0.png": "../cat/0000.png"},
        {"ring/one/to": "../two", "ring/two/to": "../one", "photos/cat/out": "../../ring/one"},
    ],
    ids=["to the parent", "to a class", "to a file", "in a ring"],
)
def test_each_real_file_is_found_once_and_under_its_own_name(tmp_path, links):
    root = write_photos(tmp_path / "photos", ["cat", "dog"], 6)
    plain = list_images(root)
    os.link(root / "cat" / "0000.png", root / "dog" / "z.png")
    for name, to in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(to)
    with pytest.warns(UserWarning, match="skipped 2 links to files or folders that are listed already"):
        assert list_images(root) == plain


def test_classes_that_are_links_to_folders_are_found(tmp_path):
    real = write_photos(tmp_path / "real", ["n01", "n02", "n03"], 6)
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for name in ("n01", "n03"):
        (chosen / name).symlink_to(real / name)
    (chosen / "n04").mkdir()
    (chosen / "n04" / "one.png").symlink_to(real / "n02" / "0001.png")
    listed = list_images(chosen)
    assert listed.classes == ("n01", "n03", "n04") and len(listed.files) == 5
    assert listed.label("n03/0002.png") == 1
    assert all(read_image(chosen, file, 16).pixels is not None for file in listed.files)


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/a.png", "__MACOSX/cat/a.png", "cat/@eaDir/a.png", "cat/._0000.png", "#recycle/a.png"]
)
def test_hidden_names_and_those_of_programs_are_skipped_and_counted(tmp_path, name):
    root = write_photos(tmp_path, ["cat", "dog"], 4)
    plain = list_images(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes((root / "cat" / "0000.png").read_bytes())
    with pytest.warns(UserWarning, match="skipped 1 names that are hidden or made by a program"):
        assert list_images(root) == plain


def listening(file):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(file))


@pytest.mark.parametrize("kind", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), listening])
def test_only_regular_files_are_opened(tmp_path, monkeypatch, kind):
    root = write_photos(tmp_path / "photos", ["cat"], 4)
    monkeypatch.chdir(root / "cat")  # the name of a socket is short
    kind(Path("never.png"))
    with pytest.warns(UserWarning, match="skipped 1 special files with image names"):
        assert len(list_images(root).files) == 4


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/a.png", b"new\nline/\x1b[31m.png"])
def test_names_that_are_no_text_are_read_and_give_classes_that_are(tmp_path, name):
    root = write_photos(tmp_path / "photos", ["cat"], 10)
    file = root / os.fsdecode(b"dog/" * (b"/" not in name) + name)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no image")
    store = make(root, tmp_path / "store")
    (photo,) = store.spec.images["left_out"]
    assert root / photo["file"] == file
    assert all(one.isprintable() for one in store.spec.classes)
    file.write_bytes((root / "cat" / "0000.png").read_bytes())
    assert all(one.isprintable() for one in load_images(str(root), size=8).classes)


@pytest.mark.parametrize("parts", [["train"], ["train", "val"], ["test"], ["Train"], ["TRAIN", "Test"]])
def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path, parts):
    for part in parts:
        write_photos(tmp_path / "set" / part, ["cat", "dog"], 4)
    with pytest.raises(DataError, match=r"parts of a data set and not its classes. Give .*set/" + sorted(parts)[0]):
        list_images(tmp_path / "set")
    if len(parts) == 2:
        for split in ("train", "test"):
            data = load_images(str(tmp_path / "set"), split, size=8)
            assert data.classes == ("cat", "dog") and len(data) == 4
    else:
        with pytest.raises(DataError, match="parts of a data set"):
            load_images(str(tmp_path / "set"))


# ---- a disk that fails


@pytest.fixture
def closed():
    """A folder below one of another user, that nobody may list: as for a process without rights."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def without_rights(call, *args):
    """What `call` raises as a user who is not root, which may list everything."""
    as_root = os.geteuid() == 0
    try:
        if as_root:
            os.seteuid(65534)
        with pytest.raises(DataError) as caught:
            call(*args)
    finally:
        if as_root:
            os.seteuid(0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "place"),
    [
        (list_images, "cat/deep"),
        (list_images, "cat"),
        (lambda root: load_images(str(root), size=8), "."),
        (lambda root: make(root / "photos", root / "store"), "store"),
        (lambda root: make(root / "photos", root / "store"), "store/records"),
        (is_store, "store"),
        (LatentStore, "store"),
        (lambda root: artefact("one", root), "."),
    ],
)
def test_what_cannot_be_listed_is_named_and_not_taken_for_empty(closed, call, place):
    write_photos(closed, ["cat", "cat/deep", "dog", "photos/a"], 8)
    make(closed / "photos", closed / "store")
    (closed / "SHA256SUMS").write_text("")
    at = closed / "store" if call in (is_store, LatentStore) else closed
    (closed / place).chmod(0)
    said = without_rights(call, at)
    (closed / place).chmod(0o755)
    assert f"{(closed / place)}" in said and "cannot be read (Permission denied)" in said, said


def test_sixteen_bits_keep_their_shades_and_thirty_two_are_listed(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp / 257).astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "32.tif")
    sixteen, eight, float32 = (read_image(tmp_path, name, 32) for name in ("16.png", "8.png", "32.tif"))
    assert sixteen.oddities == ("I;16",)
    assert (sixteen.pixels.int() - eight.pixels.int()).abs().max() <= 1
    assert float32.pixels is None and "32 bits" in float32.fault


def test_a_disk_that_fails_is_no_fault_of_the_image(tmp_path):
    root = write_photos(tmp_path / "photos", ["a"], 12)
    encoder = Encoder(root, "patches", tmp_path / "store", **SMALL)
    assert len(encoder.folder.files) == 12
    away = root.rename(tmp_path / "elsewhere")  # as a network folder may be
    with pytest.raises(DataError, match=r"png cannot be read \(No such file or directory\): check the disk"):
        encode(encoder)
    away.rename(root)
    assert make(root, tmp_path / "store").spec.images["left_out"] == []


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


# ---- what a picture is


@pytest.mark.parametrize(
    ("mode", "colour", "options", "shade"),
    [
        ("RGBA", (0, 0, 0, 128), {}, 127),
        ("LA", (0, 128), {}, 127),
        ("RGBA", (9, 9, 9, 0), {}, 255),
        ("P", 0, {"transparency": 0}, 255),
        ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, 255),
        ("L", 7, {"transparency": 7}, 255),
    ],
)
def test_what_is_transparent_is_put_on_white_and_counted(tmp_path, mode, colour, options, shade):
    write_photos(tmp_path / "photos", ["a"], 1)
    Image.new(mode, (20, 20), colour).save(tmp_path / "photos" / "a" / "clear.png", **options)
    read = read_image(tmp_path / "photos", "a/clear.png", 16)
    assert set(read.pixels.unique().tolist()) == {shade} and ON_WHITE in read.oddities
    store = make(tmp_path / "photos", tmp_path / "store")
    assert store.spec.images["odd"][ON_WHITE] == 1
    plan = store.path / "records" / "plan.json"  # as a version left it that dropped transparency
    plan.write_text(json.dumps({k: v for k, v in json.loads(plan.read_text()).items() if k != "transparency"}))
    with pytest.raises(ConfigError, match=r"transparency: None -> 'transparent, put on white'"):
        make(tmp_path / "photos", store.path)


def test_a_picture_with_nothing_transparent_is_read_as_it_was(tmp_path):
    root = write_photos(tmp_path, ["a"], 1)
    Image.open(root / "a" / "0000.png").convert("RGBA").save(root / "a" / "full.png")
    plain, full = (read_image(root, f"a/{name}.png", 16) for name in ("0000", "full"))
    assert (plain.pixels == full.pixels).all() and full.oddities == ("RGBA",)


@pytest.mark.parametrize("size", [0, -3])
def test_a_size_of_nothing_is_not_blamed_on_the_picture(tmp_path, size):
    root = write_photos(tmp_path / "photos", ["a"], 10)
    for call in (
        lambda: read_image(root, "a/0000.png", size),
        lambda: load_images(str(root), size=size),
        lambda: make(root, tmp_path / "store", image_size=size),
    ):
        with pytest.raises(ConfigError, match=rf"image_size.* must be above 0, got \(?{size}"):
            call()
