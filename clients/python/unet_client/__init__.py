"""Python client of unet-server.

    from unet_client import Client

    with Client("http://localhost:8000") as client:
        mask = client.segment("cells.png").image()

`AsyncClient` has the same methods for asyncio. The names below are the public API.
"""

from unet_client.async_client import AsyncClient
from unet_client.client import Client
from unet_client.errors import (
    ConnectionFailed,
    ResponseTimeout,
    SegmentationError,
    UnetClientError,
)
from unet_client.images import ImageInput, encode_image
from unet_client.query import Output, SegmentQuery
from unet_client.results import PageResult, SegmentationResult

__all__ = [
    "AsyncClient",
    "Client",
    "ConnectionFailed",
    "ImageInput",
    "Output",
    "PageResult",
    "ResponseTimeout",
    "SegmentQuery",
    "SegmentationError",
    "SegmentationResult",
    "UnetClientError",
    "encode_image",
]
