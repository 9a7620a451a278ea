"""Everything that can go wrong between the bytes of an image and its mask. Knows no HTTP.

The tree, each branch with the arrow of the data flow that raises it::

    ServiceError
    ├── RequestError                 client -> service
    │   ├── InvalidRequest             no file, an unknown parameter, a value out of range
    │   ├── UnsupportedContentEncoding a Content-Encoding that is not accepted
    │   ├── UnknownModel               no such model in the weights folder
    │   └── Unauthorized               the API key is missing or wrong
    ├── ImageError                   bytes -> decoded image
    │   ├── UploadTooLarge             more bytes than allowed (found while reading)
    │   ├── ImageTooLarge              more pixels than allowed (found in the header); of
    │   │                              tensors, more memory than there is for all
    │   ├── UnsupportedImage           an image, of a format that is not accepted
    │   └── CorruptImage               not an image, or a truncated or damaged one
    ├── RequestRejected              windows -> batch
    │   ├── QueueFull                  what waits already fills the queue
    │   ├── DeadlineExceeded           the deadline passed, or cannot be met
    │   └── Unavailable                not ready, draining, or the engine is dead
    └── EngineError                  batch -> probabilities
        ├── OutOfMemory                the device had no room for a batch of this size
        ├── NonFiniteOutput            the network gave NaN or infinity for a window
        └── DeviceLost                 the device answers nothing any more (a sticky CUDA error)

`app/handlers.py` holds the only table that knows what each of them is in HTTP. The text of an
exception is written for the client of `RequestError`, `ImageError` and `RequestRejected`, and for
the log alone of an `EngineError`.
"""

import functools

from model.errors import UserError


class ServiceError(Exception):
    """Base of every error this service raises on purpose."""


class RequestError(ServiceError):
    """What the client asked for makes no sense here."""


class InvalidRequest(RequestError):
    """No file, an unknown parameter, or a value out of range."""


class UnsupportedContentEncoding(RequestError):
    """A Content-Encoding that is not accepted.

    Attributes:
        accepted: those that are, as Accept-Encoding lists them.
    """

    def __init__(self, message: str, *, accepted: str) -> None:
        super().__init__(message)
        self.accepted = accepted

    def __reduce__(self) -> tuple[object, ...]:  # Python's own would leave `accepted` out
        return functools.partial(type(self), accepted=self.accepted), self.args


class UnknownModel(RequestError):
    """No model of that name is in service."""


class Unauthorized(RequestError):
    """The API key is missing or wrong."""


class ImageError(ServiceError):
    """The bytes cannot become an image."""


class UploadTooLarge(ImageError):
    """More bytes than the limit; raised while reading, before they are buffered."""


class ImageTooLarge(ImageError):
    """More pixels than the limit; raised from the header, before anything is decoded. Of tensors
    also JSON or an answer that would take more memory than all requests together may hold."""


class UnsupportedImage(ImageError):
    """An image, but of a format that is not accepted."""


class CorruptImage(ImageError):
    """Not an image, or a truncated or damaged one."""


class RequestRejected(ServiceError):
    """The service is sound but will not take this work now.

    Attributes:
        retry_after: seconds after which a new attempt is worth while, or None when unknown.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(RequestRejected):
    """What waits already fills the queue."""


class DeadlineExceeded(RequestRejected):
    """The deadline passed, or the estimate says at admission that it cannot be met."""


class Unavailable(RequestRejected):
    """Not ready, draining, or the engine is dead."""


class EngineError(ServiceError):
    """The engine could not turn a batch into probabilities."""


class OutOfMemory(EngineError):
    """The device had no room for a batch of this size; a smaller one may fit."""


class NonFiniteOutput(EngineError):
    """The network gave NaN or infinity for a window; never shown as an empty mask."""


class DeviceLost(EngineError):
    """The device answers nothing any more; only a new process helps."""


class SettingsError(UserError):
    """A setting is wrong: one line that names it, its value and what is allowed."""


class EngineUnavailable(UserError):
    """The settings ask for what this machine or installation does not have; one line says what.

    Attributes:
        of_flag: the same line, for who gave a flag that is no setting.
    """

    def __init__(self, setting: str, value: str, why: str) -> None:
        super().__init__(setting, value, why)  # as which it is copied to other processes
        self.of_flag = f"--{setting} {value}{why}"

    def __str__(self) -> str:
        setting, value, why = self.args
        return f"UNET_{setting.upper()}={value}{why}"


class GoldenMaskMismatch(UserError):
    """A checkpoint was loaded and is not fit to serve; one line says why."""
