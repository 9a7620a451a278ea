"""A warm engine generates no kernels during a request, according to oneDNN's own log."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROGRAM = """
import dataclasses, sys
from pathlib import Path
from app.engine.openvino import OpenVinoEngine
from model.checkpoint import load_checkpoint

def engine(*shapes):
    preprocess = dataclasses.replace(
        person.preprocess, mode="native", size=(), window=shapes, overlap=16
    )
    checkpoint = dataclasses.replace(person, preprocess=preprocess)
    return OpenVinoEngine(checkpoint, threads=2, max_batch=1, precision=sys.argv[2])

def run(engine, name):
    print(name, flush=True)
    for shape in engine.shapes:
        engine.collect(engine.submit(engine.stage(shape, 1)))

person = load_checkpoint(Path(sys.argv[1]))
warm = engine((64, 64), (96, 64), (96, 96))
warm.warm()
run(warm, "WARM")
run(engine((80, 64), (80, 80)), "COLD")
"""
WEIGHTS = Path(__file__).parents[2] / "weights/person.safetensors"


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="kernels of other processors are not generated",
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_warm_engine_generates_no_kernels(precision: str) -> None:
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, WEIGHTS, precision],
        env={**os.environ, "ONEDNN_VERBOSE": "profile_create"},  # read once per process
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    warm, cold = output.split("WARM\n")[1].split("COLD\n")
    found = {
        name: Counter(word for word in text.split(",") if word.startswith("create:"))
        for name, text in (("warm", warm), ("cold", cold))
    }
    assert found["cold"]["create:cache_miss"] > 20  # so the log contains them
    assert found["warm"]["create:cache_miss"] == 0
