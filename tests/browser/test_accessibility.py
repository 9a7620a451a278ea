"""Accessibility of the page: axe-core, the tree that screen readers read, what they announce,
forced colors and reduced motion."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import (
    ALL_KINDS,
    always_send_mask,
    choose_files,
    choose_outputs,
    outputs_of,
    render_output,
    save_file,
    send_outputs,
    send_problem,
    square_mask,
    wait_done,
    wait_drawn,
)
from tests.browser.results import CELLS

AXE = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    "rules": {"target-size": {"enabled": True}},
}


def violations(page: Page) -> list[str]:
    """List what axe-core finds, with the elements."""
    found = Axe().run(page, options=AXE).response["violations"]
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_state(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.wait_for_selector("#model option", state="attached")
    assert violations(page) == []
    choose_files(page, ("cells.png", CELLS), ("broken.png", b"not an image"))
    wait_done(page)
    page.wait_for_selector("#strip [data-state=failed]")
    page.click("#strip [data-state=done]")
    wait_drawn(page)
    page.click("#table tbody tr:first-child button")
    page.click("#details summary")
    assert violations(page) == []
    for button in ("#choose-outputs", "#about-open"):
        page.click(button)
        assert violations(page) == []
        page.keyboard.press("Escape")
    page.click("#strip [data-state=failed]")
    assert violations(page) == []


@pytest.mark.parametrize("height", [640, 900])
def test_focused_control_is_not_covered(page: Page, height: int) -> None:
    """WCAG 2.4.11. The downloads stay at the end of the panel, which scrolls."""
    page.route("**/segment*", always_send_mask)  # one object, as each row is a tab stop
    page.set_viewport_size({"width": 1024, "height": height})
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    choose_outputs(page, *ALL_KINDS)  # their names take two lines
    page.focus("#remove")
    visited = []
    while "download" not in visited:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(
            """() => {
                const focused = document.activeElement;
                const {left, top, width, height} = focused.getBoundingClientRect();
                const hit = document.elementFromPoint(left + width / 2, top + height / 2);
                return [focused.id, focused.contains(hit)];
            }"""
        )
        assert seen, name
        visited.append(name)
    assert {"threshold", "min-area", "pixel-size", "table-box"} <= set(visited)


def test_pressed_buttons_are_visible_in_forced_colors(page: Page) -> None:
    page.emulate_media(forced_colors="active")
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    colors = [
        page.eval_on_selector(f"[data-shown={name}]", "(e) => getComputedStyle(e).backgroundColor")
        for name in ("fill", "outline")
    ]
    assert colors[0] != colors[1]


def test_nothing_moves_with_reduced_motion(page: Page) -> None:
    page.emulate_media(reduced_motion="reduce")
    page.route("**/segment*", lambda route: None)
    choose_files(page, ("cells.png", CELLS))
    page.wait_for_selector("#strip [data-state=working]")
    animation = page.eval_on_selector(
        "#strip button", "(e) => getComputedStyle(e, '::after').animationName"
    )
    assert animation == "none"


def test_picture_is_described(page: Page) -> None:
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    wait_drawn(page)
    description = page.text_content("#description")
    assert description is not None
    assert description.startswith("Image of 200 by 120 pixels with")
    assert "median" in description
    assert page.get_attribute("#canvas", "aria-labelledby") == "description"


# --- what screen readers read ----------------------------------------------------------------

OPERABLE = {
    *("button", "link", "checkbox", "slider", "spinbutton", "combobox", "textbox", "ColorWell"),
    *("progressbar", "dialog", "toolbar", "image", "img", "group", "region", "table"),
}
"""Roles whose elements need a name."""


def read_tree(page: Page) -> list[tuple[str, str]]:
    """Role and name of every node of the accessibility tree, in reading order.

    Checks that everything that can be operated has a name, and that names of buttons differ.
    """
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    found = [
        (value_of(node, "role"), value_of(node, "name")) for node in nodes if not node["ignored"]
    ]
    nameless = ["group", "table"]  # a group without a name is only a border; axe checks the others
    assert [pair for pair in found if pair[0] in OPERABLE and not pair[1]
            and pair[0] not in nameless] == []  # fmt: skip
    buttons = Counter(name for role, name in found if role == "button")
    assert [name for name, count in buttons.items() if count > 1] == []
    return found


def value_of(node: dict[str, Any], name: str) -> str:
    return str(node.get(name, {}).get("value", ""))


def names(tree: list[tuple[str, str]], role: str) -> list[str]:
    """The names of all nodes with a role."""
    return [name for each, name in tree if each == role]


LISTEN = """() => {
    window.heard = [];
    for (const region of document.querySelectorAll('[role=status], [role=alert], [aria-live]')) {
        if (region.getAttribute('aria-live') === 'off') continue;
        let last = region.textContent;
        new MutationObserver(() => {
            const text = region.textContent.trim();
            if (text && text !== last) heard.push(text);
            last = text;
        }).observe(region, {childList: true, characterData: true, subtree: true});
    }
}"""


def hear(page: Page, expected: str) -> None:
    """Wait until a live region has announced a text; forget what it announced before."""
    page.evaluate(
        """async (expected) => {
            for (let left = 600; !heard.some((each) => each.includes(expected)); left -= 1) {
                if (!left) throw new Error(`not announced: ${expected}; heard: ${heard}`);
                await new Promise((resolve) => setTimeout(resolve, 50));
            }
            heard.length = 0;
        }""",
        expected,
    )


def test_tree_has_roles_names_and_announcements_at_each_step(page: Page) -> None:
    page.wait_for_selector("#model option", state="attached")
    page.evaluate(LISTEN)
    tree = read_tree(page)
    assert ("heading", "unet-server") in tree
    assert ("heading", "Drop images or a folder here") in tree
    assert {"About the models", "Choose images", "Choose a folder"} <= set(names(tree, "button"))
    assert names(tree, "slider") == ["Threshold"]
    assert ("status", "") in tree
    assert not names(tree, "progressbar")

    held: list[Route] = []
    page.route("**/segment*", lambda route: held.append(route), times=2)
    choose_files(page, ("cells.png", CELLS), ("notes.png", b"not an image"))
    hear(page, "Started: 2 to do.")
    tree = read_tree(page)
    assert names(tree, "progressbar") == ["Progress"]
    assert {"cells.png, working", "notes.png, working", "Stop"} <= set(names(tree, "button"))
    assert page.inner_text("#count") == "Working"
    for route in held:
        route.continue_()

    hear(page, "Finished: 1 done, 1 failed.")
    wait_drawn(page)
    tree = read_tree(page)
    count = page.inner_text("#count")
    assert f"cells.png, done, {count}" in names(tree, "button")
    assert "notes.png, failed" in names(tree, "button")
    assert names(tree, "toolbar") == ["View"]
    assert {"Opacity", "Wipe", "Threshold"} == set(names(tree, "slider"))
    assert any(each.startswith("Image of 200 by 120 pixels") for each in names(tree, "image"))
    assert any(each.startswith("Histogram of the areas") for each in names(tree, "image"))
    assert {"Results", "Objects", "Table of objects"} <= set(names(tree, "region"))
    assert {"Smallest area", "Largest area", "Score from"} <= set(names(tree, "spinbutton"))
    assert len(names(tree, "columnheader")) == 4
    assert names(tree, "list") == ["Images"]

    page.focus("#stage")
    page.keyboard.press("n")
    hear(page, "Selected: #1 · ")
    page.keyboard.press("Delete")
    hear(page, "Object 1 deleted. ")
    assert "Restore 1 deleted" in names(read_tree(page), "button")
    page.fill("#min-score", "0.99")
    hear(page, " are shown.")
    page.click("#choose-outputs")
    tree = read_tree(page)
    assert names(tree, "dialog") == ["Files to download"]
    assert any(each.startswith("ImageJ ROIs") for each in names(tree, "checkbox"))
    page.keyboard.press("Escape")
    page.click("#about-open")
    assert names(read_tree(page), "dialog") == ["What the models can do"]
    page.keyboard.press("Escape")

    page.click("#strip [data-state=failed]")
    hear(page, "Not a recognised image")
    assert names(read_tree(page), "alert") != []
    page.click("#remove")
    hear(page, "notes.png removed.")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#clear")
    hear(page, "All images are removed.")


def test_waiting_and_failed_downloads_are_announced(page: Page, expected_errors: list[str]) -> None:
    expected_errors += ["503"]
    page.evaluate(LISTEN)
    restarting = True

    def serve(route: Route) -> None:
        if restarting:
            return send_problem(route, 503, "draining")
        contents = {each: render_output(each, square_mask(120, 200)) for each in outputs_of(route)}
        return send_outputs(route, contents | {"probability": b"damaged"})

    page.route("**/segment*", serve)
    choose_files(page, ("cells.png", CELLS))
    hear(page, "The server is restarting. This continues by itself.")
    restarting = False
    hear(page, "Finished: 1 done.")
    choose_outputs(page, "cutout")
    page.click("#download")
    hear(page, "Download failed: An unexpected kind of PNG")
    expect(page.locator("#download")).to_be_enabled()
    choose_outputs(page, "rois")
    assert save_file(page)[0] == "cells-rois.zip"
