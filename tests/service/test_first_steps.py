"""The request that `unet serve` prints when it is ready, run as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Server, decode, serving


def printed_request(running: Server) -> str:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for line in running.lines:
            if match := re.search(r"curl .*", line):
                return match[0]
        time.sleep(0.05)
    raise AssertionError("no request was printed:\n" + "\n".join(running.lines))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_printed_request_works_as_printed(host: str, tiny: Path, tmp_path: Path) -> None:
    with serving("--host", host, ready=False, UNET_WEIGHTS_DIR=str(tiny)) as running:
        request = printed_request(running).replace("mask.png", f"{tmp_path}/mask.png")
        subprocess.run(request, shell=True, cwd=ROOT, check=True, capture_output=True)
    sample = ROOT / "app/static/samples/fluorescence.png"
    assert decode((tmp_path / "mask.png").read_bytes()).shape == decode(sample.read_bytes()).shape


def test_logs_for_machines_contain_no_request(tiny: Path) -> None:
    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_LOG_FORMAT="json") as running:
        time.sleep(0.5)  # in text format the request is printed within 50 ms
    assert running.lines
    assert not any("curl" in line for line in running.lines)
