"""Parameters of requests: what is read, which errors name them, and how OpenAPI describes them."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from starlette.requests import Request

from app.api.parameters import describe_parameters, read_deadline, read_query
from app.api.routers.remove import RemoveQuery
from app.api.schemas import SegmentQuery
from app.errors import InvalidRequest
from app.inference.outputs import FileFormat, Output
from app.settings import Settings

SETTINGS = Settings(request_timeout_s=30, max_request_timeout_s=300)


def request(query: str = "", **headers: str) -> Request:
    fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "query_string": query.encode(), "headers": fields}
    return Request(scope)


def remaining(value: str) -> float:
    return read_deadline(request(**{"X-Request-Timeout": value}), SETTINGS).remaining()


def test_timeout_header_sets_the_deadline_up_to_the_limit() -> None:
    assert 29 < read_deadline(request(), SETTINGS).remaining() <= 30
    assert 1 < remaining("2.5") <= 2.5
    assert 199 < remaining("200") <= 200
    assert 299 < remaining("1e9") <= 300


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400", "soon", ""])
def test_timeout_header_must_be_positive_and_finite(value: str) -> None:
    with pytest.raises(InvalidRequest, match=r"header\.X-Request-Timeout: Input should be"):
        remaining(value)


def test_no_query_is_all_defaults() -> None:
    assert read_query(request(), SegmentQuery) == SegmentQuery()


def test_query_is_read_with_several_outputs() -> None:
    query = "output=mask&output=coco&threshold=0.25&page=all&percentiles=1,99&background=%23ff8000"
    read = read_query(request(query + "&exclude_edges=true&model="), SegmentQuery)
    assert read.output == (Output.MASK, Output.COCO)
    assert (read.threshold, read.page, read.percentiles) == (0.25, "all", (1, 99))
    assert (read.background, read.exclude_edges, read.model) == ((255, 128, 0), True, "")


def test_equal_queries_are_parsed_once_unless_they_are_long() -> None:
    assert read_query(request("threshold=0.25"), SegmentQuery) is read_query(
        request("threshold=0.25"), SegmentQuery
    )
    long = f"model={'m' * 300}"
    first, second = (read_query(request(long), SegmentQuery) for _ in range(2))
    assert first == second
    assert first is not second


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("treshold=1", "unknown parameter 'treshold'; available: model, threshold, output, page"),
        ("threshold=1&threshold=1", "threshold is given 2 times; send it once"),
        ("threshold=2", "query.threshold: Input should be less than or equal to 1, not '2'"),
        ("threshold=", "query.threshold: Input should be a valid number, unable to parse string"),
        ("output=hologram", "query.output.0: Input should be 'mask', 'probability'"),
        (f"{quote('é')}=1", "unknown parameter 'é'"),
    ],
)
def test_query_errors_name_the_parameter(query: str, detail: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_query(request(query), SegmentQuery)
    assert detail in str(raised.value)


@pytest.mark.parametrize("model", [SegmentQuery, RemoveQuery])
def test_every_parameter_is_described(model: type[SegmentQuery] | type[RemoveQuery]) -> None:
    described = {each["name"]: each for each in describe_parameters(model)}
    timeout = described.pop("X-Request-Timeout")
    assert timeout["in"] == "header"
    assert described.keys() == model.model_fields.keys()
    for each in (timeout, *described.values()):
        assert each["description"]
        assert not each["required"]
        assert "$ref" not in str(each["schema"])  # the document has no definitions to refer to


def test_values_to_choose_from_are_listed() -> None:
    schemas = {each["name"]: each["schema"] for each in describe_parameters(SegmentQuery)}
    assert schemas["format"]["enum"] == list(FileFormat)
    assert schemas["format"]["default"] == "png"
    assert schemas["output"]["items"]["enum"] == list(Output)
