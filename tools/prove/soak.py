"""Mixed traffic for minutes, with models that are replaced: no answer is wrong, no memory is lost.

The clients pause every few seconds, after a model was replaced. Memory is read then, with no
request in the service, so that the figures can be compared.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import stats

from model.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from tools.prove.images import Mutator
from tools.prove.report import Row, at_least, at_most, format_counts, none_of, noted
from tools.prove.subject import WEIGHTS, Subject, serving
from tools.prove.wire import Answer, exchange, request

MAX_SLOPE = 1.0
"""Growth of the memory of all processes, in MB per minute."""
SETTLED = 0.5
"""Share of the time after which the memory is judged."""
_SIZES = ((1, 1), (60, 40), (200, 200), (256, 256), (300, 500), (544, 544), (700, 650), (1000, 900))
_OUTPUTS = ("mask", "mask", "mask", "probability", "instances", "overlay", "cutout", "polygons")
_TIMES = re.compile(rb'"milliseconds": ?{[^}]*}')
_CLIENTS = 3
_CYCLE_S = 3.0
"""Shortest time between two pauses."""
_PAUSE_S = 6.0
"""The service gives memory back after 2 to 4 s without a request."""
_RELOAD_S = 60.0
_ALLOWED = frozenset({200, 404, 413, 415, 422, 429, 503, 504})


def _encode(pixels: np.ndarray, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def _make_images() -> dict[str, bytes]:
    """Blobs on a dark ground, of several sizes and formats."""
    rng = np.random.default_rng(0)
    images = {}
    for (width, height), format in zip(_SIZES, itertools.cycle(("PNG", "TIFF", "BMP"))):
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2)).astype(np.float32)
        pixels = np.kron(coarse, np.ones((16, 16), np.float32))[:height, :width]
        noisy = np.clip(pixels * (pixels > 150) + rng.normal(20, 5, (height, width)), 0, 255)
        images[f"{width}x{height} {format}"] = _encode(noisy.astype(np.uint8), format)
    return images


@dataclasses.dataclass(frozen=True)
class Sample:
    """The memory at one pause: minutes since the start, and bytes of all processes."""

    minutes: float
    bytes: int


class Traffic:
    """Clients that send images, broken ones too, or disconnect.

    Attributes:
        statuses: of all answers.
        failures: answers that are wrong, or missing.
        masks: answers that were compared with an earlier one.
    """

    def __init__(self, subject: Subject) -> None:
        self.statuses: Counter[object] = Counter()
        self.failures: list[str] = []
        self.masks = 0
        self._subject = subject
        self._images = _make_images()
        self._known: dict[tuple[str, ...], bytes] = {}
        self._lock = threading.Lock()
        self._running, self._end = threading.Event(), threading.Event()
        self._idle = threading.Semaphore(0)
        roles = [self._send_image] * _CLIENTS + [self._send_broken, self._disconnect]
        self._threads = [
            threading.Thread(target=self._run, args=(role, seed)) for seed, role in enumerate(roles)
        ]
        for thread in self._threads:
            thread.start()

    def run_for(self, seconds: float) -> None:
        """Let the clients send for some time, then wait until each has its answer."""
        self._running.set()
        time.sleep(seconds)
        self._running.clear()
        for _ in self._threads:
            self._idle.acquire()

    def warm(self) -> None:
        """Send every image for every output once, so that all that is cached is cached."""
        for model, output, name in itertools.product(
            ("nuclei", "other"), sorted(set(_OUTPUTS)), sorted(self._images)
        ):
            self._request(model, output, name)

    def stop(self) -> None:
        """End the clients."""
        self._end.set()
        self._running.set()
        for thread in self._threads:
            thread.join()

    def _run(self, role: object, seed: int) -> None:
        assert callable(role)
        generator = random.Random(seed)
        while not self._end.is_set():
            self._running.wait()
            while self._running.is_set() and not self._end.is_set():
                try:
                    role(generator)
                except OSError as error:
                    self._fail(f"{type(error).__name__} of a client")
            self._idle.release()

    def _send_image(self, generator: random.Random) -> None:
        model = generator.choice(("nuclei", "nuclei", "other"))
        self._request(model, generator.choice(_OUTPUTS), generator.choice(sorted(self._images)))

    def _request(self, model: str, output: str, name: str) -> None:
        path = f"/segment?output={output}&model={model}"
        answer = self._subject.post(self._images[name], path=path)
        self._count(answer)
        if answer.status == 200:
            self._compare(name, output, answer)

    def _send_broken(self, generator: random.Random) -> None:
        images = {name: self._images[name] for name in sorted(self._images)}
        mutator = Mutator(images, generator.randrange(1 << 30))
        damaged = mutator.mutate(generator.choice(list(images.values())))
        kind = generator.choice(("image/png", "application/octet-stream", "multipart/form-data"))
        self._count(exchange(self._subject.port, request(damaged or b"x", kind=kind)))
        time.sleep(0.05)

    def _disconnect(self, generator: random.Random) -> None:
        """Leave while the request is sent, or while it is processed."""
        sent = request(self._images[generator.choice(sorted(self._images))])
        with socket.create_connection(("127.0.0.1", self._subject.port), 10) as connection:
            connection.sendall(sent[: generator.choice((len(sent), len(sent) // 2, 40))])
            time.sleep(0.2 * generator.random())
            if generator.random() < 0.5:  # reset
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        time.sleep(0.1)

    def _compare(self, name: str, output: str, answer: Answer) -> None:
        found = re.search(rb"\r\nx-model: (\S+)", answer.head)
        assert found is not None
        key = (name, output, found[1].decode())
        body = _TIMES.sub(b"", answer.body)
        with self._lock:
            self.masks += key in self._known
            if self._known.setdefault(key, body) != body:
                self.failures.append(f"another answer for {key}")

    def _count(self, answer: Answer) -> None:
        with self._lock:
            self.statuses[answer.status or answer.end] += 1
        if answer.status not in _ALLOWED or not answer.complete:
            self._fail(f"{answer.status} {answer.end}")

    def _fail(self, text: str) -> None:
        with self._lock:
            self.failures.append(text)


class Models:
    """A folder of weights whose files are replaced: by valid models, and by broken files.

    Args:
        folder: that the service watches.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._broken = itertools.cycle((random.Random(0).randbytes(1_000_000), _truncated(), b""))
        shutil.copy(WEIGHTS / "nuclei.safetensors", folder)
        shutil.copy(WEIGHTS / "person.safetensors", folder / "other.safetensors")

    def replace(self) -> None:
        """Replace one file: mostly the default model, sometimes the other one, by a broken file."""
        self._number += 1
        match self._number % 6:
            case 2:
                write_atomically(self._folder / "other.safetensors", next(self._broken))
            case 5:
                self._change(WEIGHTS / "person.safetensors", "other.safetensors")
            case _:
                self._change(WEIGHTS / "nuclei.safetensors", "nuclei.safetensors")

    def _change(self, source: Path, name: str) -> None:
        """Write a model with the same weights, and another hash."""
        checkpoint = load_checkpoint(source)
        card = {**checkpoint.card, "number": self._number}
        save_checkpoint(self._folder / name, dataclasses.replace(checkpoint, card=card))


def _truncated() -> bytes:
    return (WEIGHTS / "person.safetensors").read_bytes()[:5_000_000]


def run(seconds: float) -> list[Row]:
    """Send traffic for this time."""
    with tempfile.TemporaryDirectory() as name:
        models = Models(Path(name))
        with serving("--reload=on", weights=Path(name)) as subject:
            _wait_loaded(subject, "other")
            traffic, samples = Traffic(subject), list[Sample]()
            traffic.warm()
            start, late = time.monotonic(), 0
            try:
                while time.monotonic() < start + seconds:
                    before = subject.metric("reloads_total")
                    models.replace()
                    late += not _run_until_reloaded(subject, traffic, before)
                    leftovers = subject.leftovers()
                    minutes = (time.monotonic() - start) / 60
                    samples.append(Sample(minutes, _read_lowest_memory(subject)))
            finally:
                traffic.stop()
            reloads = subject.metric("reloads_total")
            kills = subject.metric("image_worker_kills_total", reason="leak")
            tracebacks = [line for line in subject.log().splitlines() if "Traceback" in line]
    settled = [each for each in samples if each.minutes >= SETTLED * samples[-1].minutes]
    peak = max(each.bytes for each in samples)
    return [
        noted("minutes, answers", f"{samples[-1].minutes:.1f}, {traffic.statuses.total():,}"),
        noted("statuses", format_counts(traffic.statuses)),
        none_of("wrong or missing answers", traffic.failures),
        at_least("answers that were compared with an earlier one", traffic.masks, 10),
        noted("models loaded or rejected", f"{reloads:g}"),
        at_most("files that were not loaded or rejected in a minute", late, 0),
        noted("memory at rest: first, settled, last", _describe(samples, settled)),
        noted("memory at rest: highest", f"{peak / 1e6:.0f} MB"),
        judge_slope("its slope in the second half", settled),
        noted("image workers replaced because they kept memory", f"{kills:g}"),
        none_of("left behind", leftovers),
        none_of("tracebacks in the log", tracebacks),
    ]


def _wait_loaded(subject: Subject, model: str) -> None:
    end = time.monotonic() + _RELOAD_S
    while time.monotonic() < end:
        if json.loads(subject.get(f"/models/{model}").body)["ready"]:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{model} was not loaded")


def _run_until_reloaded(subject: Subject, traffic: Traffic, before: float) -> bool:
    """Send traffic until a file was loaded or rejected; returns whether it was, in a minute."""
    end = time.monotonic() + _RELOAD_S
    while time.monotonic() < end:
        traffic.run_for(_CYCLE_S)
        if subject.metric("reloads_total") > before:
            return True
    return False


def _read_lowest_memory(subject: Subject) -> int:
    """The memory after a pause in which the service gives back what it does not need."""
    end, lowest = time.monotonic() + _PAUSE_S, subject.memory()
    while time.monotonic() < end:
        time.sleep(0.5)
        lowest = min(lowest, subject.memory())
    return lowest


def judge_slope(what: str, samples: Sequence[Sample]) -> Row:
    """Compare the growth of memory with its bound, as precisely as the samples allow.

    The slope is the median of those between all pairs of samples, with its confidence interval of
    95% (Theil and Sen; `scipy.stats.theilslopes`). Memory at rest varies by tens of megabytes, so
    that minutes cannot resolve the bound: such a run fails only if the whole interval is above it.
    """
    minutes = [each.minutes for each in samples]
    megabytes = [each.bytes / 1e6 for each in samples]
    slope, _, low, high = stats.theilslopes(megabytes, minutes, 0.95)
    is_resolved = high - low <= 2 * MAX_SLOPE
    return Row(
        what,
        f"{slope:.2f} MB per minute (95%: {low:.2f} to {high:.2f})",
        f"at most {MAX_SLOPE:g} MB per minute" + ("" if is_resolved else ", within the interval"),
        bool((slope if is_resolved else low) <= MAX_SLOPE),
    )


def _describe(samples: list[Sample], settled: list[Sample]) -> str:
    figures = (samples[0].bytes, settled[0].bytes, samples[-1].bytes)
    return ", ".join(f"{each / 1e6:.0f}" for each in figures) + " MB"
