"""Settings that look right and would never do what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tmp_path))


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
