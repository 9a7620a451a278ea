"""Mean and standard deviation of values outside 0..1 are rejected, with a correction."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

import numpy as np
import pytest

from app.cli.errors import CommandError
from app.cli.importing.command import add_arguments
from app.cli.importing.normalization import check_normalization, describe_defaults


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["theirs.pth", *flags])


def read_error(*flags: str) -> str:
    with pytest.raises(CommandError) as error:
        check_normalization(parse(*flags))
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "unit", "mean", "std"),
    [
        ("--mean 124 116 104 --std 58 57 57", 255, (124, 116, 104), (58, 57, 57)),
        ("--mean 128 --std 60", 255, [128], [60]),
        ("--mean 104 117 123", 255, (104, 117, 123), (1, 1, 1)),  # subtracted, as Caffe does
        ("--mean 104 117 123 --std 1 1 1", 255, (104, 117, 123), (1, 1, 1)),
        ("--std 58", 255, None, [58]),
        ("--mean 1200 --std 300", 65535, [1200], [300]),
    ],
)
def test_statistics_of_integers_are_rejected_with_those_of_values_in_0_to_1(
    flags: str, unit: int, mean: Sequence[float] | None, std: Sequence[float]
) -> None:
    message = read_error(*flags.split())
    assert message.startswith(f"{flags}: ")
    start, _, correction = message.rpartition("set ")
    assert f"if your values are for pixels 0..{unit}" in start
    corrected = parse(*shlex.split(correction))
    check_normalization(corrected)
    assert (corrected.mean is None) == (mean is None)
    for found, expected in ((corrected.mean, mean), (corrected.std, std)):
        if expected is not None:
            assert np.allclose(np.multiply(found, unit), expected, rtol=1e-5)


def test_only_what_is_too_large_is_divided() -> None:
    assert read_error("--mean", "0.5", "--std", "60").endswith("set --std 0.235294")
    assert read_error("--mean", "128", "--std", "0.2").endswith("set --mean 0.501961")


@pytest.mark.parametrize(
    "flags",
    ["--mean nan", "--mean inf", "--mean -0.1", "--std 0", "--std -0.1", "--std nan",
     "--mean -2.118 -2.036 -1.804 --std 4.367 4.464 4.444", "--mean 70000"],
)  # fmt: skip
def test_values_without_a_likely_meaning_are_rejected(flags: str) -> None:
    message = read_error(*flags.split())
    assert message.endswith("a mean is in 0..1, a standard deviation above 0 and at most 1")


@pytest.mark.parametrize(
    "flags",
    ["", "--mean 0", "--std 1", "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225",
     "--mean 0 0 0 --std 0.00392157 0.00392157 0.00392157", "--mean 1 --std 1"],
)  # fmt: skip
def test_statistics_of_values_in_0_to_1_are_accepted(flags: str) -> None:
    check_normalization(parse(*flags.split()))


def test_default_of_a_missing_partner_is_said() -> None:
    assert describe_defaults(parse("--std", "0.5")) == ["mean: 0, because --mean is not set"]
    (line,) = describe_defaults(parse("--mean", "0.5"))
    assert line == "standard deviation: 1, because --std is not set"
    assert describe_defaults(parse()) == []
    assert describe_defaults(parse("--mean", "0.5", "--std", "0.5")) == []
