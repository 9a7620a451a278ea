"""Settings that look right and would never do what was meant."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import Settings, add_flags, given_flags, load_settings


@pytest.fixture(autouse=True)
def _weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tmp_path))


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "https://lab.example",
        "http://localhost:8080, https://lab.example:8443",
        "http://127.0.0.1:3000",
        "http://[::1]:3000",
        "http://lab.example:443,https://lab.example:80",
        "chrome-extension://abcdefghijklmnop",
    ],
)
def test_origins_as_browsers_send_them(origins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_CORS_ORIGINS", origins)
    assert load_settings().cors_origins == tuple(each.strip() for each in origins.split(","))


@pytest.mark.parametrize(
    "origin",
    [
        "https://lab.example/",
        "https://lab.example/page",
        "lab.example",
        "//lab.example",
        "https://",
        "https://*.lab.example",
        "https://Lab.example",
        "https://lab.example:443",
        "http://lab.example:80",
        "http://lab.example:",
        "http://lab.example:0",
        "http://user@lab.example",
        "https://lab.example?x",
        "null",
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(
    origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_CORS_ORIGINS", f"https://good.example,{origin}")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"UNET_CORS_ORIGINS='https://good.example,{origin}': {origin} is no")
    assert "scheme://host[:port]" in line


def test_a_key_that_no_header_carries_is_refused_and_none_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNET_API_KEYS", "s3cret-Key,schl\u00fcssel")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    (line,) = str(refused.value).splitlines()
    assert line.startswith("UNET_API_KEYS='**********,****\u00fc****': ")
    assert "ASCII" in line
    monkeypatch.setenv("UNET_API_KEYS", "s3cret-Key,with space~")
    assert load_settings().api_keys == ("s3cret-Key", "with space~")


def test_flags_show_their_defaults_as_people_write_them() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings.model_fields)
    text = " ".join(parser.format_help().split())
    for default in ("RELOAD, off", "API_KEYS, none", "THREADS, auto", "MAX_WAIT_MS, 0"):
        assert f"(UNET_{default})" in text
    given = parser.parse_args(["--max-batch", "3", "--reload", "on"])
    assert given_flags(given, Settings.model_fields) == {"max_batch": "3", "reload": "on"}
