"""The export of spans by OTLP, as the variables OTEL_* describe it. Imports the SDK."""

from __future__ import annotations

import importlib.metadata

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from app.errors import SettingsError
from app.tracing.spans import Tracing

_NAME = "unet-server"
_UNNAMED = "unknown_service"


def start_tracing() -> Tracing:
    """Traces whose spans a thread sends to the collector. Spans beyond its queue are dropped.

    Raises:
        SettingsError: the SDK rejects the value of a variable.
    """
    try:
        return Tracing(BatchSpanProcessor(OTLPSpanExporter()), describe_service())
    except ValueError as error:
        raise SettingsError(f"a variable OTEL_* is invalid: {error}") from error


def describe_service() -> Resource:
    """Attributes of all spans. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override the name."""
    resource = Resource.create({SERVICE_VERSION: importlib.metadata.version(_NAME)})
    if str(resource.attributes[SERVICE_NAME]).startswith(_UNNAMED):
        return resource.merge(Resource({SERVICE_NAME: _NAME}))
    return resource
