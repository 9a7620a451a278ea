"""The service that an experiment attacks: its process, its probes, its metrics and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tools.prove.wire import Answer, exchange, request

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "weights"
IDLE_GAUGES = ("held_bytes", "held_pixels", "windows_reserved", "image_workers_busy")
"""Metrics that are zero when no request is processed."""

_START_SECONDS = 60.0
_PSS = re.compile(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


@dataclasses.dataclass
class Subject:
    """A running `unet serve`.

    Attributes:
        port: on 127.0.0.1.
        process: of the service.
        log_file: receives its standard error.
    """

    port: int
    process: subprocess.Popen[bytes]
    log_file: IO[bytes]

    def get(self, path: str, seconds: float = 30) -> Answer:
        """GET a path on a connection of its own."""
        return exchange(self.port, request(path=path, method="GET"), seconds)

    def post(
        self, body: bytes, *fields: str, path: str = "/segment", seconds: float = 60
    ) -> Answer:
        """POST a body on a connection of its own.

        Args:
            fields: further lines of the head.
        """
        return exchange(self.port, request(body, *fields, path=path), seconds)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that have these labels."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        total = 0.0
        for line in self.get("/metrics").body.decode().splitlines():
            match = re.fullmatch(rf"unet_{name}(?:{{(.*)}})? (\S+)", line)
            if match and wanted <= set((match[1] or "").split(",")):
                total += float(match[2])
        return total

    def statuses(self) -> dict[str, int]:
        """Responses to requests so far, by status."""
        found: dict[str, int] = {}
        pattern = r'^unet_requests_total{.*status="(\d+)"} (\S+)$'
        for status, count in re.findall(pattern, self.get("/metrics").body.decode(), re.MULTILINE):
            found[status] = found.get(status, 0) + int(float(count))
        return found

    def leftovers(self, seconds: float = 10) -> list[str]:
        """The gauges that do not return to zero within this time, with their values."""
        end = time.monotonic() + seconds
        while True:
            values = {name: self.metric(name) for name in IDLE_GAUGES}
            left = [f"{name}={value:g}" for name, value in values.items() if value]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """The service and its image workers."""
        found = [self.process.pid]
        with contextlib.suppress(OSError):  # the process has ended
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    def memory(self) -> int:
        """Bytes of all processes, without the pages of files, which the system can drop.

        Pages that processes share count once (proportional set size, proc(5)).
        """
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += sum(int(size) for size in _PSS.findall(rollup)) * 1024
        return total

    def log(self) -> str:
        """Everything that was logged so far."""
        size = os.fstat(self.log_file.fileno()).st_size
        return os.pread(self.log_file.fileno(), size, 0).decode(errors="replace")

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextlib.contextmanager
def serving(
    *flags: str,
    weights: Path = WEIGHTS,
    program: Sequence[str] = ("-m", "app.cli"),
    environment: dict[str, str] | None = None,
    files: int | None = None,
) -> Iterator[Subject]:
    """Run the service on a free port, and kill it at the end if it still runs.

    Args:
        flags: of `unet serve`.
        program: arguments of Python.
        environment: variables that are added.
        files: limit of open files.

    Raises:
        RuntimeError: it did not become ready.
    """
    command = [sys.executable, *program, "serve", "--port=0", f"--weights-dir={weights}"]
    command += ["--log-format=text", *flags]
    if files is not None:
        command = ["prlimit", f"--nofile={files}:{files}", *command]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("UNET_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=kept | (environment or {}),
            stderr=log,
            start_new_session=True,
        )
        subject = Subject(0, process, log)
        try:
            _wait_ready(subject)
            yield subject
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _wait_ready(subject: Subject) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and subject.process.poll() is None:
        if found := re.search(r"listening on http://\S+:(\d+)", subject.log()):
            subject.port = int(found[1])
            if subject.get("/readyz").status == 200:
                return
        time.sleep(0.02)
    raise RuntimeError(f"the service is not ready:\n{subject.log()[-2000:]}")
