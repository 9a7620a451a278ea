"""The worker that decodes images, and the page without one."""

from __future__ import annotations

import numpy as np
import pytest
from playwright.sync_api import Page

from tests.browser.conftest import (
    always_send_mask,
    choose_files,
    choose_outputs,
    save_file,
    saved_view,
    square_mask,
    unzip,
    wait_done,
    wait_drawn,
)
from tests.conftest import decode, encode, nuclei

CELLS = encode(nuclei(64, 64)[0])
WATCH = """
window.decoded = [];
for (const name of ['DecompressionStream', 'CompressionStream', 'createImageBitmap']) {
    const original = window[name];
    window[name] = new Proxy(original, {
        construct: (target, args) => (decoded.push(name), new target(...args)),
        apply: (target, self, args) => (decoded.push(name), target.apply(window, args)),
    });
}"""


def use_everything(page: Page) -> None:
    """Receive an image, delete its only object, and save files without it."""
    page.route("**/segment*", always_send_mask)
    choose_files(page, ("cells.png", CELLS))
    wait_done(page)
    mask = square_mask()
    assert (saved_view(page, "mask")[..., 0] == mask).all()
    page.click("#table tbody tr:first-child button")
    page.click("#object-delete")
    choose_outputs(page, "mask", "instances", "polygons")
    archive = unzip(save_file(page)[1])
    assert not decode(archive.read("cells-mask.png")).any()
    assert not decode(archive.read("cells-instances.png")).any()
    page.click("#undelete")
    page.check("#contrast")
    wait_drawn(page)


def test_images_are_decoded_in_a_worker(page: Page) -> None:
    page.add_init_script(WATCH)
    page.reload()
    use_everything(page)
    assert len(page.workers) == 1
    assert page.evaluate("decoded") == []


@pytest.mark.parametrize("lacks", ["Worker", "OffscreenCanvas", "worker.js"])
def test_page_decodes_itself_without_a_worker(
    page: Page, expected_errors: list[str], lacks: str
) -> None:
    if lacks == "worker.js":
        expected_errors += ["ERR_FAILED"]
        page.route("**/worker.js", lambda route: route.abort())
    else:
        page.add_init_script(f"delete window.{lacks};")
    page.add_init_script(WATCH)
    page.reload()
    use_everything(page)
    assert len(page.workers) == 0
    assert "DecompressionStream" in page.evaluate("decoded")


def test_contrast_is_the_same_with_and_without_a_worker(page: Page) -> None:
    views = []
    for script in ("", "delete window.Worker;"):
        page.add_init_script(script)
        page.reload()
        page.route("**/segment*", always_send_mask)
        choose_files(page, ("dim.png", encode(nuclei(64, 64)[0] // 6)))
        wait_done(page)
        page.check("#contrast")
        views.append(saved_view(page, "image"))
    assert (views[0] == views[1]).all()
    assert views[0].max() > 2 * int(np.max(nuclei(64, 64)[0] // 6))
