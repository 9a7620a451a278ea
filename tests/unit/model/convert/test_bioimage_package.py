"""Packages of bioimage.io: what their description says becomes preprocessing, or is rejected."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.convert.bioimage_package import Package, Preprocessing, read_package
from model.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "package.zip"


def save(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(path: Path, description: dict[str, Any] | str, **files: bytes) -> None:
    text = description if isinstance(description, str) else json.dumps(description)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rdf.yaml", text)
        archive.writestr("weights.onnx", b"graph")
        for name, content in files.items():
            archive.writestr(name.replace("_npy", ".npy"), content)


def describe_new(*steps: dict[str, Any], channels: int = 1, **changes: Any) -> dict[str, Any]:
    """A description in version 0.5."""
    space = [{"type": "space", "id": axis, "size": {"min": 64, "step": 16}} for axis in ("y", "x")]
    tensor = {
        "id": "raw",
        "axes": [
            {"type": "batch"},
            {"type": "channel", "channel_names": [f"channel{i}" for i in range(channels)]},
            *space,
        ],
        "data": {"type": "uint8"},
        "preprocessing": list(steps),
        "test_tensor": {"source": "input.npy"},
    }
    output = {
        "id": "mask",
        "axes": [{"type": "batch"}, {"type": "channel", "channel_names": ["nucleus"]}, *space],
        "test_tensor": {"source": "output.npy"},
    }
    return {
        "type": "model",
        "format_version": "0.5.3",
        "license": "CC-BY-4.0",
        "training_data": {"id": "zenodo/1"},
        "inputs": [tensor | changes],
        "outputs": [output],
        "weights": {"onnx": {"source": "weights.onnx", "opset_version": 17}},
    }


def describe_old(**changes: Any) -> dict[str, Any]:
    """A description in version 0.4."""
    tensor = {
        "name": "raw",
        "axes": "bcyx",
        "data_type": "float32",
        "data_range": [0, 255],
        "shape": {"min": [1, 3, 64, 64], "step": [0, 0, 32, 32]},
    }
    output = {"name": "mask", "axes": "bcyx", "postprocessing": [{"name": "sigmoid"}]}
    return {
        "format_version": "0.4.10",
        "inputs": [tensor | changes],
        "outputs": [output],
        "test_inputs": ["input.npy"],
        "test_outputs": ["output.npy"],
        "weights": {"onnx": {"source": "./weights.onnx"}},
    }


TENSORS = {
    "input_npy": save(np.full((1, 1, 64, 80), 7, np.uint8)),
    "output_npy": save(np.full((1, 1, 64, 80), 0.5, np.float32)),
}


def read(path: Path) -> Package:
    package = read_package(path)
    assert package is not None
    return package


def test_new_description_is_read(path: Path) -> None:
    write(path, describe_new(), **TENSORS)
    package = read(path)
    assert package.graph == b"graph"
    assert package.divisor == 16
    assert package.classes == ("nucleus",)
    assert (package.licence, package.data) == ("CC-BY-4.0", "zenodo/1")
    assert not package.is_activated
    assert package.image is not None
    assert package.image.shape == (64, 80)
    assert package.image.dtype == np.uint8
    assert package.expected is not None
    assert package.expected.shape == (1, 64, 80)


def test_old_description_is_read(path: Path) -> None:
    tensors = {
        "input_npy": save(np.full((1, 3, 64, 64), 7, np.float32)),
        "output_npy": save(np.zeros((1, 1, 64, 64), np.float32)),
    }
    write(path, describe_old(), **tensors)
    package = read(path)
    assert package.divisor == 32
    assert package.is_activated
    assert package.preprocessing.std == pytest.approx([1 / 255] * 3)
    assert package.image is not None
    assert package.image.shape == (64, 64, 3)
    assert package.image.dtype == np.uint8
    assert (package.licence, package.data) == ("unknown", "unknown")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], Preprocessing(None, (0.0,), (1 / 255,))),
        (
            [{"id": "scale_linear", "kwargs": {"gain": 1 / 255, "offset": -0.5}}],
            Preprocessing(None, (0.5,), (1.0,)),
        ),
        (
            [{"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": 51.0, "std": 25.5}}],
            Preprocessing(None, (0.2,), (0.1,)),
        ),
        (
            [
                {
                    "id": "scale_range",
                    "kwargs": {"min_percentile": 1, "max_percentile": 99.8, "axes": ["y", "x"]},
                },
                {"id": "clip", "kwargs": {"min": 0, "max": 1}},
                {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
            ],
            Preprocessing((1.0, 99.8), (0.0,), (1.0,)),
        ),
    ],
)
def test_steps_become_percentiles_mean_and_deviation(
    path: Path, steps: list[dict[str, Any]], expected: Preprocessing
) -> None:
    write(path, describe_new(*steps), **TENSORS)
    found = read(path).preprocessing
    assert found.percentiles == expected.percentiles
    assert found.mean == pytest.approx(expected.mean)
    assert found.std == pytest.approx(expected.std)
    assert found.problem is None


def test_old_fixed_normalization_is_read(path: Path) -> None:
    step = {
        "name": "zero_mean_unit_variance",
        "kwargs": {"mode": "fixed", "axes": "yx", "mean": [0, 51, 102], "std": [255, 255, 51]},
    }
    write(path, describe_old(preprocessing=[step]), **TENSORS)
    found = read(path).preprocessing
    assert found.mean == pytest.approx([0, 0.2, 0.4])
    assert found.std == pytest.approx([1, 1, 0.2])


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"id": "zero_mean_unit_variance"}, "by the image's own mean and standard deviation"),
        ({"id": "binarize", "kwargs": {"threshold": 1}}, "has the step binarize before"),
        ({"id": "scale_linear", "kwargs": {"gain": -1}}, "factor that is not positive"),
    ],
)
def test_steps_that_cannot_be_expressed_are_named(
    path: Path, step: dict[str, Any], says: str
) -> None:
    write(path, describe_new(step), **TENSORS)
    problem = read(path).preprocessing.problem
    assert problem is not None
    assert says in problem


def test_contrast_of_each_channel_cannot_be_expressed(path: Path) -> None:
    step = {"id": "scale_range", "kwargs": {"axes": ["y", "x"]}}
    write(path, describe_new(step, channels=3), **TENSORS)
    problem = read(path).preprocessing.problem
    assert problem is not None
    assert "each channel by itself" in problem


def test_range_of_floats_must_be_stated(path: Path) -> None:
    write(path, describe_new(data={"type": "float32"}), **TENSORS)
    problem = read(path).preprocessing.problem
    assert problem is not None
    assert "does not say which range" in problem


def test_fixed_size_and_channels_at_the_end_are_read(path: Path) -> None:
    write(path, describe_old(axes="byxc", shape=[1, 128, 96, 3]), **TENSORS)
    package = read(path)
    assert package.size == (128, 96)
    assert package.divisor is None
    assert package.channel_last


@pytest.mark.parametrize("file", ["zip", "text"])
def test_other_files_are_no_packages(path: Path, file: str) -> None:
    if file == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "rdf.yaml")
    else:
        path.write_text("rdf.yaml")
    assert read_package(path) is None


def test_package_without_onnx_is_left_to_others(path: Path) -> None:
    description = describe_new()
    description["weights"] = {"pytorch_state_dict": {"source": "weights.pt"}}
    write(path, description)
    assert read_package(path) is None


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ("{", "package is damaged"),
        ("!!python/object/apply:os.system [exit]", "package is damaged"),
        ("[]", "package is damaged"),
        ({"weights": {}}, "package is damaged: 'inputs'"),
        (describe_new() | {"inputs": []}, "has 0 inputs"),
        (describe_old(axes="bczyx", shape=[1, 1, 8, 64, 64]), "axes batch, channel, z, y, x"),
        (
            describe_new() | {"weights": {"onnx": {"source": "https://example.org/weights.onnx"}}},
            "is not in the package",
        ),
        (describe_new() | {"weights": {"onnx": {"source": "none.onnx"}}}, "none.onnx"),
        (
            describe_new()
            | {"outputs": [{"axes": "bcyx", "postprocessing": [{"name": "stardist"}]}]},
            "has stardist after the network",
        ),
    ],
)
def test_package_that_cannot_be_read_is_rejected_in_one_line(
    path: Path, description: dict[str, Any] | str, says: str
) -> None:
    if isinstance(description, dict) and "inputs" not in description:
        description["weights"] = {"onnx": {"source": "weights.onnx"}}
    write(path, description, **TENSORS)
    with pytest.raises(CheckpointError) as caught:
        read_package(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_array_of_objects_in_a_package_is_not_loaded(path: Path) -> None:
    write(path, describe_new(), input_npy=save(np.array([{}], object)))
    with pytest.raises(CheckpointError, match="allow_pickle=False"):
        read_package(path)


@pytest.mark.parametrize(
    ("planes", "kind", "most"),
    [
        (np.array([[[0.0, 300.0]]], np.float32), np.uint16, 300),
        (np.array([[[0.5, 2.5]]], np.float32), np.uint16, 65535),
    ],
)
def test_test_input_of_floats_becomes_an_image(
    path: Path, planes: np.ndarray, kind: type, most: int
) -> None:
    step = {"id": "scale_range"}
    write(path, describe_new(step), input_npy=save(planes[None]), output_npy=save(planes[None]))
    image = read(path).image
    assert image is not None
    assert image.dtype == kind
    assert image.tolist() == [[0, most]]
