"""A pool of processes for work on bytes from clients: decoding, preparing, rendering, encoding.

A decoder cannot be interrupted, and one that crashes takes its process with it. So each call has a
limit of time and of memory, and a process that exceeds one is killed and replaced. Only the call
that it was making fails. Knows processes and functions; no images and no HTTP.

::

    WorkerPool ── call ──▶ an idle ImageWorker ── pickle, file descriptors ──▶ its process
               ◀─ result ─                     ◀─ JSON ─────────────────────── (`child`)
"""

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
import time
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
"""Time to end a call that nobody waits for any more. Starting a process costs more than most."""
_LEAK_BYTES = 256_000_000
"""A process that keeps so much more than at its start is replaced."""
_FAILED_STARTS = 3
"""Starts that fail one after the other until the pool counts as failed."""
_MAX_PAUSE = 10.0
_MAX_CALL, _MAX_REPLY = 1 << 17, 1 << 20
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
    """What a call may take.

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
        kill_reason: set as soon as it has ended or was told to.
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
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_CALL)
        path = [entry or str(Path.cwd()) for entry in sys.path]
        environment = os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)}
        try:
            with theirs:
                fd = theirs.fileno()
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", child.__name__, str(fd), str(os.getpid()), *modules,
                    pass_fds=(fd,),
                    env=environment,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise WorkerStartError(str(error)) from error
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
        """Run `function(*args)` in the process. See `WorkerPool.call`."""
        assert self._reply is None
        self.used = True
        self._limit = limit
        self._reply = self._loop.create_future()
        self._timer = self._loop.call_later(limit.seconds, self.kill, KillReason.TIME)
        data, fds = pack((limit.max_bytes, function, args))
        try:
            # The process has read everything before, so the buffer is empty and takes all of it.
            frame = child.LENGTH.pack(len(data)) + data
            if socket.send_fds(self._connection, [frame], fds) != len(frame):
                raise RuntimeError(f"a call of {len(frame)} bytes is too long")
        except OSError:  # it has just ended; `wait` will say how
            log.debug("image worker %d is gone", self._process.pid)
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
        return f"{self._exit_status()}{': ' if tail else ''}{tail}"

    def _exit_status(self) -> str:
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
            text = self._limit.describe(reason, self._exit_status())
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


class WorkerPool:
    """Keeps a number of processes running, and gives calls to those that are idle.

    Args:
        size: number of processes.
        modules: imported by each process at its start.
        on_kill: called with the reason when a process was killed or crashed.
        on_restart: called when a process has replaced another one.

    Attributes:
        failure: why no process can be started any more; None while that works.
    """

    def __init__(
        self,
        size: int,
        modules: Sequence[str],
        *,
        on_kill: Callable[[KillReason], object] = lambda reason: None,
        on_restart: Callable[[], object] = lambda: None,
    ) -> None:
        self.size = size
        self.failure: str | None = None
        self._modules = modules
        self._on_kill = on_kill
        self._on_restart = on_restart
        self._failed_starts = 0
        self._idle: list[ImageWorker] = []
        self._changed = asyncio.Semaphore(0)
        """Released for each worker that becomes idle. One that ends while idle leaves it as it is,
        so that its count is at least the number of idle workers."""
        self._running: set[ImageWorker] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def running(self) -> int:
        """Number of processes that take calls."""
        return len(self._running)

    @property
    def busy(self) -> int:
        """Number of processes that are making a call."""
        return sum(worker.busy for worker in self._running)

    def start(self) -> None:
        """Begin to start the processes. Calls wait for the first one."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._keep_one()) for _ in range(self.size)]

    async def stop(self) -> None:
        """Kill all processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def call(self, limit: CallLimit, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)` in a process, and return its result.

        If this is cancelled while the function runs, its process is killed unless it is done soon.

        Args:
            limit: counts from the moment a process begins with the call.
            function: of a module; its result must be representable as JSON.
            args: are pickled; shared blocks among them are passed by their file descriptors.

        Raises:
            ServiceError: the function raised it; same class, same text.
            UnprocessableImage: the call exceeded a limit, or its process ended.
            RuntimeError: the function raised anything else.
        """
        worker = await self._take_idle()
        try:
            return await worker.call(limit, function, *args)
        finally:
            if worker.busy:  # cancelled
                late = time.monotonic() >= limit.deadline
                worker.abandon(KillReason.DEADLINE if late else KillReason.CANCELLED)
            else:
                self._give_back(worker)

    async def call_each(self, function: Callable[[], Any], limit: CallLimit) -> None:
        """Make a call in every process that is idle now, one after the other."""
        for worker in list(self._idle):
            if worker in self._idle:
                self._idle.remove(worker)
                try:
                    await worker.call(limit, function)
                finally:
                    self._give_back(worker)

    async def _take_idle(self) -> ImageWorker:
        while True:
            await self._changed.acquire()
            if self._idle:
                return self._idle.pop()  # the last one used: its memory is in the caches

    def _give_back(self, worker: ImageWorker) -> None:
        if worker.kill_reason is not None:
            return
        if worker.leaks:
            worker.kill(KillReason.LEAK)
            return
        self._idle.append(worker)
        self._changed.release()

    async def _keep_one(self) -> None:
        """Keep one process running: start it, and replace it whenever it ends."""
        restart = False
        while True:
            try:
                worker = await ImageWorker.start(self._modules, self._give_back)
            except WorkerStartError as error:
                await self._pause_after_failed_start(str(error))
                continue
            self.failure = None
            if restart:
                self._on_restart()
            self._running.add(worker)
            self._give_back(worker)
            start = time.monotonic()
            try:
                reason = await worker.wait()
            finally:
                self._running.remove(worker)
                if worker in self._idle:
                    self._idle.remove(worker)
                await worker.close()
            restart = True
            self._on_kill(reason)
            end = worker.describe_end()
            log.warning("an image worker was replaced (%s): %s", reason, end.partition("\n")[0])
            log.debug("image worker: %s", end)
            if worker.used or time.monotonic() > start + _MAX_PAUSE:
                self._failed_starts = 0
            else:
                await self._pause_after_failed_start(end)

    async def _pause_after_failed_start(self, error: str) -> None:
        self._failed_starts += 1
        log.error("an image worker could not be started: %s", error)
        if self._failed_starts >= _FAILED_STARTS:
            self.failure = (
                f"image workers cannot be started: {self._failed_starts} failures in a row"
            )
        await asyncio.sleep(min(0.1 * 2**self._failed_starts, _MAX_PAUSE))
