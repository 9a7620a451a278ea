"""The HTTP service as a Ray Serve deployment.

    serve deploy deploy/ray/serve_config.yaml

Each replica is the whole application of `app.main`, with its models, its queue and its image
workers. Ray Serve starts and replaces replicas, chooses one for each request, and bounds how many
requests wait. Settings are the environment variables of the service (docs/settings.md), which the
config file sets per application. docs/ray.md describes what differs from `unet serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Mapping

import ray
from fastapi import FastAPI
from ray import serve

from app import logs
from app.inference.allocator import use_one_arena
from app.inference.registry import WrapEngineFn, use_as_built
from app.inference.service import Service
from app.main import create_app
from app.settings import Settings, load_settings, warn_about_unknown_variables

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
"""Between two looks at a service that is loading its default model."""


def build_app(wrap_engine: WrapEngineFn = use_as_built) -> FastAPI:
    """Build the application of one replica. It starts when its default model is ready.

    Args:
        wrap_engine: see `app.inference.registry.Registry`.

    Raises:
        SettingsError, EngineUnavailable: the settings ask for what the node does not have.
    """
    use_one_arena()
    settings = fit_settings(load_settings(), ray.get_runtime_context().get_assigned_resources())
    log_to_stderr(settings)
    warn_about_unknown_variables()
    app = create_app(settings, wrap_engine)
    start_without_drain = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service: Service = app.state.service
        async with start_without_drain(app):
            await wait_started(service)
            yield
            await drain(service)

    app.router.lifespan_context = lifespan
    return app


class HealthCheck:
    """Gives Ray the health of the service that a replica runs."""

    app: FastAPI

    async def check_health(self) -> None:
        """Check what `/livez` checks; Ray replaces a replica that fails several times.

        Raises:
            RuntimeError: the engine is hung or its device is lost.
        """
        error = self.app.state.service.liveness_error()
        if error is not None:
            raise RuntimeError(error)


@serve.deployment(
    name="unet-server",
    max_ongoing_requests=16,
    max_queued_requests=64,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 4},
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=25,
)
@serve.ingress(build_app)
class Replica(HealthCheck):
    """One copy of the service. The config file overrides the options above."""


app = Replica.bind()  # type: ignore[attr-defined] # of the deployment that Serve makes of it


def fit_settings(settings: Settings, resources: Mapping[str, float]) -> Settings:
    """The settings of a replica: threads, image workers and device follow what Ray assigned to it,
    where the environment does not set them.

    Without this a replica would use all CPUs of its node, and any GPU that it can see.

    Args:
        resources: amount by name, such as {"CPU": 2.0, "GPU": 0.5}.
    """
    cpus = max(1, math.floor(resources.get("CPU", 1)))
    gpus = resources.get("GPU", 0)
    devices = ",".join(f"cuda:{index}" for index in range(math.ceil(gpus))) or "cpu"
    assigned = {"threads": str(cpus), "image_workers": str(cpus), "device": devices}
    unset = {
        name: value for name, value in assigned.items() if name not in settings.model_fields_set
    }
    return load_settings(**unset)


def log_to_stderr(settings: Settings) -> None:
    """Log as `unet serve` does. Ray writes standard error to a file for each replica."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logs.JsonFormatter() if settings.log_format == "json" else logs.TextFormatter()
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


async def wait_started(service: Service) -> None:
    """Wait until the default model has reproduced its golden mask.

    Raises:
        RuntimeError: it cannot be served; the log says why. Ray starts the replica again.
    """
    while not service.started:
        if service.failed.is_set():
            raise RuntimeError(service.readiness_error())
        await asyncio.sleep(_POLL_SECONDS)


async def drain(service: Service) -> None:
    """Wait for the requests that are not answered, for UNET_DRAIN_S at most.

    Ray has stopped sending requests, and has waited for those that it sent. Computations of
    requests whose clients disconnected may be left: their engine must not be freed under them.
    """
    try:
        await asyncio.wait_for(service.drain(), service.settings.drain_s)
    except TimeoutError:
        log.warning("drain timeout: %d requests aborted", service.cancel_accepted())
