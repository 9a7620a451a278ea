"""Draws the dashboard's panels with the data of a Prometheus, as a picture.

Grafana is not needed: the queries and the places are those of the dashboard, the looks are not.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_PIXELS = 830
"""Width at which a browser shows the picture in the documentation."""
_PIXELS_PER_SHOWN_PIXEL = 2
_WIDTH_INCHES = 10.0
_ROW_INCHES = 0.31
_COLUMNS = 24
_TEXT_SIZE, _TITLE_SIZE, _HEADING_SIZE, _NUMBER_SIZE = 9, 10, 13, 15
"""In points: 10 to 17 pixels where the picture is shown."""
_LETTER_INCHES, _TITLE_LETTER_INCHES = 0.075, 0.085
"""Width of a letter of a text and of a title, on average."""
_LINE_INCHES = 0.17
_HANDLE_INCHES = 0.4
"""Width of a line in a legend, with its space."""
_LEFT_INCHES, _RIGHT_INCHES, _TICKS_INCHES = 0.5, 0.2, 0.3
_MAX_NAMES = 8
_NUMBERS = "stat"
_THOUSANDS = (("G", 1e9), ("M", 1e6), ("k", 1e3))

Series = list[tuple[str, np.ndarray, np.ndarray]]
"""Name, seconds before now, values."""


def draw_dashboard(
    dashboard: dict[str, Any],
    url: str,
    fill_in: Callable[[str], str],
    seconds: float,
    path: Path,
) -> None:
    """Draw every panel.

    Args:
        url: of Prometheus.
        fill_in: replaces the variables of an expression.
        seconds: of the time range, which ends now.
        path: of the PNG.
    """

    def read(target: dict[str, Any]) -> Series:
        return _read(url, fill_in(target["expr"]), target["legendFormat"], seconds)

    figure = build_figure(dashboard, read)
    figure.savefig(path, dpi=SHOWN_PIXELS * _PIXELS_PER_SHOWN_PIXEL / _WIDTH_INCHES)


def build_figure(dashboard: dict[str, Any], read: Callable[[dict[str, Any]], Series]) -> Figure:
    """Build the figure of every panel.

    Args:
        read: returns the series of a target of a panel.
    """
    from matplotlib.figure import Figure

    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(_WIDTH_INCHES, rows * _ROW_INCHES), facecolor="white")
    for panel in panels:
        place = panel["gridPos"]
        left, top = place["x"] / _COLUMNS * _WIDTH_INCHES, (rows - place["y"]) * _ROW_INCHES
        if panel["type"] == "row":
            _write(figure, left + 0.05, top - 0.28, panel["title"], _HEADING_SIZE, weight="bold")
            continue
        width, height = place["w"] / _COLUMNS * _WIDTH_INCHES, place["h"] * _ROW_INCHES
        series = [each for target in panel["targets"] for each in read(target)]
        _draw_panel(figure, panel, series, (left, top - height, width, height))
    return figure


def _read(url: str, expression: str, legend: str, seconds: float) -> Series:
    """The series of a query."""
    end = time.time()
    query = {
        "query": expression,
        "start": end - seconds,
        "end": end,
        "step": max(0.5, seconds / 200),
    }
    found = httpx.get(f"{url}/api/v1/query_range", params=query, timeout=60).json()
    series = []
    for each in found["data"]["result"]:
        name = legend
        for label, value in each["metric"].items():
            name = name.replace("{{" + label + "}}", value)
        points = np.array([[float(at), float(value)] for at, value in each["values"]])
        series.append((name, points[:, 0] - end, points[:, 1]))
    return series


def _draw_panel(
    figure: Figure, panel: dict[str, Any], series: Series, place: tuple[float, float, float, float]
) -> None:
    """Draw a panel: its title, then its plot, then the names of its series.

    Args:
        place: left, bottom, width and height in inches.
    """
    left, bottom, width, height = place
    title = textwrap.fill(panel["title"], int((width - 0.2) / _TITLE_LETTER_INCHES))
    top = bottom + height - 0.12
    _write(figure, left + 0.1, top, title, _TITLE_SIZE, va="top")
    top -= _LINE_INCHES * (title.count("\n") + 1) + 0.08
    if panel["type"] == "table":
        text = f"{len(series)} models on their replicas"
        _write(figure, left + 0.1, top - 0.1, text, _TEXT_SIZE, va="top")
        return
    if panel["type"] == _NUMBERS:
        value = f"{series[0][2][-1]:.3g}" if series else "no data"
        _write(figure, left + 0.1, top, value, _NUMBER_SIZE, va="top", weight="bold")
        spark = figure.add_axes(
            _fraction(figure, left + 0.1, bottom, width - 0.2, top - bottom - 0.3)
        )
        spark.axis("off")
        _plot(spark, series)
        return
    if not series:
        _write(figure, left + 0.1, top - 0.1, "no data", _TEXT_SIZE, va="top", color="grey")
        return
    names, columns = _arrange_names(series, width - 0.2)
    lines = math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
    start = bottom + lines * _LINE_INCHES + _TICKS_INCHES
    axes = figure.add_axes(
        _fraction(
            figure, left + _LEFT_INCHES, start, width - _LEFT_INCHES - _RIGHT_INCHES, top - start
        )
    )
    _plot(axes, series)
    if names:
        figure.legend(
            axes.get_lines(), names, ncols=columns, fontsize=_TEXT_SIZE, frameon=False,
            loc="upper left", borderaxespad=0, borderpad=0, handlelength=1, handletextpad=0.5,
            columnspacing=1, labelspacing=0.2,
            bbox_to_anchor=_fraction(figure, left + 0.1, start - _TICKS_INCHES)[:2],
        )  # fmt: skip


def _arrange_names(series: Series, width: float) -> tuple[list[str], int]:
    """The names of a legend of this width in inches, and the columns of the legend."""
    names = [name for name, _, _ in series]
    if not names or len(names) > _MAX_NAMES:
        return [], 1
    letters = max(map(len, names))
    columns = int(width / (_HANDLE_INCHES + letters * _LETTER_INCHES))
    if columns:
        return names, min(columns, len(names))
    fitting = int((width - _HANDLE_INCHES) / _LETTER_INCHES)
    return [textwrap.fill(name, fitting) for name in names], 1


def _plot(axes: Axes, series: Series) -> None:
    for _, seconds, values in series:
        axes.plot(seconds, values, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=_TEXT_SIZE)
    axes.locator_params(nbins=4)
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g} s")
    axes.yaxis.set_major_formatter(lambda value, _: _shorten(value))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shorten(value: float) -> str:
    for suffix, unit in _THOUSANDS:
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _write(
    figure: Figure, left: float, bottom: float, text: str, size: int, **options: Any
) -> None:
    """Write a text at a place in inches."""
    figure.text(*_fraction(figure, left, bottom), text, size=size, **options)


def _fraction(figure: Figure, *inches: float) -> tuple[float, ...]:
    """A place, or a place and a size, as fractions of the figure."""
    return tuple(
        length / figure.get_size_inches()[index % 2] for index, length in enumerate(inches)
    )
