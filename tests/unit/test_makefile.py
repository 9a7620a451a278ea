"""The commands of each target of the Makefile, read from `make --dry-run`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SERVING, CUDA, EVERYTHING = "-r requirements/serve.txt", "install -e .", "install -e '.[dev]'"
READY_TO_SERVE, READY = "ready-to-serve-torch-no", "ready"
FOREIGN_TESTS = re.compile(r"tests/unit/app/cli/\S+\.py")


def dry_run(folder: Path, *arguments: str, **environment: str) -> str:
    """The commands that make would run, one per line."""
    run = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def installs(commands: str) -> list[str]:
    """The sets of packages that these commands install."""
    lines = [line.rstrip() for line in commands.splitlines() if "pip install" in line]
    return [what for what in (SERVING, CUDA, EVERYTHING) for line in lines if line.endswith(what)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files the Makefile depends on, all of the same age, without an environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    for name in (
        "pyproject.toml",
        "requirements/serve.txt",
        "requirements/torch.txt",
        "requirements/foreign.txt",
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    return tmp_path


def create_environment(clone: Path, stamp: str, modified: int = 2000) -> None:
    """An environment for which `stamp` records what was installed into it."""
    (clone / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (clone / ".venv/bin/pip").touch()
    (clone / ".venv" / stamp).touch()
    os.utime(clone / ".venv" / stamp, (modified, modified))


@pytest.mark.parametrize(
    ("arguments", "environment", "host", "port"),
    [
        ([], {}, "127.0.0.1", "8000"),
        ([], {"UNET_HOST": "0.0.0.0", "UNET_PORT": "9001"}, "0.0.0.0", "9001"),
        ([], {"HOST": "x86_64-conda-linux-gnu"}, "127.0.0.1", "8000"),
        ([], {"PORT": "9002"}, "127.0.0.1", "9002"),
        ([], {"PORT": "9002", "UNET_PORT": "9001"}, "127.0.0.1", "9001"),
        (["HOST=::1", "PORT=9003"], {"UNET_HOST": "0.0.0.0", "UNET_PORT": "9001"}, "::1", "9003"),
    ],
)
def test_serve_listens_on_the_chosen_address(
    arguments: list[str], environment: dict[str, str], host: str, port: str
) -> None:
    commands = dry_run(ROOT, "serve", *arguments, **environment)
    assert f"unet serve --host {host} --port {port}\n" in commands


@pytest.mark.parametrize(
    ("target", "torch", "expected"),
    [
        ("serve", "no", SERVING),
        ("serve", "yes", CUDA),
        ("bench", "no", SERVING),
        ("test", "no", EVERYTHING),
        ("test-unit", "no", EVERYTHING),
        ("lint", "no", EVERYTHING),
        ("prove", "no", EVERYTHING),
        ("scale-test", "no", EVERYTHING),
        ("setup", "no", EVERYTHING),
    ],
)
def test_target_installs_only_what_it_needs(
    clone: Path, target: str, torch: str, expected: str
) -> None:
    commands = dry_run(clone, target, f"TORCH={torch}")
    assert "-m venv .venv" in commands
    assert installs(commands) == [expected]


def test_package_is_installed_without_its_dependencies_where_torch_is_left_out(
    clone: Path,
) -> None:
    assert "pip install --no-deps -e ." in dry_run(clone, "serve", "TORCH=no")


def test_serve_installs_torch_where_the_driver_lists_a_device(clone: Path) -> None:
    driver = clone / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    driver.chmod(0o755)
    path = f"{clone}:{os.environ['PATH']}"
    assert installs(dry_run(clone, "serve", PATH=path)) == [CUDA]
    assert installs(dry_run(clone, "serve", "TORCH=no", PATH=path)) == [SERVING]
    assert installs(dry_run(clone, "serve", PATH=path, TORCH="no")) == [SERVING]


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a device")
@pytest.mark.parametrize("output", ["exit 9", "echo No devices were found"])
def test_serve_leaves_torch_out_where_the_driver_lists_no_device(clone: Path, output: str) -> None:
    driver = clone / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\n{output}\n")
    driver.chmod(0o755)
    commands = dry_run(clone, "serve", PATH=f"{clone}:{os.environ['PATH']}")
    assert installs(commands) == [SERVING]


@pytest.mark.parametrize("value", ["maybe", "", "yes no"])
def test_unknown_value_of_torch_is_rejected(clone: Path, value: str) -> None:
    run = subprocess.run(
        ["make", "--dry-run", "serve", f"TORCH={value}"], cwd=clone, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert f"TORCH={value}: use yes or no" in run.stderr


@pytest.mark.parametrize(
    ("stamp", "target"), [(READY_TO_SERVE, "serve"), (READY, "serve"), (READY, "test")]
)
def test_current_environment_is_used_as_it_is(clone: Path, stamp: str, target: str) -> None:
    create_environment(clone, stamp)
    commands = dry_run(clone, target, "TORCH=no")
    assert installs(commands) == []
    assert "venv .venv" not in commands


@pytest.mark.parametrize("target", ["test", "test-unit", "lint", "serve TORCH=yes"])
def test_environment_for_serving_is_completed_not_rebuilt(clone: Path, target: str) -> None:
    create_environment(clone, READY_TO_SERVE)
    commands = dry_run(clone, *target.split())
    assert len(installs(commands)) == 1
    assert "venv .venv" not in commands
    assert "rm " not in commands


@pytest.mark.parametrize(
    ("stamp", "changed", "expected"),
    [
        (READY_TO_SERVE, "requirements/serve.txt", [SERVING]),
        (READY_TO_SERVE, "pyproject.toml", [SERVING]),
        (READY_TO_SERVE, "requirements/torch.txt", []),
        (READY, "requirements/torch.txt", [EVERYTHING]),
        (READY, "requirements/serve.txt", [EVERYTHING]),
    ],
)
def test_changed_requirements_are_installed_again(
    clone: Path, stamp: str, changed: str, expected: list[str]
) -> None:
    create_environment(clone, stamp)
    os.utime(clone / changed, (3000, 3000))
    commands = dry_run(clone, "serve", "TORCH=no")
    assert installs(commands) == expected
    assert "venv .venv" not in commands


def test_tests_with_servers_of_others_run_in_a_target_of_their_own() -> None:
    assert "pytest tests/scale" in dry_run(ROOT, "scale-test")
    everything = dry_run(ROOT, "test")
    assert "--ignore tests/scale" in everything
    assert "pytest tests/scale" not in everything


def test_tests_of_other_projects_run_in_an_environment_of_their_own(clone: Path) -> None:
    commands = dry_run(clone, "test")
    assert "pip install -e '.[export,quantize]' -r requirements/foreign.txt" in commands
    tests = "tests/unit/app/cli/export/test_bioimage.py tests/unit/app/cli/importing/test_libraries"
    assert f"build/foreign/venv/bin/python -m pytest {tests}" in commands
    assert all((ROOT / path).exists() for path in FOREIGN_TESTS.findall(commands))
    assert "build/foreign" not in dry_run(clone, "test-unit")


@pytest.mark.parametrize(("arguments", "flags"), [([], ""), (["LONG=1"], " --long")])
def test_prove_runs_every_experiment(arguments: list[str], flags: str) -> None:
    assert f"python -m tools.prove{flags}\n" in dry_run(ROOT, "prove", *arguments).replace(
        " \n", "\n"
    )


def test_proof_on_a_gpu_installs_nothing(clone: Path) -> None:
    commands = dry_run(clone, "gpu-proof")
    assert commands.split()[:3] == ["python3", "-m", "benchmarks.gpu_proof"]
    assert "--device cuda:0 --out build/gpu-proof" in commands
    assert "venv" not in commands
    assert "install" not in commands


def test_proof_uses_the_environment_unless_another_python_is_given(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").touch()
    assert dry_run(clone, "gpu-proof").startswith(".venv/bin/python ")
    assert dry_run(clone, "gpu-proof", PYTHON="python3.12").startswith("python3.12 ")
    quick = dry_run(clone, "gpu-proof", "DEVICE=cpu", "QUICK=1", "PYTHON=/opt/python", OUT="/out")
    assert quick.split() == [
        "/opt/python", "-m", "benchmarks.gpu_proof", "--device", "cpu", "--out", "/out", "--quick",
    ]  # fmt: skip


def test_kube_test_has_an_environment_of_its_own_and_builds_no_server_that_is_given() -> None:
    commands = dry_run(ROOT, "kube-test", "KUBE_APISERVER=/bin/true")
    assert "build/kube/venv/bin/python -m tools.kube test --api-server /bin/true" in commands
    assert ".venv" not in commands
    assert "build_api_server" not in commands
    missing = dry_run(ROOT, "kube-test", "KUBE_APISERVER=build/kube/kube-apiserver")
    built = (ROOT / "build/kube/kube-apiserver").exists()
    assert ("tools/kube/build_api_server.sh build/kube" in missing) == (not built)


def test_help_lists_every_target(clone: Path) -> None:
    listed = subprocess.run(
        ["make", "help"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    expected = "serve test test-unit lint format setup bench prove gpu-proof kube-test"
    assert set(expected.split()) <= targets
