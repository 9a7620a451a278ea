"""The CPU engine in a process whose threads and signals matter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
