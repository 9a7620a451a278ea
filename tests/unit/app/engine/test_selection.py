"""How settings become engines on a machine, without a silent fallback."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from app.engine import selection
from app.engine.cpus import count_cpus
from app.engine.selection import choose_engines, cpu_quota, resolve
from app.errors import EngineUnavailable
from model.checkpoint import Checkpoint
from model.config import Calibration, GraphConfig, PreprocessConfig, UNetConfig
from model.cuda import CudaDevice, CudaDevices


def set_devices(
    monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], **found: Any
) -> None:
    """Let the machine have cards of these compute capabilities."""
    devices = tuple(CudaDevice(f"Card {each[0]}{each[1]}", each) for each in capabilities)
    result = CudaDevices(devices, **found)
    monkeypatch.setattr(selection, "find_cuda_devices", lambda: result)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, (9, 0), (8, 0))


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, problem="no CUDA device: no driver", expected=False)


@pytest.mark.usefixtures("no_cuda")
def test_auto_on_a_cpu_is_openvino() -> None:
    (choice,) = choose_engines()
    assert (choice.backend, choice.device) == ("openvino", "cpu")
    assert choice.max_batch == 1
    assert "no CUDA device" in choice.reason


@pytest.mark.usefixtures("no_cuda")
def test_auto_without_openvino_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_installed", lambda package: package != "openvino")
    assert choose_engines()[0].backend == "torch"
    with pytest.raises(EngineUnavailable, match="pip install openvino"):
        choose_engines(engine="openvino")


@pytest.mark.usefixtures("cuda")
def test_auto_with_cuda_is_torch_in_bf16() -> None:
    (choice,) = choose_engines()
    assert (choice.backend, choice.device, choice.precision) == ("torch", "cuda:0", "bf16")
    assert choice.max_batch == selection.CUDA_BATCH
    assert choose_engines(device="cpu")[0].device == "cpu"
    assert [each.device for each in choose_engines(device="cuda:0,cuda:1")] == ["cuda:0", "cuda:1"]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:5"}, "sees 2 CUDA devices"),
        ({"device": "cuda", "engine": "openvino"}, "runs on the CPU only"),
        ({"device": "cuda", "precision": "int8"}, "supported: bf16, fp16, fp32"),
        ({"device": "cpu", "engine": "torch", "precision": "bf16"}, "UNET_PRECISION=bf16"),
    ],
)
def test_unsupported_settings_are_rejected(settings: dict[str, str], message: str) -> None:
    with pytest.raises(EngineUnavailable, match=message):
        choose_engines(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capabilities", "precision", "message"),
    [
        ([(9, 0), (8, 0)], "bf16", "Card 80, compute capability 8.0"),
        ([(8, 0), (7, 5)], "fp16", "Card 75, compute capability 7.5"),
        ([(6, 1)], "fp32", "Card 61, compute capability 6.1"),
    ],
)
def test_precision_is_one_that_every_card_has(
    capabilities: list[tuple[int, int]],
    precision: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_devices(monkeypatch, *capabilities)
    names = ",".join(f"cuda:{index}" for index in range(len(capabilities)))
    for choice in choose_engines(device=names):
        assert choice.precision == precision
        assert f"precision {precision}: {message}" in choice.reason
    if precision != "bf16":
        with pytest.raises(EngineUnavailable, match=r"bf16 is not supported.*supported: fp"):
            choose_engines(device=names, precision="bf16")


def test_auto_says_why_it_leaves_a_device_that_should_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_devices(monkeypatch, problem="the driver is too old")
    (choice,) = choose_engines()
    assert choice.device == "cpu"
    assert "device cpu: the driver is too old" in choice.reason
    assert caplog.messages == ["device cpu: the driver is too old"]


@pytest.mark.usefixtures("no_cuda")
def test_auto_is_quiet_on_a_machine_without_a_device(caplog: pytest.LogCaptureFixture) -> None:
    choose_engines()
    assert not caplog.messages


@pytest.mark.usefixtures("no_cuda")
def test_cuda_without_a_device_is_rejected() -> None:
    with pytest.raises(EngineUnavailable, match="UNET_DEVICE=cuda: no CUDA device: no driver"):
        choose_engines(device="cuda")


def checkpoint(calibration: Calibration | None) -> Checkpoint:
    return Checkpoint("cells", UNetConfig(), PreprocessConfig(), {}, calibration=calibration)


VALIDATED = Calibration({}, images=9, iou=0.995, dice_loss=0.001, golden_iou=0.99)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("calibration", "precision", "message"),
    [
        (None, "fp32", "this model has no calibration for int8"),
        (Calibration({}), "fp32", "int8 was measured on no validation image"),
        (dataclasses.replace(VALIDATED, iou=0.93), "fp32", "int8 masks have IoU 0.9300"),
        (dataclasses.replace(VALIDATED, dice_loss=0.003), "fp32", "lose 0.0030 Dice"),
        (dataclasses.replace(VALIDATED, golden_iou=0.97), "fp32", "0.9700 on the golden image"),
        (VALIDATED, "int8", "on 9 validation images"),
    ],
)
def test_int8_is_the_default_only_where_it_was_validated(
    calibration: Calibration | None, precision: str, message: str
) -> None:
    choice = resolve(choose_engines()[0], checkpoint(calibration))
    assert choice.precision == precision
    assert f"precision {precision}: " in choice.reason
    assert message in choice.reason


@pytest.mark.usefixtures("no_cuda")
def test_a_precision_that_is_set_is_used() -> None:
    int8 = choose_engines(precision="int8")[0]
    assert resolve(int8, checkpoint(Calibration({}))).precision == "int8"
    assert resolve(choose_engines(precision="fp32")[0], checkpoint(VALIDATED)).precision == "fp32"
    with pytest.raises(EngineUnavailable, match=r"cells has no calibration.*unet export cells"):
        resolve(int8, checkpoint(None))


@pytest.mark.usefixtures("no_cuda")
def test_bf16_on_a_cpu_needs_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "cpu_has_bf16", lambda: True)
    assert choose_engines(precision="bf16")[0].precision == "bf16"
    assert resolve(choose_engines()[0], checkpoint(None)).precision == "fp32"  # bf16 must be set
    monkeypatch.setattr(selection, "cpu_has_bf16", lambda: False)
    with pytest.raises(EngineUnavailable, match="supported: fp32, int8"):
        choose_engines(precision="bf16")


@pytest.mark.usefixtures("no_cuda")
def test_torch_on_a_cpu_does_not_support_int8() -> None:
    with pytest.raises(
        EngineUnavailable, match=r"^UNET_PRECISION=int8 .* torch on cpu; supported: fp32"
    ):
        choose_engines(engine="torch", precision="int8")


CORES = count_cpus()


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
def test_cpu_quota_follows_the_cgroup(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_quota(tmp_path) == cpus


GRAPH = Checkpoint("theirs", GraphConfig(), PreprocessConfig(), {})


@pytest.mark.usefixtures("no_cuda")
def test_graph_runs_by_openvino_on_a_cpu() -> None:
    choice = resolve(choose_engines()[0], GRAPH)
    assert (choice.backend, choice.precision) == ("openvino", "fp32")
    assert choice.reason.endswith("precision fp32: this model has no calibration for int8")


@pytest.mark.usefixtures("no_cuda")
def test_graph_does_not_run_by_torch_on_a_cpu() -> None:
    with pytest.raises(EngineUnavailable, match="torch does not run ONNX graphs on a CPU"):
        resolve(choose_engines(engine="torch")[0], GRAPH)


@pytest.mark.usefixtures("no_cuda")
def test_graph_runs_in_int8_by_the_rule_of_other_networks() -> None:
    for calibration, precision in ((VALIDATED, "int8"), (Calibration({}), "fp32")):
        graph = dataclasses.replace(GRAPH, calibration=calibration)
        assert resolve(choose_engines()[0], graph).precision == precision
        assert resolve(choose_engines(precision="int8")[0], graph).precision == "int8"
    command = r"theirs has no calibration.*: unet export theirs\.safetensors --calibrate RECIPE"
    with pytest.raises(EngineUnavailable, match=command):
        resolve(choose_engines(precision="int8")[0], GRAPH)


@pytest.mark.usefixtures("cuda")
def test_calibrated_graph_runs_in_fp32_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_installed", lambda _: True)
    graph = dataclasses.replace(GRAPH, calibration=VALIDATED)
    assert resolve(choose_engines()[0], graph).precision == "fp32"
    with pytest.raises(EngineUnavailable, match="int8 is not supported"):
        choose_engines(precision="int8")


@pytest.mark.usefixtures("cuda")
def test_graph_runs_by_onnx_runtime_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_installed", lambda _: True)
    for choice in (choose_engines()[0], choose_engines(precision="fp32")[0]):
        resolved = resolve(choice, GRAPH)
        assert (resolved.backend, resolved.precision) == ("onnxruntime", "fp32")
        assert resolved.device == "cuda:0"
    with pytest.raises(
        EngineUnavailable, match="bf16: theirs is an ONNX graph, which runs in fp32"
    ):
        resolve(choose_engines(precision="bf16")[0], GRAPH)


@pytest.mark.usefixtures("cuda")
def test_graph_needs_an_extra_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_installed", lambda package: package != "onnxruntime")
    with pytest.raises(EngineUnavailable, match=r"pip install 'unet-server\[onnx\]'") as caught:
        resolve(choose_engines()[0], GRAPH)
    assert "\n" not in str(caught.value)
