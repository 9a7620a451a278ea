"""Draws the dashboard's panels with the data of a Prometheus, as a picture.

Grafana is not needed: the queries and the places are those of the dashboard, the looks are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

_ROW_INCHES = 0.33
_WIDTH_INCHES = 18.0
_COLUMNS = 24
_NUMBERS = "stat"


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(_WIDTH_INCHES, rows * _ROW_INCHES), facecolor="white")
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / _COLUMNS, 1 - (place["y"] + place["h"]) / rows
        width, height = place["w"] / _COLUMNS, place["h"] / rows
        if panel["type"] == "row":
            figure.text(left + 0.003, bottom + height * 0.3, panel["title"], weight="bold", size=11)
            continue
        margin = (left + 0.025, bottom + height * 0.16, width - 0.035, height * 0.66)
        axes = figure.add_axes(margin)
        axes.set_title(panel["title"], size=9, loc="left")
        series = [
            each
            for target in panel["targets"]
            for each in _read(url, fill_in(target["expr"]), target["legendFormat"], seconds)
        ]
        _draw_panel(axes, panel, series)
    figure.savefig(path, dpi=60)
    plt.close(figure)


def _read(
    url: str, expression: str, legend: str, seconds: float
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The series of a query: name, seconds before now, values."""
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


def _draw_panel(axes: Any, panel: dict[str, Any], series: list[Any]) -> None:
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel["type"] == "table":
        axes.axis("off")
        axes.text(0, 0.5, f"{len(series)} models on their replicas", size=9)
        return
    if not series:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes, color="grey")
        return
    for name, seconds, values in series:
        axes.plot(seconds, values, linewidth=1, label=name)
    axes.set_ylim(bottom=0)
    if panel["type"] == _NUMBERS:
        axes.set_title(f"{panel['title']}: {series[0][2][-1]:.3g}", size=9, loc="left")
    elif len(series) <= 8:
        axes.legend(fontsize=6, loc="upper left", ncols=2, frameon=False)
