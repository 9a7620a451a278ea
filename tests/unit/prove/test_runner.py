"""`python -m tools.prove`: what it runs, writes and returns."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.prove import __main__ as runner
from tools.prove.report import Row, at_most


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, value: float = 1) -> int:
    """Run experiments that take no time; `value` must be at most 2."""

    def measure(seconds: float) -> list[Row]:
        return [at_most(f"figure of {seconds:g} s", value, 2)]

    def fail(seconds: float) -> list[Row]:
        raise RuntimeError("the service is not ready")

    experiments = {
        "good": runner.Experiment("A title", measure, 10, 100),
        "broken": runner.Experiment("Another", fail, 10, 100),
    }
    monkeypatch.setattr(runner, "EXPERIMENTS", experiments)
    monkeypatch.setattr(runner, "ROOT", folder)
    monkeypatch.setattr(runner, "OUTPUT", folder / "build" / "prove.md")
    monkeypatch.setattr(sys, "argv", ["prove", *arguments])
    return runner.main()


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (3.0, 1)])
def test_missed_bound_is_an_exit_status(
    value: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path, "good", value=value) == status
    written = (tmp_path / "build/prove.md").read_text()
    assert "## A title" in written
    assert "figure of 10 s" in written
    assert ("**missed**" in written) is bool(status)


def test_long_run_gives_experiments_more_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path, "--long", "good") == 0
    assert "figure of 100 s" in (tmp_path / "build/prove.md").read_text()


def test_experiment_that_ends_with_an_error_is_a_missed_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path) == 1
    written = (tmp_path / "build/prove.md").read_text()
    assert "1: RuntimeError: the service is not ready" in written
    assert "figure of 10 s" in written  # the others run


def test_unknown_experiment_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "tea")
    assert "unknown: tea; known: good, broken" in capsys.readouterr().err
