"""The locked versions that the images install fit the ranges, and each has hashes."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

FOLDER = ROOT / "requirements"
PIN = re.compile(r"^([\w.-]+)==([\w.+!]+)((?:.*\\\n)(?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", re.M)
NAMES = ("serve", "torch", "build")


def read_ranges(name: str) -> list[Requirement]:
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", NAMES)
def test_lock_has_a_version_in_every_range(name: str) -> None:
    pins = PIN.findall((FOLDER / f"{name}.lock").read_text())
    for wanted in read_ranges(name):
        versions = [version for package, version, _ in pins if package == wanted.name.lower()]
        assert versions, f"{wanted} is not in {name}.lock; run make lock"
        assert all(map(wanted.specifier.contains, versions)), f"{wanted}: run make lock"


@pytest.mark.parametrize("name", NAMES)
def test_every_locked_version_has_hashes(name: str) -> None:
    text = (FOLDER / f"{name}.lock").read_text()
    pinned = [line for line in text.splitlines() if "==" in line.split(";")[0]]
    assert len(PIN.findall(text)) == len(pinned) > 0


def test_images_install_only_locked_versions() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    installs = re.findall(r"pip install ((?:[^\n\\&]|\\\n)+)", dockerfile)
    assert len(installs) == 4
    for arguments in installs:
        assert "--require-hashes" in arguments or "--no-deps --no-build-isolation" in arguments
