"""Flags in place of the parameters that messages of the pipeline name."""

from __future__ import annotations

import argparse

import pytest

from app.cli.segment.command import add_arguments
from app.cli.segment.wording import describe_error, name_flags
from app.errors import WrongSelection
from unet_client import SegmentQuery


@pytest.mark.parametrize("parameter", sorted(SegmentQuery.__annotations__.keys() - {"model"}))
def test_each_parameter_of_a_request_becomes_a_flag_that_exists(parameter: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flag, value = name_flags(f"{parameter}=1").split()
    assert value == "1"
    assert flag in parser.format_help()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("page=7: the image has 1 page, page=0", "--page 7: the image has 1 page, --page 0"),
        ("channel=-1: no such", "--channel -1: no such"),
        ("choose page=0 to page=2, or page=all", "choose --page 0 to --page 2, or --page all"),
        ("percentiles=1,99.8 is not used", "--percentiles 1,99.8 is not used"),
        ("a/page=1/b.tif cannot be read", "a/page=1/b.tif cannot be read"),
        ("homepage=1", "homepage=1"),
    ],
)
def test_flags_take_the_place_of_parameters_alone(message: str, expected: str) -> None:
    assert name_flags(message) == expected
    assert describe_error(WrongSelection(message)) == expected
