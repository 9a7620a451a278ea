"""The names and the content of uploaded files, and bodies that are rejected."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Request

from app.api.uploads import (
    Form,
    Upload,
    check_upload,
    read_body,
    read_form,
    read_uploads,
)
from app.errors import CorruptImage, InvalidRequest, UploadTooLarge
from app.inference.budget import Budget

FORM = {"content-type": "multipart/form-data; boundary=B"}


def request(chunks: list[bytes], headers: dict[str, str]) -> Request:
    """A request whose body arrives in chunks."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> Any:
        return messages.pop(0)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def upload(*chunks: bytes, max_bytes: int = 10_000_000, **headers: str) -> list[Upload]:
    async def read() -> list[Upload]:
        with Budget(1e9, "MB", lambda: None).allocate() as allocation:
            fields = FORM | {name.replace("_", "-"): value for name, value in headers.items()}
            return await read_uploads(request(list(chunks), fields), max_bytes, allocation)

    return asyncio.run(read())


def part(content: bytes, disposition: bytes = b'name="file"; filename="a.png"') -> bytes:
    head = b"--B\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n"
    return head + content + b"\r\n"


END = b"--B--\r\n"
IMAGE = b"\x89PNG\r\n\x1a\n and more"


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_files_of_a_form_arrive_in_any_chunks(size: int) -> None:
    contents = [b"", b"x", b"\r\n--B\r", bytes(range(256)) * 200]
    body = b"".join(part(content) for content in contents) + END
    files = upload(*(body[at : at + size] for at in range(0, len(body), size)))
    assert [file.data for file in files] == contents
    assert {file.name for file in files} == {"a"}


def test_name_is_utf_8_whatever_charset_is_declared() -> None:
    body = part(b"x", 'name="file"; filename="Zellkörper.png"'.encode()) + END
    for charset in ("punycode", "utf-16", "idna", "unknown"):
        kind = f"multipart/form-data; boundary=B; charset={charset}"
        assert upload(body, content_type=kind) == [Upload("Zellkörper", b"x", "Zellkörper.png")]
    latin = part(b"x", 'name="file"; filename="Zellkörper.png"'.encode("latin-1")) + END
    assert upload(latin) == [Upload("Zellk_rper", b"x", "Zellk_rper.png")]


@pytest.mark.parametrize(
    ("disposition", "detail"),
    [
        (b'name="other"; filename="a"', "unknown form field 'other'"),
        (b"name=" + b"x" * 5000, "header size"),
        (b'name="file"\r\n' + b"X: y\r\n" * 20, "header count"),
    ],
)
def test_part_is_rejected_at_the_end_of_its_headers(disposition: bytes, detail: str) -> None:
    """Reading stops at the error; this body ends there."""
    with pytest.raises(InvalidRequest, match=detail):
        upload(part(b"", disposition)[:-2])


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        ("multipart/form-data", "no boundary"),
        ("multipart/form-data; boundary=", "no boundary"),
        ("multipart/form-data; boundary=" + "x" * 500, "malformed"),
        ("multipart/form-data; boundary=B" + ";a=b" * 15_000, "longer than"),
        ('multipart/form-data; boundary="' + '\\"' * 28_000, "longer than"),
    ],
)
def test_content_type_of_a_form_is_checked(kind: str, detail: str) -> None:
    with pytest.raises(InvalidRequest, match=detail):
        upload(END, content_type=kind)


def test_files_of_a_form_are_counted() -> None:
    with pytest.raises(InvalidRequest, match="too many files"):
        upload(part(b"x") * 1001 + END)


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_inflating_stops_at_the_limit(coding: str, compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(part(bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(UploadTooLarge, match="decompresses"):
        upload(bomb, max_bytes=1_000_000, content_encoding=coding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize("size", [1, 1000, 10_000_000])
def test_body_is_inflated_whatever_chunks_it_arrives_in(size: int) -> None:
    plain = bytes(64 * 1024 * 3) + b"end"
    packed = gzip.compress(plain)
    chunks = [packed[at : at + size] for at in range(0, len(packed), size)]

    async def read() -> bytes:
        with Budget(1e9, "MB", lambda: None).allocate() as allocation:
            headers = {"content-encoding": "gzip"}
            data = await read_body(request(chunks, headers), 10_000_000, allocation)
            assert allocation.amount == len(plain)
            return data

    assert asyncio.run(read()) == plain


def test_file_needs_content() -> None:
    with pytest.raises(CorruptImage, match=r"^empty file"):
        check_upload(Upload("a", b""))
    check_upload(Upload("a", b"."))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"cells.png", "the text 'cells.png'"),
        (b"iVBORw0KGgoAAAANSUhEUgAAAB4AAAAUCA", "base64 text"),
        (b'{"a": 1}', "JSON"),
    ],
)
def test_text_of_a_field_is_named_with_what_curl_needs(value: bytes, name: str) -> None:
    (field,) = upload(part(value, b'name="file"') + END)
    with pytest.raises(CorruptImage) as caught:
        check_upload(field)
    assert str(caught.value) == (
        f"the part 'file' has no file name and is {name}, not an image; send the file itself, with "
        "curl as -F file=@cells.png"
    )


@pytest.mark.parametrize(
    ("content", "disposition"),
    [
        (IMAGE, b'name="file"'),
        (b"cells.png", b'name="file"; filename="a.png"'),
        (b"cells.png", b"name=\"file\"; filename*=UTF-8''a.png"),
        (b"cells.png", b'name="file"; filename=""'),
        (b"cells.png", b""),
    ],
)
def test_image_without_a_name_and_file_with_one_are_left_to_the_decoder(
    content: bytes, disposition: bytes
) -> None:
    (file,) = upload(part(content, disposition) + END)
    check_upload(file)


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "",
            "application/octet-stream",
            "binary/octet-stream",
            "application/x-www-form-urlencoded",
        ),
        *(
            "image/png",
            "image/tiff",
            "image/*",
            "text/plain; charset=utf-8",
            "application/json",
            "?",
        ),
    ],
)
def test_raw_body_is_taken_whatever_its_content_type(kind: str) -> None:
    assert upload(IMAGE[:5], IMAGE[5:], content_type=kind) == [Upload("", IMAGE)]


def test_empty_body_is_an_empty_file() -> None:
    with pytest.raises(CorruptImage, match=r"^empty file"):
        upload(content_type="image/png")


def test_form_whose_content_type_does_not_say_so_is_named() -> None:
    with pytest.raises(InvalidRequest, match="a multipart form, but its Content-Type does not say"):
        upload(part(b"x") + END, content_type="application/octet-stream")


@pytest.mark.parametrize("body", [IMAGE, b"{}", b"--C\r\n", b"file=x"])
def test_body_that_is_not_multipart_as_declared_is_named_as_such(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="does not begin with --B, its boundary"):
        upload(body)


@pytest.mark.parametrize("body", [b"", b"--", b"--B", part(b"x"), part(b"x") + b"--B-"])
def test_incomplete_form_is_invalid(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="incomplete"):
        upload(body)


def test_form_may_begin_with_an_empty_line_and_end_with_more() -> None:
    assert upload(b"\r\n" + part(b"x") + END + b"\r\n")[0].data == b"x"


@pytest.mark.parametrize(
    "disposition", [b'name="file"', b'filename="a.png"', b"", b'name=file; filename=""']
)
def test_part_without_a_name_is_a_file(disposition: bytes) -> None:
    (only,) = upload(part(b"x", disposition) + END)
    assert only.data == b"x"


def test_part_without_a_disposition_is_a_file() -> None:
    assert upload(b"--B\r\nContent-Type: image/png\r\n\r\nx\r\n" + END) == [Upload("", b"x")]


def test_parameter_in_the_form_is_pointed_to_the_query() -> None:
    async def read() -> None:
        with Budget(1e9, "MB", lambda: None).allocate() as allocation:
            body = request([part(b"polygons", b'name="output"'), END], FORM)
            await read_uploads(body, 10_000_000, allocation, parameters=("model", "output"))

    with pytest.raises(InvalidRequest, match=r"^output is a parameter .*: \?output=VALUE"):
        asyncio.run(read())


def read_with_fields(*parts: bytes) -> Form:
    async def read() -> Form:
        with Budget(1e9, "MB", lambda: None).allocate() as allocation:
            body = request([*parts, END], FORM)
            return await read_form(body, 10_000_000, allocation, fields=("om", "model"))

    return asyncio.run(read())


def test_fields_that_are_expected_are_read() -> None:
    form = read_with_fields(
        part(b"true", b'name="om"'), part(b"x"), part(b"pers\xff", b"name=model")
    )
    assert form == Form([Upload("a", b"x", "a.png")], {"om": "true", "model": "pers\ufffd"})


@pytest.mark.parametrize(
    ("parts", "detail"),
    [
        ([part(b"true", b'name="om"')] * 2, "om is given twice"),
        ([part(b"x" * 1001, b'name="om"')], "om has more than 1000 bytes"),
        ([part(b"x", b'name="url"')], "unknown form field 'url'; .*fields are om, model"),
        ([part(b"x", b'name="om"')], "no part named 'file'"),
    ],
)
def test_fields_are_checked(parts: list[bytes], detail: str) -> None:
    with pytest.raises(InvalidRequest, match=detail):
        read_with_fields(*parts)
