"""Take page.webp, the README's picture of the page: python docs/pictures/screenshot.py URL

URL is a running service (`make serve`). Needs the development dependencies and Chromium.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
SIZE = {"width": 1440, "height": 900}


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.goto(sys.argv[1])
        screenshot = capture(page)
        browser.close()
    Image.open(io.BytesIO(screenshot)).save(HERE / "page.webp", quality=90, method=6)


def capture(page: Page) -> bytes:
    """The page with both sample images and a selected object, as a PNG."""
    for count, name in enumerate(("fluorescence", "histology"), start=1):
        page.click(f"[data-sample*={name}]")
        page.wait_for_selector(f"#strip li:nth-child({count}) [data-state=done]")
    page.click("#strip li:first-child button")
    page.wait_for_selector("#stage:not([aria-busy])")
    page.click("#table [data-sort=area]")
    page.click("#table [data-sort=area]")
    page.click("#table tbody tr:nth-child(3) button")
    page.mouse.move(5, 5)
    page.wait_for_timeout(300)
    return page.screenshot(animations="disabled")


if __name__ == "__main__":
    main()
