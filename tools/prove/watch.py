"""Watches a service while it is attacked: its probe, its memory, and a normal client."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
from PIL import Image

from tools.prove.subject import ROOT, Subject

LIVEZ_MS = 50.0
"""Longest answer of a probe."""


def small_image() -> bytes:
    """A PNG of one window."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Watch:
    """Watches a service while it is attacked.

    Attributes:
        probes: of `/livez`: when each was sent, by the monotonic clock, and its milliseconds.
        normal: outcomes of a client with a normal image.
        peak: bytes of all processes.
    """

    def __init__(self, subject: Subject) -> None:
        self.probes: list[tuple[float, float]] = []
        self.normal: Counter[object] = Counter()
        self.peak = 0
        self._subject = subject
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_images), threading.Thread(target=self._read_memory)
        ]  # fmt: skip

    def __enter__(self) -> Watch:
        # In a process of its own: the threads of this one wait for each other.
        command = [sys.executable, "-m", "tools.prove.livez", str(self._subject.port)]
        self._probe = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        output = self._probe.communicate()[0]
        lines = [line.split() for line in output.splitlines()]
        self.probes = [(float(sent), float(latency)) for sent, latency in lines]
        for thread in self._threads:
            thread.join()

    @property
    def slowest_livez(self) -> tuple[float, float]:
        """When the slowest probe was sent, and its milliseconds; infinite if there was none."""
        return max(self.probes, key=lambda probe: probe[1], default=(0.0, float("inf")))

    @property
    def rejections(self) -> set[object]:
        """Outcomes of the normal client that it should not have met."""
        return set(self.normal) - {200, 429}

    def _send_images(self) -> None:
        image = small_image()
        while not self._end.wait(0.2):
            try:
                self.normal[self._subject.post(image).status] += 1
            except OSError as error:
                self.normal[type(error).__name__] += 1

    def _read_memory(self) -> None:
        while not self._end.wait(0.1):
            self.peak = max(self.peak, self._subject.memory())
