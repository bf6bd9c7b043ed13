"""Draw a chart as SVG, whose colours come from the style sheet of the page.

The text of matplotlib's SVG has fixed colours, which would not fit a dark page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import LogLocator, MaxNLocator

from flallm_ds.reporting.curves import Chart, Line

WIDTH, HEIGHT = 560, 240
# Margins around the plot: room for the labels of the axes.
LEFT, RIGHT, TOP, BOTTOM = 58, 26, 10, 24
NUM_COLORS = 6  # of the style sheet


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels. low, high: values at the two ends."""

    low: float
    high: float
    begin: float  # pixels
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def _scaled(self, value: float) -> float:
        return float(np.log10(value)) if self.is_log else value

    def ticks(self) -> list[float]:
        """Return round values between the two ends."""
        locator = LogLocator(numticks=6) if self.is_log else MaxNLocator(5)
        ticks = np.asarray(locator.tick_values(self.low, self.high)).tolist()
        # Rounding may put a tick at an end just outside of it.
        slack = 1e-9 * (self.high - self.low)
        return [t for t in ticks if self.low - slack <= t <= self.high + slack]


def axes_of(chart: Chart) -> tuple[Axis, Axis]:
    """Return the two axes of a chart, which fit its values."""
    xs = [x for line in chart.lines for x in line.x]
    ys = [y for line in chart.lines for y in (*line.y, *line.low, *line.high)]
    x_axis = Axis(0.0, max(xs), LEFT, WIDTH - RIGHT)
    low, high = min(ys), max(ys)
    if chart.is_log:
        # Whole decades, at least one.
        low = 10.0 ** np.floor(np.log10(low))
        high = 10.0 ** max(np.ceil(np.log10(high)), np.log10(low) + 1)
    else:
        # The next ticks outside of the values; 0 if it is near.
        if 0 <= low < 0.4 * high or low == high > 0:
            low = 0.0
        ends = MaxNLocator(5).tick_values(low, high if high > low else low + 1.0)
        low, high = float(ends[0]), float(ends[-1])
    return x_axis, Axis(float(low), float(high), HEIGHT - BOTTOM, TOP, chart.is_log)


def draw(chart: Chart) -> Markup:
    """Return a chart as an SVG element. The page must have the classes of its lines."""
    x_axis, y_axis = axes_of(chart)
    parts = [_grid(x_axis, y_axis)]
    for line in chart.lines:
        parts.append(_line(line, x_axis, y_axis, _style_of(chart, line)))
    for line, (x, y) in zip(chart.lines, chart.best, strict=False):
        parts.append(_best(x_axis.place(x), y_axis.place(y), y, line.run))
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}'
        '<line class="cross" y1="{}" y2="{}" hidden></line></svg>'
    ).format(WIDTH, HEIGHT, summary(chart), Markup("").join(parts), TOP, HEIGHT - BOTTOM)


def summary(chart: Chart) -> str:
    """Describe a chart in a sentence, for screen readers."""
    unit = f" {chart.unit}" if chart.unit else ""
    lines = []
    for line in chart.lines:
        text = f"{line.label}: from {number(line.y[0])} to {number(line.y[-1])}{unit}"
        lines.append(f"{text}, step {number(line.x[0])} to {number(line.x[-1])}")
    best = [f"best {number(y)} at step {number(x)}" for x, y in chart.best]
    return f"{chart.title}. {'; '.join([*lines, *best])}."


def number(value: float) -> str:
    """Format a value with four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _style_of(chart: Chart, line: Line) -> str:
    """Return the classes of a line: the colour of its run, dashed if the run has several."""
    of_run = [other for other in chart.lines if other.run == line.run]
    dash = " dashed" if of_run.index(line) % 2 else ""
    return f"c{line.run % NUM_COLORS}{dash}"


def _grid(x_axis: Axis, y_axis: Axis) -> Markup:
    """Return grid lines with their labels, and the title of the x axis."""
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"></line>'
                '<text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, number(tick))
        )
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x, HEIGHT - BOTTOM + 16, number(tick)
            )
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="end">step</text>').format(
            LEFT - 14, HEIGHT - BOTTOM + 16
        )
    )
    return Markup("").join(parts)


def _line(line: Line, x_axis: Axis, y_axis: Axis, style: str) -> Markup:
    """Return a line, the range of its points as an area, and its measurements as dots."""
    xs = list(map(x_axis.place, line.x))
    ys = list(map(y_axis.place, line.y))
    parts = []
    if line.low:
        lows = list(map(y_axis.place, line.low))
        highs = list(map(y_axis.place, line.high))
        outline = _points([*xs, *xs[::-1]], [*highs, *lows[::-1]])
        parts.append(
            Markup('<polygon class="range {}" points="{}"></polygon>').format(
                style, outline
            )
        )
    parts.append(
        Markup('<polyline class="line {}" points="{}"></polyline>').format(
            style, _points(xs, ys)
        )
    )
    if line.marked:
        for x, y in zip(xs, ys, strict=True):
            parts.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.5"></circle>').format(
                    style, x, y
                )
            )
    return Markup("").join(parts)


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in zip(xs, ys, strict=True))


def _best(x: float, y: float, value: float, run: int) -> Markup:
    """Return a ring around the best point, and its value."""
    # On the left of a point in the right half, so that the text stays inside.
    is_right = x > WIDTH / 2
    above = y - 9 if y > TOP + 12 else y + 18
    return Markup(
        '<circle class="best c{}" cx="{}" cy="{}" r="5"></circle>'
        '<text class="best" x="{}" y="{}" text-anchor="{}">best {}</text>'
    ).format(
        run % NUM_COLORS,
        x,
        y,
        x - 9 if is_right else x + 9,
        above,
        "end" if is_right else "start",
        escape(number(value)),
    )
