import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from encode_jobs import write_photos
from PIL import Image

from dispersive_kit.data import ImageSet, load_images, to_float, to_uint8
from dispersive_kit.data.images import data_folder
from dispersive_kit.errors import DataError
from dispersive_kit.training import train_preset
from dispersive_kit.training.batches import open_source


def test_digits_split_is_fixed_disjoint_and_complete():
    train, test = load_images("digits"), load_images("digits", "test")
    assert len(train) == 1297 and len(test) == 500 and train.images.shape[1:] == (1, 8, 8)
    assert len(test.labels.unique()) == 10
    assert train.sha256 == load_images("digits").sha256 != test.sha256


def test_uint8_survives_the_round_trip_and_out_of_range_is_clamped():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_becomes_no_picture(wrong):
    x = torch.zeros(2, 3, 4, 4)
    x[0, 0, 0, :3] = wrong
    with pytest.raises(DataError, match="3 of 96 values are NaN or infinite: they are no picture"):
        to_uint8(x)


def open_by_name(name):
    open_source(train_preset("digits", data=name))


@pytest.mark.parametrize(
    ("call", "name"),
    [(load_images, "digits"), (load_images, "mnist"), (load_images, "cifar10"), (open_by_name, "photos"),
     (open_by_name, "spirals")],
)  # fmt: skip
def test_a_folder_with_the_name_of_a_data_set_is_asked_about(tmp_path, monkeypatch, call, name):
    monkeypatch.chdir(tmp_path)
    write_photos(Path(name), ["a"], 10)
    said = rf"'{name}' is both a data set .* a folder, {tmp_path}/{name}: write \./{name}"
    for file in ("notes.txt", "spec.json"):  # a folder of images, and a store of latents
        (Path(name) / file).write_text("{}")
        with pytest.raises(DataError, match=said):
            call(name)
    (Path(name) / "spec.json").unlink()
    assert len(load_images(f"./{name}", size=8)) == 9
    if name == "digits":  # of a run that was named like its data; there is no other meaning
        (Path(name) / "config.json").write_text("{}")
        assert len(load_images(name)) == 1297


def test_what_is_not_there_is_refused_with_what_there_is_or_where_to_put_it(tmp_path):
    for args, said in (
        (("cifar100",), "cifar10"),
        (("digits", "validation"), "train, test"),
        ((str(tmp_path),), "no image"),
        (("cifar10",), rf"{tmp_path}.*cifar-10-batches-py.*cifar10\.npz"),
    ):
        with pytest.raises(DataError, match=said):
            load_images(*args, data_dir=tmp_path, download=False)


def write_packed(file, labels=(0, 1, 2, 0), **changes):
    arrays = {
        "images": np.arange(4 * 5 * 5 * 3, dtype=np.uint8).reshape(4, 5, 5, 3),
        "labels": np.array(labels),
        "split": np.array([0, 0, 0, 1], dtype=np.uint8),
        "classes": np.array(["a", "b", "c"]),
    }
    np.savez(file, **{**arrays, **changes})


def test_packed_arrays_are_read_by_split(tmp_path):
    write_packed(tmp_path / "cifar10.npz")
    train = load_images("cifar10", data_dir=tmp_path)
    assert train.images.shape == (3, 3, 5, 5) and train.labels.tolist() == [0, 1, 2] and len(train.classes) == 3
    assert train.images[0, :, 0, 0].tolist() == [0, 1, 2]
    assert len(load_images("cifar10", "test", data_dir=tmp_path)) == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:100]), "cannot be read"),
        (lambda f: write_packed(f, labels=(0, 1, 3, 0)), "labels run from 0 to 3"),
        (lambda f: write_packed(f, images=np.zeros((4, 5, 5, 3), dtype=np.float32)), "uint8"),
        (lambda f: np.savez(f, images=np.zeros(1)), "split"),
    ],
    ids=["truncated", "label outside", "not uint8", "arrays missing"],
)
def test_a_bad_packed_file_is_refused_by_name(tmp_path, spoil, words):
    file = tmp_path / "cifar10.npz"
    write_packed(file)
    spoil(file)
    with pytest.raises(DataError, match=rf"cifar10\.npz.*{words}"):
        load_images("cifar10", data_dir=tmp_path)


def test_mnist_in_its_own_format_is_read(tmp_path):
    raw, n = tmp_path / "MNIST" / "raw", 6
    raw.mkdir(parents=True)
    images = np.arange(n * 28 * 28, dtype=np.uint32).astype(np.uint8)
    for part in ("train", "t10k"):
        for kind, magic, body in (
            ("images-idx3", struct.pack(">iiii", 2051, n, 28, 28), images.tobytes()),
            ("labels-idx1", struct.pack(">ii", 2049, n), bytes(range(n))),
        ):
            (raw / f"{part}-{kind}-ubyte").write_bytes(magic + body)
    data = load_images("mnist", data_dir=tmp_path, download=False)
    assert np.array_equal(data.images[:, 0].numpy().ravel(), images) and data.labels.tolist() == list(range(n))


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """A small set in CIFAR-10's own file format, of whose files torchvision knows the md5."""
    folder, n = tmp_path / "cifar-10-batches-py", 4
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = np.full((n, 3072), ord(name[-1]), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(n))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setenv("DISPERSIVE_KIT_DATA", str(tmp_path))
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [[n, md5[n]] for n, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[n, md5[n]] for n, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5["batches.meta"]})
    return tmp_path


def test_cifar_in_its_own_format_is_read(small_cifar):
    data = load_images("cifar10", download=False)  # in the folder of the variable
    assert data.images.shape == (20, 3, 32, 32) and data.classes[3] == "class3"
    assert data.images[0, 0, 0, 0] == ord("1") and data.images[-1, 0, 0, 0] == ord("5")


def test_cifar_with_a_wrong_md5_is_never_unpickled(small_cifar):
    class Trap:
        def __reduce__(self):
            return (open, (str(small_cifar / "sprung"), "w"))

    (small_cifar / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="cifar10 is not in"):
        load_images("cifar10", data_dir=small_cifar, download=False)
    assert not (small_cifar / "sprung").exists()


def test_a_folder_of_images_is_cropped_and_labelled_by_its_first_folder(tmp_path):
    for name, mode, colour in (("cat", "RGB", (200, 10, 10)), ("dog", "L", 90)):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new(mode, (40 + i, 30), colour).save(tmp_path / name / f"{i}.png")
    train, test = (load_images(str(tmp_path), split, size=16) for split in ("train", "test"))
    assert train.images.shape == (18, 3, 16, 16) and len(test) == 2 and train.classes == ("cat", "dog")
    assert train.images[0, :, 8, 8].tolist() == [200, 10, 10] and train.images[-1, :, 8, 8].tolist() == [90] * 3


def test_a_broken_image_is_named(tmp_path):
    write_photos(tmp_path, ["a"], 10)
    (tmp_path / "a" / "0003.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a/0003\.png is not a readable image \(Unident.*repair or remove"):
        load_images(str(tmp_path))


def test_labels_and_images_must_agree():
    with pytest.raises(DataError, match=r"labels \(N,\), with N at least 1; got .*\(2, 1, 4, 4\) and \(3,\)"):
        ImageSet("x", "train", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), ("a",), "here")


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_both_splits_of_a_folder_have_the_classes_of_train(tmp_path, held_out):
    folder = str(tmp_path)
    write_photos(tmp_path / "train", ["cat", "dog", "emu"], 3)
    write_photos(tmp_path / held_out, ["dog", "emu"], 2)
    train, test = load_images(folder, "train", size=8), load_images(folder, "test", size=8)
    assert train.classes == test.classes == ("cat", "dog", "emu")
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [1, 2]
    assert test.resize == train.subset(torch.tensor([1])).resize == "ADM centre crop to 8"
    (tmp_path / held_out / "dog").rename(tmp_path / held_out / "fox")
    with pytest.raises(DataError, match=r"has a class 'fox', and .*train has not"):
        load_images(folder, "test", size=8)


def test_without_a_home_the_variable_is_named(monkeypatch):
    monkeypatch.setenv("DISPERSIVE_KIT_DATA", "~nobody9/data")
    with pytest.raises(DataError, match="Set DISPERSIVE_KIT_DATA"):
        data_folder()
