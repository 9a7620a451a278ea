"""OpenTelemetry traces of requests, where the standard variables OTEL_* ask for them.

Knows no HTTP and no queues. Without these variables OpenTelemetry's SDK is not imported, and no
object of this package exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from app.errors import SettingsError

if TYPE_CHECKING:
    from app.tracing.spans import Tracing

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORTER = "OTEL_TRACES_EXPORTER"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_DISABLED = "OTEL_SDK_DISABLED"


def load_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Set up traces as the environment asks for; None if it asks for none.

    An endpoint of OTLP, or the exporter `otlp`, switches traces on. All other variables are read by
    the SDK itself (OpenTelemetry specification, "Environment variables").

    Raises:
        SettingsError: a value that is not supported, or the extra `otel` is not installed.
    """
    cause = _find_cause(environment)
    if cause is None:
        return None
    for variable in _PROTOCOLS:
        value = environment.get(variable) or _PROTOCOL
        if value != _PROTOCOL:
            raise SettingsError(f"{variable}={value!r}: must be {_PROTOCOL}")
    try:
        from app.tracing.export import start_tracing
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{cause}={environment[cause]!r}: traces need the extra otel; run pip install "
            f"'unet-server[otel]', or set {_DISABLED}=true"
        ) from error
    return start_tracing()


def _find_cause(environment: Mapping[str, str]) -> str | None:
    """Name of the variable that switches traces on; None if they are off.

    Raises:
        SettingsError: an exporter that is not supported.
    """
    if environment.get(_DISABLED, "").lower() == "true":
        return None
    exporter = environment.get(_EXPORTER, "")
    if exporter not in ("", "none", "otlp"):
        raise SettingsError(f"{_EXPORTER}={exporter!r}: must be otlp or none")
    if exporter == "none":
        return None
    return next((name for name in (_EXPORTER, *_ENDPOINTS) if environment.get(name)), None)
