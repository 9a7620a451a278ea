"""What is in service: GET /models and GET /models/{name}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request

from app.api.dependencies import authorized
from app.api.schemas import PROBLEM
from app.inference.registry import ModelEntry
from app.inference.service import Service

router = APIRouter(
    tags=["models"], dependencies=[Depends(authorized)], responses={401: PROBLEM[401]}
)


@router.get("/models", summary="All models", response_description="What is served.")
async def models(request: Request) -> dict[str, Any]:
    """The default model's name, and every model with what it is and how it is served."""
    service: Service = request.app.state.service
    return {
        "default": service.registry.default,
        "models": [
            _describe(name, entry, service) for name, entry in service.registry.entries.items()
        ],
    }


@router.get(
    "/models/{name}",
    summary="One model",
    response_description="What it is, and how it is served.",
    responses={404: PROBLEM[404]},
)
async def model(request: Request, name: str) -> dict[str, Any]:
    """What it is and how it is served; 404 for a name that is not there."""
    service: Service = request.app.state.service
    return _describe(name, service.registry.entry(name), service)


def _describe(name: str, entry: ModelEntry, service: Service) -> dict[str, Any]:
    served = entry.served
    described: dict[str, Any] = {
        "name": name,
        "ready": served is not None,
        "default": name == service.registry.default,
        "error": entry.error,
    }
    if served is None:
        return described
    checkpoint = served.checkpoint
    choice = served.choices[0]
    return described | {
        "id": checkpoint.id,
        "sha256": checkpoint.sha256,
        "architecture": checkpoint.architecture.to_json(),
        "preprocessing": checkpoint.preprocess.to_json(),
        "classes": checkpoint.preprocess.classes,
        "threshold": checkpoint.preprocess.threshold,
        "window_shapes": checkpoint.preprocess.window,
        "metrics": checkpoint.card.get("metrics", {}),
        "data": checkpoint.card.get("data"),
        "licence": checkpoint.card.get("licence"),
        "revision": _revision(checkpoint.card),
        "engine": choice.backend,
        "device": ",".join(choice.device for choice in served.choices),
        "precision": choice.precision,
        "max_batch": choice.max_batch,
        "chosen_because": choice.reason,
        "golden_iou": served.golden_iou,
    }


def _revision(card: Mapping[str, Any]) -> str | None:
    """Of the source that wrote the checkpoint: of its import, or of its training."""
    revision: str | None = card.get("revision") or card.get("training", {}).get("revision")
    return revision
