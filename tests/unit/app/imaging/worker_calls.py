"""Functions that the tests of image workers run in them."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from app import errors
from app.imaging.workers import child
from app.imaging.workers.shared import SharedBlock, StoredArray

_kept: list[bytes] = []


def echo(value: Any) -> Any:
    return value


def double(values: StoredArray, target: SharedBlock) -> int:
    array = values.load()
    size = target.write(array.tobytes())
    values.block.store(array * 2)
    return size


def fail(name: str, text: str) -> None:
    raise getattr(errors, name)(text)


def divide_by_zero() -> float:
    return 1 / 0


def spin() -> None:
    while True:
        pass


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def sleep_in_c() -> None:
    """Holds Python's lock, as a decoder may do."""
    ctypes.PyDLL(None).sleep(60)


def allocate(size: int) -> None:
    np.ones(size, np.uint8)


def allocate_within_a_decoder(size: int) -> None:
    """A decoder's MemoryError, reported as a damaged image."""
    try:
        bytearray(size)
    except MemoryError as error:
        raise errors.CorruptImage("damaged") from error


def keep(size: int) -> None:
    _kept.append(b"x" * size)


def send_to_itself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def write_pid_and_spin(path: str, portable: bool) -> None:
    """With `portable`, the kernel does not kill this process when its parent ends."""
    if portable:
        ctypes.CDLL(None).prctl(child.PR_SET_PDEATHSIG, 0)
        child.end_with_input()
    Path(path).write_text(str(os.getpid()))
    spin()


def write_to_stderr(size: int) -> None:
    os.write(2, b"x" * (size // 2))
    sys.stderr.write("y" * (size // 2) + "\n")
    sys.stderr.flush()


def modules() -> list[str]:
    return list(sys.modules)
