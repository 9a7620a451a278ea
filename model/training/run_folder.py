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
    .lock           held while a run is at work in the folder
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
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
from model.errors import ConfigError
from model.training.plots import draw_curves
from model.training.recipe import SECTIONS, Recipe, rename_old_keys

log = logging.getLogger(__name__)

_MAY_CHANGE = {
    ("optim", "steps"),
    ("optim", "epochs"),
    ("optim", "minutes"),
    ("data", "golden"),
    ("data", "source"),
    ("data", "licence"),
}
"""What a run may be resumed with another value of, beside the whole of [run]: how long, and what
the checkpoint carries beside its weights."""


class Run:
    """A run's folder, which is there and locked: see `open_run`.

    Args:
        command: that began it, or goes on with it.

    Raises:
        ConfigError: the folder holds the state of a run of another recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe, command: str = "") -> None:
        self.folder = folder
        config = folder / "config.json"
        # before a state is saved there is nothing to go on with: a failed start binds nobody
        if self.has_state and config.exists():
            _check_same(folder, json.loads(config.read_text()), _plain(recipe.to_json()))
        self._write("config.json", recipe.to_json())
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "revision": git_revision(),
            "torch": torch.__version__,
        }
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps(start) + "\n")
        self._board: Any = None

    @property
    def has_state(self) -> bool:
        return (self.folder / "state.pt").exists()

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """The last saved state; None at the start. What was logged behind it is dropped."""
        state: dict[str, Any] | None = None
        if self.has_state:
            state = torch.load(self.folder / "state.pt", map_location=device, weights_only=True)
        step = state["step"] if state else 0
        kept = [record for record in self.records() if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.folder / "metrics.jsonl", lines.encode())
        self._board = _tensorboard(self.folder / "tensorboard", step + 1)
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
    """The run in `folder`, which is created if need be, and nobody else's meanwhile.

    Raises:
        ConfigError: the folder holds the state of a run of another recipe, or one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        run = Run(folder, recipe, command)
        try:
            yield run
        finally:
            run.close()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, and clear it of files that killed runs were about to write.

    The lock is the process's, however that ends; unlike that of `flock`, it is not inherited by
    the workers, who outlive a killed run by seconds.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"another run is at work in {folder}; give another --out, or wait for its end"
            ) from None
        for part in folder.glob(".*.part"):
            part.unlink()
        yield


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: what the recipe says `now` would not go on with what it said `before`.
    """
    for section, kind in SECTIONS.items():
        if section == "run":
            continue
        # a value that came into recipes later was its default before
        known = _plain(dataclasses.asdict(kind())) | rename_old_keys(
            section, before.get(section, {})
        )
        for name, value in now[section].items():
            if known[name] != value and (section, name) not in _MAY_CHANGE:
                raise ConfigError(
                    f"{folder} holds a run with {name} = {known[name]!r}, not {value!r}; "
                    "give another --out, or the same values to go on"
                )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back from JSON, tuples as lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer from `step` on, which hides what earlier ones wrote there; None if it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("no TensorBoard log: it is missing (pip install 'unet-server[train]')")
        return None
    return SummaryWriter(str(folder), purge_step=step)
