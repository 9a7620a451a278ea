"""Start the real service as an operator would, and measure its start and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from app.cli.errors import CommandError

_READY_TIMEOUT_S = 300
_STOP_TIMEOUT_S = 60
_MEMORY = re.compile(r"^Vm(RSS|HWM):\s*(\d+) kB", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class ResidentMemory:
    """Resident bytes of a process: now, and at its peak."""

    now: int
    peak: int


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A server that is ready.

    Attributes:
        url: base URL.
        pid: its process.
        start_seconds: from the start of the process to the first 200 of its readiness probe.
    """

    url: str
    pid: int
    start_seconds: float

    def memory(self) -> ResidentMemory | None:
        """Read the memory of the process; None where the system has no /proc."""
        try:
            found = dict(_MEMORY.findall(Path(f"/proc/{self.pid}/status").read_text()))
        except OSError:
            return None
        return ResidentMemory(int(found["RSS"]) * 1024, int(found["HWM"]) * 1024)

    def reset_peak(self) -> None:
        """Start to measure the peak of memory anew (Linux)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[RunningServer]:
    """Run `unet serve` with one checkpoint, on a free port, in its own process.

    Args:
        flags: further flags of `unet serve`.

    Raises:
        CommandError: it did not become ready; the message has the line of its log that says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / checkpoint.name).symlink_to(checkpoint.resolve())
        command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--log-format", "text"]
        command += ["--weights-dir", folder, "--model", checkpoint.stem, *flags]
        with running(command, r"listening on (http://\S+)", "/readyz") as service:
            yield service


@contextmanager
def running(command: Sequence[str], address: str, ready: str) -> Iterator[RunningServer]:
    """Run any server: start it, wait until it is ready, and stop it at the end.

    Args:
        address: regular expression for its URL in its log.
        ready: path of its readiness probe.

    Raises:
        CommandError: it did not become ready.
    """
    # SIGTERM must stop the server too, so it becomes an exception that runs the code below.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

        def read_log() -> str:
            return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")

        try:
            while (found := re.search(address, read_log())) is None or not _ok(found[1], ready):
                if process.poll() is not None or time.perf_counter() - start > _READY_TIMEOUT_S:
                    lines = read_log().strip().splitlines() or ["no output"]
                    why = next((line for line in lines if "ERROR" in line), lines[-1])
                    raise CommandError(f"{' '.join(command[1:4])} did not become ready: {why}")
                time.sleep(0.01)
            yield RunningServer(found[1], process.pid, time.perf_counter() - start)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):  # the server and its children
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            signal.signal(signal.SIGTERM, before)


def _ok(url: str, path: str) -> bool:
    """Whether a GET returns 200."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
