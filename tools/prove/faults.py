"""Engines that fail while clients send images: the right status, and the right probes.

Each fault is injected by `tools.prove.faulty`, for windows of one value. Normal clients send
other images all the time: their masks must not change.
"""

from __future__ import annotations

import io
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from tools.prove.report import Row, at_most, equal, format_counts, none_of
from tools.prove.subject import Subject, serving
from tools.prove.wire import Answer

_PROGRAM = ("-m", "tools.prove.faulty")
_CLIENTS = 3
_PER_IMAGE = ("error", "bug", "nan", "short", "host-memory")
"""Faults of one window, which gets 500 alone."""
_ENGINE_FAILED = 70
_WATCHDOG_S = 2.0
_TIMEOUT_S = 5.0
_DRAIN_S = 3.0
_STOP_S = 3.0
"""Longest time between the drain and the end of the process."""


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = _encode(np.random.default_rng(0).integers(0, 200, (200, 200), np.uint8))
POISON = _encode(np.full((200, 200), 255, np.uint8))


class Clients:
    """Normal clients, from the start of the block to its end.

    Attributes:
        statuses: of their answers, or how their connections ended.
        different: masks that differ from the first one.
    """

    def __init__(self, subject: Subject) -> None:
        self.statuses: Counter[object] = Counter()
        self.different = 0
        self._subject = subject
        self._expected = subject.post(GOOD).body
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(_CLIENTS)

    def __enter__(self) -> Clients:
        self._jobs = [self._pool.submit(self._send) for _ in range(_CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for job in self._jobs:
            job.result()
        self._pool.shutdown()

    def _send(self) -> None:
        while not self._end.wait(0.01):
            try:
                answer = self._subject.post(GOOD)
            except OSError:
                self.statuses["refused"] += 1
                continue
            self.statuses[answer.status or answer.end] += 1
            self.different += answer.status == 200 and answer.body != self._expected


def run(seconds: float) -> list[Row]:
    """Inject every fault once. `seconds` is not used: the watchdog sets the time."""
    rows = []
    for fault in _PER_IMAGE:
        rows += _fail_one_image(fault)
    rows += _run_out_of_memory()
    rows += _lose_device()
    rows += _hang()
    rows += _exit_on_failure("lost")
    rows += _exit_on_failure("hang")
    rows += _crash()
    return rows


@contextmanager
def _faulty(fault: str, *flags: str) -> Iterator[Subject]:
    with serving(
        f"--watchdog-s={_WATCHDOG_S}",
        f"--request-timeout-s={_TIMEOUT_S}",
        "--max-batch=8",
        *flags,
        program=_PROGRAM,
        environment={"FAULT": fault},
    ) as subject:
        yield subject


def _fail_one_image(fault: str) -> list[Row]:
    with _faulty(fault) as subject:
        with Clients(subject) as clients:
            answers = [subject.post(POISON) for _ in range(5)]
        statuses = Counter(answer.status for answer in answers)
        wrong = [f"{probe}: {status}" for probe, status in _probe(subject).items() if status != 200]
        leaked = [fault for answer in answers if b"secret" in answer.body]
        wrong += subject.leftovers()
    return [
        equal(f"{fault}: statuses of the image at fault", format_counts(statuses), "500: 5"),
        _only_masks(fault, clients),
        none_of(f"{fault}: wrong probes, leftovers, engine texts sent to clients", wrong + leaked),
    ]


def _run_out_of_memory() -> list[Row]:
    with _faulty("memory", "--max-wait-ms=100") as subject:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: subject.post(GOOD), range(48)))
        failures = subject.metric("batch_failures_total", error="OutOfMemory")
    statuses = Counter(answer.status for answer in answers)
    return [
        equal("out of memory in large batches: statuses", format_counts(statuses), "200: 48"),
        Row("batches that ran out of memory", f"{failures:g}", "at least 1", failures >= 1),
    ]


def _lose_device() -> list[Row]:
    with _faulty("lost") as subject:
        lost = subject.post(POISON)
        later, probes = subject.post(GOOD), _probe(subject)
        alive = subject.process.poll() is None
    expected = {"/livez": 503, "/readyz": 503, "/metrics": 200}
    return [
        equal(
            "device lost: the image at fault, the next one", (lost.status, later.status), (503, 503)
        ),
        equal("device lost: probes", probes, expected),
        equal("device lost: the process", "runs" if alive else "ended", "runs"),
        none_of("device lost: its text sent to clients", _texts(lost, later, b"illegal memory")),
    ]


def _hang() -> list[Row]:
    drain = f"--drain-s={_DRAIN_S}"
    with _faulty("hang", drain) as subject, ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        hung = pool.submit(subject.post, POISON)
        while subject.get("/livez").status == 200 and time.monotonic() < start + 60:
            time.sleep(0.02)
        noticed = time.monotonic() - start
        later, answer = subject.post(GOOD), hung.result()
        start = time.monotonic()
        subject.stop()
        stopped = time.monotonic() - start
    return [
        at_most("hang: /livez is 503 after", noticed, _WATCHDOG_S + 1, "s"),
        equal("hang: the image at fault, later ones", (answer.status, later.status), (504, 503)),
        at_most("hang: the image at fault is answered after", answer.seconds, _TIMEOUT_S + 1, "s"),
        at_most("hang: process ends after SIGTERM", stopped, _DRAIN_S + _STOP_S + 1, "s"),
    ]


def _exit_on_failure(fault: str) -> list[Row]:
    with _faulty(fault, "--exit-on-engine-failure=on") as subject:
        workers = subject.processes()[1:]
        start = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(subject.post, [POISON] * 3))
        status = subject.process.wait(60)
        seconds = time.monotonic() - start
        left = _wait_ended(workers)
    statuses = Counter(answer.status for answer in answers)
    name = f"{fault}, exit on engine failure"
    return [
        equal(f"{name}: waiting clients", format_counts(statuses), "503: 3"),
        equal(f"{name}: exit status", status, _ENGINE_FAILED),
        at_most(f"{name}: ends after", seconds, _WATCHDOG_S + 5, "s"),
        none_of(f"{name}: workers left", left),
    ]


def _crash() -> list[Row]:
    with _faulty("crash") as subject:
        workers = subject.processes()[1:]
        answer = subject.post(POISON)
        status = subject.process.wait(60)
        left = _wait_ended(workers)
    return [
        equal("crash of the engine: status of the client (0: no answer)", answer.status, 0),
        equal("crash of the engine: exit status", status, -signal.SIGSEGV),
        none_of("crash of the engine: workers left", left),
    ]


def _wait_ended(pids: list[int]) -> list[int]:
    """Wait a few seconds until processes have ended, and return those that have not."""
    end = time.monotonic() + 5
    while (
        left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    ) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def _probe(subject: Subject) -> dict[str, int]:
    return {path: subject.get(path).status for path in ("/livez", "/readyz", "/metrics")}


def _only_masks(fault: str, clients: Clients) -> Row:
    figure = f"{format_counts(clients.statuses)}; {clients.different} different masks"
    passed = set(clients.statuses) == {200} and not clients.different
    return Row(f"{fault}: other clients meanwhile", figure, "200 alone; 0 different masks", passed)


def _texts(*parts: Answer | bytes) -> list[str]:
    *answers, text = parts
    assert isinstance(text, bytes)
    return [str(each.status) for each in answers if isinstance(each, Answer) and text in each.body]
