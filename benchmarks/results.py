"""Figures that are written as soon as they are measured, so that a killed run keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from model.checkpoint import write_atomically

T = TypeVar("T")


class Results:
    """The figures of one part of a run: printed, and kept in a JSON file.

    Args:
        path: of the file, which is replaced; None: figures are only printed.

    Attributes:
        figures: name -> value, as written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.figures: dict[str, Any] = {}
        self._start = time.monotonic()
        self._write()

    def add(self, name: str, value: Any, text: str = "") -> None:
        """Record a figure, and print it as `text`, or as it is."""
        self.figures[name] = value
        self._write()
        self._print(f"{name}: {text or value}")

    def append(self, name: str, row: dict[str, Any], text: str = "") -> None:
        """Record a row of a table, and print it as `text`, or as it is."""
        self.figures.setdefault(name, []).append(row)
        self._write()
        self._print(f"{name}: {text or row}")

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """Return `measure()`. An exception is recorded under `errors`, and None is returned."""
        try:
            return measure()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            self.append("errors", {name: f"{type(error).__name__}: {lines[0][:300]}"})
            return None

    @property
    def exit_status(self) -> int:
        """1 if a measurement raised an exception, otherwise 0."""
        return int("errors" in self.figures)

    def _write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, (json.dumps(self.figures, indent=1) + "\n").encode())

    def _print(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {line}", flush=True)
