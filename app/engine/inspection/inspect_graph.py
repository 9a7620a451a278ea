"""Find out how an ONNX graph is used: its axes, sizes, outputs, and what their values mean.

Shapes are tried in OpenVINO, and values are those of random pixels. What the graph does not show is
asked for. Knows no files and no command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from onnx import ModelProto

from app.engine.inspection.facts import Finding, GraphOptions
from app.engine.inspection.maps import (
    Map,
    check_windows,
    choose_outputs,
    describe_channels,
    find_maps,
    read_input,
)
from app.engine.inspection.running import compare_runtimes, compute, computes_batches, draw_pixels
from app.engine.inspection.values import find_values
from app.engine.openvino_graph import read_graph
from model.arrays import Shape
from model.config import GraphConfig
from model.errors import CheckpointError
from model.graph import find_input


def inspect_graph(
    model: ModelProto,
    content: bytes,
    options: GraphOptions,
    windows: Sequence[Shape],
    check: Callable[[GraphConfig], None] = lambda config: None,
) -> Finding:
    """Find out how a graph is used.

    Args:
        model, content: the graph, parsed and as a file.
        windows: used if neither the graph nor `options` has any; their sides are rounded up to what
            the graph accepts.
        check: raises an error if the input and the outputs are not as wanted, before the graph
            runs.

    Raises:
        CheckpointError: the graph does not make a map of classes from an image, or leaves open what
            `options` does not say either.
    """
    graph = read_graph(content)
    config = read_input(graph, find_input(model).name, options)
    if config.size and options.windows not in ((), (config.size,)):
        raise CheckpointError(
            f"the graph accepts windows of {config.size[0]}x{config.size[1]} alone"
        )
    config, maps = find_maps(graph, [each.name for each in model.graph.output], config, options)
    used = choose_outputs(maps, options)
    first_map = next(iter(used.values()))
    config = dataclasses.replace(
        config,
        outputs=tuple(used),
        output_layout=first_map.layout,
        margin=first_map.margin,
        out_channels=sum(each.channels for each in used.values()),
    )
    check(config)
    if config.size:
        accepted: tuple[Shape, ...] = ((config.size[0], config.size[1]),)
    else:
        rounded = (_round_up(each, config) for each in windows)
        accepted = options.windows or tuple(dict.fromkeys(rounded))
    check_windows(graph, config, accepted)
    smallest = min(accepted, key=math.prod)
    pixels = draw_pixels(config, smallest, 2)
    first, second = (compute(graph, config, pixels[i : i + 1]) for i in range(2))
    if config.batch == "any" and not computes_batches(graph, config, pixels, (first, second)):
        config = dataclasses.replace(config, batch="one")
    values, reason = find_values(model, config, first, options)
    notes = [
        _describe_input(config),
        *(_describe_output(name, maps[name], name in used) for name in maps),
        f"values of the output: {values} ({reason})",
        compare_runtimes(content, config, pixels[:1], first),
    ]
    return Finding(config, values, accepted, tuple(notes))


def _round_up(window: Shape, config: GraphConfig) -> Shape:
    height, width = (math.ceil(side / config.grid) * config.grid for side in window)
    return height, width


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


def _describe_output(name: str, found: Map | None, is_used: bool) -> str:
    if found is None:
        return f"output {name!r}: not used, it does not have the size of the image"
    lost = f", {2 * found.margin} pixels smaller than the image" if found.margin else ""
    used = "" if is_used else ", not used"
    return f"output {name!r}: {found.layout}, {describe_channels(found)}{lost}{used}"
