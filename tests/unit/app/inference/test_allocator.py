"""Memory that the C library keeps. Each test is a process of its own, whose memory is known."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc")

HOLES = """
from app.inference.allocator import trim_memory
from app.imaging.workers.child import MemoryUse
blocks = [bytes(50_000) for _ in range(2000)]
kept = blocks[::100]
del blocks
memory = MemoryUse()
before = memory.resident
trim_memory()
memory.update()
print(before - memory.resident)
"""
THREAD = """
import threading
from pathlib import Path
from app.inference.allocator import use_one_arena
use_one_arena()
found = []
thread = threading.Thread(target=lambda: found.append(bytearray(50_000)))
thread.start()
thread.join()
import ctypes
address = ctypes.addressof(ctypes.c_char.from_buffer(found[0]))
heaps = [line.split()[0].split("-") for line in Path("/proc/self/maps").open() if "[heap]" in line]
print(any(int(start, 16) <= address < int(end, 16) for start, end in heaps))
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_trimming_gives_back_memory_between_blocks_in_use() -> None:
    assert int(run(HOLES)) > 50_000_000


def test_threads_allocate_from_the_same_arena() -> None:
    assert run(THREAD) == "True"
    assert run(THREAD.replace("use_one_arena()\n", "", 1)) == "False"
