"""Facts about an ONNX graph: those that the user gives, and those that are found."""

from __future__ import annotations

import dataclasses
from typing import Literal

from model.arrays import Shape
from model.config import GraphConfig

MAX_SIDE = 4096
"""Height and width of a window, in pixels."""

Layout = Literal["NCHW", "NHWC"]
Values = Literal["logits", "sigmoid", "softmax"]
"""Meaning of the outputs: values of any size, or probabilities, each by itself (sigmoid) or with a
sum of 1 over the channels (softmax)."""


@dataclasses.dataclass(frozen=True)
class GraphOptions:
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
