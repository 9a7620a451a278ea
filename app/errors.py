"""The errors this service raises on purpose. Knows no HTTP.

The tree, with the step of the data flow that raises each branch::

    ServiceError
    ├── RequestError                 client -> service
    │   ├── InvalidRequest             no file, an unknown parameter, a value out of range
    │   ├── UnsupportedContentEncoding a Content-Encoding that is not supported
    │   ├── UnknownModel               no model of that name in the weights folder
    │   ├── Unauthorized               the API key is missing or wrong
    │   └── RequestTooLarge            too many values or images in one request
    │       ├── UploadTooLarge           more bytes than allowed (found while reading)
    │       ├── ImageTooLarge            more pixels than allowed (found in the header)
    │       └── ResponseTooLarge         the response would need more memory than allowed
    ├── ImageError                   bytes -> decoded image
    │   ├── UnsupportedImage           an image in a format that is not supported
    │   ├── CorruptImage               not an image, or a truncated or damaged one
    │   ├── WrongSelection             a page or channel has to be chosen, or does not exist
    │   └── UnprocessableImage         takes too much time or memory, or crashes its decoder
    ├── RequestRejected              windows -> batch
    │   ├── QueueFull                  the queue has no free slots
    │   ├── DeadlineExceeded           the deadline passed, or cannot be met
    │   ├── TooManyWrongKeys           the client's address has sent too many wrong API keys
    │   └── Unavailable                not ready, draining, or the engine is dead
    └── EngineError                  batch -> probabilities
        ├── OutOfMemory                the device had no memory for a batch of this size
        ├── NonFiniteOutput            the network returned NaN or infinity for a window
        └── DeviceLost                 the device no longer responds (a sticky CUDA error)

A message writes a parameter of a request as name=value. The command line shows it as a flag, by
`app/cli/segment/wording.py`.

`app/api/problems.py` holds the only table from errors to HTTP statuses. Clients see the message of
a `RequestError`, an `ImageError` and a `RequestRejected`. The message of an `EngineError` goes to
the log only.
"""

from model.errors import UserError


class ServiceError(Exception):
    """Base of every error this service raises on purpose."""


class RequestError(ServiceError):
    """The request cannot be fulfilled as it was sent."""


class InvalidRequest(RequestError):
    """No file, an unknown parameter, or a value out of range."""


class UnsupportedContentEncoding(RequestError):
    """A Content-Encoding that is not supported.

    Attributes:
        accepted: the supported codings, as the header Accept-Encoding lists them.
    """

    def __init__(self, message: str, *, accepted: str) -> None:
        super().__init__(message)
        self.accepted = accepted


class UnknownModel(RequestError):
    """No model of that name exists."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""


class RequestTooLarge(RequestError):
    """The request, or its response, exceeds a limit on size."""


class UploadTooLarge(RequestTooLarge):
    """More bytes than the limit. Raised while reading, before they are buffered."""


class ImageTooLarge(RequestTooLarge):
    """More pixels than the limit. Raised from the header, before anything is decoded."""


class ResponseTooLarge(RequestTooLarge):
    """The response would need more memory than all requests together may use."""


class ImageError(ServiceError):
    """The bytes cannot be decoded to an image."""


class UnsupportedImage(ImageError):
    """An image in a format that is not supported."""


class CorruptImage(ImageError):
    """Not an image, or a truncated or damaged one."""


class WrongSelection(ImageError):
    """A page or a channel has to be chosen, or the chosen one does not exist."""


class UnprocessableImage(ImageError):
    """Processing it took more time or memory than allowed, or crashed the process that did it."""


class RequestRejected(ServiceError):
    """The request is valid, but the service cannot process it now.

    Attributes:
        retry_after: seconds after which a retry is worthwhile; None if unknown.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(RequestRejected):
    """The queue has no free slots, or the memory budget is used up."""


class DeadlineExceeded(RequestRejected):
    """The deadline passed, or the estimate at admission says that it cannot be met."""


class TooManyWrongKeys(RequestRejected):
    """The client's address has sent too many wrong API keys."""


class Unavailable(RequestRejected):
    """Not ready, draining, or the engine is dead."""


class EngineError(ServiceError):
    """The engine could not compute a batch."""


class OutOfMemory(EngineError):
    """The device had no memory for a batch of this size; a smaller one may fit."""


class NonFiniteOutput(EngineError):
    """The network returned NaN or infinity for a window. Never reported as an empty mask."""


class DeviceLost(EngineError):
    """The device no longer responds; only a new process can use it again."""


class SettingsError(UserError):
    """A setting is invalid. The message is one line: the setting, its value, what is allowed."""


class EngineUnavailable(UserError):
    """This machine or installation lacks what the settings ask for. The message is one line."""

    def __init__(self, setting: str, value: str, why: str) -> None:
        super().__init__(setting, value, why)

    def __str__(self) -> str:
        setting, value, why = self.args
        return f"UNET_{setting.upper()}={value}{why}"

    def for_cli(self) -> str:
        """The same message with the flag's name, for commands that read no settings."""
        setting, value, why = self.args
        return f"--{setting} {value}{why}"


class GoldenMaskMismatch(UserError):
    """A loaded checkpoint does not reproduce its golden mask. The message is one line."""
