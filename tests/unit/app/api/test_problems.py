"""Every error has its status, and no answer tells more than it should."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator

import pytest

from app import errors
from app.api import problems as handlers
from app.errors import EngineUnavailable


def family(root: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    for child in root.__subclasses__():
        yield child
        yield from family(child)


@pytest.mark.parametrize("error", list(family(errors.ServiceError)), ids=lambda each: each.__name__)
def test_every_error_is_in_the_table_by_itself_or_has_no_instances(
    error: type[errors.ServiceError],
) -> None:
    is_branch = bool(error.__subclasses__()) and error is not errors.EngineError
    assert (error in handlers.STATUS) != is_branch


@pytest.mark.parametrize(
    "error",
    [
        errors.UnsupportedContentEncoding("br is not accepted", accepted="gzip"),
        errors.QueueFull("the queue is full", retry_after=2),
        EngineUnavailable("device", "cuda", ": there is none"),
    ],
)
def test_an_error_comes_back_from_another_process(error: Exception) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    assert errors.__doc__ is not None
    drawn, above = {}, [""]
    for branch, name in re.findall(r"^    ([│├└─ ]*)([A-Z]\w+)", errors.__doc__, re.MULTILINE):
        depth = len(branch) // len("├── ")
        drawn[name] = above[depth]
        above[depth + 1 :] = [name]
    assert drawn.pop("ServiceError") == ""
    assert drawn == {each.__name__: each.__base__.__name__ for each in family(errors.ServiceError)}


def test_the_client_reads_its_own_mistakes_and_none_of_ours() -> None:
    assert handlers.describe(errors.CorruptImage("the third chunk")) == (422, "the third chunk")
    status, detail = handlers.describe(errors.DeviceLost("cudaErrorIllegalAddress at 0x7f"))
    assert status == 503
    assert "0x7f" not in detail
    status, detail = handlers.describe(errors.EngineError("/srv/weights/secret"))
    assert status == 500
    assert "secret" not in detail
