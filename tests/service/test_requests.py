"""POST /segment as different clients send it: bodies, names of files, and several outputs."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import io
import json
import re
import socket
import zipfile
import zlib
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tifffile

from tests.conftest import Post, Server, decode, encode, nuclei

CELLS = encode(nuclei(96, 120, seed=3)[0])


@pytest.mark.parametrize(
    "kind",
    [
        *(None, "application/octet-stream", "binary/octet-stream", "text/plain", "image/tiff"),
        *("application/x-www-form-urlencoded", "image/png; charset=utf-8", "application/json"),
    ],
)
def test_image_is_recognised_by_its_content(server: Server, post: Post, kind: str | None) -> None:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.request("POST", "/segment", CELLS, {"Content-Type": kind} if kind else {})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.read() == post(CELLS).content
    connection.close()


def test_compressed_bodies_of_all_kinds_are_read(post: Post) -> None:
    plain = post(CELLS).content
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    half = len(CELLS) // 2
    members = gzip.compress(CELLS[:half]) + gzip.compress(CELLS[half:])
    for coding, body in (
        ("x-gzip", gzip.compress(CELLS)),
        ("gzip", members),
        ("deflate", raw.compress(CELLS) + raw.flush()),
    ):
        assert post(body, headers={"Content-Encoding": coding}).content == plain, coding


def send_form(server: Server, *parts: tuple[str, bytes], **query: object) -> httpx.Response:
    """Send a form of parts with these dispositions."""
    body = b"".join(
        b"--B\r\n" + f"Content-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
        for disposition, content in parts
    )
    return httpx.post(
        f"{server.url}/segment",
        params=query,  # type: ignore[arg-type]
        content=body + b"--B--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=B"},
        timeout=60,
    )


def test_names_in_the_zip_are_those_of_the_files(server: Server) -> None:
    dispositions = {
        'form-data; name="file"; filename="scan.001"': "scan.001.png",
        'form-data; name="file"; filename="img_1.5um.ome.tif"': "img_1.5um.png",
        "form-data; name=\"file\"; filename*=UTF-8''Zellk%C3%B6rper.png": "Zellkörper.png",
        'form-data; name="file"; filename="=?utf-8?B?57Sw6IOeLnRpZg==?="': "細胞.png",
        'form-data; name="file"; filename="a%22b.png"': "a_b.png",
        'form-data; name="file"; filename="🔬 con.png"': "🔬 con.png",
        'form-data; name="file"; filename="NUL.png"': "_NUL.png",
        'form-data; name="file"': "image.png",
        'form-data; filename="unnamed.png"': "unnamed.png",
    }
    answer = send_form(server, *((disposition, CELLS) for disposition in dispositions))
    assert answer.status_code == 200, answer.text
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.namelist() == list(dispositions.values())


def test_part_of_another_name_is_named_with_what_is_right(server: Server) -> None:
    answer = send_form(server, ('form-data; name="image"; filename="a.png"', CELLS))
    assert answer.status_code == 422
    assert answer.json()["detail"] == "unknown form field 'image'; send images as 'file'"


@pytest.mark.parametrize("name", ["output", "threshold", "page"])
def test_parameter_in_the_form_is_pointed_to_the_query(server: Server, name: str) -> None:
    answer = send_form(server, (f'form-data; name="{name}"', b"0"))
    assert answer.status_code == 422
    assert answer.json()["detail"] == (
        f"{name} is a parameter of the query, not a field of the form; write it after the path: "
        f"?{name}=VALUE"
    )


def test_several_outputs_come_from_one_inference(server: Server, post: Post) -> None:
    inferred = server.metric("unet_images_total", model="nuclei")
    answer = post(CELLS, output=["mask", "polygons", "instances"])
    assert server.metric("unet_images_total", model="nuclei") == inferred + 1
    assert answer.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.namelist() == ["image-mask.png", "image.geojson", "image-instances.png"]
    assert archive.read("image-mask.png") == post(CELLS).content
    objects = int(answer.headers["x-mask-objects"])
    assert decode(archive.read("image-instances.png")).max() == objects
    assert len(json.loads(archive.read("image.geojson"))["features"]) == objects
    assert answer.headers["x-image-pages"] == "1"


def test_json_has_one_member_per_output(post: Post) -> None:
    headers = {"Accept": "application/json"}
    (image,) = post(CELLS, output=["overlay", "polygons"], headers=headers).json()["images"]
    assert image["polygons"]["type"] == "FeatureCollection"
    assert image["overlay"].startswith("iVBORw0KGgo")
    assert "mask" not in image


def stack(pages: int) -> bytes:
    """A TIFF of several pages, of which each shows other cells."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for seed in range(pages):
            writer.write(nuclei(64, 80, seed)[0], photometric="minisblack", metadata=None)
    return buffer.getvalue()


def test_page_of_a_stack_is_chosen(post: Post) -> None:
    data = stack(3)
    refused = post(data)
    assert refused.status_code == 422
    assert "3 pages" in refused.json()["detail"]
    assert "page=all" in refused.json()["detail"]
    chosen = post(data, page=1)
    assert chosen.content == post(encode(nuclei(64, 80, 1)[0])).content
    assert chosen.headers["x-image-pages"] == "3"
    assert post(data, page=3).status_code == 422


def test_all_pages_give_one_result_each(server: Server, post: Post) -> None:
    data = stack(3)
    inferred = server.metric("unet_images_total", model="nuclei")
    answer = post(data, page="all")
    assert server.metric("unet_images_total", model="nuclei") == inferred + 3
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.namelist() == [f"image-page{page}.png" for page in range(3)]
    singles = [post(data, page=page).content for page in range(3)]
    assert [archive.read(name) for name in archive.namelist()] == singles
    headers = {"Accept": "application/json"}
    images = post(data, page="all", headers=headers).json()["images"]
    assert [(each["name"], each["page"], each["pages"]) for each in images] == [
        (f"image-page{page}", page, 3) for page in range(3)
    ]
    assert [base64.b64decode(each["mask"]) for each in images] == singles


def test_file_of_one_page_is_one_result_for_all_pages(post: Post) -> None:
    assert post(CELLS, page="all").content == post(CELLS).content
    assert post(b"no image", page="all").status_code == 422


def test_all_pages_as_tiff_are_one_stack(post: Post) -> None:
    data = stack(3)
    answer = post(data, page="all", format="tiff", output="instances")
    assert answer.headers["content-type"] == "image/tiff"
    assert answer.headers["x-image-pages"] == "3"
    with tifffile.TiffFile(io.BytesIO(answer.content)) as file:
        pages = [page.asarray() for page in file.pages]
    expected = [decode(post(data, page=page, output="instances").content) for page in range(3)]
    assert all(np.array_equal(page, other) for page, other in zip(pages, expected, strict=True))
    assert int(answer.headers["x-mask-objects"]) == sum(int(page.max()) for page in expected)
    coverage = np.mean([float(post(data, page=n).headers["x-mask-coverage"]) for n in range(3)])
    assert float(answer.headers["x-mask-coverage"]) == pytest.approx(coverage, abs=1e-5)


def test_stack_and_tables_of_all_pages_are_a_zip(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/segment",
        params={"page": "all", "format": "tiff", "output": ["mask", "measurements"]},
        files=[("file", ("a.tif", stack(2))), ("file", ("b.png", CELLS))],
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.namelist() == ["a.tiff", "a-page0.csv", "a-page1.csv", "b.tiff", "b.csv"]


@pytest.mark.parametrize(
    ("query", "kind", "begins"),
    [
        ({"output": "mask", "format": "tiff"}, "image/tiff", b"II*\0"),
        ({"output": "preview"}, "image/png", b"\x89PNG"),
        ({"output": "cutout", "format": "webp"}, "image/webp", b"RIFF"),
        ({"output": "coco"}, "application/json", b"{"),
        ({"output": "rois"}, "application/zip", b"PK"),
        ({"output": "measurements"}, "text/csv", b"id"),
        ({"output": "polygons"}, "application/geo+json", b"{"),
    ],
)
def test_output_has_its_media_type(
    post: Post, query: dict[str, str], kind: str, begins: bytes
) -> None:
    answer = post(CELLS, headers={"Accept": "*/*"}, **query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == kind
    assert answer.content.removeprefix(b"\xef\xbb\xbf").startswith(begins)


def test_coco_names_the_file_as_the_client_does(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/segment?output=coco", files={"file": ("zelle 1.png", CELLS)}, timeout=60
    )
    (image,) = answer.json()["images"]
    assert image["file_name"] == "zelle 1.png"


def test_small_objects_and_those_at_the_edge_are_removed(post: Post) -> None:
    def count(**query: object) -> int:
        return int(post(CELLS, output="instances", **query).headers["x-mask-objects"])

    assert 0 <= count(exclude_edges="true") < count()
    assert count(min_area=10_000) == 0
    mask = post(CELLS, min_area=10_000)
    assert float(mask.headers["x-mask-coverage"]) == 0
    assert mask.headers["x-mask-objects"] == "0"


def exchange(server: Server, sent: bytes) -> bytes:
    """Send bytes, and read until the server closes the connection."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 30) as connection:
        connection.sendall(sent)
        received = b""
        while data := connection.recv(1 << 16):
            received += data
    return received


def head(*fields: str, version: str = "1.1", length: int = len(CELLS)) -> bytes:
    lines = [f"POST /segment HTTP/{version}", "Host: x", f"Content-Length: {length}", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def test_connection_is_reused_after_every_kind_of_response(server: Server) -> None:
    """As a proxy does: with empty lines before requests, and bodies that the server rejects."""
    sent = b"\r\n" + head() + CELLS + b"\r\n"
    sent += head("X-Request-Timeout: 0") + CELLS + b"\r\n"
    sent += head("Connection: keep-alive", version="1.0") + CELLS
    sent += head("Content-Encoding: br") + CELLS
    sent += head("Connection: close") + CELLS
    received = exchange(server, sent)
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", received)
    assert statuses == [b"200", b"422", b"200", b"415", b"200"]


def test_client_that_sends_too_much_reads_the_response(server: Server) -> None:
    """All of it: the connection is not reset while the client still sends."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 60) as connection:
        connection.sendall(head(length=10**12))
        block = bytes(1 << 20)
        sent = 0
        connection.settimeout(0.2)
        received = b""
        while b"\r\n\r\n" not in received:
            try:
                sent += connection.send(block)
            except TimeoutError:
                break
            if sent > 270_000_000:
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    received += connection.recv(1 << 16)
                connection.settimeout(0.2)
        connection.settimeout(30)
        while not received.endswith(b"}"):
            data = connection.recv(1 << 16)
            assert data, received
            received += data
    assert received.startswith(b"HTTP/1.1 413 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["status"] == 413
