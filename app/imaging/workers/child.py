"""The process of an image worker: `python -m app.imaging.workers.child`.

It receives calls from the service, makes one at a time, and sends the results back. It imports no
engine and no web framework. It ends when the service ends, however that happens.

A call is a pickle. A reply is JSON: the service must not unpickle what comes from a process that
decodes bytes of clients.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from app.errors import ServiceError
from app.imaging.workers.shared import unpack

LENGTH = struct.Struct("!I")
"""Precedes each message: its length in bytes."""
MAX_BLOCKS = 8
"""Shared blocks that a call can have."""
_USUAL_CALL = 1 << 12
"""Bytes that are read at once; most calls are shorter."""
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve calls until the service closes the connection.

    Arguments on the command line: file descriptor of the connection, process id of the service,
    modules to import before the first call.
    """
    fd, parent, *modules = sys.argv[1:]
    # Ctrl-C and a signal to the whole process group are for the service: it may want to drain.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    end_with_parent(int(parent))
    if hasattr(os, "SCHED_BATCH"):  # when it wakes up, it does not preempt the engine
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for module in modules:
        importlib.import_module(module)
    with socket.socket(fileno=int(fd)) as connection:
        memory = MemoryUse()
        send(connection, {"result": None}, memory.resident)
        while (call := receive(connection)) is not None:
            reply = run(memory, *call)
            del call  # closes the blocks
            memory.update()
            send(connection, reply, memory.resident)


def end_with_parent(parent: int) -> None:
    """End this process when its parent ends, even in the middle of a call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(0)
    else:
        end_with_input()


def end_with_input() -> None:
    """End this process at the end of its standard input, whose other end the parent holds.

    For systems whose kernel cannot do it. A decoder that holds Python's lock delays it.
    """

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=wait_for_end, daemon=True).start()


class MemoryUse:
    """The memory of this process, from /proc/self/statm (proc(5)). Zeros where that is missing.

    Attributes:
        resident: bytes, without what is shared with other processes or with files.
        allocated: bytes of data and stack.
    """

    def __init__(self) -> None:
        self.resident = self.allocated = 0
        self._fd = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
        self.update()

    def update(self) -> None:
        """Read the present values."""
        if self._fd is not None:
            pages = [int(field) for field in os.pread(self._fd, 200, 0).split()]
            self.resident = (pages[1] - pages[2]) * resource.getpagesize()
            self.allocated = pages[5] * resource.getpagesize()

    def limit(self, extra: int) -> None:
        """Let this process allocate `extra` bytes more. Shared blocks do not count."""
        if self._fd is not None:
            limit = self.allocated + extra
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def receive(connection: socket.socket) -> Any:
    """The next call: the bytes it may allocate, the function and its arguments; None at the end."""
    data, fds, _, _ = socket.recv_fds(connection, _USUAL_CALL, MAX_BLOCKS)
    while data and len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
        data += connection.recv(1 << 16)
    return unpack(data[LENGTH.size :], fds) if data else None


def send(connection: socket.socket, reply: dict[str, Any], resident: int) -> None:
    """Send a reply with the resident memory of this process."""
    data = json.dumps(reply | {"resident": resident}).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def run(
    memory: MemoryUse, max_bytes: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> dict[str, Any]:
    """Make a call and return its reply, which has one of the keys

    - result: as JSON,
    - error: class and text of a `ServiceError`,
    - memory: the call tried to allocate more than `max_bytes`,
    - bug: the traceback of any other exception.
    """
    memory.limit(max_bytes)
    try:
        return {"result": function(*args)}
    except Exception as error:
        if _is_caused_by_memory(error):
            return {"memory": True}
        if isinstance(error, ServiceError):
            return {"error": [type(error).__name__, str(error)]}
        return {"bug": traceback.format_exc()}


def _is_caused_by_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
