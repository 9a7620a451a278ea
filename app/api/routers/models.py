"""GET /models and GET /models/{name}: the models and how they are served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter

from app.api.dependencies import ServiceDep
from app.api.schemas import PROBLEM_RESPONSES
from app.inference.registry import ModelEntry
from app.inference.service import Service

router = APIRouter(tags=["models"], responses={401: PROBLEM_RESPONSES[401]})


@router.get("/models", summary="List all models", response_description="The models")
async def models(service: ServiceDep) -> dict[str, Any]:
    """The name of the default model, and every model with its properties."""
    return {
        "default": service.registry.default,
        "models": [
            _describe_model(name, entry, service)
            for name, entry in service.registry.entries.items()
        ],
    }


@router.get(
    "/models/{name}",
    summary="Describe one model",
    response_description="The model",
    responses={status: PROBLEM_RESPONSES[status] for status in (404, "default")},
)
async def model(service: ServiceDep, name: str) -> dict[str, Any]:
    """The model's properties, and the engine that runs it."""
    return _describe_model(name, service.registry.entry(name), service)


def _describe_model(name: str, entry: ModelEntry, service: Service) -> dict[str, Any]:
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
    """The revision of the source code that wrote the checkpoint, by import or by training."""
    revision: str | None = card.get("revision") or card.get("training", {}).get("revision")
    return revision
