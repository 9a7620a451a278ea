"""The CPU engine in a process whose threads and signals matter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.engine.cpus import count_cpus
from tests.conftest import ROOT, write_tiny

PROGRAM = """
import faulthandler, os, signal, sys, threading
from pathlib import Path
from app.engine.openvino import OpenVinoEngine
from model.checkpoint import load_checkpoint

faulthandler.enable()  # Python's handlers then run on the alternate stack of their thread
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
engine = OpenVinoEngine(load_checkpoint(Path(sys.argv[1])), threads=1, max_batch=1)
closing = threading.Thread(target=engine.close)
closing.start()
closing.join()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_another_thread_freed_the_engine(tmp_path: Path) -> None:
    checkpoint = tmp_path / "nuclei.safetensors"
    write_tiny(checkpoint)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint)], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


BINDING = """
import sys, threading, time
from pathlib import Path
from app.engine.openvino import OpenVinoEngine
from model.checkpoint import load_checkpoint

def read_masks():
    lines = [line for task in Path("/proc/self/task").iterdir()
             for line in (task / "status").read_text().splitlines()]
    return {line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")}

def compute():
    while not ended.is_set():
        engine.collect(engine.stage(engine.shapes[0], 1))

free = read_masks()
engine = OpenVinoEngine(load_checkpoint(Path(sys.argv[1])), threads=int(sys.argv[2]), max_batch=1)
ended = threading.Event()
thread = threading.Thread(target=compute)
thread.start()
seen = set()
for _ in range(300):  # a thread is bound during a computation only
    seen |= read_masks()
    time.sleep(0.002)
ended.set()
thread.join()
print("bound" if seen - free else "free")
"""


@pytest.mark.slow
@pytest.mark.skipif(count_cpus() < 2, reason="needs two CPUs")
@pytest.mark.parametrize(("threads", "expected"), [(1, "free"), (count_cpus(), "bound")])
def test_threads_are_bound_to_cpus_only_where_they_have_all_of_them(
    tmp_path: Path, threads: int, expected: str
) -> None:
    checkpoint = tmp_path / "nuclei.safetensors"
    write_tiny(checkpoint)
    command = [sys.executable, "-c", BINDING, str(checkpoint), str(threads)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr


def test_openvino_does_not_report_its_use() -> None:
    program = """
import multiprocessing, sys
def fail(process):
    raise AssertionError(f"{process} reports something")
multiprocessing.Process.start = fail
import app.engine.openvino
print([name for name in sys.modules if name.startswith("openvino_telemetry.")])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
