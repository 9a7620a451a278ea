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
from pathlib import Path
from typing import Any

from app.errors import ServiceError
from app.imaging.workers.shared import unpack

LENGTH = struct.Struct("!I")
"""Precedes each message: its length in bytes."""
MAX_BLOCKS = 8
"""Shared blocks that a call can have."""
PR_SET_PDEATHSIG = 1
_HAS_PROC = sys.platform == "linux"


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
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for module in modules:
        importlib.import_module(module)
    with socket.socket(fileno=int(fd)) as connection:
        send(connection, {"result": None})
        while (call := receive(connection)) is not None:
            reply = run(*call)
            del call  # closes the blocks
            send(connection, reply)


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


def receive(connection: socket.socket) -> Any:
    """The next call: the bytes it may allocate, the function and its arguments; None at the end."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, MAX_BLOCKS)
    while data and len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
        data += connection.recv(1 << 16)
    return unpack(data[LENGTH.size :], fds) if data else None


def send(connection: socket.socket, reply: dict[str, Any]) -> None:
    """Send a reply with the resident memory of this process in bytes; 0 if it is not known."""
    data = json.dumps(reply | {"resident": _read_resident()}).encode()
    connection.sendall(LENGTH.pack(len(data)) + data)


def run(max_bytes: int, function: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Make a call and return its reply, which has one of the keys

    - result: as JSON,
    - error: class and text of a `ServiceError`,
    - memory: the call tried to allocate more than `max_bytes`,
    - bug: the traceback of any other exception.
    """
    _limit_memory(max_bytes)
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


def _limit_memory(extra: int) -> None:
    """Let this process allocate `extra` bytes more than it has. Shared blocks do not count."""
    if _HAS_PROC:
        limit = _read_statm(5) + extra
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _read_resident() -> int:
    """Resident memory without what is shared with other processes or with files."""
    return _read_statm(1) - _read_statm(2) if _HAS_PROC else 0


def _read_statm(field: int) -> int:
    """A field of /proc/self/statm in bytes: 1 resident, 2 shared, 5 data and stack (proc(5))."""
    pages = Path("/proc/self/statm").read_bytes().split()[field]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    main()
