"""What the lecture console, the playground and the quiz are given to draw; tests/browser sees how they draw it."""

import re
from collections.abc import Callable

import pytest
import torch

from dispersive_kit.analysis.sweep import stored
from dispersive_kit.cli import main
from dispersive_kit.errors import ConfigError
from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.views import console as c
from dispersive_kit.views.widgets import MODULE

# Every image of an arm is of one brightness, which says where it stands.
SAMPLES = {name: torch.full((10 * c.EACH, 1, 8, 8), value, dtype=torch.uint8) for name, value in (("a", 250), ("b", 5))}


@pytest.fixture(scope="module")
def spec() -> dict:
    return c.console().spec


def test_the_neighbours_of_the_map_are_those_its_numbers_count() -> None:
    data = stored("classroom.npz")
    for arm in c.ARMS:
        near, labels, share = data[f"nearest/{arm}"].long(), data["labels"], data[f"agreement/{arm}"]
        assert near.shape == (6, 4, 6, 5)
        assert not (near == torch.arange(6)[:, None]).any()  # no image is its own neighbour
        own = (labels[near] == labels[:6, None]).double().mean((2, 3))
        assert (own - share).abs().max() < 0.35  # six images of 400
        assert share[0, -1] > 0.3 > share[-1, -1]  # chance is 0.1


def test_every_state_of_a_demo_of_images_has_samples_of_its_own_from_both_runs(spec: dict) -> None:
    for name in ("training", "denoising"):
        all_frames, noise = spec["demos"][name]["frames"], ",0" if name == "denoising" else "none"
        frames = [frame for place, frame in all_frames.items() if not place.endswith(noise)]
        images = [image for frame in frames for image in frame["rows"].values()]
        assert len(set(images)) == len(images) == 2 * len(frames)
        assert len({frame["alt"] for frame in frames}) == len(frames)


def test_the_page_is_small_has_no_address_and_lets_no_other_script_run(tmp_path) -> None:
    main(["console", "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert (tmp_path / "page.html").stat().st_size <= 3e6
    assert not re.findall(r"https?://", page)
    assert page.count("<script") == 2 and "src=" not in re.sub(r"img-src|\.src|src: |src=.\"data:", "", page)
    assert "</script" not in page.split('id="data">')[1].split("</script>")[0]
    policy = re.search(r'Policy"\s+content="(.*?)"', page)[1].split("; ")
    assert {"default-src 'none'", "form-action 'none'", "base-uri 'none'"} < set(policy)
    assert "script-src 'sha256-" in page and "{{" not in page


def test_every_cloud_and_its_arrows_fit_in_the_picture() -> None:
    code = MODULE.read_text()
    extent, arrow = map(float, re.findall(r"EXTENT = ([\d.]+), ARROW = ([\d.]+);", code)[0])
    scales = [float(scale) for scale in re.findall(r"SCALES = \[(.*?)\]", code)[0].split(",")]
    assert c.cloud(32).abs().max() * max(scales) + arrow <= extent


def test_the_still_playground_says_the_loss_of_the_library() -> None:
    assert f"{dispersive_loss(c.cloud(16), tau=0.5).item():.3f}, floor -2.773." in c.playground().still


def test_the_arms_of_a_quiz_change_sides_and_nothing_names_them_without_a_front_end() -> None:
    quiz = c.blind_quiz(SAMPLES, seed=1)
    assert len(quiz.spec["rounds"]) == 10 and set(quiz.spec["swapped"]) == {True, False}
    assert len({first for first, _ in quiz.spec["rounds"]}) == 1
    left = quiz.still.split('src="')[1].split('"')[0]
    assert left == quiz.spec["rounds"][0][quiz.spec["swapped"][0]]
    assert not re.search(r"\b[ab]\b", re.sub(r'<img src="[^"]*"|of one arm', "", quiz.still))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {"a": one}, "two arms"),
        (lambda one: {"a": one, "b": one[:12]}, "two arms"),
        (lambda one: {"a": one[: c.EACH - 1], "b": one[: c.EACH - 1]}, f"{c.EACH} images"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: Callable, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        c.blind_quiz(change(SAMPLES["a"]))
