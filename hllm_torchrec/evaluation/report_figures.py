"""Figures of the report as inline SVG, without files, scripts or network access.

Text is drawn as paths, so that a figure looks the same everywhere; each figure has a description for screen readers.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
"""Okabe and Ito's colors, which color-blind readers can distinguish; from the eighth model on, lines are dashed."""

DASHES = ("-", "--", ":", "-.")
INK, FAINT = "#333333", "#D9D9D9"
NEUTRALS = ("#222222", "#8A8A8A")
"""Colors of lines that are not models."""

LEGEND_LINE = 0.2
"""Height of a line of the legend, in inches."""

MAX_LABEL = 34
MAX_POINTS = 600

STYLE = {
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "grid.color": "#ECECEC",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "hllm_torchrec",  # the same figure gives the same bytes
    "text.color": INK,
    "text.parse_math": False,  # show a `$` in a model's name as it is
    "xtick.color": INK,
    "ytick.color": INK,
}


Svg = Markup
"""An `<svg>` element as markup, which the template does not escape."""


@dataclass(frozen=True)
class Series:
    """One named line; x and y have the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    """Index in the palette: a model has the same color in every figure."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` and `high` are None without an interval."""

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Interval:
    """One named line with intervals: (value, low, high) at each position, None for missing values."""

    name: str
    points: Sequence[tuple[float | None, float | None, float | None]]
    color: int = 0


def line_panels(panels: Sequence[Series], label: str) -> Svg:
    """Panels side by side, one per series, x = training step, with a running mean over a twentieth of the points."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * max(len(panels), 2), 2.7))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, series in zip(axes, panels):
            x, y = _thin(series)
            window = max(1, len(x) // 20)
            axis.plot(x, y, color=PALETTE[0], alpha=0.3 if window > 1 else 1.0, linewidth=1)
            if window > 1:
                means = np.convolve(y, np.full(window, 1 / window), "valid")
                axis.plot(x[window // 2 :][: len(means)], means, color=PALETTE[0])  # centered, so that it does not lag
            axis.set(title=_short(series.name), xlabel="training step")
        return _svg(figure, "training", label)


def step_lines(lines: Sequence[Series], y_label: str, label: str) -> Svg:
    """Lines with a few marked points over training steps, all in one panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.8, 2.9))
        axis = figure.subplots()
        for series in lines:
            axis.plot(series.x, series.y, marker="o", markersize=4, **_look(series.color))
        axis.set(xlabel="training step", ylabel=y_label)
        axis.margins(y=0.15)
        axis.legend(axis.lines, [_short(series.name) for series in lines], loc="best")
        return _svg(figure, "evaluation", label)


def interval_lines(lines: Sequence[Interval], places: Sequence[str], y_label: str, label: str, identifier: str) -> Svg:
    """Lines over named positions (days), with intervals as bands; a position without a value is a gap."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.2 + LEGEND_LINE * len(lines)))
        axis = figure.subplots()
        for series in lines:
            values = np.array(series.points, dtype=np.float64)
            look = _look(series.color)
            axis.plot(values[:, 0], marker="o", markersize=3, **look)
            axis.fill_between(range(len(values)), values[:, 1], values[:, 2], color=look["color"], alpha=0.15, lw=0)
        shown = np.unique(np.linspace(0, len(places) - 1, 6).astype(int))
        axis.set_xticks(shown, [places[place] for place in shown])
        axis.set(ylabel=y_label)
        if len(lines) > 1:
            _legend_below(figure, axis.lines, [series.name for series in lines])
        return _svg(figure, identifier, label)


def unit_square(
    lines: Sequence[Series],
    x_label: str,
    y_label: str,
    label: str,
    identifier: str,
    *,
    markers: bool = False,
    diagonal: bool = True,
) -> Svg:
    """Lines in the unit square, optionally with its diagonal: ROC, precision-recall and reliability curves."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 4.8 + LEGEND_LINE * len(lines)))
        axis = figure.subplots()
        if diagonal:
            axis.plot([0, 1], [0, 1], color="#AAAAAA", linestyle=(0, (4, 4)), linewidth=1)
        for series in lines:
            axis.plot(series.x, series.y, marker="o" if markers else None, markersize=4, **_look(series.color))
        axis.set(xlabel=x_label, ylabel=y_label, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        _legend_below(figure, axis.lines[int(diagonal) :], [series.name for series in lines])
        return _svg(figure, identifier, label)


def estimates(
    groups: Mapping[str, Sequence[Estimate]],
    names: Sequence[str],
    x_label: str,
    label: str,
    identifier: str,
    *,
    zero: bool = False,
    palette: Sequence[str] = PALETTE,
) -> Svg:
    """Dots with intervals: one row per group (from the top), within a row one dot per name.

    Args:
        groups: row → its estimates, whose names are in `names`.
        names: the order of the dots within a row, of the colors and of the legend.
        zero: mark 0 with a line, for differences.
    """
    height = 0.6 + len(groups) * (0.2 + 0.13 * len(names)) + LEGEND_LINE * len(names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, height))
        axis = figure.subplots()
        if zero:
            axis.axvline(0, color=INK, linewidth=1)
        for row, members in enumerate(groups.values()):
            for estimate in members:
                index = names.index(estimate.name)
                _dot(
                    axis,
                    estimate,
                    row + 0.7 * ((index + 0.5) / len(names) - 0.5),
                    palette[index % len(palette)],
                )
        axis.set(xlabel=x_label, ylim=(len(groups) - 0.5, -0.5))
        axis.set_yticks(range(len(groups)), [_short(name) for name in groups])
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
        for edge in range(1, len(groups)):
            axis.axhline(edge - 0.5, color=FAINT, linewidth=0.8)
        if len(names) > 1:
            handles = [
                Line2D([], [], color=palette[k % len(palette)], marker="o", markersize=4.5) for k in range(len(names))
            ]
            _legend_below(figure, handles, names)
        return _svg(figure, identifier, label)


def _dot(axis: Axes, estimate: Estimate, y: float, color: str) -> None:
    if estimate.low is not None and estimate.high is not None:
        axis.plot([estimate.low, estimate.high], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
    axis.plot([estimate.value], [y], color=color, marker="o", markersize=4.5, linestyle="none")


def _look(index: int) -> dict[str, Any]:
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
    }


def _legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Legend below the axes with explicit handles: matplotlib omits artists whose label begins with `_`."""
    figure.legend(handles, [_short(name, 2 * MAX_LABEL) for name in names], loc="outside lower center", ncols=1)


def _short(name: str, length: int = MAX_LABEL) -> str:
    line = " ".join(name.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points, each the mean of a contiguous range of the series."""
    x, y = np.asarray(series.x, dtype=np.float64), np.asarray(series.y, dtype=np.float64)
    stretches = min(len(x), MAX_POINTS)
    starts = np.arange(stretches) * len(x) // stretches
    counts = np.diff(starts, append=len(x))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _svg(figure: Figure, identifier: str, label: str) -> Svg:
    """The figure as an `<svg>` element with a description and with ids that are unique within the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # not needed in HTML, whose parsers know both namespaces
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{identifier}-', text)
    text = re.sub(r'\bhref="#', f'href="#{identifier}-', text)
    text = text.replace("url(#", f"url(#{identifier}-")
    return Svg(text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip())
