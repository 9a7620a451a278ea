"""The picture of the dashboard can be read where the documentation shows it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.scale.picture import SHOWN_PIXELS, Series, build_figure
from tests.scale.test_dashboard import DASHBOARD

LEAST_PIXELS = 10
"""Height of the smallest letters that are read without effort."""
INSTANCES = ("127.0.0.1:34203", "127.0.0.1:39603")


def read(target: dict[str, Any]) -> Series:
    """Two series, with names as long as those of a real Prometheus."""
    seconds = np.linspace(-90, 0, 50)
    legend = target["legendFormat"]
    if "{{" not in legend:
        return [(legend, seconds, 1e8 * np.abs(np.sin(seconds)))]
    series = []
    for instance in INSTANCES:
        name = legend.replace("{{instance}}", instance).replace("{{device}}", "cpu")
        name = name.replace("{{key}}", "nuclei@7658e25982a2#1 64x64").replace(
            "{{reason}}", "deadline"
        )
        series.append((name, seconds, np.abs(np.sin(seconds))))
    return series


@pytest.fixture(scope="module")
def figure() -> Figure:
    drawn = build_figure(DASHBOARD, read)
    drawn.draw_without_rendering()
    return drawn


def written(figure: Figure) -> list[Text]:
    """The texts that are drawn: no labels of ticks outside a plot, or of plots without axes."""
    hidden: set[Text] = set()
    for axes in figure.axes:
        if not axes.axison:
            hidden.update(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            hidden.update(
                tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high
            )
    return [
        text
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible() and text not in hidden
    ]


def test_every_text_is_large_enough_at_the_width_of_the_page(figure: Figure) -> None:
    pixels_per_point = SHOWN_PIXELS / figure.get_figwidth() / 72
    texts = written(figure)
    assert len(texts) > 100
    assert min(text.get_size() * pixels_per_point for text in texts) >= LEAST_PIXELS


def test_no_text_covers_another_or_leaves_the_picture(figure: Figure) -> None:
    boxes = [(text.get_text(), text.get_window_extent()) for text in written(figure)]
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.x1 <= figure.bbox.width, name
    for (first, box), (second, other) in itertools.combinations(boxes, 2):
        overlaps = box.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8))
        assert not overlaps, f"{first!r} and {second!r}"


def test_no_text_covers_a_plot_of_another_panel(figure: Figure) -> None:
    plots = [(axes, axes.get_window_extent()) for axes in figure.axes if axes.axison]
    for text in written(figure):
        if text.axes is None:
            box = text.get_window_extent()
            assert not any(box.overlaps(plot) for _, plot in plots), text.get_text()
