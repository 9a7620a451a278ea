"""The run on a borrowed GPU: limits, what a killed part keeps, missing packages, and goals."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof import (
    Part,
    check_goals,
    is_failure,
    missing_modules,
    run_limited,
    run_parts,
    unpacked,
)
from benchmarks.results import Results

SLEEPING_PART = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.results import Results
results = Results(Path(sys.argv[1]))
results.add("first", 1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
results.add("child", child.pid)
time.sleep(60)
results.add("second", 2)
"""


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_killed_part_keeps_its_figures_and_leaves_no_process(tmp_path: Path) -> None:
    figures = tmp_path / "part.json"
    command = [sys.executable, "-c", SLEEPING_PART, str(figures)]
    log = io.StringIO()
    start = time.monotonic()
    end = run_limited(command, 5, os.environ, log)
    assert time.monotonic() - start < 30
    assert end["status"] == "timeout"
    found = json.loads(figures.read_text())
    assert found["first"] == 1
    assert "second" not in found
    assert "first: 1" in log.getvalue()
    deadline = time.monotonic() + 10
    while is_running(found["child"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(found["child"])


@pytest.mark.slow
def test_parts_share_the_time_of_the_whole_run(tmp_path: Path) -> None:
    args = argparse.Namespace(device="cpu", quick=False, out=tmp_path, seconds=5.5)
    parts = [
        Part("slow", 60, (), ("-c", "import time; time.sleep(30)")),
        Part("late", 60, (), ("-c", "pass")),
    ]
    ends = run_parts(parts, args, os.environ, io.StringIO())
    assert ends["slow"]["status"] == "timeout"
    assert ends["slow"]["seconds"] < 20
    assert ends["late"] == {"status": "skipped", "why": "no time is left"}
    assert json.loads((tmp_path / "proof.json").read_text())["parts"] == ends


def test_part_without_its_modules_is_skipped_and_a_failed_one_is_reported(tmp_path: Path) -> None:
    args = argparse.Namespace(device="cpu", quick=True, out=tmp_path, seconds=60.0)
    parts = [
        Part("lacking", 30, ("json", "no_such_module"), ("-c", "pass")),
        Part("broken", 30, (), ("-c", "print('why'); raise SystemExit(3)"), ()),
        Part("good", 30, ("json",), ("-c", "import sys; print(sys.argv[1:], '{device}')")),
    ]
    ends = run_parts(parts, args, os.environ, io.StringIO())
    assert ends["lacking"] == {"status": "skipped", "why": "needs no_such_module"}
    assert (ends["broken"]["status"], ends["broken"]["last_line"]) == ("failed", "why")
    assert ends["good"]["status"] == "ok"
    assert [is_failure(part, ends[part.name]) for part in parts] == [True, True, False]
    optional = dataclasses.replace(parts[0], optional=True)
    assert not is_failure(optional, ends["lacking"])
    assert is_failure(optional, ends["broken"])
    assert ends["good"]["last_line"] == "['--quick'] cpu"


def test_missing_module_is_found_in_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_module/__init__.py", "")
    assert missing_modules(["carried_module"], os.environ) == ["carried_module"]
    with unpacked(tmp_path) as environment:
        assert missing_modules(["carried_module", "json"], environment) == []


def test_installed_package_has_priority_over_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "numpy-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("numpy/__init__.py", "raise ImportError('of another Python')")
    with unpacked(tmp_path) as environment:
        subprocess.run([sys.executable, "-c", "import numpy"], env=environment, check=True)


def test_failed_measurement_is_recorded_and_does_not_end_the_part(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no kernel image\nmore")

    results = Results(tmp_path / "part.json")
    assert results.exit_status == 0
    assert results.attempt("conv", fail) is None
    assert results.attempt("sum", lambda: 3) == 3
    results.append("rows", {"a": 1})
    results.append("rows", {"a": 2})
    found = json.loads((tmp_path / "part.json").read_text())
    assert found == {
        "errors": [{"conv": "RuntimeError: no kernel image"}],
        "rows": [{"a": 1}, {"a": 2}],
    }
    assert results.exit_status == 1


def good_figures() -> dict[str, Any]:
    """Figures of an H100 that reaches every goal."""
    row = {"precision": "bf16", "batch": 8}
    return {
        "engine": {
            "products_bf16": 700e12,
            "warmed": [{"without_a_graph": []}],
            "mask_iou_with_fp32": [{"precision": "bf16", "mean": 0.995}],
            "rows": [
                row | {"side": 544, "images_per_second": 980.0, "of_products": 0.61},
                row | {"side": 572, "images_per_second": 1030.0, "of_products": 0.5},
                row | {"precision": "fp32", "side": 544, "of_products": 0.9},
            ],
        },
        "service": {"engine_two_in_flight": {"of_bare_network": 0.97}},
        "http": {"runs": [{"of_engine": 0.7}, {"of_engine": 0.92}]},
    }


ENDS = {"tests": {"status": "ok", "last_line": "9 passed in 20.1s"}}


def missed_goals(figures: dict[str, Any], ends: dict[str, Any] = ENDS) -> list[str]:
    return [name for name, reached, _ in check_goals(figures, ends) if not reached]


def test_goals_are_reached_by_good_figures_and_missed_without_any() -> None:
    assert missed_goals(good_figures()) == []
    assert len(missed_goals({}, {})) == len(list(check_goals({}, {}))) == 7


@pytest.mark.parametrize(
    ("part", "name", "value", "missed"),
    [
        ("engine", "warmed", [{"without_a_graph": [8]}], "graph"),
        ("training", "mask_iou_with_fp32", [{"mean": 0.98}], "IoU"),
        ("engine", "rows", [], "0.60"),
        ("service", "engine_two_in_flight", {"of_bare_network": 0.8}, "flight"),
        ("http", "runs", [{"of_engine": 0.89}], "HTTP"),
    ],
)
def test_missed_goal_is_named(part: str, name: str, value: Any, missed: str) -> None:
    figures = good_figures()
    figures.setdefault(part, {})[name] = value
    assert any(missed in goal for goal in missed_goals(figures))


@pytest.mark.parametrize("last_line", ["8 skipped in 1s", "7 passed, 1 skipped in 9s", ""])
def test_skipped_tests_miss_their_goal(last_line: str) -> None:
    ends = {"tests": {"status": "ok", "last_line": last_line}}
    assert missed_goals(good_figures(), ends) == ["all tests pass, and none is skipped"]
