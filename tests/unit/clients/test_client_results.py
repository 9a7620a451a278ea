"""Several outputs and pages: what is asked for, and how the response is read."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

import unet_client
from app.api.answers import Answer, mask_headers, only_output, unique_names, write_zip
from app.api.schemas import SegmentQuery
from app.errors import CorruptImage, ServiceError
from app.inference.outputs import Options, Output, Rendered, Segmentation
from tests.unit.clients.fake_server import Connect, FakeServer, Reply
from unet_client import SegmentationError, SegmentationResult
from unet_client.results import read_result


def segmentation(options: Options, outputs: Mapping[Output, bytes], **fields: Any) -> Segmentation:
    rendered = {
        output: Rendered(content, *options.file_type(output)) for output, content in outputs.items()
    }
    return Segmentation(rendered, 5, 4, coverage=0.25, confidence=0.75, **fields)


def respond(answers: list[Answer]) -> tuple[bytes, httpx.Headers]:
    """Body and headers of the service's response."""
    headers = {}
    if len(answers) == 1 and isinstance(answers[0].result, Segmentation):
        headers = mask_headers(answers[0].result)
    only = only_output(answers)
    if only is not None:
        return only.content, httpx.Headers({**headers, "Content-Type": only.media_type})
    return write_zip(answers), httpx.Headers({**headers, "Content-Type": "application/zip"})


def read(answers: list[Answer], **query: object) -> SegmentationResult:
    return read_result(*respond(answers), query)


def test_parameters_are_those_of_the_service() -> None:
    assert unet_client.SegmentQuery.__annotations__.keys() == SegmentQuery.model_fields.keys()
    assert set(get_args(unet_client.Output)) == set(Output)


def test_every_parameter_is_sent_as_the_service_parses_it(
    fake: FakeServer, connect: Connect
) -> None:
    outputs = {Output.CUTOUT: b"", Output.COCO: b""}
    body, headers = respond([Answer("image", segmentation(Options(format="webp"), outputs))])  # type: ignore[arg-type]
    fake.respond = lambda _: Reply(200, dict(headers), body)
    with connect(fake.url) as client:
        client.segment(
            b"image",
            model=None,  # type: ignore[arg-type]
            output=["cutout", "coco"],  # type: ignore[arg-type]
            threshold=0.25,
            page=0,
            channel=2,
            format="webp",
            min_area=10,
            exclude_edges=True,
            percentiles=(1, 99.5),  # type: ignore[arg-type]
            pixel_size=0.5,
            background=(255, 0, 16),  # type: ignore[arg-type]
        )
    sent = parse_qs(urlsplit(fake.requests[0].path).query, strict_parsing=True)
    parsed = SegmentQuery(**{k: v if k == "output" else v[0] for k, v in sent.items()})
    assert parsed.model is None
    assert parsed.options == Options(
        outputs=(Output.CUTOUT, Output.COCO),
        threshold=0.25,
        page=0,
        channel=2,
        percentiles=(1, 99.5),
        min_area=10,
        exclude_edges=True,
        pixel_size=0.5,
        background=(255, 0, 16),
        format=parsed.format,
    )
    assert parsed.format == "webp"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"percentiles": (1, 2, 3)}, r"percentiles must be \(low, high\)"),
        ({"background": (0, 0, 256)}, r"background must be \(red, green, blue\)"),
        ({"background": (0, 0)}, "background must be"),
    ],
)
def test_value_that_cannot_be_encoded_is_rejected(
    fake: FakeServer, connect: Connect, query: dict[str, Any], message: str
) -> None:
    with connect(fake.url) as client, pytest.raises(ValueError, match=message):
        client.segment(b"image", **query)
    assert not fake.requests


@pytest.mark.parametrize("output", Output)
def test_single_output_is_the_body(output: Output) -> None:
    answer = Answer("image", segmentation(Options(), {output: b"content"}, objects=7, pages=3))
    result = read([answer], output=str(output))
    assert result.outputs == {str(output): b"content"}
    assert result.content == b"content"
    assert (result.coverage, result.confidence, result.objects) == (0.25, 0.75, 7)
    assert (result.page_count, result.pages) == (3, ())
    assert pickle.loads(pickle.dumps(result)) == result


def test_outputs_are_found_by_name_whatever_the_image_is_called() -> None:
    contents = {output: f"content of {output}".encode() for output in Output}
    for name in unique_names(["image", "a-mask", "errors", "b-page3", "x.geojson", "rois"]):
        answer = Answer(name, segmentation(Options(), contents))
        result = read([answer], output=list(map(str, Output)), page=3)
        assert result.outputs == {str(output): content for output, content in contents.items()}


def test_outputs_are_read_in_their_own_types() -> None:
    contents = {
        Output.POLYGONS: b'{"type": "FeatureCollection"}',
        Output.COCO: b'{"images": []}',
        Output.MEASUREMENTS: "id,class\n1,Zelle ä\n".encode(),
    }
    answer = Answer("image", segmentation(Options(), contents))
    result = read([answer], output=["polygons", "coco", "measurements"])
    assert result.polygons() == {"type": "FeatureCollection"}
    assert result.coco() == {"images": []}
    assert result.measurements() == "id,class\n1,Zelle ä\n"
    with pytest.raises(ValueError, match=r"read it with \.polygons\(\) or \.coco\(\)"):
        result.image()


def test_image_of_several_has_to_be_named() -> None:
    contents = {Output.MASK: b"", Output.OVERLAY: b"", Output.ROIS: b""}
    result = read([Answer("image", segmentation(Options(), contents))], output=list(contents))
    with pytest.raises(ValueError, match="name one of the images: mask, overlay"):
        result.image()
    with pytest.raises(ValueError, match="rois is not an image"):
        result.image("rois")
    with pytest.raises(ValueError, match="the result has mask, overlay, rois; request preview"):
        result.image("preview")


@pytest.mark.parametrize("outputs", [["mask"], ["rois"], ["mask", "instances", "polygons"]])
def test_pages_have_their_numbers_outputs_and_errors(outputs: list[str]) -> None:
    def result_of(page: int) -> Segmentation | ServiceError:
        if page == 1:
            return CorruptImage("damaged")
        return segmentation(Options(), {Output(each): b"%d" % page for each in outputs})

    answers = [Answer(f"scan.001-page{page}", result_of(page), page) for page in range(11)]
    result = read(answers, output=outputs, page="all")
    assert [page.number for page in result.pages] == list(range(11))
    assert result.page_count == 11
    assert result.outputs == {}
    failed = result.pages[1]
    assert (failed.outputs, str(failed.error)) == ({}, "422: damaged")
    with pytest.raises(SegmentationError, match="damaged"):
        failed.image("mask")
    assert result.pages[10].outputs == dict.fromkeys(outputs, b"10")
    with pytest.raises(ValueError, match="did not send x-mask-coverage for 11 pages"):
        _ = result.coverage


def test_stack_is_one_output_and_documents_are_by_page() -> None:
    options = Options(format="tiff")  # type: ignore[arg-type]
    stack = segmentation(options, {Output.MASK: b"stack", Output.OVERLAY: b"other"})
    pages = [segmentation(options, {Output.ROIS: b"%d" % page}) for page in range(2)]
    answers = [
        Answer("a-page7", stack),
        *(Answer(f"a-page7-page{page}", each, page) for page, each in enumerate(pages)),
    ]
    result = read(answers, output=["mask", "overlay", "rois"], page="all", format="tiff")
    assert result.outputs == {"mask": b"stack", "overlay": b"other"}
    assert [page.outputs for page in result.pages] == [{"rois": b"0"}, {"rois": b"1"}]


def test_only_page_of_all_is_a_page_too() -> None:
    answer = Answer("a", segmentation(Options(), {Output.MASK: b"mask"}), 0)
    result = read([answer], page="all")
    assert result.outputs == {"mask": b"mask"}
    assert [(page.number, page.outputs) for page in result.pages] == [(0, {"mask": b"mask"})]


def test_only_output_of_a_stack_is_not_a_page() -> None:
    answer = Answer("a", segmentation(Options(), {Output.MASK: b"stack"}, pages=5))
    result = read([answer], page="all", format="tiff")
    assert (result.outputs, result.pages, result.page_count) == ({"mask": b"stack"}, (), 5)


@pytest.mark.parametrize("files", [{"other.txt": "x"}, {"image-mask.png": ""}, {}, None])
def test_response_without_the_outputs_is_an_error(files: dict[str, str] | None) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        for name, text in (files or {}).items():
            written.writestr(name, text)
    content = b"no zip" if files is None else archive.getvalue()
    headers = httpx.Headers({"Content-Type": "application/zip", "X-Image-Pages": "1"})
    with pytest.raises(SegmentationError, match="does not have the requested outputs"):
        read_result(content, headers, {"output": ["mask", "overlay"]})


def test_mask_in_place_of_several_outputs_is_an_error() -> None:
    with pytest.raises(SegmentationError, match="2 outputs were requested"):
        read_result(b"", httpx.Headers({"Content-Type": "image/png"}), {"output": ["mask", "coco"]})
