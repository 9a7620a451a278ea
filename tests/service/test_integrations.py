"""The scripts of docs/integrations: their requests, run against the service."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import roifile
import tifffile

from model.arrays import AnyArray
from tests.conftest import ROOT, Server, nuclei
from tests.objects import read_like_qupath

FOLDER = ROOT / "docs/integrations"


def imagej_tiff(pixels: AnyArray) -> bytes:
    """A TIFF as ImageJ writes it, and QuPath for a region; a pixel has 0.5 micrometres."""
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        pixels,
        imagej=True,
        photometric="rgb" if pixels.shape[2:] == (3,) else "minisblack",
        resolution=(2.0, 2.0),
        metadata={"unit": "um"},
    )
    return buffer.getvalue()


def find(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match[1]


def request_like_qupath(server: Server, image: bytes, **added: object) -> list[dict[str, Any]]:
    """Send the request of the Groovy script, and return the features."""
    script = (FOLDER / "qupath.groovy").read_text()
    pairs = re.findall(r"(\w+): ('[^']*'|\d+)", find(r"^def query = \[(.*)\]$", script))
    query = {name: value.strip("'") for name, value in pairs} | added
    service = find(r"^def service = '(.*)'$", script)
    url = find(r"URI\.create\(\"(.*)\"\)", script)
    url = url.replace("${service}", service).replace("${parameters}", str(httpx.QueryParams(query)))
    response = httpx.post(
        url.replace("http://localhost:8000", server.url),
        content=image,
        headers=dict(re.findall(r"\.header\('(Content-Type)', '(.*)'\)", script)),
        timeout=60,
    )
    assert response.status_code == 200, response.text
    document = response.json()
    assert document["type"] == "FeatureCollection"
    assert len(document["features"]) == int(response.headers["x-mask-objects"]) > 5
    features: list[dict[str, Any]] = document["features"]
    return features


@pytest.mark.parametrize("kind", ["8-bit", "16-bit", "RGB"])
def test_qupath_reads_the_objects_of_its_request(server: Server, kind: str) -> None:
    grey = nuclei(200, 240)[0]
    pixels = {"8-bit": grey, "16-bit": grey.astype(np.uint16) * 20, "RGB": np.dstack([grey] * 3)}
    for feature in request_like_qupath(server, imagej_tiff(pixels[kind]), pixel_size=0.5):
        found = read_like_qupath(feature)
        assert (found["type"], found["class"]) == ("detection", "nucleus")
        assert found["roi"].is_valid
        area = found["measurements"]["area_um2"]
        assert found["roi"].area * 0.25 == pytest.approx(area, rel=1e-6)
        assert found["roi"].area >= 20


def test_channel_of_a_fluorescence_image_can_be_chosen(server: Server) -> None:
    image, empty = nuclei(200, 240)[0], np.zeros((200, 240), np.uint8)
    buffer = io.BytesIO()
    stack, axes = np.stack([empty, image]), {"axes": "CYX"}
    tifffile.imwrite(buffer, stack, imagej=True, photometric="minisblack", metadata=axes)
    assert request_like_qupath(server, buffer.getvalue(), channel=1)


def load_napari_snippet() -> Any:
    spec = importlib.util.spec_from_file_location("napari_unet", FOLDER / "napari_unet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Viewer:
    """The part of `napari.Viewer` that the snippet uses."""

    def __init__(self, data: AnyArray) -> None:
        layer = SimpleNamespace(data=data, name="cells", scale=(0.5, 0.5), translate=(0, 10))
        self.layers = SimpleNamespace(selection=SimpleNamespace(active=layer))

    def add_labels(self, data: AnyArray, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(data=data, **options)


def test_napari_gets_labels_with_a_row_of_features_each(server: Server) -> None:
    snippet = load_napari_snippet()
    for pixels in (nuclei(200, 240)[0], np.dstack([nuclei(200, 240)[0]] * 3)):
        layer = snippet.segment_layer(Viewer(pixels), url=server.url, min_area=20)
        assert layer.data.shape == (200, 240)
        assert layer.features["index"] == list(range(1, layer.data.max() + 1))
        assert layer.features["area_px"] == np.bincount(layer.data.ravel())[1:].tolist()
        assert set(layer.features["class"]) == {"nucleus"}
        assert (layer.name, layer.scale, layer.translate) == ("cells objects", (0.5, 0.5), (0, 10))


def test_napari_gets_an_empty_layer_without_objects(server: Server) -> None:
    snippet = load_napari_snippet()
    layer = snippet.segment_layer(Viewer(np.zeros((60, 70), np.uint8)), url=server.url)
    assert not layer.data.any()
    assert layer.features == {"index": []}


def read_macro_arguments(server: Server, variables: dict[str, str]) -> list[str]:
    """The arguments of exec in the macro, with its variables."""
    macro = (FOLDER / "fiji.ijm").read_text()
    given = dict(re.findall(r'^(\w+) = "(.*)";', macro, re.MULTILINE))
    values = given | {"service": server.url} | variables
    arguments = []
    for argument in re.split(r", (?=[\w\"])", find(r"^status = exec\((.*)\);$", macro)):
        terms = argument.split(" + ")
        arguments.append("".join(t[1:-1] if t.startswith('"') else values[t] for t in terms))
    return arguments


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_rois_of_the_macro_are_the_objects(server: Server, tmp_path: Path) -> None:
    image, rois = tmp_path / "image.tif", tmp_path / "rois.zip"
    image.write_bytes(imagej_tiff(nuclei(200, 240)[0]))
    arguments = read_macro_arguments(server, {"image": str(image), "rois": str(rois)})
    assert arguments[0] == "curl"
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "200"
    opened = roifile.roiread(rois)
    assert isinstance(opened, list)
    assert len(opened) > 5
    assert [int(each.name) for each in opened] == list(range(1, len(opened) + 1))
    image.write_bytes(b"not an image")
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "422"
    assert "not a recognised image" in rois.read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_macro_notices_a_service_that_does_not_respond(server: Server, tmp_path: Path) -> None:
    variables = {"service": "http://127.0.0.1:9", "image": __file__, "rois": str(tmp_path / "rois")}
    arguments = read_macro_arguments(server, variables)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "000"
