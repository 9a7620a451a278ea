"""Every error has its status, and no response reveals internals."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterator

import pytest
from fastapi import Request

from app import errors
from app.api.problems import STATUS, classify_error, problem_response

RAISED_BASES = (errors.EngineError, errors.RequestTooLarge)
"""Errors that have subclasses and are raised themselves."""


def descendants(root: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    for child in root.__subclasses__():
        yield child
        yield from descendants(child)


ALL_ERRORS = list(descendants(errors.ServiceError))


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda each: each.__name__)
def test_every_raised_error_has_a_status(error: type[errors.ServiceError]) -> None:
    is_raised = not error.__subclasses__() or error in RAISED_BASES
    assert (error in STATUS) == is_raised


def test_engine_unavailable_survives_pickling() -> None:
    error = errors.EngineUnavailable("device", "cuda", ": there is none")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error) == "UNET_DEVICE=cuda: there is none"
        assert twin.for_cli() == "--device cuda: there is none"


def test_tree_in_the_docstring_matches_the_classes() -> None:
    assert errors.__doc__ is not None
    drawn, above = {}, [""]
    for branch, name in re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)", errors.__doc__, re.MULTILINE):
        depth = len(branch) // len("├── ")
        drawn[name] = above[depth]
        above[depth + 1 :] = [name]
    assert drawn.pop("ServiceError") == ""
    assert drawn == {each.__name__: each.__base__.__name__ for each in ALL_ERRORS}


@pytest.mark.parametrize(
    ("status", "title"),
    [
        (404, "Not Found"),
        (413, "Content Too Large"),
        (415, "Unsupported Media Type"),
        (422, "Unprocessable Content"),
        (503, "Service Unavailable"),
    ],
)
def test_title_is_the_phrase_of_rfc_9110_with_every_python(status: int, title: str) -> None:
    response = problem_response(Request({"type": "http"}), status, "what was wrong")
    assert json.loads(response.body)["title"] == title


def test_details_show_client_errors_and_hide_engine_errors() -> None:
    assert classify_error(errors.CorruptImage("the third chunk")) == (422, "the third chunk")
    status, detail = classify_error(errors.DeviceLost("cudaErrorIllegalAddress at 0x7f"))
    assert status == 503
    assert "0x7f" not in detail
    status, detail = classify_error(errors.EngineError("/srv/weights/secret"))
    assert status == 500
    assert "secret" not in detail
