"""POST /api/remove: the contract of rembg's server, for its clients. Cuts out the foreground.

Source: https://github.com/danielgatis/rembg, rembg/commands/s_command.py (2.0.69). Its parameters
are fields of the form except `bgc` and `extras`; here each may be in the form or in the query.
"""

from __future__ import annotations

import functools
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from app.api.answers import mask_headers
from app.api.dependencies import accept_request, find_service, model_headers
from app.api.parameters import describe_parameters, read_deadline, read_query
from app.api.problems import problem_response
from app.api.schemas import PROBLEM_RESPONSES
from app.api.uploads import Form, check_upload, read_form
from app.api.validation import ParametersModel, describe_validation_error
from app.errors import InvalidRequest
from app.inference.budget import Allocation
from app.inference.outputs import Options, Output
from app.inference.segmenter import Segmenter
from app.inference.service import Service

DEFAULT_MODEL = "person"
"""Used if it is served and the request names no model; otherwise the service's default."""

router = APIRouter(prefix="/api", tags=["segmentation"])


class RemoveQuery(ParametersModel):
    """The parameters of POST /api/remove, with rembg's names and defaults."""

    model: str | None = Field(
        None, description="default: person, or the service's default model if there is none"
    )
    om: bool = Field(False, description="only the mask")
    bgc: str | None = Field(None, description="background color r,g,b,a; default: transparent")
    a: bool = Field(False, description="alpha matting; no effect: edges are always soft")
    af: int = Field(240, ge=0, le=255, description="no effect")
    ab: int = Field(10, ge=0, le=255, description="no effect")
    ae: int = Field(10, ge=0, description="no effect")
    ppm: bool = Field(False, description="post-processing of the mask; no effect")
    extras: str | None = Field(None, description="not accepted")

    @field_validator("bgc")
    @classmethod
    def _check_color(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = [part.strip() for part in value.split(",", 4)]
        numbers = [int(part) if part.isascii() and part.isdigit() else 256 for part in parts]
        if len(numbers) not in (3, 4) or max(numbers) > 255:
            raise PydanticCustomError(
                "color", "must be r,g,b,a of 0 to 255 each, for example 255,255,255,255"
            )
        return ",".join(map(str, numbers))

    @field_validator("extras")
    @classmethod
    def _reject_extras(cls, value: str | None) -> None:
        if value:
            raise PydanticCustomError("extras", "is for rembg's own models; leave it out")

    @functools.cached_property
    def options(self) -> Options:
        """Options for the segmentation of the image."""
        if self.om:
            return Options((Output.MASK,))
        red, green, blue, alpha = (*map(int, (self.bgc or "0,0,0,0").split(",")), 255)[:4]
        if alpha not in (0, 255):
            raise InvalidRequest(f"bgc: alpha must be 0 (transparent) or 255 (opaque), not {alpha}")
        return Options((Output.CUTOUT,), background=(red, green, blue) if alpha else None)


_FIELDS = tuple(RemoveQuery.model_fields)
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **{name: {"type": "string"} for name in _FIELDS},
                    },
                }
            }
        },
    }
}


@router.post(
    "/remove",
    summary="Remove the background, as rembg's server does",
    response_class=Response,
    responses={
        200: {
            "description": "The image with a transparent background.",
            "content": {"image/png": {}},
        },
        **PROBLEM_RESPONSES,
    },
    openapi_extra=_BODY | {"parameters": describe_parameters(RemoveQuery)},
)
async def remove_background(request: Request) -> Response:
    """For clients of rembg: send `multipart/form-data` with one part `file`, get a PNG. Parameters
    may be fields of the form, or in the query.
    """
    service = find_service(request)
    deadline = read_deadline(request, service.settings)
    query = read_query(request, RemoveQuery)
    allocation: Allocation = request.state.allocation
    read = functools.partial(read_form, fields=_FIELDS)
    check = functools.partial(Segmenter.check, options=query.options)
    name = _choose_model(service, query)
    async with accept_request(request, service, name, deadline, read, check) as (_, form):
        query = _add_fields(query, form)
        options = query.options
        if len(form.uploads) > 1:
            raise InvalidRequest(f"the form has {len(form.uploads)} files; send one")
        (upload,) = form.uploads
        check_upload(upload)
        with service.registry.lease(_choose_model(service, query)) as model:
            result = await service.segmenter.segment(model, upload.data, options, deadline)
            allocation.grow(result.size)
            (rendered,) = result.rendered.values()
            request.state.log_fields |= {
                "model": model.id,
                "size": f"{result.width}x{result.height}",
            }
            headers = model_headers(model) | mask_headers(result)
            return Response(rendered.content, media_type=rendered.media_type, headers=headers)


@router.get("/remove", include_in_schema=False)
async def refuse_url(request: Request) -> Response:
    """rembg fetches the image from the parameter `url`; this service sends no requests."""
    detail = "this service never fetches an image from a URL; POST the image as a part named 'file'"
    return problem_response(request, 405, detail, {"Allow": "POST"})


def _choose_model(service: Service, query: RemoveQuery) -> str | None:
    if query.model is not None:
        return query.model
    entry = service.registry.entries.get(DEFAULT_MODEL)
    return DEFAULT_MODEL if entry is not None and entry.served is not None else None


def _add_fields(query: RemoveQuery, form: Form) -> RemoveQuery:
    """The parameters of the query and of the form together.

    Raises:
        InvalidRequest: a value is invalid, or a parameter is in both.
    """
    in_query = query.model_dump(exclude_unset=True)
    for name in form.values:
        if name in in_query:
            raise InvalidRequest(f"{name} is given in the query and in the form; send it once")
    try:
        return RemoveQuery.model_validate({**in_query, **form.values})
    except ValidationError as error:
        raise InvalidRequest(describe_validation_error(error.errors()[0])) from None
