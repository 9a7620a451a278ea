"""What the settings become on a machine, and that nothing falls back in silence."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest

from app.engine import selection as factory
from app.engine.memory import used_bytes
from app.engine.selection import choose_engines, cpu_quota, resolve
from app.errors import EngineUnavailable
from model.checkpoint import Checkpoint
from model.config import Calibration, PreprocessConfig, UNetConfig


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_cuda_devices", lambda: 2)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_cuda_devices", lambda: 0)


@pytest.mark.usefixtures("no_cuda")
def test_auto_on_a_cpu() -> None:
    (choice,) = choose_engines()
    assert (choice.backend, choice.device) == ("openvino", "cpu")
    assert choice.max_batch == 1
    assert "no CUDA device" in choice.reason


@pytest.mark.usefixtures("no_cuda")
def test_without_openvino_a_cpu_gets_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_installed", lambda package: package != "openvino")
    assert choose_engines()[0].backend == "torch"
    with pytest.raises(EngineUnavailable, match="pip install openvino"):
        choose_engines(engine="openvino")


@pytest.mark.usefixtures("cuda")
def test_auto_with_cuda() -> None:
    (choice,) = choose_engines()
    assert (choice.backend, choice.device, choice.precision) == ("torch", "cuda:0", "bf16")
    assert choice.max_batch == factory.CUDA_BATCH
    assert choose_engines(device="cpu")[0].device == "cpu"
    assert [each.device for each in choose_engines(device="cuda:0,cuda:1")] == ["cuda:0", "cuda:1"]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "cuda:5"}, "sees 2 CUDA devices"),
        ({"device": "cuda", "engine": "openvino"}, "runs on the CPU only"),
        ({"device": "cuda", "precision": "int8"}, "bf16 and fp16 and fp32"),
        ({"device": "cpu", "engine": "torch", "precision": "bf16"}, "UNET_PRECISION=bf16"),
    ],
)
def test_what_cannot_be_had_is_refused(settings: dict[str, str], says: str) -> None:
    with pytest.raises(EngineUnavailable, match=says):
        choose_engines(**settings)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_cuda")
def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(EngineUnavailable, match="torch sees 0 CUDA devices"):
        choose_engines(device="cuda")


def checkpoint(calibration: Calibration | None) -> Checkpoint:
    return Checkpoint("cells", UNetConfig(), PreprocessConfig(), {}, calibration=calibration)


PROVEN = Calibration({}, images=9, iou=0.995, dice_loss=0.001, golden_iou=0.99)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("calibration", "precision", "says"),
    [
        (None, "fp32", "this model has no calibration for int8"),
        (Calibration({}), "fp32", "int8 was measured on no validation image"),
        (dataclasses.replace(PROVEN, iou=0.93), "fp32", "int8 masks have IoU 0.9300"),
        (dataclasses.replace(PROVEN, dice_loss=0.003), "fp32", "lose 0.0030 Dice"),
        (dataclasses.replace(PROVEN, golden_iou=0.97), "fp32", "0.9700 on the golden image"),
        (PROVEN, "int8", "on 9 validation images"),
    ],
)
def test_int8_is_the_default_only_where_it_was_proven(
    calibration: Calibration | None, precision: str, says: str
) -> None:
    choice = resolve(choose_engines()[0], checkpoint(calibration))
    assert choice.precision == precision
    assert f"precision {precision}: " in choice.reason
    assert says in choice.reason


@pytest.mark.usefixtures("no_cuda")
def test_a_precision_that_is_asked_for_is_what_one_gets() -> None:
    asked = choose_engines(precision="int8")[0]
    assert resolve(asked, checkpoint(Calibration({}))).precision == "int8"
    assert resolve(choose_engines(precision="fp32")[0], checkpoint(PROVEN)).precision == "fp32"
    with pytest.raises(EngineUnavailable, match=r"cells has no calibration.*unet export cells"):
        resolve(asked, checkpoint(None))


@pytest.mark.usefixtures("no_cuda")
def test_bf16_on_a_cpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_bf16_on_cpu", lambda: True)
    assert choose_engines(precision="bf16")[0].precision == "bf16"
    assert resolve(choose_engines()[0], checkpoint(None)).precision == "fp32"  # it must be asked
    monkeypatch.setattr(factory, "_bf16_on_cpu", lambda: False)
    with pytest.raises(EngineUnavailable, match="there is fp32 and int8"):
        choose_engines(precision="bf16")


@pytest.mark.usefixtures("no_cuda")
def test_torch_on_a_cpu_has_no_int8() -> None:
    with pytest.raises(
        EngineUnavailable, match=r"^UNET_PRECISION=int8 .* torch on cpu; there is fp32"
    ):
        choose_engines(engine="torch", precision="int8")


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, CORES),
        ({"cpu.max": "max 100000\n"}, CORES),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, CORES),
        ({"cpu.max": "nonsense"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_quota(tmp_path) == cpus


def test_memory_of_a_device_that_is_lost_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def lost(device: str) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    assert used_bytes("cuda:0") == 70
    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    assert math.isnan(used_bytes("cuda:0"))
