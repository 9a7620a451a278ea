"""The service without HTTP, in the process of a test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from app.inference.service import Service
from app.settings import Settings
from app.tracing.spans import Tracing


def with_service(
    folder: Path,
    body: Callable[[Service], Awaitable[None]],
    *,
    load: bool = True,
    tracing: Tracing | None = None,
    **settings: Any,
) -> None:
    """Run `body` with a started service.

    Args:
        folder: with the weights.
        tracing: makes the traces of requests.
        load: load the default model first; other models and changed files are not loaded.
    """

    async def scene() -> None:
        given = Settings(weights_dir=folder, threads=1, image_workers=1, **settings)
        service = Service(given, tracing=tracing)
        if load:
            await service.start_without_probes()
        else:
            service.workers.start()
            await service.batcher.start()
        try:
            await asyncio.wait_for(body(service), 60)
        finally:
            await service.stop()

    asyncio.run(scene())


def read_metric(service: Service, name: str, **labels: str) -> float:
    """The value of one sample; 0 if there is none."""
    return service.metrics.registry.get_sample_value(name, labels) or 0.0
