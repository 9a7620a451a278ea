"""Take page.png, the README's picture of the page: python docs/pictures/screenshot.py URL

URL is a running service (`make serve`). Needs the development dependencies and Chromium.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
MAX_SIZE = (1440, 900)  # pixels
MARGIN = 22  # pixels below the last control


def main() -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1110, "height": 640}, device_scale_factor=2)
        page.goto(sys.argv[1])
        screenshot = capture(page)
        browser.close()
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    image.thumbnail(MAX_SIZE, Image.Resampling.LANCZOS)
    image.quantize(256).save(HERE / "page.png", optimize=True)


def capture(page: Page) -> bytes:
    """The page with the masks of both sample images, without its footer, as a PNG."""
    for count, name in enumerate(("fluorescence", "histology"), start=1):
        page.click(f"[data-sample*={name}]")
        page.wait_for_selector(f"#strip li:nth-child({count}) [data-state=done]")
    page.click("#strip li:first-child button")
    page.wait_for_selector("#stage:not([aria-busy])")
    tools = page.locator("#tools").bounding_box()
    assert tools is not None
    height = tools["y"] + tools["height"] + MARGIN
    return page.screenshot(
        full_page=True,
        clip={"x": 0, "y": 0, "width": 1110, "height": height},
        animations="disabled",
    )


if __name__ == "__main__":
    main()
