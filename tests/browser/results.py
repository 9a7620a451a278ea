"""Images, and steps that tests of results on the page share."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
from playwright.sync_api import Page, Route

from tests.browser.conftest import send_mask
from tests.conftest import Server, encode, nuclei

CELLS = encode(nuclei(120, 200)[0])
SAMPLE = (Path(__file__).parents[2] / "app/static/samples/fluorescence.png").read_bytes()
ASTRONAUT = (Path(__file__).parents[1] / "fixtures/astronaut.jpg").read_bytes()
SQUARES = np.kron(np.indices((32, 32)).sum(axis=0) % 2, np.full((16, 16), 255)).astype(np.uint8)
SHAPE = (512, 512)


def segment(server: Server, data: bytes = CELLS, **query: str) -> httpx.Response:
    headers = {"Content-Type": "application/octet-stream"}
    url = f"{server.url}/segment"
    return httpx.post(url, content=data, params=query, headers=headers, timeout=60)


def to_screen(
    page: Page, x: float, y: float, shape: tuple[int, int] = SHAPE
) -> tuple[float, float]:
    """The position on the page of a point of a fitted image."""
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    scale = min(box["width"] / shape[1], box["height"] / shape[0], 8)
    left = box["x"] + (box["width"] - scale * shape[1]) / 2
    top = box["y"] + (box["height"] - scale * shape[0]) / 2
    return left + x * scale, top + y * scale


def set_threshold(page: Page, value: float) -> None:
    """Move the slider and release it."""
    page.evaluate(
        """(value) => {
            const slider = document.getElementById('threshold');
            slider.value = value;
            slider.dispatchEvent(new Event('change', {bubbles: true}));
        }""",
        value,
    )


def send_many(route: Route) -> None:
    """Respond with many objects in place of the service."""
    send_mask(route, SQUARES)
