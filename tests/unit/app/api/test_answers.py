"""Bodies of responses: a file, a zip or JSON, and the names in them."""

from __future__ import annotations

import base64
import io
import json
import time
import zipfile

import pytest

from app.api.answers import (
    Answer,
    only_output,
    prefers_json,
    unique_names,
    write_json,
    write_zip,
)
from app.errors import CorruptImage, EngineError
from app.inference.outputs import Output, Rendered, Segmentation

MASK = Rendered(b"\x89PNG mask", "image/png", ".png")
OVERLAY = Rendered(b"\x89PNG overlay", "image/png", ".png")
POLYGONS = Rendered(b'{"type": "FeatureCollection"}', "application/geo+json", ".geojson")
COCO = Rendered(b'{"images": []}', "application/json", ".json")
CSV = Rendered("id,µm\n1,2\n".encode(), "text/csv", ".csv")


def segmented(**rendered: Rendered) -> Segmentation:
    outputs = {Output(name): each for name, each in rendered.items()}
    return Segmentation(outputs, 80, 64, 0.25, 0.75, 3, 2, {"infer": 0.0123})


def unzip(data: bytes) -> dict[str, bytes]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.testzip() is None
    return {name: archive.read(name) for name in archive.namelist()}


def test_one_output_of_one_image_needs_no_zip() -> None:
    answer = Answer("a", segmented(mask=MASK))
    assert only_output([answer]) is MASK
    assert only_output([answer, answer]) is None
    assert only_output([Answer("a", segmented(mask=MASK, polygons=POLYGONS))]) is None
    assert only_output([Answer("a", CorruptImage("damaged"))]) is None


def test_outputs_with_the_same_extension_are_told_apart_by_their_names() -> None:
    one = Answer("one", segmented(mask=MASK, polygons=POLYGONS))
    two = Answer("two", segmented(mask=MASK, overlay=OVERLAY, measurements=CSV))
    assert unzip(write_zip([one, two])) == {
        "one.png": MASK.content,
        "one.geojson": POLYGONS.content,
        "two-mask.png": MASK.content,
        "two-overlay.png": OVERLAY.content,
        "two.csv": CSV.content,
    }


def test_zip_says_why_images_failed() -> None:
    answers = [
        Answer("good", segmented(mask=MASK)),
        Answer("bad", CorruptImage("damaged")),
        Answer("worse", EngineError("secret")),
    ]
    files = unzip(write_zip(answers))
    assert list(files) == ["good.png", "errors.json"]
    errors = json.loads(files["errors.json"])
    assert errors["bad"] == {"status": 422, "detail": "damaged"}
    assert errors["worse"]["status"] == 500
    assert "secret" not in errors["worse"]["detail"]


def test_long_names_leave_room_for_what_is_added() -> None:
    name = "ö" * 127
    (file,) = unzip(write_zip([Answer(name, segmented(mask=MASK))]))
    assert file == "ö" * 125 + ".png"


def test_json_includes_outputs_as_json_text_or_base64() -> None:
    result = segmented(mask=MASK, polygons=POLYGONS, coco=COCO, measurements=CSV)
    answers = [Answer("a", result), Answer("b", CorruptImage("damaged"), page=2)]
    document = json.loads(write_json({"model": "m"}, answers))
    assert document["model"] == "m"
    first, second = document["images"]
    assert base64.b64decode(first.pop("mask")) == MASK.content
    assert first == {
        "name": "a",
        "width": 80,
        "height": 64,
        "pages": 2,
        "coverage": 0.25,
        "confidence": 0.75,
        "milliseconds": {"infer": 12.3},
        "objects": 3,
        "polygons": {"type": "FeatureCollection"},
        "coco": {"images": []},
        "measurements": CSV.content.decode(),
    }
    assert second == {"name": "b", "page": 2, "error": {"status": 422, "detail": "damaged"}}


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (["application/json"], True),
        (["APPLICATION/JSON; charset=utf-8"], True),
        (["application/json, text/plain, */*"], True),
        (["text/html", "application/json;q=0.9, */*;q=0.8"], True),
        (["*/*"], False),
        ([], False),
        (["application/json, text/csv"], False),
        (["application/json, application/geo+json;q=0.9"], True),
        (["application/geo+json"], False),
        (["image/tiff, application/json"], False),
        (["application/json;q=0"], False),
        (["application/json;q=lots"], False),
    ],
)
def test_json_is_preferred_by_quality(accept: list[str], expected: bool) -> None:
    assert prefers_json(accept) is expected


def test_equal_names_are_numbered() -> None:
    names = unique_names(["a", "A", "a", "", "", "errors", "a-2"])
    assert names == ["a", "A-2", "a-3", "image", "image-2", "errors-2", "a-2-2"]


def test_many_equal_names_are_numbered_in_linear_time() -> None:
    start = time.process_time()
    assert len(set(unique_names(["a"] * 20_000))) == 20_000
    assert time.process_time() - start < 1
