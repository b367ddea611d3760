"""Encode once: what is stored, and that neither kills nor company change a bit of it."""

import hashlib
import random
import signal
import time

import numpy as np
import pytest
import torch
import warm
from encode_jobs import SMALL, make, start, write_photos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_autoencoders import register_drawn

from dispersive_kit.cli import main
from dispersive_kit.data import files
from dispersive_kit.data.encode import IMAGENET_IMAGES, Encoder, encode, store_size
from dispersive_kit.data.folder import list_images, read_image
from dispersive_kit.data.latents import LatentStore
from dispersive_kit.errors import ConfigError, DataError


def bytes_of(store):
    """Every file of a store with its hash."""
    files = sorted(p for p in store.rglob("*") if p.is_file())
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ---- what is stored


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    count=st.integers(1, 17), shard_size=st.integers(1, 20), batch_size=st.integers(1, 9), flip=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16"]), parts=st.integers(1, 3), factor=st.sampled_from([2, 4, 8]),
    channels=st.integers(1, 5), size=st.sampled_from([8, 16]), exponent=st.integers(-6, 6),
)  # fmt: skip
def test_what_is_read_is_the_encoders_own_posterior_to_the_types_rounding(
    tmp_path_factory, count, shard_size, batch_size, flip, dtype, parts, factor, channels, size, exponent
):
    folder = tmp_path_factory.mktemp("property")
    images, drawn = write_photos(folder / "images", ["a", "b"], count, size=(9, 13)), (factor, channels, exponent)
    options = {"image_size": size, "shard_size": shard_size, "batch_size": batch_size, "flip": flip, "dtype": dtype}
    store, listed = make(images, folder / "store", "drawn", drawn=drawn, parts=parts, **options), list_images(images)
    rows = np.arange(count)[::-1].copy()
    assert store.labels(rows).tolist() == [listed.label(listed.files[row]) for row in rows]
    pixels = torch.stack([read_image(images, listed.files[row], size).pixels for row in rows]) / 127.5 - 1
    for flipped in [False, True][: 1 + flip]:
        expected = torch.stack(register_drawn(*drawn).encode(pixels.flip(-1) if flipped else pixels), dim=1)
        read = store.read(rows, np.full(count, flipped))
        assert read.dtype == getattr(torch, dtype)
        rounding = torch.finfo(read.dtype)
        torch.testing.assert_close(read.float(), expected, rtol=rounding.eps / 2, atol=rounding.smallest_normal)


def test_latents_beyond_the_type_are_refused_with_the_cure(photos, tmp_path):
    with pytest.raises(DataError, match="bfloat16"):
        make(photos, tmp_path / "store", "bright")
    assert len(make(photos, tmp_path / "wide", "bright", dtype="bfloat16")) == 30


def test_sums_do_not_depend_on_threads_or_on_what_cudnn_finds_fastest(photos, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(DataError, match=r"threads 1, deterministic True, benchmark False"):
        make(photos, tmp_path / "store", "telling")
    assert torch.get_num_threads() == before


# ---- neither kills nor company


@pytest.mark.parametrize(("seed", "kills"), [(0, 2), *(pytest.param(i, 10, marks=pytest.mark.long) for i in range(4))])
def test_two_processes_killed_at_any_moment_and_resumed_give_the_same_bytes(photos, tmp_path, seed, kills):
    rng, store, options = random.Random(seed), tmp_path / "store", {"shard_size": 2 if kills > 2 else 7}
    whole, struck, made = make(photos, tmp_path / "whole", "slow patches", **options).path, 0, []
    for _ in range(kills):
        pair, before = start(2, photos, store, "slow patches", **options), len(made)
        while len(made) <= before and any(process.is_alive() for process in pair):
            time.sleep(0.01)
            made = sorted(store.glob("records/shard-*.json"))
        time.sleep(rng.uniform(0.0, 0.06))
        for process in pair:
            process.kill()  # which may come too late
            process.join()
            struck += process.exitcode == -signal.SIGKILL
        made = sorted(store.glob("records/shard-*.json"))
    times = {file: file.stat().st_mtime_ns for file in made}
    make(photos, store, "slow patches", **options)
    assert struck >= kills and all(file.stat().st_mtime_ns == when for file, when in times.items())
    assert bytes_of(store) == bytes_of(whole)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A store that was never interrupted."""
    return make(photos, tmp_path_factory.mktemp("whole") / "store", "patches").path


def test_a_store_is_not_gone_on_with_under_other_settings_or_of_other_images(photos, whole, tmp_path):
    before, other = bytes_of(whole), write_photos(tmp_path / "other", ["n01"], 3)
    for images, autoencoder, change, said in (
        (photos, "patches", {"flip": False}, "flip: True -> False"),
        (photos, "patches", {"image_size": 8}, "image_size: 16 -> 8"),
        (photos, "slow patches", {}, "autoencoder"),
        (other, "patches", {}, "names_sha256"),
    ):
        with pytest.raises(ConfigError, match=said):
            make(images, whole, autoencoder, **change)
    assert bytes_of(whole) == before


def test_a_lost_shard_and_a_lost_or_changed_spec_are_made_again_and_nothing_else(photos, tmp_path, whole):
    store = make(photos, tmp_path / "store", "patches").path
    spec, lost = store / "spec.json", store / "shard-00002.safetensors"
    written, before = spec.read_text(), {p: p.stat().st_mtime_ns for p in store.glob("shard-*") if p != lost}
    for damaged in (None, written[:-30], written.replace('"scale": 0.5', '"scale": 0.6')):
        lost.unlink()
        spec.unlink() if damaged is None else spec.write_text(damaged)
        with pytest.raises(DataError, match=r"not finished: give the same encode command again|damaged"):
            LatentStore(store)
        make(photos, store, "patches")
        assert bytes_of(store) == bytes_of(whole)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())


def test_a_folder_of_something_else_is_left_alone(photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(ConfigError, match="holds no store"):
        make(photos, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_progress_counts_images_and_the_bar_tells_rate_and_time(photos, tmp_path, capsys):
    told = []
    encoder = Encoder(photos, "patches", tmp_path / "store", **SMALL)
    encode(encoder, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == [3, 6, 7, 10, 13, 14, 17, 20, 21, 24, 27, 28, 30] and told[0][1] == 30
    make(photos, tmp_path / "other")
    last = capsys.readouterr().err.split("\r")[-1]
    assert "30/30 [00:0" in last and "image/s" in last


# ---- sizes


def test_the_plan_of_imagenet_is_arithmetic():
    total, said = store_size(IMAGENET_IMAGES, (4, 32, 32))
    posterior = 2 * 2 * 4 * 32 * 32 * 2  # image and mirror image, mean and std, values, bytes each
    assert posterior + 8 == 32_776 and 312 * 4096 < IMAGENET_IMAGES <= 313 * 4096
    assert total == 41_991_582_176 and "32,776 bytes each, 41,991.6 MB in 313 shards" in said
    assert store_size(IMAGENET_IMAGES, (4, 32, 32), flip=False)[0] == pytest.approx(21.0e9, rel=1e-3)


@pytest.mark.parametrize("flip", [True, False])
def test_a_store_has_the_size_that_was_planned(photos, tmp_path, flip):
    store = make(photos, tmp_path / "store", flip=flip)
    total, _ = store_size(30, store.spec.shape, flip=flip, shard_size=SMALL["shard_size"])
    assert sum(shard.bytes for shard in store.spec.shards) == pytest.approx(total, abs=30 * 5)


# ---- the command


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_encodes_and_check_looks_at_it(photos, tmp_path, monkeypatch, capsys, processes):
    store, sizes = tmp_path / "store", ["--image-size", "16", "--shard-size", "7", "--batch-size", "3"]
    command = ["encode", "--images", photos, "--vae", "small_autoencoders:patches", "--out", store, *sizes]
    said = warm.run("dispersive-kit", *command, "--plan-only")
    assert "30 images with mirror images, latents 3x2x2: 104 bytes each, 0.0 MB in 5 shards" in said
    assert not store.exists()
    said = warm.run("dispersive-kit", *command, processes=processes)
    assert said.count("done: ") == 1 and f"{processes} processes, each at a shard" in said
    make(photos, tmp_path / "alone", "small_autoencoders:patches")
    assert bytes_of(store) == bytes_of(tmp_path / "alone")
    monkeypatch.chdir(store)
    main(["check", "."])
    assert capsys.readouterr().out.count("ok  ") == 3
    assert Image.open(tmp_path / "store-grid.png").size == (69, 69)


def test_check_looks_at_a_store_whose_folder_cannot_be_written_and_makes_no_folder(photos, tmp_path, monkeypatch):
    make(photos, tmp_path / "shared" / "store", "small_autoencoders:patches")
    real = files.tempfile.TemporaryFile

    def refuse(dir):  # as on a disk for reading, also for root
        if dir == tmp_path / "shared":
            raise PermissionError(13, "Read-only file system")
        return real(dir=dir)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    monkeypatch.chdir(tmp_path)
    main(["check", "shared/store"])
    assert Image.open(tmp_path / "store-grid.png").size == (69, 69)
    with pytest.raises(SystemExit):
        main(["check", "no/such/store"])
    assert not (tmp_path / "no").exists()
