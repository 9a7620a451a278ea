"""The page on a phone: fingers on the picture, and the tools around it."""

from __future__ import annotations

import pytest
from playwright.sync_api import CDPSession, Page, expect

from tests.browser.conftest import (
    always_send_mask,
    canvas_pixels,
    choose_files,
    wait_done,
    wait_drawn,
)
from tests.conftest import encode, nuclei

Point = tuple[float, float]


class Fingers:
    """Fingers on the screen, as Chromium receives them from the operating system."""

    def __init__(self, session: CDPSession) -> None:
        self.session = session

    def _send(self, kind: str, *points: Point) -> None:
        touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self.session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    def move(self, *paths: tuple[Point, Point], steps: int = 6) -> None:
        """Put a finger down at the start of each path, move all to the ends, and lift them."""
        self._send("touchStart", *(start for start, _ in paths))
        for step in range(1, steps + 1):
            share = step / steps
            self._send(
                "touchMove",
                *((a + (c - a) * share, b + (d - b) * share) for (a, b), (c, d) in paths),
            )
        self._send("touchEnd")

    def tap(self, point: Point) -> None:
        self._send("touchStart", point)
        self._send("touchEnd")


@pytest.fixture
def fingers(phone: Page) -> Fingers:
    return Fingers(phone.context.new_cdp_session(phone))


@pytest.fixture
def center(phone: Page) -> Point:
    """The middle of the picture, of which a square mask is at the center."""
    phone.route("**/segment*", always_send_mask)
    choose_files(phone, ("cells.png", encode(nuclei(64, 64)[0])))
    wait_done(phone)
    wait_drawn(phone)
    phone.locator("#canvas").scroll_into_view_if_needed()
    box = phone.locator("#canvas").bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def zoom_of(page: Page) -> int:
    canvas_pixels(page)  # waits until it is drawn
    return int(page.inner_text("#zoom").removesuffix("%"))


def test_two_fingers_zoom_the_picture_and_not_the_page(
    phone: Page, fingers: Fingers, center: Point
) -> None:
    x, y = center
    fitted = zoom_of(phone)
    fingers.move(((x - 30, y), (x - 75, y)), ((x + 30, y), (x + 75, y)))
    assert zoom_of(phone) == pytest.approx(2.5 * fitted, rel=0.05)
    assert phone.evaluate("visualViewport.scale") == 1
    fingers.move(((x, y - 75), (x, y - 30)), ((x, y + 75), (x, y + 30)))
    assert zoom_of(phone) == pytest.approx(fitted, rel=0.1)
    assert not phone.is_visible("#object")  # none of this is a tap


def test_one_finger_moves_a_zoomed_picture(phone: Page, fingers: Fingers, center: Point) -> None:
    x, y = center
    for _ in range(3):
        phone.tap("#zoom-in")
    before, scrolled = canvas_pixels(phone), phone.evaluate("scrollY")
    fingers.move(((x, y), (x + 40, y + 60)))
    after = canvas_pixels(phone)
    ratio = phone.evaluate("devicePixelRatio")
    right, down = round(40 * ratio), round(60 * ratio)
    assert (
        after[down + 4 : -4, right + 4 : -4] == before[4 : -down - 4, 4 : -right - 4]
    ).mean() > 0.98
    assert phone.evaluate("scrollY") == scrolled
    assert not phone.is_visible("#object")


def test_one_finger_scrolls_the_page_while_all_of_the_picture_is_visible(
    phone: Page, fingers: Fingers, center: Point
) -> None:
    x, y = center
    fitted, scrolled = zoom_of(phone), phone.evaluate("scrollY")
    fingers.move(((x, y), (x, y - 120)), steps=12)
    expect(phone.locator("#stage.fitted")).to_be_attached()
    canvas_pixels(phone)
    assert phone.evaluate("scrollY") > scrolled + 60
    assert zoom_of(phone) == fitted


def test_tap_selects_an_object(phone: Page, fingers: Fingers, center: Point) -> None:
    fingers.tap(center)
    expect(phone.locator("#object-text")).to_contain_text("#1 · 1,024 px")
    phone.tap("#object-delete")
    expect(phone.locator("#count")).to_have_text("0 nuclei")


def test_reason_of_a_failure_is_on_the_first_screen(phone: Page) -> None:
    choose_files(phone, ("broken.png", b"not an image"))
    expect(phone.locator("#error")).to_contain_text("Not a recognised image")
    box = phone.locator("#error").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 844
    assert phone.evaluate("scrollY") == 0


def test_tools_take_two_rows_and_none_is_lost(phone: Page, center: Point) -> None:
    tools = phone.locator("#tools").bounding_box()
    stage = phone.locator("#stage").bounding_box()
    assert tools is not None
    assert stage is not None
    assert tools["height"] <= 2 * 40 + 8
    first = phone.locator("[data-shown=fill]").bounding_box()
    assert first is not None
    rows = {
        round(button.bounding_box()["y"])  # type: ignore[index]
        for button in phone.locator("#tools button:visible").all()
    }
    assert len(rows) == 2
    more = ("#opacity", "#colors", "#contrast", "#wipe")
    assert not any(phone.is_visible(each) for each in more)
    phone.tap("#more")
    assert phone.get_attribute("#more", "aria-expanded") == "true"
    for each in more:
        box = phone.locator(each).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    phone.tap("#more")
    assert not any(phone.is_visible(each) for each in more)
