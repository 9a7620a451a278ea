"""The folder of a training run: what is written down, and what a killed run goes on from.

::

    config.json     every value of the recipe
    starts.jsonl    when, by which command and with which code it was begun and gone on with
    state.pt        weights, average, optimiser, step: replaced in one step, or not at all
    metrics.jsonl   loss, learning rate and speed by step; scores of each validation
    curves.png      both, drawn
    samples.png     validation images with hits and misses
    tensorboard/    the same for TensorBoard
    report.json     written at the end
    NAME.safetensors
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from model.checkpoint import git_revision, write_atomically
from model.config import ConfigError
from model.pictures import draw_curves
from model.recipe import Recipe

log = logging.getLogger(__name__)

_MAY_CHANGE = {("optim", "steps"), ("optim", "epochs"), ("optim", "minutes")}
"""What a run may be resumed with another value of, beside the whole of [run]."""


class Run:
    """A run's folder, created or found.

    Args:
        command: that began it, or goes on with it.

    Raises:
        ConfigError: the folder holds a run of another recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe, command: str = "") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.json"
        if config.exists():
            _check_same(
                folder, json.loads(config.read_text()), json.loads(json.dumps(recipe.to_json()))
            )
        self._write("config.json", recipe.to_json())
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "revision": git_revision(),
            "torch": torch.__version__,
        }
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")
        self._board = _tensorboard(folder / "tensorboard")

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """The last saved state; None at the start. Later lines of the log are dropped."""
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        kept = [record for record in self.records() if record["step"] <= state["step"]]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.folder / "metrics.jsonl", lines.encode())
        return state

    def save_state(self, state: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "state.pt", buffer.getbuffer())

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def records(self) -> list[dict[str, Any]]:
        """The log so far; a last line that was cut off by a kill is left out."""
        records = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return records

    def draw(self) -> None:
        """Curves of what was logged."""
        try:
            draw_curves(self.records(), self.folder / "curves.png")
        except ImportError:
            log.warning("no curves.png: matplotlib is missing (pip install 'unet-server[train]')")

    def picture(self, name: str, picture: Image.Image) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        picture.save(path)

    def report(self, report: Mapping[str, Any]) -> None:
        self._write("report.json", report)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self.folder / name, (json.dumps(value, indent=2) + "\n").encode())

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


@contextlib.contextmanager
def open_run(folder: Path, recipe: Recipe, command: str = "") -> Iterator[Run]:
    run = Run(folder, recipe, command)
    try:
        yield run
    finally:
        run.close()


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for section, values in now.items():
        if section == "run" or not isinstance(values, dict):
            continue
        for name, value in values.items():
            old = before.get(section, {}).get(name)
            if old != value and (section, name) not in _MAY_CHANGE:
                raise ConfigError(
                    f"{folder} holds a run with {name} = {old!r}, not {value!r}; "
                    "give another --out, or the same values to go on"
                )


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no TensorBoard log: it is missing (pip install 'unet-server[train]')")
        return None
    return SummaryWriter(str(folder))
