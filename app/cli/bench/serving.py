"""The real service, started as its operator would, and what it takes: time and memory."""

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

_PATIENCE = 300
"""Seconds a service may take to become ready."""
_MEMORY = re.compile(r"^Vm(RSS|HWM):\s*(\d+) kB", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Resident bytes of a process: at the moment, and the most there were."""

    now: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Running:
    """A service that is ready.

    Attributes:
        url: of it.
        pid: its process.
        start_seconds: from the start of the process to the first yes of /readyz.
    """

    url: str
    pid: int
    start_seconds: float

    def memory(self) -> Memory | None:
        """None where the system does not tell."""
        try:
            found = dict(_MEMORY.findall(Path(f"/proc/{self.pid}/status").read_text()))
        except OSError:
            return None
        return Memory(int(found["RSS"]) * 1024, int(found["HWM"]) * 1024)

    def forget_peak(self) -> None:
        """The peak of memory is counted from now on (Linux)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[Running]:
    """`unet serve` of one checkpoint alone, on a free port, in a process of its own.

    Args:
        flags: of `unet serve`, beside these.

    Raises:
        CommandError: it did not become ready; with the line of its log that says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / checkpoint.name).symlink_to(checkpoint.resolve())
        command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--log-format", "text"]
        command += ["--weights-dir", folder, "--model", checkpoint.stem, *flags]
        with running(command, r"listening on (http://\S+)", "/readyz") as service:
            yield service


@contextmanager
def running(command: Sequence[str], address: str, ready: str) -> Iterator[Running]:
    """Any server: started, waited for, stopped.

    Args:
        address: pattern of the line of its log that tells its URL.
        ready: path that answers 200 once it is.

    Raises:
        CommandError: it did not become ready.
    """
    # Who is told to end ends what it started, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

        def said() -> str:
            return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")

        try:
            while (found := re.search(address, said())) is None or not _ok(found[1], ready):
                if process.poll() is not None or time.perf_counter() - start > _PATIENCE:
                    lines = said().strip().splitlines() or ["it said nothing"]
                    why = next((text for text in lines if "ERROR" in text), lines[-1])
                    raise CommandError(f"{' '.join(command[1:4])} did not become ready: {why}")
                time.sleep(0.01)
            yield Running(found[1], process.pid, time.perf_counter() - start)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):  # it, or children that outlived it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            signal.signal(signal.SIGTERM, before)


def _ok(url: str, path: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
