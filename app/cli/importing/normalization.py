"""Check --mean and --std of `unet import`. Knows no network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from app.cli.errors import CommandError


def check_normalization(args: argparse.Namespace) -> None:
    """Check that mean and standard deviation can be those of values in 0..1.

    Raises:
        CommandError: they cannot. The message has their values divided by the largest pixel, since
            other programs often state them for 0..255.
    """
    mean, std = args.mean or [], args.std or []
    if mean and std and len(mean) != len(std):
        raise CommandError(
            f"--mean has {count(len(mean), 'value')} and --std {count(len(std), 'value')}; give "
            "one for each channel"
        )
    if all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std):
        return
    flags = [write_flag(*each) for each in (("--mean", mean), ("--std", std)) if each[1]]
    rule = "pixels are 0..1 here, so a mean is in 0..1, a standard deviation above 0 and at most 1"
    raise CommandError(f"{' '.join(flags)}: {rule}{_suggest_normalization(mean, std)}")


def describe_defaults(args: argparse.Namespace) -> list[str]:
    """Say which of mean and standard deviation is a default, if only the other one is set."""
    if args.std and not args.mean:
        return ["mean: 0, because --mean is not set"]
    if args.mean and not args.std:
        return ["standard deviation: 1, because --std is not set"]
    return []


def write_flag(flag: str, values: Sequence[float]) -> str:
    return " ".join([flag, *(f"{value:.6g}" for value in values)])


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _suggest_normalization(mean: list[float], std: list[float]) -> str:
    """Say what mean and standard deviation are if they are those of pixels 0..255 or 0..65535."""
    largest = max([*mean, *std])
    unit = 255 if largest <= 255 else 65535
    if not (largest <= unit and all(value >= 0 for value in mean) and all(v > 0 for v in std)):
        return ""
    flags = []
    is_mean_scaled = any(value > 1 for value in mean)
    if is_mean_scaled:
        flags.append(write_flag("--mean", [value / unit for value in mean]))
        std = std or [1.0] * len(mean)
    # a std of 1 does not scale pixels 0..255, which is a division by 1/255 here
    if any(value > 1 for value in std) or (is_mean_scaled and set(std) == {1.0}):
        flags.append(write_flag("--std", [value / unit for value in std]))
    return f"; if your values are for pixels 0..{unit}, set {' '.join(flags)}"
