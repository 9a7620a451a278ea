"""The Python client with the real service."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
import uvicorn
from fastapi import FastAPI

from app.inference.outputs import Output
from tests.conftest import ROOT, Server, decode, encode, nuclei
from unet_client import AsyncClient, Client, SegmentationError, SegmentationResult

README = (ROOT / "clients/python/README.md").read_text()


def test_array_gives_the_mask_of_the_same_file(server: Server) -> None:
    pixels = nuclei(120, 130)[0]
    with Client(server.url) as client:
        from_array, from_bytes = client.segment(pixels), client.segment(encode(pixels))
    np.testing.assert_array_equal(from_array.image(), from_bytes.image())
    assert from_array.coverage == pytest.approx((from_array.image() > 0).mean(), abs=1e-6)


def test_polygons_are_one_per_object(server: Server) -> None:
    with Client(server.url) as client:
        result = client.segment(nuclei(120, 130)[0], output="polygons")
    polygons = result.polygons()
    assert polygons["type"] == "FeatureCollection"
    assert len(polygons["features"]) == int(result.headers["x-mask-objects"]) > 0


def test_instances_are_labels(server: Server) -> None:
    with Client(server.url) as client:
        result = client.segment(nuclei(120, 130)[0], output="instances")
    assert result.image().dtype == np.uint16
    assert result.image().max() == int(result.headers["x-mask-objects"]) > 0


def write_stack(pages: int) -> bytes:
    buffer = io.BytesIO()
    stack = np.stack([nuclei(60, 70, seed)[0] for seed in range(pages)])
    tifffile.imwrite(buffer, stack, photometric="minisblack")
    return buffer.getvalue()


def test_every_output_comes_from_one_request(server: Server) -> None:
    pixels = nuclei(120, 130)[0]
    outputs = list(map(str, Output))
    with Client(server.url) as client:
        result = client.segment(pixels, output=outputs, pixel_size=0.5, min_area=20)
    assert set(result.outputs) == set(outputs)
    labels = result.image("instances")
    assert labels.max() == result.objects == len(result.polygons()["features"])
    assert len(result.coco()["annotations"]) == result.objects
    header, *rows = result.measurements().splitlines()
    assert "area_um2" in header
    assert len(rows) == result.objects
    for name in ("mask", "probability", "overlay", "cutout", "preview"):
        assert result.image(name).shape[:2] == pixels.shape


def test_coco_states_the_name_of_the_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "Zelle ä.001.png"
    path.write_bytes(encode(nuclei(60, 70)[0]))
    with Client(server.url) as client:
        result = client.segment(path, output="coco")
    assert result.coco()["images"][0]["file_name"] == "Zelle ä.001.png"


def test_pages_come_one_by_one(server: Server) -> None:
    with Client(server.url) as client:
        result = client.segment(write_stack(3), page="all", output=["mask", "overlay"])
        assert [page.image("mask").shape for page in result.pages] == [(60, 70)] * 3
        with pytest.raises(SegmentationError, match="3 pages") as caught:
            client.segment(write_stack(3))
    assert caught.value.status == 422


def test_one_bad_image_of_many_fails_alone(server: Server) -> None:
    images = [*(encode(nuclei(60, 60, seed)[0]) for seed in range(4)), b"not an image"]
    with Client(server.url) as client:
        outcomes = dict(client.segment_many(images))
    error = outcomes.pop(b"not an image")
    assert isinstance(error, SegmentationError)
    assert error.status == 422
    assert len(outcomes) == 4
    assert all(isinstance(outcome, SegmentationResult) for outcome in outcomes.values())


def test_model_is_one_of_models(server: Server) -> None:
    with Client(server.url) as client:
        assert client.model("nuclei") in client.models()["models"]
        with pytest.raises(SegmentationError, match="missing") as caught:
            client.model("missing")
    assert caught.value.status == 404
    assert caught.value.request_id


def test_async_client_gives_the_same_results(server: Server) -> None:
    image = encode(nuclei(120, 130)[0])

    async def main() -> tuple[SegmentationResult, list[object]]:
        async with AsyncClient(server.url) as client:
            many = [outcome async for _, outcome in client.segment_many([image] * 4)]
            return await client.segment(image), many

    result, many = asyncio.run(main())
    with Client(server.url) as client:
        assert client.segment(image).content == result.content
    for outcome in many:
        assert isinstance(outcome, SegmentationResult)
        assert outcome.content == result.content


@contextlib.contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Run an application on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def examples(server: Server) -> list[str]:
    """The examples of the README, with the URL of the running service."""
    code = README.replace("http://localhost:8000", server.url)
    return re.findall(r"```python\n(.*?)```", code, re.DOTALL)


def test_readme_example_of_client_works(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image.png").write_bytes(encode(nuclei(60, 70)[0]))
    for folder in ("images", "masks"):
        Path(folder).mkdir()
    for seed in range(3):
        Path(f"images/{seed}.png").write_bytes(encode(nuclei(60, 70, seed)[0]))
    exec(examples(server)[0], {})
    assert len(Path("cells.csv").read_text().splitlines()) > 1
    masks = [Path("mask.png"), *Path("masks").iterdir()]
    assert len(masks) == 4
    assert all(decode(mask.read_bytes()).shape == (60, 70) for mask in masks)


def test_readme_example_of_a_stack_works(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stack.tif").write_bytes(write_stack(3))
    with Client(server.url) as client:
        names: dict[str, Any] = {"client": client}
        exec(examples(server)[1], names)
    assert names["masks"].shape == (3, 60, 70)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert all(int(line.split()[1]) > 0 for line in lines)


def test_readme_example_of_async_client_works(server: Server) -> None:
    namespace: dict[str, FastAPI] = {}
    exec(examples(server)[2], namespace)
    with running(namespace["app"]) as url:
        response = httpx.post(f"{url}/count", content=encode(nuclei(120, 130)[0]), timeout=60)
        assert response.status_code == 200
        assert response.json()["objects"] > 0
        response = httpx.post(f"{url}/count", content=b"not an image", timeout=60)
        assert response.status_code == 422
