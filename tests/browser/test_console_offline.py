"""The offline console in Chromium, without a network: every control by keyboard, pictures and words that follow."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page

from dispersive_kit.regularizers import dispersive_loss
from dispersive_kit.views.console import write_console
from dispersive_kit.views.demos import ARMS, DEMOS
from dispersive_kit.views.playground import TAUS, VARIANTS

PAGES = ["playground", *DEMOS, "quiz"]
# The key that moves a control, which may stand at its end.
TO_A_NEIGHBOUR = """one => one.options ? (one.selectedIndex + 1 < one.options.length ? "ArrowDown" : "ArrowUp")
  : (+one.value < +one.max ? "ArrowRight" : "ArrowLeft")"""
each_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("console") / "console.html"
    write_console(path)
    return path


@pytest.fixture
def page(chromium: Browser, file: Path) -> Iterator[Page]:
    """The page at the size of a projector; fails if anything was asked of a network, or anything went wrong."""
    context = chromium.new_context(viewport={"width": 1280, "height": 720}, offline=True)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(file.as_uri())
    yield page
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert wrong == []
    context.close()


def open_demo(page: Page, name: str) -> None:
    page.keyboard.press(str(PAGES.index(name) + 1))
    assert page.locator("section:visible").get_attribute("id") == name


def seen(page: Page, name: str) -> tuple[str, str]:
    """Picture and its alternative text."""
    svg = page.locator(f"#{name} .picture svg")
    return svg.inner_html(), svg.get_attribute("aria-label") or ""


@each_page
def test_every_control_is_moved_by_keyboard_and_picture_and_words_follow(page: Page, name: str) -> None:
    open_demo(page, name)
    for control in page.locator(f"#{name} input, #{name} select").all():
        before = seen(page, name)
        control.focus()
        page.keyboard.press(control.evaluate(TO_A_NEIGHBOUR))
        after = seen(page, name)
        assert before[0] != after[0], control.evaluate("one => one.parentNode.textContent")
        assert before[1] != after[1]


@each_page
def test_tab_alone_reaches_every_control(page: Page, name: str) -> None:
    open_demo(page, name)
    wanted = page.locator(f"#{name} :is(input, select, button, [tabindex])").count()
    reached = set()
    for _ in range(wanted + len(PAGES) + 2):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(
            f"[...document.querySelectorAll('#{name} :is(input, select, button, [tabindex])')]"
            ".indexOf(document.activeElement)"))  # fmt: skip
    assert reached - {-1} == set(range(wanted))


@each_page
def test_a_demo_fits_on_a_screen_and_its_type_is_large(page: Page, name: str) -> None:
    open_demo(page, name)
    assert page.evaluate("document.documentElement.scrollHeight") <= 721
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    heights = page.locator(f"#{name} .picture svg").evaluate(
        "svg => [...svg.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * svg.getScreenCTM().a)"
    )
    assert heights and min(heights) >= 20  # pixels of 720, 1/36 of the wall


def test_the_loss_and_gradient_of_the_page_are_those_of_the_package(page: Page) -> None:
    rng = torch.Generator().manual_seed(0)
    for variant, (options, _) in VARIANTS.items():
        for B in (2, 3, 8, 32):
            for tau in TAUS:
                z = (2 * torch.rand((), generator=rng) * torch.randn(B, 2, generator=rng)).double().requires_grad_()
                loss = dispersive_loss(z, **options, **({} if options["kind"] == "covariance" else {"tau": tau}))
                (gradient,) = torch.autograd.grad(loss, z)
                found = page.evaluate(
                    "([z, variant, tau]) => dispersive(z, data.playground.variants[variant], tau)",
                    [z.tolist(), variant, tau],
                )
                assert found["loss"] == pytest.approx(loss.item(), rel=1e-9, abs=1e-9), (variant, B, tau)
                apart = (torch.tensor(found["gradient"], dtype=torch.float64) - gradient).norm()
                assert (
                    apart <= 1e-7 * gradient.norm() + 1e-8
                )  # EPS of the package where two points are all, (variant, B, tau)


def test_a_point_is_dragged_and_only_it_moves(page: Page) -> None:
    where = "dots => dots.map(one => [+one.getAttribute('cx'), +one.getAttribute('cy')])"
    points = page.locator("#playground circle.point")
    before, words = points.evaluate_all(where), seen(page, "playground")[1]
    box = points.nth(4).bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] - 60, steps=5)
    page.mouse.up()
    page.mouse.move(box["x"] + 200, box["y"] + 60)  # let go: nothing follows
    after = points.evaluate_all(where)
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [4]
    assert after[4][0] - before[4][0] > 60 and after[4][1] - before[4][1] < -40
    assert seen(page, "playground")[1] != words


def test_the_arrow_keys_move_a_point_and_reset_brings_it_back(page: Page) -> None:
    point = page.locator("#playground circle.point").nth(2)
    before = point.get_attribute("aria-label")
    point.focus()
    for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert point.get_attribute("aria-label") != before
    page.get_by_role("button", name="reset").press("Enter")
    assert page.locator("#playground circle.point").nth(2).get_attribute("aria-label") == before


def test_a_cell_of_the_map_opens_its_samples(page: Page) -> None:
    open_demo(page, "map")
    cell = page.get_by_role("button", name="block 4, level clean")
    cell.focus()
    page.keyboard.press("Enter")
    assert cell.get_attribute("aria-pressed") == "true"
    assert "block 4, no noise" in seen(page, "map")[1]
    assert page.locator("#map [aria-pressed=true]").count() == 1


@pytest.mark.parametrize("wins", ARMS)
def test_the_blind_test_counts_an_arm_whatever_its_side(page: Page, wins: str) -> None:
    open_demo(page, "quiz")
    for _ in range(10):
        assert not any(name in page.locator("#quiz").inner_text() for name in ARMS.values())
        left_is_first = page.evaluate(
            "data.quiz.rounds.some(r => new DOMParser().parseFromString(r[0], 'text/html').querySelector('image')"
            ".getAttribute('href') === document.querySelector('#quiz image').getAttribute('href'))"
        )
        side = "left" if left_is_first == (wins == "base") else "right"
        page.locator("#quiz").get_by_role("button", name=side).press("Enter")
    said = page.locator("#quiz output").inner_text()
    other = next(name for name in ARMS if name != wins)
    assert f"{ARMS[wins]}: 10" in said and f"{ARMS[other]}: 0" in said
    assert "probability 0.00" in said
