"""`unet segment --ray` on a cluster: the same files as without it, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
import tifffile

from tests.conftest import ROOT, encode, nuclei, write_tiny
from tests.scale.conftest import BIN, OBJECT_STORE, Cluster, environment, wait_until

pytestmark = pytest.mark.timeout(900)  # a busy machine takes minutes to start an actor

IMAGES = 400
SEVERAL = ("--output", "mask", "--output", "measurements", "--page", "all", "--threshold", "0.01")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, some of which are in subfolders, and small weights."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "weights").mkdir()
    write_tiny(folder / "weights/nuclei.safetensors")
    contents = [encode(nuclei(150, 200, seed)[0]) for seed in range(20)]
    for index in range(IMAGES):
        file = folder / f"many/{index % 7}/{index:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[index % 20])
    (folder / "few/deep").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deep/Zelle ä.001.png"):
        (folder / "few" / name).write_bytes(contents[len(name) % 20])
    stack = np.stack([nuclei(60, 70, seed)[0] for seed in range(3)])
    axes = {"axes": "ZYX"}
    tifffile.imwrite(folder / "few/z.ome.tif", stack, photometric="minisblack", metadata=axes)
    return folder


@pytest.fixture(scope="module")
def masks(folder: Path) -> dict[str, bytes]:
    """The results of `many` without a cluster."""
    assert segment(folder, "many", "-o", "many-here").returncode == 0
    return read_files(folder / "many-here")


@pytest.fixture(autouse=True)
def _idle(cluster: Cluster) -> Iterator[None]:
    """No test begins before the actors of the last one have ended."""
    yield
    wait_until(lambda: not cluster.actors("SegmentActor"), 240, "the end of the actors")


def start(folder: Path, *arguments: str, errors: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start `unet segment` in the folder.

    Args:
        errors: for standard error.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "segment", *arguments],
        cwd=folder,
        env={
            **environment(),
            "PYTHONPATH": str(ROOT),
            "UNET_WEIGHTS_DIR": str(folder / "weights"),
            "UNET_THREADS": "1",
        },
        stderr=errors,
        text=True,
    )


def segment(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, *arguments)
    _, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, "", errors)


def read_files(folder: Path) -> dict[str, bytes]:
    """The results in a folder. A process that was killed may leave hidden parts of files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for_results(folder: Path, number: int) -> None:
    wait_until(lambda: len(read_files(folder)) >= number, 300, f"{number} results", every=0.02)


@pytest.mark.parametrize("address", ["", "file://{folder}/"])
def test_results_are_those_without_a_cluster(cluster: Cluster, folder: Path, address: str) -> None:
    prefix = address.format(folder=folder)
    here, there = f"few-here{len(address)}", f"few-there{len(address)}"
    assert segment(folder, "few", "-o", here, *SEVERAL).returncode == 0
    arguments = (f"{prefix}few", "-o", f"{prefix}{there}", *SEVERAL, "--ray", cluster.address)
    done = segment(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert read_files(folder / there) == read_files(folder / here)
    assert done.stderr.splitlines()[-1] == f"4 written to {prefix}{there}/"
    again = segment(folder, *arguments, "--skip-existing")
    assert again.stderr.splitlines()[-1] == f"0 written to {prefix}{there}/, 4 skipped"
    assert read_files(folder / there) == read_files(folder / here)


def test_progress_is_shown_as_a_bar_on_a_terminal(cluster: Cluster, folder: Path) -> None:
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    arguments = ("few", "-o", "bar", *SEVERAL, "--ray", cluster.address)
    process = start(folder, *arguments, errors=terminal)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the end of what a terminal shows
        while part := os.read(shown, 4096):
            output += part
    os.close(shown)
    assert process.wait(60) == 0, output
    bars = re.findall(r"(\d+)/4 \[[\d:]+<([\d:?]+), +([\d.?]+)(?:image/s|s/image)", output.decode())
    assert bars, output
    done, left, rate = bars[-1]
    assert (done, left) == ("4", "00:00")
    assert float(rate) > 0


@contextlib.contextmanager
def object_store() -> Iterator[Any]:
    """Run a server of the S3 protocol, and return a client of it."""
    address = httpx.URL(OBJECT_STORE)
    process = subprocess.Popen(
        [BIN / "moto_server", "--host", address.host, "--port", str(address.port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: httpx.get(OBJECT_STORE).status_code == 200, 120, "the object store")
        yield boto3.client(
            "s3",
            endpoint_url=OBJECT_STORE,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
    finally:
        process.terminate()
        process.wait(20)


def read_objects(client: Any, prefix: str) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix)["Contents"]
    return {
        each["Key"].removeprefix(prefix): client.get_object(Bucket="bucket", Key=each["Key"])[
            "Body"
        ].read()
        for each in found
    }


def test_results_in_an_object_store_are_those_in_a_folder(cluster: Cluster, folder: Path) -> None:
    assert segment(folder, "few", "-o", "few-plain", *SEVERAL).returncode == 0
    with object_store() as client:
        client.create_bucket(Bucket="bucket")
        for name, content in read_files(folder / "few").items():
            client.put_object(Bucket="bucket", Key=f"in/{name}", Body=content)
        client.put_object(Bucket="bucket", Key="in/bad.png", Body=b"not an image")
        arguments = ("s3://bucket/in", "-o", "s3://bucket/out", *SEVERAL, "--ray", cluster.address)
        done = segment(folder, *arguments)
        assert done.returncode == 1, done.stderr
        assert done.stderr.splitlines()[-1] == "4 written to s3://bucket/out/, 1 failed"
        results = read_objects(client, "out/")
        assert json.loads(results.pop("failures.jsonl"))["image"] == "bad.png"
        assert results == read_files(folder / "few-plain")
        client.delete_object(Bucket="bucket", Key="in/bad.png")
        again = segment(folder, *arguments, "--skip-existing")
        assert again.stderr.splitlines()[-1] == "0 written to s3://bucket/out/, 4 skipped"
        assert read_objects(client, "out/") == results


def test_an_actor_that_is_killed_loses_no_image(
    cluster: Cluster, folder: Path, masks: dict[str, bytes]
) -> None:
    process = start(folder, "many", "-o", "killed-actor", "--ray", cluster.address)
    wait_until(lambda: len(cluster.actors("SegmentActor")) == 2, 240, "two actors")
    victim, _ = cluster.actors("SegmentActor")
    wait_for_results(folder / "killed-actor", 30)
    os.kill(victim["pid"], signal.SIGKILL)
    before = len(read_files(folder / "killed-actor"))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert before < IMAGES  # it was killed in the middle
    assert errors.splitlines()[-1] == f"{IMAGES} written to killed-actor/"
    assert read_files(folder / "killed-actor") == masks


def test_a_run_whose_driver_is_killed_is_resumed(
    cluster: Cluster, folder: Path, masks: dict[str, bytes]
) -> None:
    arguments = ("many", "-o", "killed-driver", "--ray", cluster.address, "--skip-existing")
    process = start(folder, *arguments)
    wait_for_results(folder / "killed-driver", 30)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not cluster.actors("SegmentActor"), 240, "the end of the actors")
    out = folder / "killed-driver"
    done = {name: (out / name).stat().st_mtime_ns for name in read_files(out)}
    assert 30 <= len(done) < IMAGES
    resumed = segment(folder, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    rest = IMAGES - len(done)
    summary = f"{rest} written to killed-driver/, {len(done)} skipped"
    assert resumed.stderr.splitlines()[-1] == summary
    assert read_files(out) == masks
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


def test_images_that_fail_are_listed(cluster: Cluster, folder: Path) -> None:
    source = folder / "damaged"
    source.mkdir()
    (source / "good.png").write_bytes(encode(nuclei(60, 70, 1)[0]))
    (source / "bad.png").write_bytes(b"not an image")
    arguments = ("damaged", "-o", "found", "--ray", cluster.address, "--skip-existing")
    failed = segment(folder, *arguments)
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.splitlines()[-2:] == [
        "unet: all failures are in found/failures.jsonl",
        "1 written to found/, 1 failed",
    ]
    assert "unet: damaged/bad.png: not a recognised image" in failed.stderr
    (line,) = (folder / "found/failures.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == "bad.png"
    assert json.loads(line)["reason"].startswith("not a recognised image")
    (source / "bad.png").write_bytes(encode(nuclei(60, 70, 2)[0]))
    fixed = segment(folder, *arguments)
    assert fixed.stderr.splitlines()[-1] == "1 written to found/, 1 skipped"
    assert read_files(folder / "found").keys() == {"good.png", "bad.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "UNET_MODEL='nothing'"),
        (("--percentiles", "1,99"), "--percentiles 1,99 is only available for models that spread"),
        (("--precision", "fp16"), "UNET_PRECISION=fp16"),
    ],
)
def test_mistakes_are_reported_without_a_traceback(
    cluster: Cluster, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = segment(folder, "few", "-o", "nothing", "--ray", cluster.address, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
