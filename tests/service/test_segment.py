"""POST /segment against a real process: responses for valid images."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from model.checkpoint import load_checkpoint
from model.predict import Predictor
from model.transforms import to_mask
from tests.conftest import ROOT, Post, Server, decode, encode, nuclei, serving, write_tiny


def test_mask_of_synthetic_nuclei_is_accurate(post: Post) -> None:
    image, labels = nuclei(300, 410)
    response = post(encode(image))
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    png = Image.open(io.BytesIO(response.content))
    assert (png.mode, png.size) == ("L", (410, 300))
    mask = np.asarray(png)
    assert set(np.unique(mask)) == {0, 255}
    found, true = mask > 0, labels > 0
    dice = 2 * (found & true).sum() / (found.sum() + true.sum())
    assert dice > 0.85
    assert float(response.headers["x-mask-coverage"]) == pytest.approx(found.mean(), abs=1e-6)
    assert 0.5 <= float(response.headers["x-mask-confidence"]) <= 1
    for stage in ("decode", "queue", "infer", "encode"):
        assert f"{stage};dur=" in response.headers["server-timing"]


def test_mask_matches_the_torch_reference() -> None:
    """The mask over HTTP is that of the network in plain torch, except for rounding."""
    checkpoint = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    image, _ = nuclei(230, 700, seed=1)
    with serving(UNET_PRECISION="fp32") as server:
        response = httpx.post(
            f"{server.url}/segment", content=encode(image), headers={"Content-Type": "image/png"}
        )
    served = decode(response.content)
    reference = to_mask(Predictor.of(checkpoint)(image), checkpoint.preprocess)
    assert (served != reference).mean() < 1e-4
    assert response.headers["x-model"] == checkpoint.id
    assert response.headers["x-engine"].split("/")[0] in ("cpu", "cuda:0")


def test_multipart_and_raw_body_give_the_same_mask(server: Server, post: Post) -> None:
    image = encode(nuclei(100, 120)[0])
    form = httpx.post(f"{server.url}/segment", files={"file": ("a.png", image, "image/png")})
    assert form.status_code == 200
    assert form.content == post(image).content
    assert form.content == post(image, headers={"Content-Type": "image/png"}).content


@pytest.mark.parametrize(
    ("coding", "compress"),
    [("gzip", gzip.compress), ("Deflate", zlib.compress), ("identity", bytes)],
)
def test_body_may_be_compressed(
    server: Server, post: Post, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    image = encode(nuclei(100, 120)[0])
    plain, headers = post(image).content, {"Content-Encoding": coding}
    assert post(compress(image), headers=headers).content == plain
    form = httpx.Request("POST", server.url, files={"file": ("a.png", image)})
    headers["Content-Type"] = form.headers["Content-Type"]
    assert post(compress(form.read()), headers=headers).content == plain


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (17, 3), (256, 256), (511, 513)])
def test_mask_has_the_size_of_the_image(post: Post, size: tuple[int, int]) -> None:
    height, width = size
    response = post(encode(np.full(size, 90, np.uint8)))
    assert response.status_code == 200
    assert decode(response.content).shape == (height, width)


def test_exif_orientation_applies(post: Post) -> None:
    """Orientation 6: the image is stored rotated; the mask is that of the upright image."""
    image, _ = nuclei(96, 160, seed=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(np.rot90(image), "PNG", exif=exif)  # stored so that orientation 6 undoes it
    mask = decode(post(turned).content)
    plain = decode(post(encode(image)).content)
    assert mask.shape == plain.shape == (96, 160)
    assert (mask != plain).mean() < 0.01


def test_16_bit_image_uses_its_full_range(post: Post) -> None:
    image, _ = nuclei(200, 200, seed=3)
    eight = decode(post(encode(image)).content)
    sixteen = decode(post(encode(image.astype(np.uint16) * 16, "TIFF")).content)  # a 12-bit camera
    assert eight.mean() > 5
    assert (eight != sixteen).mean() < 0.005


def test_outputs_agree_with_the_mask(server: Server, post: Post) -> None:
    image, labels = nuclei(128, 144, seed=4)
    png = encode(image)
    mask = decode(post(png).content)
    probability = decode(post(png, output="probability").content)
    assert probability.max() > 60_000
    threshold = httpx.get(server.url + "/models/nuclei").json()["preprocessing"]["threshold"]
    assert ((probability >= threshold * 65535) == (mask > 0)).mean() > 0.9999
    response = post(png, output="instances")
    instances = decode(response.content)
    assert int(response.headers["x-mask-objects"]) == instances.max()
    assert abs(int(instances.max()) - len(np.unique(labels)) + 1) <= 3
    overlay = Image.open(io.BytesIO(post(png, output="overlay").content))
    assert overlay.mode == "RGB"
    tinted = (np.asarray(overlay) != image[..., None]).any(axis=2)
    assert np.array_equal(tinted, mask > 0)
    cutout = Image.open(io.BytesIO(post(png, output="cutout").content))
    assert (cutout.mode, cutout.size) == ("RGBA", (144, 128))
    assert (np.asarray(cutout)[..., :3] == image[..., None]).all()
    alpha = np.asarray(cutout)[..., 3]
    assert alpha[mask > 0].mean() > 128 > alpha[mask == 0].mean()


def test_polygons_are_geojson_of_the_instances(server: Server, post: Post) -> None:
    png = encode(nuclei(128, 144, seed=4)[0])
    response = post(png, output="polygons")
    assert response.headers["content-type"] == "application/geo+json"
    assert response.headers["x-model"].startswith("nuclei@")
    collection = response.json()
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == int(response.headers["x-mask-objects"])
    instances = decode(post(png, output="instances").content)
    areas = sorted(each["properties"]["area"] for each in collection["features"])
    assert areas == sorted(np.bincount(instances.ravel())[1:].tolist())
    for feature in collection["features"]:
        left, top, right, bottom = feature["bbox"]
        assert 0 <= left < right <= 144
        assert 0 <= top < bottom <= 128
        assert feature["properties"]["classification"]["name"] == "nucleus"
    asked = {"Accept": "application/json"}
    (image,) = post(png, output="polygons", headers=asked).json()["images"]
    assert (image["width"], image["height"]) == (144, 128)
    assert image["objects"] == len(collection["features"])
    assert image["polygons"] == collection
    assert "mask" not in image
    two = httpx.post(
        f"{server.url}/segment",
        params={"output": "polygons"},
        files=[("file", ("a.png", png)), ("file", ("bad.png", b"no"))],
        headers=asked,
    ).json()["images"]
    assert two[0]["polygons"] == collection
    assert two[1]["error"]["status"] == 422


def test_higher_threshold_gives_smaller_mask(post: Post) -> None:
    png = encode(nuclei(128, 128, seed=5)[0])
    areas = [(decode(post(png, threshold=t).content) > 0).mean() for t in (0, 0.2, 0.8)]
    assert areas[0] == 1.0
    assert areas[0] > areas[1] > areas[2] > 0


def test_zip_has_good_masks_and_errors_of_bad_files(server: Server) -> None:
    good = encode(nuclei(64, 80)[0])
    response = httpx.post(
        f"{server.url}/segment",
        files=[
            ("file", ("a.png", good)),
            ("file", ("a.png", good)),
            ("file", ("../../etc/b.png", good)),
            ("file", ("broken.png", b"no image")),
            ("file", ("empty.png", b"")),
        ],
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    assert set(archive.namelist()) == {"a.png", "a-2.png", "b.png", "errors.json"}
    assert archive.read("a.png") == archive.read("b.png")
    assert decode(archive.read("a.png")).shape == (64, 80)
    errors = json.loads(archive.read("errors.json"))
    assert list(errors) == ["broken", "empty"]
    assert errors["broken"]["status"] == errors["empty"]["status"] == 422
    assert "empty file" in errors["empty"]["detail"]


def test_json_has_statistics_and_the_mask(server: Server) -> None:
    image = encode(nuclei(64, 80)[0])
    response = httpx.post(
        f"{server.url}/segment",
        files={"file": ("cells.png", image)},
        headers={"Accept": "application/json"},
    )
    (only,) = response.json()["images"]
    assert (only["name"], only["width"], only["height"]) == ("cells", 80, 64)
    mask = decode(base64.b64decode(only["mask"]))
    assert (mask > 0).mean() == pytest.approx(only["coverage"])


def test_single_image_has_mask_headers_in_every_format(post: Post) -> None:
    png = encode(nuclei(64, 80)[0])
    for answer in (
        post(png, headers={"Accept": "application/json"}),
        post(png, output="polygons"),
        post(png, output="probability"),
    ):
        assert 0 <= float(answer.headers["x-mask-coverage"]) <= 1
        assert 0.5 <= float(answer.headers["x-mask-confidence"]) <= 1
        assert "infer;dur=" in answer.headers["server-timing"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/json", "application/json"),
        ("APPLICATION/JSON; charset=utf-8", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("text/html, application/json;q=0.9, */*;q=0.8", "application/json"),
        ("*/*", "image/png"),
        ("", "image/png"),
        ("image/png, application/json;q=0.1", "image/png"),
        ("image/png, application/zip, application/json", "image/png"),
        ("application/json;q=0", "image/png"),
        ("application/json;q=0.5, image/*;q=0.7", "image/png"),
        ("application/json;q=lots", "image/png"),
        ("application/problem+json", "image/png"),
    ],
)
def test_accept_header_chooses_json_or_png(post: Post, accept: str, kind: str) -> None:
    answer = post(encode(np.zeros((8, 8), np.uint8)), headers={"Accept": accept})
    assert answer.headers["content-type"] == kind


def test_output_that_the_model_does_not_have_is_422(tmp_path: Path) -> None:
    """For several images too: nothing is computed, and no zip of errors is returned."""
    write_tiny(tmp_path / "nuclei.safetensors", classes=3)
    png = encode(nuclei(64, 80)[0])
    with serving(UNET_WEIGHTS_DIR=str(tmp_path)) as server:
        url = f"{server.url}/segment"
        for files in ([("file", ("a.png", png))], [("file", ("a.png", png))] * 2):
            for query in ({"output": "instances"}, {"threshold": "0.5"}):
                answer = httpx.post(url, params=query, files=files)
                assert answer.status_code == 422
                assert "binary models" in answer.json()["detail"]
        mask = Image.open(io.BytesIO(httpx.post(url, files=files[:1]).content))
        assert (mask.mode, mask.size) == ("P", (80, 64))
        assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
        probability = httpx.post(url, params={"output": "probability"}, files=files[:1])
        assert Image.open(io.BytesIO(probability.content)).mode.startswith("I")


def test_valid_request_id_is_echoed(post: Post) -> None:
    png = encode(np.zeros((8, 8), np.uint8))
    assert post(png, headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = post(png, headers={"X-Request-ID": "a b\tc" * 50}).headers["x-request-id"]
    assert len(made) == 32


@pytest.mark.parametrize("classes", [1, 3])
def test_resizing_model_returns_the_size_of_the_image(tmp_path: Path, classes: int) -> None:
    """The mask matches the probabilities that are sent, for larger, smaller and flat images."""
    write_tiny(tmp_path / "nuclei.safetensors", classes=classes, resize=True)
    with serving(UNET_WEIGHTS_DIR=str(tmp_path), UNET_PRECISION="fp32") as server:

        def ask(image: bytes, output: str) -> httpx.Response:
            url = f"{server.url}/segment?output={output}"
            answer = httpx.post(url, content=image, headers={"Content-Type": "image/png"})
            assert answer.status_code == 200, answer.text
            return answer

        for size in ((150, 210), (40, 30), (1, 3000), (64, 48)):
            image = nuclei(150, 3000, seed=5)[0][: size[0], : size[1]]
            answer = ask(encode(image), "mask")
            mask = decode(answer.content)
            probability = decode(ask(encode(image), "probability").content) / 65535
            opacity = decode(ask(encode(image), "cutout").content)[:, :, 3] / 255
            assert mask.shape == probability.shape == size
            assert ((opacity > 0.5) == (mask > 0)).all()
            if classes == 1:
                away = np.abs(probability - 0.5) > 1e-4  # 16 bits round
                assert ((mask > 0) == (probability > 0.5))[away].all()
                sure = np.maximum(probability, 1 - probability).mean()
                assert float(answer.headers["x-mask-confidence"]) == pytest.approx(sure, abs=1e-4)
            else:
                # foreground is 1 - p(background), the largest of three is at least a third
                assert (probability[mask == 0] < 2 / 3 + 1e-4).all()
                assert (probability[mask > 0] > 0.5 - 1e-4).all()
