"""Find out how an ONNX graph is used: its axes, sizes, outputs, and what their values mean.

Shapes are tried in OpenVINO, and values are those of random pixels. What the graph does not show is
asked for. Knows no files and no command line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import openvino as ov
from onnx import ModelProto

from app.engine.openvino_core import shared_core
from app.engine.openvino_graph import read_graph, set_shape
from model.arrays import FloatArray, Shape
from model.config import GraphConfig
from model.errors import CheckpointError
from model.graph import find_input

Layout = Literal["NCHW", "NHWC"]
Values = Literal["logits", "sigmoid", "softmax"]
"""Meaning of the outputs: values of any size, or probabilities, each by itself (sigmoid) or with a
sum of 1 over the channels (softmax)."""

MAX_SIDE = 4096
"""Height and width of a window, in pixels."""
_DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
_LEAST_SIDE = 160
"""Pixels. Smaller images vanish in some encoders."""
_TOLERANCE = 1e-3
"""Largest deviation from 0..1, and difference of two results, relative to the largest value."""

_KEEPS_RANGE = {"Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Slice",
                "Resize", "Upsample", "Concat"}  # fmt: skip
"""Operators that leave probabilities probabilities."""
_LINEAR = {"Conv", "ConvTranspose", "Add", "MatMul", "Gemm", "BatchNormalization"}
"""Operators whose values are logits, also where all of them happen to lie between 0 and 1."""
_ENDINGS: dict[str, Values] = {
    "Sigmoid": "sigmoid",
    "HardSigmoid": "sigmoid",
    "Softmax": "softmax",
}


@dataclasses.dataclass(frozen=True)
class Told:
    """Facts about a graph that the user gives; None and empty where nothing is said.

    Attributes:
        layout: axes of the input.
        outputs: names of the outputs to use.
        values: what the outputs are.
        divisor: height and width must be multiples of it.
        windows: that are wanted.
    """

    layout: Layout | None = None
    outputs: tuple[str, ...] = ()
    values: Values | None = None
    divisor: int | None = None
    windows: tuple[Shape, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finding:
    """How a graph is used.

    Attributes:
        config: of the outputs as they are, without an activation.
        values: what they are.
        windows: that the graph accepts.
        notes: what was found, one line each.
    """

    config: GraphConfig
    values: Values
    windows: tuple[Shape, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Map:
    """An output that has values for each pixel of a window, or of its inner part."""

    layout: Literal["NCHW", "NHWC", "NHW"]
    margin: int
    channels: int


def inspect_graph(
    model: ModelProto, content: bytes, told: Told, windows: Sequence[Shape]
) -> Finding:
    """Find out how a graph is used.

    Args:
        model, content: the graph, parsed and as a file.
        windows: used if neither the graph nor `told` has any; their sides are rounded up to what
            the graph accepts.

    Raises:
        CheckpointError: the graph does not make a map of classes from an image, or leaves open what
            `told` does not say either.
    """
    graph = read_graph(content)
    config = _read_input(graph, find_input(model).name, told)
    if config.size and told.windows not in ((), (config.size,)):
        raise CheckpointError(
            f"the graph accepts windows of {config.size[0]}x{config.size[1]} alone"
        )
    config, maps = _find_maps(graph, [each.name for each in model.graph.output], config, told)
    used = _choose_outputs(maps, told)
    first_map = next(iter(used.values()))
    config = dataclasses.replace(
        config,
        outputs=tuple(used),
        output_layout=first_map.layout,
        margin=first_map.margin,
        out_channels=sum(each.channels for each in used.values()),
    )
    if config.size:
        accepted: tuple[Shape, ...] = ((config.size[0], config.size[1]),)
    else:
        rounded = (_round_up(each, config) for each in windows)
        accepted = told.windows or tuple(dict.fromkeys(rounded))
    _check_windows(graph, config, accepted)
    smallest = min(accepted, key=math.prod)
    pixels = _draw_pixels(config, smallest, 2)
    first, second = (_compute(graph, config, pixels[i : i + 1]) for i in range(2))
    if config.batch == "any" and not _computes_batches(graph, config, pixels, (first, second)):
        config = dataclasses.replace(config, batch="one")
    values, reason = _find_values(model, config, first, told)
    notes = [
        _describe_input(config),
        *(_describe_output(name, maps[name], name in used) for name in maps),
        f"values of the output: {values} ({reason})",
        _compare_runtimes(content, config, pixels[:1], first),
    ]
    return Finding(config, values, accepted, tuple(notes))


def _read_input(graph: ov.Model, name: str, told: Told) -> GraphConfig:
    """Read axes, channels and size of the input.

    Raises:
        CheckpointError: it is not one image of one or three channels.
    """
    source = graph.input(name)
    shape = source.get_partial_shape()
    if source.get_element_type().get_type_name() not in ("f32", "f16"):
        raise CheckpointError(
            f"input {name!r} has the type {source.get_element_type().get_type_name()}; float32 "
            "and float16 are supported"
        )
    if shape.rank.is_dynamic or len(shape) != 4:
        raise CheckpointError(f"input {name!r} has the shape {shape}; an image has four axes")
    lengths = [None if each.is_dynamic else each.get_length() for each in shape]
    layout: Layout = told.layout or _guess_layout(lengths)
    channels = lengths[1 if layout == "NCHW" else 3]
    sides = lengths[2:] if layout == "NCHW" else lengths[1:3]
    if channels not in (1, 3):
        raise CheckpointError(
            f"input {name!r} has the shape {shape}, which is {channels or 'any number of'} "
            f"channels in {layout}; images have 1 or 3 (--layout says where they are)"
        )
    if (sides[0] is None) != (sides[1] is None) or lengths[0] not in (None, 1):
        raise CheckpointError(
            f"input {name!r} has the shape {shape}; export it with one image, or with any number, "
            "and with height and width both fixed or both free"
        )
    return GraphConfig(
        in_channels=channels,
        input=name,
        layout=layout,
        size=tuple(side for side in sides if side is not None),
        batch="any" if lengths[0] is None else "one",
    )


def _guess_layout(lengths: Sequence[int | None]) -> Layout:
    is_last = lengths[3] in (1, 3) and lengths[1] not in (1, 3)
    return "NHWC" if is_last else "NCHW"


def _find_maps(
    graph: ov.Model, names: Sequence[str], config: GraphConfig, told: Told
) -> tuple[GraphConfig, dict[str, _Map | None]]:
    """Find the least divisor of sizes that the graph accepts, and the outputs that are maps.

    Returns:
        The description with the divisor, and every output, None if it is not a map.

    Raises:
        CheckpointError: no size was accepted, or no output is a map.
    """
    problem = ""
    for divisor, window in _list_trials(config, told):
        try:
            shapes = _output_shapes(graph, names, config, window)
        except CheckpointError as error:
            problem = str(error)
            continue
        maps = {name: _read_map(shape, window, config) for name, shape in shapes.items()}
        if any(maps.values()):
            return dataclasses.replace(config, divisor=divisor), maps
        listed = ", ".join(f"{name!r} {list(shape)}" for name, shape in shapes.items())
        listed = listed or "all have whole numbers; export the logits"
        hint = "; a smaller map must be resized in the graph" if shapes else ""
        problem = (
            f"no output has values for each pixel of a window of {window[0]}x{window[1]}: {listed}"
            f"{hint}"
        )
    raise CheckpointError(problem)


def _list_trials(config: GraphConfig, told: Told) -> Iterator[tuple[int, Shape]]:
    """Yield divisors, and for each a window with sides that no larger one divides.

    Height and width differ, so that a smaller output is not mistaken for one without its margin.
    """
    if config.size:
        yield 1, (config.size[0], config.size[1])
        return
    for divisor in _DIVISORS if told.divisor is None else (told.divisor,):
        odd = math.ceil(_LEAST_SIDE / divisor) | 1
        yield divisor, (odd * divisor, (odd + 2) * divisor)
    for window in told.windows:
        yield 1, window


def _output_shapes(
    graph: ov.Model, names: Sequence[str], config: GraphConfig, window: Shape
) -> dict[str, tuple[int, ...]]:
    """The shapes of these outputs for a window, without outputs of whole numbers."""
    fixed = _fix_shape(graph, config, window, 1)
    outputs = {name: fixed.output(name) for name in names}
    return {
        name: tuple(output.get_shape())
        for name, output in outputs.items()
        if output.get_element_type().is_real()
    }


def _fix_shape(graph: ov.Model, config: GraphConfig, window: Shape, count: int) -> ov.Model:
    height, width = window
    axes = {"N": count, "C": config.in_channels, "H": height, "W": width}
    fixed = graph.clone()
    set_shape(fixed, [axes[axis] for axis in config.layout])
    return fixed


def _read_map(shape: Sequence[int], window: Shape, config: GraphConfig) -> _Map | None:
    """How an output of this shape covers a window; None if it does not."""
    layouts: dict[int, tuple[Literal["NCHW", "NHWC", "NHW"], ...]] = {
        4: (config.layout, "NHWC" if config.layout == "NCHW" else "NCHW"),
        3: ("NHW",),
    }
    for layout in layouts.get(len(shape), ()):
        axes = dict(zip(layout, shape, strict=True))
        lost = window[0] - axes["H"]
        is_part = axes["H"] > 0 and 0 <= lost == window[1] - axes["W"] and lost % 2 == 0
        # Half of a square is a smaller map of all of it.
        is_smaller = lost > 0 and window[0] % axes["H"] == 0 if is_part else False
        if is_part and not is_smaller and axes["N"] == 1 and axes.get("C", 1) > 0:
            return _Map(layout, lost // 2, axes.get("C", 1))
    return None


def _choose_outputs(maps: Mapping[str, _Map | None], told: Told) -> dict[str, _Map]:
    """The outputs that are used, by name.

    Raises:
        CheckpointError: `told` names one that is not a map, or there are several and it names none.
    """
    possible = {name: found for name, found in maps.items() if found is not None}
    listed = ", ".join(f"{name!r} ({_channels(found)})" for name, found in possible.items())
    for name in told.outputs:
        if name not in possible:
            raise CheckpointError(
                f"{name!r} is not an output with values for each pixel; those are {listed}"
            )
    if len(possible) > 1 and not told.outputs:
        raise CheckpointError(
            f"the graph has several outputs: {listed}; choose with --output NAME (several names: "
            "their channels become one output)"
        )
    used = {name: possible[name] for name in told.outputs or possible}
    if len({(each.layout, each.margin) for each in used.values()}) > 1:
        raise CheckpointError("the outputs differ in their axes or sizes")
    return used


def _check_windows(graph: ov.Model, config: GraphConfig, windows: Sequence[Shape]) -> None:
    """Check that the graph accepts every window, and returns what it should.

    Raises:
        CheckpointError, ConfigError: it does not.
    """
    for window in windows:
        name = f"{window[0]}x{window[1]}"
        if max(window) > MAX_SIDE:
            raise CheckpointError(f"window {name}: sides of at most {MAX_SIDE} are supported")
        config.check_window(*window)
        shapes = _output_shapes(graph, config.outputs, config, window)
        for output in config.outputs:
            found = _read_map(shapes[output], window, config)
            if found is None or found.margin != config.margin:
                raise CheckpointError(
                    f"window {name}: output {output!r} has the shape {list(shapes[output])}"
                )


def _round_up(window: Shape, config: GraphConfig) -> Shape:
    height, width = (math.ceil(side / config.grid) * config.grid for side in window)
    return height, width


def _draw_pixels(config: GraphConfig, window: Shape, count: int) -> FloatArray:
    axes = {"N": count, "C": config.in_channels, "H": window[0], "W": window[1]}
    rng = np.random.default_rng(0)
    return rng.normal(size=[axes[axis] for axis in config.layout]).astype(np.float32)


def _compute(graph: ov.Model, config: GraphConfig, pixels: FloatArray) -> list[FloatArray]:
    """Compute the outputs that are used."""
    axes = dict(zip(config.layout, pixels.shape, strict=True))
    fixed = _fix_shape(graph, config, (axes["H"], axes["W"]), axes["N"])
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    results = shared_core().compile_model(fixed, "CPU", options)([pixels])
    return [np.asarray(results[name], np.float32) for name in config.outputs]


def _computes_batches(
    graph: ov.Model,
    config: GraphConfig,
    pixels: FloatArray,
    singles: Sequence[Sequence[FloatArray]],
) -> bool:
    """Whether the results of windows in one run equal those of each."""
    try:
        together = _compute(graph, config, pixels)
    except (CheckpointError, RuntimeError):
        return False
    apart = [np.concatenate(each) for each in zip(*singles, strict=True)]
    return all(
        batch.shape == each.shape and _difference(batch, each) < _TOLERANCE
        for batch, each in zip(together, apart, strict=True)
    )


def _difference(values: FloatArray, others: FloatArray) -> float:
    """The largest difference, relative to the largest value if that is above 1."""
    return float(np.abs(values - others).max() / max(1.0, np.abs(others).max()))


def _find_values(
    model: ModelProto, config: GraphConfig, outputs: Sequence[FloatArray], told: Told
) -> tuple[Values, str]:
    """Find out what the outputs are, and how that is known.

    Raises:
        CheckpointError: they are not what the user says, or it is not clear what they are.
    """
    low = min(float(each.min()) for each in outputs)
    high = max(float(each.max()) for each in outputs)
    if not math.isfinite(low) or not math.isfinite(high):
        raise CheckpointError("the graph returns values that are not finite for random pixels")
    seen = f"{low:.3g} to {high:.3g} for random pixels"
    are_probabilities = low >= -_TOLERANCE and high <= 1 + _TOLERANCE
    endings = {_find_ending(model, name) for name in config.outputs}
    if told.values is not None:
        if told.values != "logits" and not are_probabilities:
            raise CheckpointError(
                f"--activation {told.values}: the values are {seen}, which are not probabilities"
            )
        return told.values, f"as set; {seen}"
    ending = min(endings)
    if len(endings) > 1:
        raise CheckpointError(f"the outputs end in {', '.join(sorted(endings))}; set --activation")
    if ending == "Softmax" and not _sum_to_one(outputs, config):
        raise CheckpointError(
            "the graph ends in a softmax that is not over its channels; set --activation"
        )
    if ending in _ENDINGS and are_probabilities:
        return _ENDINGS[ending], f"the graph ends in {ending}; {seen}"
    if ending not in _LINEAR and are_probabilities:
        raise CheckpointError(
            f"the values of the output are {seen}, but the graph does not end in a sigmoid or "
            "softmax; set --activation to logits, sigmoid or softmax"
        )
    return "logits", f"the graph ends in {ending}; {seen}"


def _sum_to_one(outputs: Sequence[FloatArray], config: GraphConfig) -> bool:
    """Whether the values of each pixel have a sum of 1."""
    if "C" not in config.output_layout:
        return False
    axis = config.output_layout.index("C")
    sums = np.concatenate(outputs, axis).sum(axis)
    return bool(np.abs(sums - 1).max() < _TOLERANCE)


def _find_ending(model: ModelProto, name: str) -> str:
    """The last operator that changes the values of an output."""
    makers = {output: node for node in model.graph.node for output in node.output}
    for _ in range(len(model.graph.node)):
        node = makers.get(name)
        if node is None:
            break
        if node.op_type not in _KEEPS_RANGE or not node.input:
            return str(node.op_type)
        name = node.input[0]
    return "Identity"


def _compare_runtimes(
    content: bytes, config: GraphConfig, pixels: FloatArray, outputs: Sequence[FloatArray]
) -> str:
    """Compare OpenVINO's outputs with those of ONNX Runtime, if it is installed.

    Raises:
        CheckpointError: they differ.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not compared with ONNX Runtime, which is not installed"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    expected: list[Any] = session.run(list(config.outputs), {config.input: pixels})
    difference = max(
        _difference(each, np.asarray(other, np.float32))
        for each, other in zip(outputs, expected, strict=True)
    )
    if not difference < _TOLERANCE:
        raise CheckpointError(
            f"OpenVINO and ONNX Runtime compute different outputs: {difference:.1e}"
        )
    return f"OpenVINO and ONNX Runtime compute the same outputs, to {difference:.0e}"


def _describe_input(config: GraphConfig) -> str:
    if config.size:
        sizes = f"{config.size[0]}x{config.size[1]} alone"
    elif config.divisor == 1:
        sizes = "any size"
    else:
        sizes = f"sides that are multiples of {config.divisor}"
    batch = "one image" if config.batch == "one" else "any number of images"
    return (
        f"input {config.input!r}: {config.layout}, {config.in_channels} channels, {batch}, {sizes}"
    )


def _describe_output(name: str, found: _Map | None, is_used: bool) -> str:
    if found is None:
        return f"output {name!r}: not used, it does not have the size of the image"
    lost = f", {2 * found.margin} pixels smaller than the image" if found.margin else ""
    used = "" if is_used else ", not used"
    return f"output {name!r}: {found.layout}, {_channels(found)}{lost}{used}"


def _channels(found: _Map) -> str:
    return "1 channel" if found.channels == 1 else f"{found.channels} channels"
