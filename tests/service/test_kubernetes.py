"""Properties that the Helm chart relies on, of a real process: keys of a Secret, and metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, Server, encode, nuclei, serving, write_tiny

PNG = encode(nuclei(64, 64)[0])
CHANGE_S = 10.0
"""In which a changed key must be known; the file is looked at every second."""


def mount_secret(folder: Path, version: int, key: str) -> None:
    """Write a Secret's file as the kubelet does: a new folder, and one link that is replaced."""
    (folder / str(version)).mkdir()
    (folder / str(version) / "api-keys").write_text(f"{key}\n")
    (folder / "..data_tmp").symlink_to(str(version))
    (folder / "..data_tmp").replace(folder / "..data")
    if version == 1:
        (folder / "api-keys").symlink_to("..data/api-keys")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys"


@pytest.fixture
def pod(tmp_path: Path, folder: Path) -> Iterator[Server]:
    weights = tmp_path / "weights"
    weights.mkdir()
    write_tiny(weights / "tiny.safetensors")
    mount_secret(folder, 1, "old")
    with serving(
        UNET_WEIGHTS_DIR=str(weights),
        UNET_MODEL="tiny",
        UNET_API_KEYS_FILE=str(folder / "api-keys"),
    ) as server:
        yield server


def segment(server: Server, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/segment", content=PNG, headers=headers).status_code


def test_keys_of_a_replaced_secret_are_used_without_a_restart(pod: Server, folder: Path) -> None:
    assert (segment(pod, "old"), segment(pod, "new")) == (200, 401)
    mount_secret(folder, 2, "new")
    until = time.monotonic() + CHANGE_S
    while segment(pod, "new") != 200 and time.monotonic() < until:
        time.sleep(0.2)
    assert (segment(pod, "old"), segment(pod, "new")) == (401, 200)


def test_metrics_of_the_autoscalers_query_exist(pod: Server) -> None:
    template = (ROOT / "deploy/helm/unet-server/templates/_helpers.tpl").read_text()
    (query,) = re.findall(r'define "unet.loadQuery" -}}(.*?){{- end', template, re.DOTALL)
    names = set(re.findall(r"unet_\w+", query))
    assert len(names) == 4
    assert segment(pod, "old") == 200
    text = httpx.get(f"{pod.url}/metrics", headers={"X-API-Key": "old"}).text
    assert names <= set(re.findall(r"^(\w+)[ {]", text, re.MULTILINE))
