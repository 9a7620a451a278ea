"""Read a package of bioimage.io: its ONNX graph, and what its description says about the values.

The description is `rdf.yaml` in version 0.4 or 0.5 of the format
(https://bioimage-io.github.io/spec-bioimage-io/). What is done with the values of an image becomes
percentiles, mean and standard deviation. Knows no command line and no network.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from model.arrays import AnyArray, FloatArray
from model.errors import CheckpointError
from model.files import MAX_CHECKPOINT_BYTES, MAX_TEXT_BYTES, read_stream

DESCRIPTIONS = ("rdf.yaml", "bioimageio.yaml")

_AXES = {"b": "batch", "c": "channel", "y": "y", "x": "x", "z": "z", "t": "time"}
_MAX_TENSOR_BYTES = 1_000_000_000
_DAMAGED = (
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,  # of zipfile: also for unknown compression
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Exceptions that a description of another form, or a damaged archive, raises."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The steps between the values of an image and the network.

    Attributes:
        percentiles: that become 0 and 1, or None if the full range of the data type does.
        mean, std: of values in 0..1 after that, per channel.
        problem: why the steps cannot be expressed by these; None if they can.
    """

    percentiles: tuple[float, float] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Package:
    """A package with an ONNX graph.

    Attributes:
        graph: the ONNX file.
        preprocessing: steps before the network.
        channel_last: whether the input is (N, H, W, C).
        size: (height, width), if the graph accepts only one.
        divisor: height and width are multiples of it; None if it is not stated.
        classes: names of the channels of the output; empty if they are only numbered.
        is_activated: whether the description has a sigmoid or softmax after the graph.
        licence: an identifier of SPDX, or "unknown".
        data: of the training, or "unknown".
        own: fields of `model.convert.metadata.describe_checkpoint`, if this project wrote the
            package.
        image: the test input as an image, (H, W) or (H, W, 3) uint8 or uint16; None if it has none.
        expected: the test output, (C, H, W); None if it has none.
    """

    graph: bytes
    preprocessing: Preprocessing
    channel_last: bool
    size: tuple[int, int] | None
    divisor: int | None
    classes: tuple[str, ...]
    is_activated: bool
    licence: str
    data: str
    own: Mapping[str, str]
    image: AnyArray | None
    expected: FloatArray | None


def read_package(path: Path) -> Package | None:
    """Read a package of bioimage.io.

    Returns:
        None if the file is another one, or a package without an ONNX graph.

    Raises:
        CheckpointError: the package is damaged, or its network is not one of images.
        ModuleNotFoundError: PyYAML is not installed.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((each for each in archive.namelist() if _is_description(each)), None)
            if name is None:
                return None
            return _Reader(archive, name).read()
    except _DAMAGED as error:
        raise CheckpointError(f"{path}: the bioimage.io package is damaged: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _is_description(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[-1] in DESCRIPTIONS and len(parts) <= 2


class _Reader:
    """A package that is open.

    Args:
        name: of the description in the archive.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        import yaml

        self._archive = archive
        self._folder = PurePosixPath(name).parent
        text = self._read(name, MAX_TEXT_BYTES)
        try:
            self.description: dict[str, Any] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error).replace("\n", " ")) from error

    def read(self) -> Package | None:
        """Read the parts that are needed; None without an ONNX graph."""
        description = self.description
        weights = description["weights"].get("onnx")
        if weights is None:
            return None
        if len(description["inputs"]) != 1:
            raise CheckpointError(f"its network has {len(description['inputs'])} inputs, not one")
        tensor, output = description["inputs"][0], description["outputs"][0]
        axes = _read_axes(tensor)
        names = [axis["id"] for axis in axes]
        if sorted(set(names) - {"batch"}) not in (["channel", "x", "y"], ["x", "y"]):
            raise CheckpointError(f"its input has the axes {', '.join(names)}; images have y and x")
        channels = _count_channels(axes)
        preprocessing = _read_preprocessing(tensor, channels)
        after = {_name_step(each) for each in output.get("postprocessing") or []}
        if rest := after - {"sigmoid", "softmax", "binarize", "ensure_dtype", "clip"}:
            raise CheckpointError(f"it has {', '.join(sorted(rest))} after the network")
        size, divisor = _read_sizes(axes)
        training = description.get("training_data") or {}
        return Package(
            graph=self._read_source(weights, MAX_CHECKPOINT_BYTES),
            preprocessing=preprocessing,
            channel_last="channel" in names and names.index("channel") > names.index("x"),
            size=size,
            divisor=divisor,
            classes=_read_classes(output),
            is_activated=bool(after & {"sigmoid", "softmax"}),
            licence=str(description.get("license") or "unknown"),
            data=str(training.get("id") or training.get("name") or "unknown"),
            own=(description.get("config") or {}).get("unet_server") or {},
            image=_make_image(self._read_test("inputs", names), tensor, preprocessing),
            expected=_make_planes(
                self._read_test("outputs", [axis["id"] for axis in _read_axes(output)])
            ),
        )

    def _read_test(self, kind: str, names: Sequence[str]) -> AnyArray | None:
        """The first test tensor as (channel, y, x); None without one in the package."""
        old = self.description.get(f"test_{kind}") or [None]
        source = self.description[kind][0].get("test_tensor") or old[0]
        if source is None:
            return None
        array = np.load(io.BytesIO(self._read_source(source, _MAX_TENSOR_BYTES)))
        if array.ndim != len(names):
            return None
        array = array[(0,)] if names[0] == "batch" else array
        names = [name for name in names if name != "batch"]
        if "channel" not in names:
            array, names = array[None], ["channel", *names]
        if sorted(names) != ["channel", "x", "y"]:
            return None
        planes: AnyArray = array.transpose([names.index(axis) for axis in ("channel", "y", "x")])
        return planes

    def _read_source(self, source: str | Mapping[str, Any], most: int) -> bytes:
        name = source if isinstance(source, str) else str(source["source"])
        if "://" in name:
            raise CheckpointError(f"{name} is not in the package; download the whole package")
        return self._read(str(self._folder / name), most)

    def _read(self, name: str, most: int) -> bytes:
        with self._archive.open(str(PurePosixPath(name))) as file:
            return read_stream(file, most)  # type: ignore[arg-type]


def _read_axes(tensor: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The axes of a tensor as in version 0.5: each with `id` and, unless batch, `size`."""
    axes = tensor["axes"]
    if not isinstance(axes, str):
        return [{"id": each.get("id") or each["type"], **each} for each in axes]
    shape = tensor.get("shape")
    sizes: list[Any] = [None] * len(axes)
    if isinstance(shape, list):
        sizes = shape
    elif isinstance(shape, Mapping) and "min" in shape:
        sizes = [
            {"min": least, "step": step} if step else least
            for least, step in zip(shape["min"], shape["step"], strict=True)
        ]
    return [{"id": _AXES[axis], "size": size} for axis, size in zip(axes, sizes, strict=True)]


def _count_channels(axes: Sequence[Mapping[str, Any]]) -> int:
    for axis in axes:
        if axis["id"] == "channel":
            return len(axis["channel_names"]) if "channel_names" in axis else int(axis["size"])
    return 1


def _read_sizes(axes: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, int] | None, int | None]:
    """The only size, and the divisor of sizes, where they are stated."""
    sizes = {axis["id"]: axis.get("size") for axis in axes}
    height, width = sizes["y"], sizes["x"]
    if isinstance(height, int) and isinstance(width, int):
        return (height, width), None
    steps = [each for each in (height, width) if isinstance(each, Mapping) and "step" in each]
    if len(steps) == 2 and not any(each["min"] % each["step"] for each in steps):
        return None, math.lcm(*(each["step"] for each in steps))
    return None, None


def _read_classes(output: Mapping[str, Any]) -> tuple[str, ...]:
    axes = output["axes"]
    if isinstance(axes, str):
        return ()
    named = (each.get("channel_names") for each in axes if each["type"] == "channel")
    names = [str(each) for each in next(named, None) or []]
    are_numbered = all(name.strip("0123456789_") in ("channel", "c", "output") for name in names)
    return () if are_numbered else tuple(names)


def _name_step(step: Mapping[str, Any]) -> str:
    return str(step.get("id") or step["name"])


def _read_preprocessing(tensor: Mapping[str, Any], channels: int) -> Preprocessing:
    """Reduce the steps of preprocessing to percentiles, mean and standard deviation."""
    unit, problem = _find_unit(tensor)
    # value of the network = factor * value in 0..1 + offset
    factor, offset = np.full(channels, unit), np.zeros(channels)
    percentiles = None
    for step in tensor.get("preprocessing") or []:
        kind, kwargs = _name_step(step), step.get("kwargs") or {}
        axes = _list_axes(kwargs)
        if kind in ("ensure_dtype", "clip"):
            continue
        if kind == "scale_linear":
            gain = np.array(kwargs.get("gain", 1.0), float)
            factor, offset = factor * gain, offset * gain + np.array(kwargs.get("offset", 0.0))
        elif kind == "scale_range" and (channels == 1 or axes is None or "channel" in axes):
            percentiles = (
                float(kwargs.get("min_percentile", 0.0)),
                float(kwargs.get("max_percentile", 100.0)),
            )
            factor, offset, problem = np.ones(channels), np.zeros(channels), None
        elif kind == "fixed_zero_mean_unit_variance" or kwargs.get("mode") == "fixed":
            mean, std = (np.array(kwargs[name], float) for name in ("mean", "std"))
            factor, offset = factor / std, (offset - mean) / std
        else:
            return Preprocessing(problem=_explain(kind, kwargs))
    if problem is None and not (np.isfinite(factor).all() and (factor > 0).all()):
        problem = "its values are scaled by a factor that is not positive"
    if problem:
        return Preprocessing(problem=problem)
    mean, std = -offset / factor, 1 / factor
    return Preprocessing(percentiles, tuple(mean.tolist()), tuple(std.tolist()))


def _find_unit(tensor: Mapping[str, Any]) -> tuple[float, str | None]:
    """The value of the input that is 1 here, and why it is unknown."""
    data = tensor.get("data") or {}
    if not isinstance(data, Mapping):
        data = data[0]
    kind = str(data.get("type") or tensor.get("data_type") or "float32")
    if kind in ("uint8", "uint16"):
        return float(np.iinfo(kind).max), None
    limits = data.get("range") or tensor.get("data_range") or (None, None)
    if limits[1] is not None and float(limits[1]) in (1.0, 255.0, 65535.0):
        return float(limits[1]), None
    return 1.0, f"it does not say which range its values of {kind} have"


def _list_axes(kwargs: Mapping[str, Any]) -> list[str] | None:
    """The axes over which a step computes its statistics; None for all."""
    axes = kwargs.get("axes")
    if isinstance(axes, str):
        return [_AXES[axis] for axis in axes]
    return axes


def _explain(kind: str, kwargs: Mapping[str, Any]) -> str:
    if kind == "scale_range":
        return "it stretches the contrast of each channel by itself"
    if kind == "zero_mean_unit_variance":
        return "it normalizes each image by the image's own mean and standard deviation"
    return f"it has the step {kind} before the network"


def _make_image(
    planes: AnyArray | None, tensor: Mapping[str, Any], preprocessing: Preprocessing
) -> AnyArray | None:
    """A test input (C, H, W) as an image; None if it cannot be one."""
    if planes is None or len(planes) not in (1, 3):
        return None
    pixels = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
    if pixels.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(pixels)
    pixels = pixels.astype(np.float64)
    if not np.isfinite(pixels).all():
        return None
    low, high = pixels.min(), pixels.max()
    if preprocessing.percentiles is None:
        unit, _ = _find_unit(tensor)
        low, high = 0.0, unit
    elif low >= 0 and high <= 65535 and not np.any(pixels % 1):
        return pixels.astype(np.uint8 if high <= 255 else np.uint16)
    kind = np.uint8 if preprocessing.percentiles is None and high <= 255 else np.uint16
    most = np.iinfo(kind).max
    scaled = (pixels - low) / max(high - low, 1e-12) * most
    image: AnyArray = np.clip(np.rint(scaled), 0, most).astype(kind)
    return image


def _make_planes(planes: AnyArray | None) -> FloatArray | None:
    return None if planes is None else planes.astype(np.float32)


def read_own_field(own: Mapping[str, str], name: str) -> Any:
    """Decode a field of `model.convert.metadata.describe_checkpoint`.

    Returns:
        Its value; None if it is missing or damaged.
    """
    try:
        return json.loads(own[name])
    except (KeyError, TypeError, ValueError):
        return None
