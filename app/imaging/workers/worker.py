"""One process of the pool, seen from the service: starting it, calling it, killing it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from app import errors
from app.errors import ServiceError, UnprocessableImage
from app.imaging.workers import child
from app.imaging.workers.shared import pack

log = logging.getLogger(__name__)

_START_SECONDS = 60.0
"""Time for a process to start; a fifth of a second if the machine is idle."""
_GRACE_SECONDS = 0.5
"""Time to end a call whose result is not needed any more. Most calls take less than a start."""
_LEAK_BYTES = 256_000_000
"""A process that keeps so much more than at its start is replaced."""
_MAX_CALL, _MAX_REPLY = 1 << 17, 1 << 20
"""Bytes of a message."""
_STDERR_TAIL = 2000

_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # there is one process per CPU
    "OMP_NUM_THREADS": "1",
    # glibc: reuse the memory of small images. Page faults would cost more than decoding.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "16000000",
    "MALLOC_TRIM_THRESHOLD_": "32000000",
}


class KillReason(StrEnum):
    """Why a process was killed, or ended."""

    TIME = "time"
    MEMORY = "memory"
    CRASH = "crash"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    LEAK = "leak"
    STOP = "stop"


@dataclasses.dataclass(frozen=True)
class CallLimit:
    """The limits of a call.

    Attributes:
        step: begins the message of an error: "decoding".
        seconds: from its start.
        max_bytes: of memory, besides shared blocks.
        deadline: of the request, on the clock of `time.monotonic`. It only says why a call was
            cancelled; the caller enforces it.
    """

    step: str
    seconds: float
    max_bytes: int
    deadline: float = math.inf

    def describe(self, reason: KillReason, signal_name: str = "") -> str:
        """The message for the client whose call ended its process."""
        match reason:
            case KillReason.TIME:
                return f"{self.step} the image took longer than {self.seconds:g} s"
            case KillReason.MEMORY:
                megabytes = self.max_bytes / 1e6
                return f"{self.step} the image takes more than {megabytes:.0f} MB of memory"
            case _:
                return f"{self.step} the image failed: its process ended ({signal_name})"


class WorkerStartError(Exception):
    """A process could not be started."""


class ImageWorker:
    """One process. It makes one call at a time. Use `start` to create one.

    Attributes:
        kill_reason: set as soon as it has ended or was killed.
        used: it was given a call.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        connection: socket.socket,
        on_idle: Callable[[ImageWorker], object],
    ) -> None:
        self.kill_reason: KillReason | None = None
        self.used = False
        self._process = process
        self._connection = connection
        self._on_idle = on_idle
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._reply: asyncio.Future[dict[str, Any]] | None = self._loop.create_future()
        self._limit = CallLimit("starting", _START_SECONDS, 0)
        self._timer: asyncio.TimerHandle | None = None
        self._abandoned = False
        self._resident = self._resident_at_start = 0
        self._stderr = b""
        self._stderr_task = asyncio.create_task(self._read_stderr())
        self._loop.add_reader(connection, self._read)

    @classmethod
    async def start(
        cls, modules: Sequence[str], on_idle: Callable[[ImageWorker], object]
    ) -> ImageWorker:
        """Start a process and wait until it has imported `modules`.

        Raises:
            WorkerStartError: it ended before that, or took too long.
            OSError: the system has no resources for it.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_CALL)
        try:
            with theirs:
                fd = theirs.fileno()
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", child.__name__, str(fd), str(os.getpid()), *modules,
                    pass_fds=(fd,),
                    env=_environment(),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C in a terminal is for the service alone
                )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        worker = cls(process, ours, on_idle)
        ready = worker._reply
        assert ready is not None
        ended = asyncio.create_task(process.wait())
        started = False
        try:
            waiting: list[asyncio.Future[Any]] = [ready, ended]
            await asyncio.wait(waiting, timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            started = ready.done()
        finally:
            ended.cancel()
            if not started:
                ready.cancel()
                await worker.close()
        if not started:
            raise WorkerStartError(worker.describe_end())
        worker._resident_at_start = worker._resident
        return worker

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        return self._reply is not None

    @property
    def leaks(self) -> bool:
        """Whether the process keeps too much memory between calls."""
        return self._resident > self._resident_at_start + _LEAK_BYTES

    async def call(self, limit: CallLimit, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` in the process. See `WorkerPool.call`.

        Raises:
            ConnectionError: the process had ended before the call.
        """
        assert self._reply is None
        self.used = True
        self._limit = limit
        self._reply = self._loop.create_future()
        self._timer = self._loop.call_later(limit.seconds, self.kill, KillReason.TIME)
        data, fds = pack((limit.max_bytes, function, args))
        # The process has read everything before, so the buffer is empty and takes all of it.
        frame = child.LENGTH.pack(len(data)) + data
        try:
            sent = socket.send_fds(self._connection, [frame], fds)
        except ConnectionError:
            self._reply.cancel()
            raise
        if sent != len(frame):
            raise RuntimeError(f"a call of {len(frame)} bytes is too long")
        reply = await self._reply
        if "memory" in reply:
            self.kill(KillReason.MEMORY)
            raise UnprocessableImage(limit.describe(KillReason.MEMORY))
        if "error" in reply:
            name, text = reply["error"]
            raise _error_class(name)(text)
        if "bug" in reply:
            raise RuntimeError(f"in an image worker: {reply['bug']}")
        return reply["result"]

    def abandon(self, reason: KillReason) -> None:
        """Give up on the running call: the process is killed unless it ends the call very soon."""
        assert self._timer is not None
        self._abandoned = True
        when = min(self._timer.when(), self._loop.time() + _GRACE_SECONDS)
        self._timer.cancel()
        self._timer = self._loop.call_at(when, self.kill, reason)

    def kill(self, reason: KillReason) -> None:
        """Kill the process. The running call fails at once."""
        if self.kill_reason is None:
            self._fail(reason)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait(self) -> KillReason:
        """Wait until the process has ended, and return why."""
        await self._process.wait()
        self._fail(KillReason.CRASH)
        assert self.kill_reason is not None
        return self.kill_reason

    async def close(self) -> None:
        """Kill the process, wait for its end, and free what it held."""
        self.kill(KillReason.STOP)
        self._loop.remove_reader(self._connection)
        self._connection.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
        await self._stderr_task

    def describe_end(self) -> str:
        """How the process ended, with the end of what it wrote to standard error."""
        tail = self._stderr.decode(errors="replace").strip()
        return f"{self.exit_status}{': ' if tail else ''}{tail}"

    @property
    def exit_status(self) -> str:
        """The signal or the status that the process ended with."""
        code = self._process.returncode
        if code is None:
            return "running"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _fail(self, reason: KillReason) -> None:
        if self.kill_reason is not None:
            return
        self.kill_reason = reason
        if self._timer is not None:
            self._timer.cancel()
        future, self._reply = self._reply, None
        if future is not None and not future.done():
            text = self._limit.describe(reason, self.exit_status)
            future.set_exception(UnprocessableImage(text))

    def _read(self) -> None:
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the process has ended, or is about to
            self._loop.remove_reader(self._connection)
            return
        self._received += data
        if len(self._received) < child.LENGTH.size:
            return
        (length,) = child.LENGTH.unpack_from(self._received)
        if length > _MAX_REPLY:
            self.kill(KillReason.CRASH)
        elif len(self._received) >= child.LENGTH.size + length:
            reply = json.loads(self._received[child.LENGTH.size :])
            self._received.clear()
            self._handle(reply)

    def _handle(self, reply: dict[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._resident = int(reply["resident"])
        future, self._reply = self._reply, None
        if future is not None and not future.done():
            future.set_result(reply)
        if self._abandoned:
            self._abandoned = False
            self._on_idle(self)

    async def _read_stderr(self) -> None:
        """Keep the pipe empty. Decoders write about damaged files there."""
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(1 << 12):
            self._stderr = (self._stderr + data)[-_STDERR_TAIL:]
            log.debug("image worker %d: %s", self._process.pid, data.decode(errors="replace"))


def _error_class(name: str) -> type[ServiceError]:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, ServiceError) else ServiceError


def _environment() -> dict[str, str]:
    """The environment of the service without its settings, which include API keys."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("UNET_")}
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return inherited | _ENVIRONMENT | {"PYTHONPATH": path}
