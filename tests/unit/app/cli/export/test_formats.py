"""`unet export` for other programs: what is written, and that a failure leaves nothing."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from safetensors.numpy import load_file

from app import cli
from app.cli.export import formats
from model.checkpoint import load_checkpoint, save_checkpoint, update_manifest
from model.predict import attach_golden
from tests.conftest import write_tiny


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    return path


TENSORS = "image, uint8 (N, H, W, 3), to probabilities, float32 (N, 1, H, W)"


@pytest.mark.parametrize(
    ("flags", "tensors"),
    [
        ([], TENSORS),
        (
            ["--pixels", "float32"],
            TENSORS.replace("uint8 (N, H, W, 3)", "float32 0..255 (N, 3, H, W)"),
        ),
    ],
)
def test_onnx_is_written_and_its_tensors_are_printed(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], tensors: str
) -> None:
    graph = tiny_path.with_suffix(".onnx")
    assert cli.main(["export", str(tiny_path), "--onnx", str(graph), *flags]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{graph}: {tensors}; weights in fp32; within ")
    assert line.endswith(" of the reference in ONNX Runtime\n")
    assert onnx.load(graph).graph.input[0].name == "image"


def test_openvino_reads_the_onnx_graph_and_computes_the_same(tiny_path: Path) -> None:
    folder = tiny_path.parent
    arguments = ["--onnx", str(folder / "tiny.onnx"), "--openvino", str(folder / "openvino")]
    assert cli.main(["export", str(tiny_path), *arguments]) == 0
    window = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), np.uint8)
    found = [
        ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([window])[0]
        for path in (folder / "tiny.onnx", folder / "openvino/tiny.xml")
    ]
    assert np.abs(found[0] - found[1]).max() < 1e-5


def test_metadata_has_the_id_of_the_checkpoint_that_is_saved_before(tiny_path: Path) -> None:
    folder = tiny_path.parent
    wide, graph = folder / "wide.safetensors", folder / "wide.onnx"
    arguments = ["--base-features", "8", "--out", str(wide), "--onnx", str(graph)]
    assert cli.main(["export", str(tiny_path), *arguments]) == 0
    metadata = {each.key: each.value for each in onnx.load(graph).metadata_props}
    assert metadata["name"] == "wide"
    assert metadata["checkpoint_sha256"] == load_checkpoint(wide).sha256


def test_graph_is_written_and_its_tensors_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, graph = tmp_path / "tiny.safetensors", tmp_path / "tiny.xml"
    write_tiny(path)
    assert cli.main(["export", str(path), "--openvino", str(graph)]) == 0
    tensors = "image, uint8 (N, H, W, 3), to probabilities, float32 (N, 1, H, W)"
    line = f"{graph}: {tensors}; weights in fp32; golden mask with IoU 1.0000\n"
    assert capsys.readouterr().out == line
    written = ov.Core().read_model(graph)
    assert written.inputs[0].names == {"image"}
    assert written.outputs[0].names == {"probabilities"}


def test_graph_has_the_weights_in_fp32(tmp_path: Path) -> None:
    path, graph = tmp_path / "tiny.safetensors", tmp_path / "tiny.xml"
    write_tiny(path)
    checkpoint = load_checkpoint(path)
    state = {name: array * np.float32(1.0001) for name, array in checkpoint.state.items()}
    checkpoint = attach_golden(
        dataclasses.replace(checkpoint, state=state), checkpoint.golden.image
    )
    save_checkpoint(path, checkpoint)
    update_manifest(path)
    assert cli.main(["export", str(path), "--openvino", str(graph)]) == 0
    stored = {
        operation.get_data().tobytes()
        for operation in ov.Core().read_model(graph).get_ops()
        if operation.get_type_name() == "Constant"
    }
    weight = state["down_conv.0.first.weight"].astype(np.float32)
    assert weight.astype(np.float16).astype(np.float32).tobytes() != weight.tobytes()
    assert weight.tobytes() in stored


def test_fp16_halves_the_graph_and_is_said(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_path.parent
    for precision in ("fp32", "fp16"):
        arguments = ["--openvino", str(folder / precision), "--precision", precision]
        assert cli.main(["export", str(tiny_path), *arguments]) == 0
        assert f"; weights in {precision}; " in capsys.readouterr().out
    sizes = [(folder / each / "tiny.bin").stat().st_size for each in ("fp32", "fp16")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1


def test_graph_that_does_not_reproduce_the_golden_mask_is_not_written(
    tiny_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "GOLDEN_IOU", 1.01)
    folder = tiny_path.parent / "openvino"
    arguments = ["--openvino", str(folder), "--precision", "fp16"]
    assert cli.main(["export", str(tiny_path), *arguments]) == 2
    assert "tiny in fp16 does not reproduce its golden mask" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_state_dict_is_written(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_path.with_name("state.safetensors")
    assert cli.main(["export", str(tiny_path), "--state-dict", str(path)]) == 0
    assert "46 tensors in fp32" in capsys.readouterr().out
    state = load_file(path)
    for name, array in load_checkpoint(tiny_path).state.items():
        assert np.array_equal(state[name], array)
    assert cli.main(["import", str(path), "--out", str(path.parent / "again.safetensors")]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--openvino", "/no/such/tiny.xml"], "/no/such/tiny.xml cannot be written"),
        (["--openvino", "graph.onnx"], "--openvino graph.onnx: give a folder, or a file that ends"),
        (["--onnx", "/no/such/tiny.onnx"], "/no/such/tiny.onnx cannot be written: /no/such is"),
        (["--onnx", "graph.xml"], "--onnx graph.xml: the file's name ends with .onnx"),
        (["--state-dict", "state.bin"], "ends with .safetensors or .pt or .pth"),
        (["--state-dict", "/no/such/state.pt"], "/no/such/state.pt cannot be written"),
        (["--onnx", "{folder}/old.onnx"], "old.onnx exists; choose another name, or --force"),
        (["--openvino", "{folder}/old.xml"], "old.bin exists; choose another name, or --force"),
        (["--state-dict", "{folder}/tiny.safetensors", "--force"], "is the checkpoint itself"),
        (["--precision", "fp16"], "--precision needs --openvino"),
        (["--pixels", "uint8"], "--pixels needs --onnx"),
    ],
)
def test_mistake_is_one_line_and_changes_nothing(
    tiny_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_path.parent
    for name in ("old.onnx", "old.bin"):
        (folder / name).write_text("old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = [each.format(folder=folder) for each in arguments]
    assert cli.main(["export", str(tiny_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unet: error: ")
    assert says in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_existing_file_is_replaced_with_force(tiny_path: Path) -> None:
    graph = tiny_path.with_suffix(".onnx")
    graph.write_text("old")
    assert cli.main(["export", str(tiny_path), "--onnx", str(graph), "--force"]) == 0
    assert onnx.load(graph).graph.name == "tiny"


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("onnxruntime", ["--onnx", "graph.onnx"]),
        ("bioimageio.core", ["--bioimageio", "package.zip", "--author", "A"]),
    ],
)
def test_missing_package_is_named_before_anything_is_computed(
    package: str,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ending:
        cli.main(["export", "no-such.safetensors", *flags])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert f"export needs {package}, which is not installed" in error
    assert "pip install 'unet-server[export]'" in error


def test_onnx_graph_is_imported_and_is_not_exported_again(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_path.parent
    graph, checkpoint = folder / "tiny.onnx", folder / "again.safetensors"
    assert cli.main(["export", str(tiny_path), "--onnx", str(graph), "--pixels", "float32"]) == 0
    values = ["--std", *(["0.00392156862745098"] * 3)]
    assert cli.main(["import", str(graph), "--out", str(checkpoint), *values]) == 0
    capsys.readouterr()
    for flags in (
        ["--onnx", str(folder / "new.onnx")],
        ["--openvino", str(folder / "new.xml")],
        ["--state-dict", str(folder / "new.pt")],
        ["--base-features", "8"],
    ):
        assert cli.main(["export", str(checkpoint), *flags]) == 2
        assert capsys.readouterr().err == (
            "unet: error: again is an ONNX graph; this works with U-Nets of this project alone\n"
        )
    assert not list(folder.glob("new.*"))
