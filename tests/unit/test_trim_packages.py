"""deploy/trim_packages.py removes what it names, and fails where a package has changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import openvino
import pytest

from tests.conftest import ROOT


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trim", ROOT / "deploy/trim_packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_and_nested_folders_are_removed(script: ModuleType, tmp_path: Path) -> None:
    for name in ("a/tests/tests/one", "a/b/tests/two", "a/kept", "lib.so.26"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1234")
    assert script.trim_packages(tmp_path, ["a/**/tests", "lib.so.*"]) == 12
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"kept"}


def test_pattern_that_matches_nothing_is_an_error(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing matches lib\.so"):
        script.trim_packages(tmp_path, ["lib.so"])


def test_patterns_match_the_installed_packages(script: ModuleType) -> None:
    packages = Path(openvino.__file__).parents[1]
    assert [pattern for pattern in script.PATTERNS if not any(packages.glob(pattern))] == []
