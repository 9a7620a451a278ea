"""What `make serve` hands on of its command line and its environment."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.conftest import ROOT


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
def test_where_it_listens(
    arguments: list[str], environment: dict[str, str], host: str, port: str
) -> None:
    said = subprocess.run(
        ["make", "--dry-run", "serve", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"unet serve --host {host} --port {port}\n" in said
