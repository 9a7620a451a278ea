"""`unet` itself: exit statuses, which errors are one line, and what is imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from app import cli
from model.errors import UserError
from tests.conftest import ROOT


def use_command(monkeypatch: pytest.MonkeyPatch, run: Callable[[argparse.Namespace], int]) -> None:
    """Let `unet models` run a function."""
    module = ModuleType("app.cli.models")
    module.main = run  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app.cli.models", module)


def raising(error: BaseException) -> Callable[[argparse.Namespace], NoReturn]:
    def run(args: argparse.Namespace) -> NoReturn:
        raise error

    return run


def test_user_error_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(monkeypatch, raising(UserError("no such model")))
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err == "unet: error: no such model\n"


@pytest.mark.parametrize("arguments", [["--debug", "models"], ["models", "--debug"]])
def test_debug_shows_the_traceback_of_a_user_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(monkeypatch, raising(UserError("no such model")))
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("\nunet: error: no such model\n")


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError("a bug"), ModuleNotFoundError("a bug", name="nmupy")]
)
def test_bug_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, raising(error))
    with pytest.raises(type(error), match="a bug"):
        cli.main(["models"])


def test_bug_is_a_traceback_and_status_1() -> None:
    code = (
        "import sys; import app.cli.models as models; from app.cli import main\n"
        "models.main = lambda args: [][0]\n"
        "sys.exit(main(['models']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "IndexError" in done.stderr


def test_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    use_command(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["models"]) == 130


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_missing_package_is_one_line_that_says_how_to_install_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_command(monkeypatch, raising(ModuleNotFoundError(name=package)))
    with pytest.raises(SystemExit) as end:
        cli.main(["models"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"unet models: error: models needs {package}, which is not installed")
    assert "pip install torch torchvision" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--prot", "1"], "unrecognized arguments: --prot 1 (see unet serve --help)"),
        (["segment", "a.png", "--wide", "--tall"], "arguments: --wide --tall (see unet segment"),
        (["segmnt"], "invalid choice: 'segmnt'"),
        ([], "the following arguments are required: COMMAND"),
        (["--verbose", "models"], "unrecognized arguments: --verbose"),
    ],
)
def test_wrong_argument_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert line.endswith(" --help)")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("unet-server 0.")


def test_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    """As in `unet models | head -1`."""
    code = (
        "import sys; import app.cli.models as models; from app.cli import main\n"
        "models.main = lambda args: [print('x' * 100) for _ in range(10**5)] and 0\n"
        "sys.exit(main(['models']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("command", ["models", "train", "segment", "serve"])
def test_only_the_chosen_command_is_imported(command: str) -> None:
    code = f"""
import contextlib, sys
from app.cli import COMMANDS, main
with contextlib.suppress(SystemExit):
    main([{command!r}, "--help"])
imported = {{name for name, (module, _) in COMMANDS.items() if module in sys.modules}}
sys.exit("torch" in sys.modules or imported != {{{command!r}}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0
