"""Charts of the error by noise level, over the course of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from difftrain.report.bands import Bands
from difftrain.report.charts import Chart
from difftrain.report.style import QUIET, SERIES, Array

if TYPE_CHECKING:
    from difftrain.report.canvas import Canvas

MOST_TICKS = 9


@dataclass(frozen=True)
class HeatMap(Chart):
    """The error as colour on a logarithmic scale: steps to the right, log-SNR upwards.

    Args:
        alt: See `Chart`.
        bands: Mean errors by stretch of training and noise level.
    """

    bands: Bands

    @property
    def height(self) -> float:
        """Height in inches."""
        return 2.7

    @property
    def is_empty(self) -> bool:
        """Whether no error is positive."""
        return bool(np.isnan(self._errors()).all())

    def draw(self, canvas: Canvas) -> None:
        """Draw the map and its colour bar; see `Chart.draw`."""
        errors = self._errors()
        first, last = self.bands.steps
        half = max((last - first) / max(len(errors) - 1, 1), 1) / 2
        lowest, highest = np.nanmin(errors), np.nanmax(errors)
        image = canvas.axes.imshow(
            errors.T,
            norm="log",
            vmin=lowest,
            vmax=max(highest, 1.01 * lowest),
            cmap="viridis",
            origin="lower",
            aspect="auto",
            interpolation="none",
            extent=(first - half, last + half, 0, len(self.bands.intervals)),
        )
        canvas.color_bar(image)
        canvas.axes.grid(False)
        canvas.step_axis()
        canvas.axes.set_yticks(*interval_ticks(self.bands.intervals))
        canvas.axes.set_ylabel("log-SNR (noise ↓)")

    def _errors(self) -> Array:  # [stretches, intervals], NaN where not positive
        errors = np.stack(
            [self.bands.error(slice(i, i + 1)) for i in range(len(self.bands.errors))]
        )
        errors[~(errors > 0)] = math.nan
        return errors


@dataclass(frozen=True)
class Profiles(Chart):
    """The error along log-SNR in the first, a middle and the last tenth of training.

    Args:
        alt: See `Chart`.
        bands: Mean errors by stretch of training and noise level.
    """

    bands: Bands

    @property
    def height(self) -> float:
        """Height in inches."""
        return 2.7

    @property
    def is_empty(self) -> bool:
        """Whether there is no error; bands always hold at least one."""
        return False

    def draw(self, canvas: Canvas) -> None:
        """Draw the profiles; see `Chart.draw`."""
        profiles = self._profiles()
        centres = np.arange(len(self.bands.intervals)) + 0.5
        for i, (name, errors) in enumerate(profiles.items(), start=1):
            look = {"color": QUIET, "linewidth": 1.2, "alpha": i / len(profiles)}
            if i == len(profiles):
                look |= {"color": SERIES[0], "linewidth": 2.0}
            canvas.axes.plot(centres, errors, marker="o", label=name, **look)
        known = np.concatenate(list(profiles.values()))
        canvas.log_scale_where_wide(known[np.isfinite(known)])
        canvas.axes.set_xticks(*interval_ticks(self.bands.intervals))
        canvas.axes.set_xlabel("log-SNR (noise ←)")
        canvas.legend()

    def _profiles(self) -> dict[str, Array]:
        stretches = len(self.bands.errors)
        tenth, middle = max(1, stretches // 10), stretches // 2
        last = {"last tenth": self.bands.error(slice(stretches - tenth, stretches))}
        if stretches < 3:
            return last
        start = middle - tenth // 2
        return {
            "first tenth": self.bands.error(slice(0, tenth)),
            "middle": self.bands.error(slice(start, start + tenth)),
        } | last


def interval_ticks(intervals: Sequence[tuple[float, float]]) -> tuple[range, list[str]]:
    """Return positions and labels of the edges of intervals that are drawn equally wide.

    Args:
        intervals: Neighbouring intervals; the outer ends may be infinite.

    Returns:
        At most nine positions, in units of intervals, and their labels.
    """
    edges = [low for low, _ in intervals] + [intervals[-1][1]]
    every = math.ceil(len(edges) / MOST_TICKS)
    labels = []
    for edge in edges[::every]:
        labels.append(f"{edge:.3g}".replace("inf", "∞").replace("-", "\N{MINUS SIGN}"))
    return range(0, len(edges), every), labels
