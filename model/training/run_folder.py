"""The folder of a training run: the recipe, the log, and the state from which a run is resumed.

::

    config.json     every value of the recipe
    recipe.toml     the recipe that was made of two folders
    starts.jsonl    time, command and code revision of each start
    state.pt        weights, their moving average, the optimizer's state and the step
    metrics.jsonl   by step: loss, learning rate and speed; scores of each validation
    curves.png      a plot of metrics.jsonl
    samples.png     validation images with hits and misses, or with the colors of classes
    confusion.csv, confusion.png    of several classes, written at the end
    pictures/       further previews, if the recipe asks for them
    tensorboard/    metrics and pictures for TensorBoard, and at the end the recipe
    report.json     written at the end
    NAME.safetensors, manifest.json
    .lock           locked while a run uses the folder

Whole files are replaced atomically, so a run may be killed at any moment. Knows files; no network,
no data sets.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.arrays import AnyArray
from model.checkpoint import git_revision, write_atomically
from model.errors import ConfigError, WriteError
from model.training.plots import draw_confusion, draw_curves, format_confusion
from model.training.recipe import SECTIONS, Recipe, rename_old_keys

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    ("optim", "steps"),
    ("optim", "epochs"),
    ("optim", "minutes"),
    ("optim", "stop_after"),
    ("data", "golden"),
    ("data", "source"),
    ("data", "licence"),
}
"""Values that a resumed run may change, besides all of [run]: how long it trains, and what the
checkpoint contains besides weights."""


class RunFolder:
    """A run's folder. It exists and is locked: create it with `open_run`.

    Every method that writes raises a `WriteError` if it cannot.

    Args:
        folder: exists.
        recipe: of this run.
        command: that starts or resumes the run; recorded in starts.jsonl.

    Raises:
        ConfigError: the folder contains the state of a run with another recipe, or config.json is
            damaged.
        WriteError: the folder cannot be written.
    """

    def __init__(self, folder: Path, recipe: Recipe, command: str = "") -> None:
        self.path = folder
        self._board: Any = None
        # A run that failed before its first state cannot be resumed, so another may replace it.
        if self.has_state:
            _check_same_recipe(folder, recipe)
        self._write_json("config.json", recipe.to_json())
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "revision": git_revision(),
            "torch": torch.__version__,
        }
        self._append_line("starts.jsonl", start)

    @property
    def has_state(self) -> bool:
        """Whether a state was saved, from which the run can be resumed."""
        return (self.path / "state.pt").exists()

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """Load the last saved state, or None if there is none; then open the log for appending.

        Metrics that were logged after that state are removed: the resumed run logs them again.
        """
        state: dict[str, Any] | None = None
        if self.has_state:
            state = torch.load(self.path / "state.pt", map_location=device, weights_only=True)
        step = state["step"] if state else -1  # the start of a run is validated at step 0
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        with report_write_errors(self.path):
            write_atomically(self.path / "metrics.jsonl", lines.encode())
            self._board = _open_tensorboard(self.path / "tensorboard", step + 1)
        return state

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace state.pt atomically.

        Args:
            state: of `model.training.trainer.Trainer.state`.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with report_write_errors(self.path):
            write_atomically(self.path / "state.pt", buffer.getbuffer())

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append metrics to metrics.jsonl; numbers also go to TensorBoard."""
        self._append_line("metrics.jsonl", {"step": step, **metrics})
        if self._board is not None:
            with report_write_errors(self.path / "tensorboard"):
                for name, value in metrics.items():
                    if isinstance(value, int | float):
                        self._board.add_scalar(name, value, step)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a line that a kill left incomplete is skipped."""
        records = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return records

    def save_curves(self, step: int | None = None) -> None:
        """Plot the logged metrics as curves.png; without matplotlib, log a warning instead.

        Args:
            step: as for `save_image`.
        """
        records = self.read_metrics()
        try:
            with report_write_errors(self.path):
                draw_curves(records, self.path / "curves.png")
        except ImportError:
            logger.warning(
                "curves.png is not written: matplotlib is not installed "
                "(pip install 'unet-server[train]')"
            )
        else:
            self._show_picture("curves.png", step)

    def save_image(self, name: str, image: Image.Image, step: int | None = None) -> None:
        """Write an image.

        Args:
            name: path in the folder; its parent is created.
            step: that it shows, if it goes to TensorBoard too.
        """
        path = self.path / name
        with report_write_errors(self.path):
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        self._show_picture(name, step)

    def save_confusion(self, confusion: AnyArray, classes: Sequence[str], step: int) -> None:
        """Write a confusion matrix as confusion.csv and, with matplotlib, as confusion.png.

        Args:
            step: of the weights.
        """
        with report_write_errors(self.path):
            text = format_confusion(confusion, classes)
            write_atomically(self.path / "confusion.csv", text.encode())
            with contextlib.suppress(ImportError):  # `save_curves` has warned
                draw_confusion(confusion, classes, self.path / "confusion.png")
                self._show_picture("confusion.png", step)

    def log_hyperparameters(self, recipe: Recipe, scores: Mapping[str, Any], step: int) -> None:
        """Give TensorBoard the recipe and the scores at the end, for its table of runs.

        Args:
            scores: of the weights in the checkpoint; only numbers are taken.
            step: of these weights.
        """
        if self._board is None:
            return
        metrics = {
            f"final/{name}": value
            for name, value in scores.items()
            if isinstance(value, int | float)
        }
        with report_write_errors(self.path / "tensorboard"):
            # "." is the run itself; otherwise it would be a second run
            self._board.add_hparams(_flatten(recipe), metrics, run_name=".", global_step=step)

    def save_text(self, name: str, text: str) -> None:
        """Replace a text file atomically."""
        with report_write_errors(self.path):
            write_atomically(self.path / name, text.encode())

    def save_report(self, report: Mapping[str, Any]) -> None:
        """Write report.json."""
        self._write_json("report.json", report)

    def close(self) -> None:
        """Flush and close the TensorBoard log."""
        if self._board is not None:
            with report_write_errors(self.path / "tensorboard"):
                self._board.close()

    def _show_picture(self, name: str, step: int | None) -> None:
        """Give TensorBoard a picture of the folder, unless `step` is None."""
        if self._board is None or step is None:
            return
        with report_write_errors(self.path / "tensorboard"):
            with Image.open(self.path / name) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._board.add_image(Path(name).stem, pixels, step, dataformats="HWC")

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with report_write_errors(self.path):
            write_atomically(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def _append_line(self, name: str, value: Mapping[str, Any]) -> None:
        with report_write_errors(self.path), (self.path / name).open("a") as file:
            file.write(json.dumps(value) + "\n")


@contextlib.contextmanager
def open_run(folder: Path, recipe: Recipe, command: str = "") -> Iterator[RunFolder]:
    """Create a run's folder if needed, lock it, and open the run in it.

    Args:
        recipe, command: as for `RunFolder`.

    Raises:
        ConfigError: the folder contains a run with another recipe, or is locked by another run.
        WriteError: the folder cannot be created or written.
    """
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _lock_folder(folder):
        run = RunFolder(folder, recipe, command)
        try:
            yield run
        finally:
            run.close()


@contextlib.contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Convert an `OSError` in the block into a `WriteError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, and delete the incomplete files that killed runs left.

    The lock belongs to the process and ends with it. A lock of `flock` would be inherited by the
    worker processes, which may outlive a killed run by seconds.

    Raises:
        ConfigError: another process has the lock.
        WriteError: the folder cannot be written.
    """
    with report_write_errors(folder):
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"{folder} is locked by another run; give another --out, or wait until it ends"
            ) from None
        for part in folder.glob(".*.part"):
            part.unlink()
        yield


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Check that a run's recipe allows the run in `folder` to be resumed.

    Raises:
        ConfigError: a value differs that may not change, or config.json is damaged.
    """
    config = folder / "config.json"
    if not config.exists():
        return
    try:
        saved = json.loads(config.read_text())
        sections = {section: dict(saved.get(section, {})) for section in SECTIONS}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{config} is damaged: {error}; give another --out") from error
    current = _json_types(recipe.to_json())
    for section, kind in SECTIONS.items():
        if section == "run":
            continue
        # a value that recipes did not have yet was its default
        defaults = _json_types(kind().to_json())
        before = defaults | rename_old_keys(section, sections[section])
        for name, value in current[section].items():
            if before[name] != value and (section, name) not in _MAY_CHANGE:
                raise ConfigError(
                    f"{folder} contains a run with {name} = {before[name]!r}, not {value!r}; "
                    "give another --out, or the same value to resume it"
                )


def _json_types(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to the types that reading JSON gives: tuples to lists."""
    converted: dict[str, Any] = json.loads(json.dumps(values))
    return converted


def _flatten(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """Name the values of a recipe `section.field`; lists become text."""
    flat: dict[str, bool | int | float | str] = {}
    for section, values in recipe.to_json().items():
        for name, value in values.items() if isinstance(values, dict) else ():
            is_plain = isinstance(value, bool | int | float | str)
            flat[f"{section}.{name}"] = value if is_plain else json.dumps(value)
    return flat


def _open_tensorboard(folder: Path, step: int) -> Any:
    """Open a TensorBoard log that hides earlier records from `step` on.

    Returns:
        A `SummaryWriter`, or None if TensorBoard is not installed; a warning is logged.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning(
            "no TensorBoard log is written: tensorboard is not installed "
            "(pip install 'unet-server[train]')"
        )
        return None
    return SummaryWriter(str(folder), purge_step=step)
