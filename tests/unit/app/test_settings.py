"""Settings: which values are allowed, and how the others are reported."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.settings import SECTIONS, Settings, load_settings, warn_about_unknown_variables


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
def test_origin_as_browsers_send_it_is_accepted(
    origins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_origin_that_no_browser_sends_is_rejected(
    origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_CORS_ORIGINS", f"https://good.example,{origin}")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"UNET_CORS_ORIGINS='https://good.example,{origin}': {origin} is not")
    assert "scheme://host[:port]" in line


def test_invalid_key_is_rejected_without_showing_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UNET_API_KEYS", "s3cret-Key,schl\u00fcssel")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    (line,) = str(caught.value).splitlines()
    assert line.startswith("UNET_API_KEYS='**********,****\u00fc****': ")
    assert "visible ASCII characters without spaces" in line


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("with space", "**** *****"),
        ("\u043a\u043b\u044e\u0447", "\u043a\u043b\u044e\u0447"),
        ("tab\there", "***\\t****"),
    ],
)
def test_key_that_no_header_can_carry_is_rejected_and_hidden(
    keys: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_API_KEYS", keys)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"UNET_API_KEYS='{shown}': each key must be visible ")


def test_visible_keys_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_API_KEYS", "s3cret-Key, a+b/c==,p@ss!=x")
    assert load_settings().api_keys == ("s3cret-Key", "a+b/c==", "p@ss!=x")


@pytest.mark.parametrize("value", [",", ", ,", " "])
def test_blank_keys_do_not_switch_authentication_off(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_API_KEYS", value)
    with pytest.raises(SettingsError, match="must be values separated by commas"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PORT", "http", "must be a valid integer"),
        ("PORT", "70000", "must be less than or equal to 65535"),
        ("RELOAD", "perhaps", "must be a boolean (true or false)"),
        ("ENGINE", "onnx", "must be 'auto', 'torch' or 'openvino'"),
        ("DEVICE", "tpu", "must be auto, cpu, cuda, cuda:N or cuda:N,cuda:M"),
        ("DRAIN_S", "nan", "must be a finite number"),
        ("MAX_BATCH", "0", "must be greater than or equal to 1"),
        ("WEIGHTS_DIR", "/no/such", "folder /no/such not found"),
        ("WEIGHTS_DIR", "x" * 300, "cannot be read: File name too long"),
    ],
)
def test_invalid_value_is_one_line(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"UNET_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"UNET_{name}={value!r}: {says}")


def test_checkpoint_in_place_of_the_weights_folder_is_named(tmp_path: Path) -> None:
    for name, model in (("lit.safetensors", ", and UNET_MODEL or --model to lit"), ("a.txt", "")):
        file = tmp_path / name
        file.touch()
        with pytest.raises(SettingsError) as caught:
            load_settings(weights_dir=str(file))
        assert str(caught.value) == (
            f"UNET_WEIGHTS_DIR='{file}': this is a file; set UNET_WEIGHTS_DIR or --weights-dir to "
            f"its folder {tmp_path}{model}"
        )


def test_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_PORT", "wrong")
    monkeypatch.setenv("UNET_THREADS", "2")
    settings = load_settings(port="9000", reload="on", max_batch="auto")
    assert (settings.port, settings.reload, settings.threads) == (9000, True, 2)
    assert settings.max_batch is None


@pytest.mark.parametrize(
    ("flags", "default", "longest"),
    [
        ({}, 60, 600),
        ({"request_timeout_s": "5"}, 5, 600),
        ({"request_timeout_s": "1000"}, 1000, 1000),
        ({"max_request_timeout_s": "20"}, 20, 20),
        ({"request_timeout_s": "1000", "max_request_timeout_s": "700"}, 700, 700),
    ],
)
def test_default_deadline_is_at_most_the_longest(
    flags: dict[str, str], default: float, longest: float
) -> None:
    settings = load_settings(**flags)
    assert (settings.default_timeout_s, settings.longest_timeout_s) == (default, longest)


def test_only_checkpoint_of_the_folder_is_the_default_model(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert load_settings(weights_dir=folder).model == "nuclei"
    (tmp_path / "cells.safetensors").touch()
    assert load_settings(weights_dir=folder).model == "cells"
    assert load_settings(weights_dir=folder, model="tissue").model == "tissue"
    (tmp_path / "person.safetensors").touch()
    assert load_settings(weights_dir=folder).model == "nuclei"


def test_service_link_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets UNET_PORT for a Service named "unet"."""
    monkeypatch.setenv("UNET_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    (line,) = str(caught.value).splitlines()
    assert "UNET_PORT='tcp://10.0.0.1:8000'" in line
    assert "enableServiceLinks: false" in line
    assert "rename the Service" in line


def warnings_for(caplog: pytest.LogCaptureFixture, **environment: str) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_about_unknown_variables(environment)
    return caplog.messages


def test_unknown_variable_is_a_warning_with_the_nearest_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert warnings_for(caplog, UNET_PROT="80", UNET_PORT="80", PATH="/bin") == [
        "unknown variable UNET_PROT is ignored (did you mean UNET_PORT?)"
    ]
    assert warnings_for(caplog, UNET_QQQQ="1") == ["unknown variable UNET_QQQQ is ignored"]
    assert warnings_for(caplog, UNET_KEY="of a client") == []


def test_variables_that_kubernetes_sets_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    links = {
        "UNET_SERVICE_HOST": "10.0.0.1",
        "UNET_SERVICE_PORT": "8000",
        "UNET_SERVICE_PORT_HTTP": "8000",
        "UNET_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "UNET_PORT_8000_TCP_ADDR": "10.0.0.1",
        "UNET_PORT_8000_TCP_PORT": "8000",
        "UNET_PORT_8000_TCP_PROTO": "tcp",
        "UNET_GPU_SERVICE_HOST": "10.0.0.2",
        "UNET_GPU_PORT": "tcp://10.0.0.2:8000",
    }
    assert warnings_for(caplog, **links) == []
    assert len(warnings_for(caplog, UNET_GPU_PORT="8000")) == 1


def test_every_setting_has_a_description_and_a_section() -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())
