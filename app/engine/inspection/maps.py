"""Find the axes and sizes of an ONNX graph's input, and which of its outputs are maps.

A map has values for each pixel of a window. Sizes are tried in OpenVINO. Knows shapes; no values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import openvino as ov

from app.engine.inspection.facts import MAX_SIDE, GraphOptions, Layout
from app.engine.inspection.running import find_output_shapes
from model.arrays import Shape
from model.config import GraphConfig
from model.errors import CheckpointError

_DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
_LEAST_SIDE = 160
"""Pixels. Smaller images vanish in some encoders."""


@dataclasses.dataclass(frozen=True)
class Map:
    """An output that has values for each pixel of a window, or of its inner part."""

    layout: Literal["NCHW", "NHWC", "NHW"]
    margin: int
    channels: int


def read_input(graph: ov.Model, name: str, options: GraphOptions) -> GraphConfig:
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
    layout: Layout = options.layout or _guess_layout(lengths)
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


def find_maps(
    graph: ov.Model, names: Sequence[str], config: GraphConfig, options: GraphOptions
) -> tuple[GraphConfig, dict[str, Map | None]]:
    """Find the least divisor of sizes that the graph accepts, and the outputs that are maps.

    Returns:
        The description with the divisor, and every output, None if it is not a map.

    Raises:
        CheckpointError: no size was accepted, or no output is a map.
    """
    problem = ""
    for divisor, window in _list_trials(config, options):
        try:
            shapes = find_output_shapes(graph, names, config, window)
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


def _list_trials(config: GraphConfig, options: GraphOptions) -> Iterator[tuple[int, Shape]]:
    """Yield divisors, and for each a window with sides that no larger one divides.

    Height and width differ, so that a smaller output is not mistaken for one without its margin.
    """
    if config.size:
        yield 1, (config.size[0], config.size[1])
        return
    for divisor in _DIVISORS if options.divisor is None else (options.divisor,):
        odd = math.ceil(_LEAST_SIDE / divisor) | 1
        yield divisor, (odd * divisor, (odd + 2) * divisor)
    for window in options.windows:
        yield 1, window


def _read_map(shape: Sequence[int], window: Shape, config: GraphConfig) -> Map | None:
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
            return Map(layout, lost // 2, axes.get("C", 1))
    return None


def choose_outputs(maps: Mapping[str, Map | None], options: GraphOptions) -> dict[str, Map]:
    """The outputs that are used, by name.

    Raises:
        CheckpointError: `options` names one that is not a map, or there are several and it names
            none.
    """
    possible = {name: found for name, found in maps.items() if found is not None}
    listed = ", ".join(f"{name!r} ({describe_channels(found)})" for name, found in possible.items())
    for name in options.outputs:
        if name not in possible:
            raise CheckpointError(
                f"{name!r} is not an output with values for each pixel; those are {listed}"
            )
    if len(possible) > 1 and not options.outputs:
        raise CheckpointError(
            f"the graph has several outputs: {listed}; choose with --output NAME (several names: "
            "their channels become one output)"
        )
    used = {name: possible[name] for name in options.outputs or possible}
    if len({(each.layout, each.margin) for each in used.values()}) > 1:
        raise CheckpointError("the outputs differ in their axes or sizes")
    return used


def check_windows(graph: ov.Model, config: GraphConfig, windows: Sequence[Shape]) -> None:
    """Check that the graph accepts every window, and returns what it should.

    Raises:
        CheckpointError, ConfigError: it does not.
    """
    for window in windows:
        name = f"{window[0]}x{window[1]}"
        if max(window) > MAX_SIDE:
            raise CheckpointError(f"window {name}: sides of at most {MAX_SIDE} are supported")
        config.check_window(*window)
        shapes = find_output_shapes(graph, config.outputs, config, window)
        for output in config.outputs:
            found = _read_map(shapes[output], window, config)
            if found is None or found.margin != config.margin:
                raise CheckpointError(
                    f"window {name}: output {output!r} has the shape {list(shapes[output])}"
                )


def describe_channels(found: Map) -> str:
    return "1 channel" if found.channels == 1 else f"{found.channels} channels"
