"""The charts of a report: their data, and how each is drawn on a canvas.

Imports no matplotlib, so that a chart costs nothing until it is drawn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from difftrain.report.style import DASHED, INK, SERIES, Array, Level

if TYPE_CHECKING:
    from difftrain.report.canvas import Canvas

Points = tuple[Sequence[float], Sequence[float]]  # x and y, NaN where a value is not known

FEW = 30  # curves with fewer points show each point as a dot
DENSE = 20  # curves with at least this many points are smoothed
LARGEST = 1e30  # matplotlib's own arithmetic overflows beyond it


class Band(NamedTuple):
    """A faint area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Chart(ABC):
    """A chart that a template shows as an SVG picture.

    Args:
        alt: What the chart shows, for readers who cannot see it.
    """

    alt: str

    @property
    def height(self) -> float:
        """Height in inches, at a width of 4.4 inches."""
        return 2.5

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is nothing that can be drawn."""

    @abstractmethod
    def draw(self, canvas: Canvas) -> None:
        """Draw the chart.

        Args:
            canvas: Empty axes with a few helpers.
        """


@dataclass(frozen=True)
class StepCurves(Chart):
    """Curves over training steps.

    Args:
        alt: See `Chart`.
        series: Steps and values by the name of the curve.
        smooth: Draw the raw values faintly behind their moving average.
        log: Allow a logarithmic axis where positive values span more than a factor of 20.
        level: A dashed line.
        mark: The step of the best checkpoint, which gets a ring.
    """

    series: Mapping[str, Points]
    smooth: bool = False
    log: bool = True
    level: Level | None = None
    mark: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no curve has a finite point."""
        return not drawable(self.series)

    def draw(self, canvas: Canvas) -> None:
        """Draw the curves, the ring and the level; see `Chart.draw`."""
        curves = drawable(self.series)
        for i, (name, (x, y)) in enumerate(curves.items()):
            label = name if len(curves) > 1 else None
            color = SERIES[i % len(SERIES)]
            dashes = ["-", "--", ":"][i // len(SERIES) % 3]
            look = {"color": color, "linestyle": dashes, "marker": marker(x)}
            if self.smooth and len(x) >= DENSE:
                canvas.axes.plot(x, y, **look | {"alpha": 0.28, "linewidth": 0.8})
                canvas.axes.plot(x, smoothed(y, max(3, len(y) // 25)), label=label, **look)
            else:
                canvas.axes.plot(x, y, label=label, **look)
            if self.mark is not None and self.mark in x:
                canvas.ring(self.mark, y[x == self.mark], "best checkpoint")
        if has_value(self.level):
            canvas.level(self.level)
        if self.log:
            canvas.log_scale_where_wide(all_values(curves))
        canvas.step_axis()
        canvas.legend()


@dataclass(frozen=True)
class Curves(Chart):
    """Curves over an axis other than training steps; every second one is dashed.

    Args:
        alt: See `Chart`.
        series: x and y by the name of the curve.
        x_label: What the x axis shows.
        log: Allow a logarithmic axis, as in `StepCurves`; a level excludes it.
        level: A dashed line.
        band: A faint area.
    """

    series: Mapping[str, Points]
    x_label: str
    log: bool = True
    level: Level | None = None
    band: Band | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no curve has a finite point."""
        return not drawable(self.series)

    def draw(self, canvas: Canvas) -> None:
        """Draw the curves, the band and the level; see `Chart.draw`."""
        curves = drawable(self.series)
        for i, (name, (x, y)) in enumerate(curves.items()):
            label = name if len(curves) > 1 else None
            canvas.axes.plot(x, y, label=label, **alternating_look(i, x))
        if self.band is not None:
            canvas.axes.fill_between(*self.band, color=SERIES[0], alpha=0.2, linewidth=0)
        if has_value(self.level):
            canvas.level(self.level)
        elif self.log:
            canvas.log_scale_where_wide(all_values(curves))
        canvas.axes.set_xlabel(self.x_label)
        canvas.legend()


@dataclass(frozen=True)
class WeightCurves(Chart):
    """Curves of non-negative weights over the log-SNR, with noise to the left.

    Args:
        alt: See `Chart`.
        series: log-SNR and weights by the name of the curve. Points that are not finite are left
            out, such as the one where a schedule ends at SNR = 0.
    """

    series: Mapping[str, Points]

    @property
    def height(self) -> float:
        """Height in inches."""
        return 2.7

    @property
    def is_empty(self) -> bool:
        """Whether no curve has a finite point."""
        return not drawable(self.series)

    def draw(self, canvas: Canvas) -> None:
        """Draw the curves; see `Chart.draw`."""
        curves = drawable(self.series)
        for i, (name, (x, y)) in enumerate(curves.items()):
            canvas.axes.plot(x, y, label=name, **alternating_look(i, x))
        canvas.log_scale_where_wide(all_values(curves))
        if canvas.axes.get_yscale() == "linear":
            canvas.axes.set_ylim(bottom=0)
        canvas.few_ticks(canvas.axes.xaxis, 7, integer=True)
        canvas.axes.set_xlabel("log-SNR (noise ←)")
        canvas.legend()


@dataclass(frozen=True)
class Dots(Chart):
    """One row for each name: every value as a dot, their mean as a stroke.

    Args:
        alt: See `Chart`.
        values: The values by name; those that are not finite are left out.
        level: A dashed line.
    """

    values: Mapping[str, Sequence[float]]
    level: Level | None = None

    @property
    def height(self) -> float:
        """Height in inches, which grows with the number of rows."""
        return 0.9 + 0.3 * len(self.values)

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows."""
        return not self.values

    def draw(self, canvas: Canvas) -> None:
        """Draw the rows; see `Chart.draw`."""
        axes = canvas.axes
        dot = {"color": SERIES[0], "alpha": 0.65, "markersize": 6, "markeredgewidth": 0}
        for row, given in enumerate(self.values.values()):
            x = [value for value in given if abs(value) < LARGEST]
            if x:
                axes.plot(x, [row] * len(x), "o", **dot)
                axes.plot([np.mean(x)], [row], "|", color=INK, markersize=16, markeredgewidth=2)
        if has_value(self.level):
            look = {"color": SERIES[1], "linewidth": 1.3, "linestyle": DASHED}
            axes.axvline(self.level.value, label=self.level.name, **look)
            axes.figure.legend(loc="outside upper right")
        axes.set_yticks(range(len(self.values)), map(shortened, self.values), color=INK)
        axes.set_ylim(len(self.values) - 0.4, -0.6)
        canvas.few_ticks(axes.xaxis, 5)
        axes.margins(x=0.08)


def finite(points: Points) -> tuple[Array, Array]:
    """Return the points that can be drawn, sorted by x.

    Args:
        points: x and y, of the same length.

    Returns:
        x and y without the points where x is not finite or y is not below 1e30.
    """
    kept = []
    for x, y in zip(*points, strict=True):
        if math.isfinite(x) and abs(y) < LARGEST:
            kept.append((x, y))
    kept.sort()
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def drawable(series: Mapping[str, Points]) -> dict[str, tuple[Array, Array]]:
    """Return the finite points of each curve, without the curves that have none."""
    curves = {name: finite(points) for name, points in series.items()}
    return {name: (x, y) for name, (x, y) in curves.items() if len(x)}


def smoothed(values: Array, width: int) -> Array:
    """Return the centred moving average; at the ends, over the values that exist.

    Args:
        values: [N]
        width: Number of values in the window.
    """
    window = np.ones(width)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.asarray(np.convolve(values, window, "same") / counts)


def all_values(curves: Mapping[str, tuple[Array, Array]]) -> Array:
    """Return the values of all curves in one array."""
    return np.concatenate([y for _, y in curves.values()])


def marker(x: Array) -> str | None:
    """Return matplotlib's marker for a curve with these points."""
    return "o" if len(x) < FEW else None


def alternating_look(i: int, x: Array) -> dict[str, Any]:
    """Return the look of the i-th curve. Odd ones are dashed: both show where two coincide."""
    dashes = "--" if i % 2 else "-"
    return {"color": SERIES[i % len(SERIES)], "marker": marker(x), "linestyle": dashes}


def has_value(level: Level | None) -> TypeGuard[Level]:
    """Return whether there is a level with a finite value."""
    return level is not None and math.isfinite(level.value)


def shortened(name: str, most: int = 22) -> str:
    """Return the name, cut to at most `most` characters."""
    return name if len(name) <= most else name[: most - 1] + "…"
