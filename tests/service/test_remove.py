"""POST /api/remove: the documented requests of rembg's server, and what differs from it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Server, encode, nuclei

PORTRAIT = (ROOT / "tests" / "fixtures" / "astronaut.jpg").read_bytes()
Remove = Callable[..., httpx.Response]


@pytest.fixture
def remove(server: Server) -> Remove:
    """Send the portrait: remove(fields, **query)."""

    def send(
        fields: dict[str, str] | None = None, files: Any = None, **query: object
    ) -> httpx.Response:
        return httpx.post(
            f"{server.url}/api/remove",
            params=query,  # type: ignore[arg-type]
            data=fields,
            files=files or {"file": ("input.jpg", PORTRAIT, "image/jpeg")},
            timeout=60,
        )

    return send


def opened(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def test_uploaded_image_is_cut_out_by_the_person_model(server: Server, remove: Remove) -> None:
    """curl -s -F file=@/path/to/input.jpg "http://localhost:7000/api/remove" -o output.png"""
    answer = remove()
    image = opened(answer)
    original = Image.open(io.BytesIO(PORTRAIT))
    assert (image.mode, image.size) == ("RGBA", original.size)
    alpha = np.asarray(image)[..., 3]
    assert 0.2 < (alpha > 127).mean() < 0.7
    assert answer.headers["x-model"].startswith("person@")
    segmented = httpx.post(
        f"{server.url}/segment?model=person&output=cutout", content=PORTRAIT, timeout=60
    )
    assert answer.content == segmented.content


@pytest.mark.parametrize("where", ["form", "query"])
def test_only_the_mask(remove: Remove, where: str) -> None:
    answer = remove({"om": "true"}) if where == "form" else remove(om="true")
    mask = opened(answer)
    assert mask.mode == "L"
    assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_background_color(remove: Remove) -> None:
    transparent = remove()
    assert remove(bgc="1,2,3,0").content == transparent.content
    colored = np.asarray(opened(remove(bgc="255,0,128,255")).convert("RGBA"))
    alpha = np.asarray(opened(transparent))[..., 3]
    assert (colored[..., 3] == 255).all()
    assert (colored[alpha == 0] == (255, 0, 128, 255)).all()
    assert remove({"bgc": "255, 0, 128"}).content == remove(bgc="255,0,128,255").content


def test_parameters_of_alpha_matting_are_accepted(remove: Remove) -> None:
    fields = {"a": "true", "af": "240", "ab": "10", "ae": "10", "ppm": "true"}
    assert remove(fields).content == remove().content


def test_model_is_chosen_by_name(remove: Remove) -> None:
    cells = {"file": encode(nuclei(64, 80)[0])}
    assert remove({"model": "nuclei"}, cells).headers["x-model"].startswith("nuclei@")
    assert remove(None, cells, model="nuclei").headers["x-model"].startswith("nuclei@")
    unknown = remove({"model": "u2net"})
    assert unknown.status_code == 404
    assert unknown.json()["detail"] == "unknown model 'u2net'; available: nuclei, person"


@pytest.mark.parametrize(
    ("fields", "query", "detail"),
    [
        ({"om": "true"}, {"om": "true"}, "om is given in the query and in the form"),
        ({"om": "perhaps"}, {}, "om: Input should be a valid boolean"),
        ({"url": "http://input.png"}, {}, "unknown form field 'url'"),
        ({}, {"url": "http://input.png"}, "unknown parameter 'url'"),
        ({}, {"bgc": "red"}, "bgc: must be r,g,b,a"),
        ({}, {"bgc": "1,2,3,256"}, "bgc: must be r,g,b,a"),
        ({}, {"bgc": "1,2,3,128"}, "alpha must be 0 (transparent) or 255 (opaque), not 128"),
        ({}, {"extras": '{"sam_prompt": []}'}, "extras: is for rembg's own models"),
        ({"af": "256"}, {}, "af: Input should be less than or equal to 255"),
    ],
)
def test_invalid_parameters_are_named(
    remove: Remove, fields: dict[str, str], query: dict[str, str], detail: str
) -> None:
    answer = remove(fields, **query)
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]


def test_one_file_is_expected(remove: Remove) -> None:
    two = [("file", ("a.jpg", PORTRAIT)), ("file", ("b.jpg", PORTRAIT))]
    assert "has 2 files; send one" in remove(files=two).json()["detail"]
    assert "empty file" in remove(files={"file": b""}).json()["detail"]


def test_image_is_never_fetched_from_a_url(server: Server) -> None:
    """curl -s "http://localhost:7000/api/remove?url=http://input.png" -o output.png"""
    answer = httpx.get(f"{server.url}/api/remove", params={"url": "http://input.png"})
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert "never fetches an image" in answer.json()["detail"]
