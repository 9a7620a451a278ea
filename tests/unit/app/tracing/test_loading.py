"""Which variables switch traces on, and what is rejected."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import SettingsError
from app.tracing import load_tracing
from app.tracing.export import describe_service
from tests.conftest import ROOT
from tests.in_process import with_service

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "masks"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "true"},
    ],
)
def test_traces_are_off_unless_an_exporter_is_named(environment: dict[str, str]) -> None:
    assert load_tracing(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
    ],
)
def test_endpoint_or_exporter_switches_traces_on(environment: dict[str, str]) -> None:
    tracing = load_tracing(environment)
    assert tracing is not None
    asyncio.run(tracing.close())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http/protobuf"),
    ],
)
def test_value_that_is_not_supported_is_one_line(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_tracing(ENDPOINT | {name: value})
    assert str(raised.value) == f"{name}='{value}': must be {allowed}"


def test_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "app.tracing.export")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"pip install 'unet-server\[otel\]'"):
        load_tracing(ENDPOINT)


def test_invalid_value_of_the_sdk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(SettingsError, match=r"OTEL_\* is invalid: .*queue"):
        load_tracing(ENDPOINT)


def test_service_has_a_name_unless_it_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_service().attributes["service.name"] == "unet-server"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=masks,team=a")
    attributes = describe_service().attributes
    assert (attributes["service.name"], attributes["team"]) == ("masks", "a")


def test_service_without_traces_runs_its_devices_bare(tiny: Path) -> None:
    async def body(service: object) -> None:
        (worker,) = service.batcher.workers  # type: ignore[attr-defined]
        assert [worker.runner] == service.devices  # type: ignore[attr-defined]

    with_service(tiny, body)


def test_application_without_traces_does_not_import_the_sdk() -> None:
    code = """
import sys
from app.main import create_app
from app.settings import Settings
create_app(Settings())
sys.exit(any(name.startswith("opentelemetry.sdk") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={}, check=False)
    assert done.returncode == 0
