"""Errors of a running service, in the words of the command line. Knows no command."""

from __future__ import annotations

from app.settings import KEY_VARIABLE
from unet_client import SegmentationError

WRONG_KEY = 401


def describe_refusal(error: SegmentationError) -> str:
    """The reason that a service gave, with the flag of the key in place of its headers."""
    if error.status == WRONG_KEY:
        return f"the API key is missing or wrong; set --key or {KEY_VARIABLE}"
    in_log = f" (request {error.request_id})" if error.status == 500 else ""
    return error.detail + in_log
