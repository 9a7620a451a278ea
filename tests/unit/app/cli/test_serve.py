"""Lines that `unet serve` prints for a person at a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from app.cli.serve import SAMPLE, example_request, log_first_steps
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("10.0.0.5", "http://10.0.0.5:80"),
    ],
)
def test_first_steps_use_an_address_that_clients_can_reach(
    host: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log_first_steps(host, 80, keys=False)
    page, request = caplog.messages
    assert page == f"open {url} in a browser, or run:"
    assert f"{url}/segment" in shlex.split(request)


def test_example_request_names_the_sample_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    request = example_request("http://127.0.0.1:80", keys=False)
    assert request == (
        "curl -F file=@app/static/samples/fluorescence.png http://127.0.0.1:80/segment -o mask.png"
    )
    monkeypatch.chdir(tmp_path)
    assert f"file=@{SAMPLE}" in shlex.split(example_request("http://127.0.0.1:80", keys=False))
    assert SAMPLE.exists()


def test_example_request_bypasses_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    words = shlex.split(example_request("http://127.0.0.1:80", keys=False))
    assert words[1:3] == ["--noproxy", "*"]


def test_example_request_shows_where_a_key_goes() -> None:
    words = shlex.split(example_request("http://127.0.0.1:80", keys=True))
    assert words[1:3] == ["-H", "Authorization: Bearer YOUR_KEY"]
