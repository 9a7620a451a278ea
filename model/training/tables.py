"""Text files about images: their groups, their scores, and which of them are for validation.

Knows no images.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from model.errors import DataError
from model.files import MAX_TEXT_BYTES, read_file
from model.training.images import FILE_SUFFIXES


def read_groups(table: Path, column: str) -> dict[str, str]:
    """Read the group of each image from a CSV file.

    Args:
        table: has a header with the column `id`.
        column: of the groups.

    Returns:
        id -> group.

    Raises:
        DataError: the file cannot be read, is not CSV in UTF-8, or lacks a column or a value.
    """
    text = _read_text(table)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"{table} is not a CSV file: {error}") from error
    if not rows or column not in rows[0] or "id" not in rows[0]:
        raise DataError(f"{table} needs the columns 'id' and {column!r}")
    for number, row in enumerate(rows, start=2):
        if not (row["id"] and row[column]):
            raise DataError(f"{table}, row {number}: no value for 'id' or {column!r}")
    return {row["id"]: row[column] for row in rows}


def read_scores(report: Path) -> dict[str, float]:
    """Read the Dice of each image from the JSON that `unet evaluate --json` writes.

    Returns:
        id -> Dice, 0..1.

    Raises:
        DataError: the file cannot be read or is not such a report.
    """
    text = _read_text(report)
    try:
        images = json.loads(text)["images"]
        scores = {image["id"]: float(image["dice"]) for image in images}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{report} was not written by `unet evaluate --json`: {error}") from error
    for id, score in scores.items():
        if not 0 <= score <= 1:
            raise DataError(f"{report}: the Dice of {id} must be 0..1, not {score}")
    return scores


def read_validation_list(path: Path) -> set[str]:
    """Read one id per line, with or without the suffix of the image's file."""
    lines = [line.strip() for line in _read_text(path).splitlines()]
    return {
        line.removesuffix(Path(line).suffix) if Path(line).suffix.lower() in FILE_SUFFIXES else line
        for line in lines
        if line
    }


def _read_text(path: Path) -> str:
    """Read UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        return read_file(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
