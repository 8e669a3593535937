"""Charts of a report, as SVG inside the page.

matplotlib draws in stand-in colours that become CSS variables here, so that one chart is read on light, dark and paper.
Knows numbers and labels, no run folders; never touches pyplot.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from difftrain.report.page import Html, element

Array = np.ndarray[Any, Any]
Points = tuple[Sequence[float], Sequence[float]]  # steps and values

SERIES = [f"#0a000{i}" for i in range(6)]
INK, QUIET, GRID = "#0b0001", "#0b0002", "#0b0003"
CSS_VARIABLE = {color: f"var(--c{i})" for i, color in enumerate(SERIES)} | {INK: "var(--ink)", QUIET: "var(--quiet)", GRID: "var(--grid)"}
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "difftrain", "text.parse_math": False, "text.usetex": False, "font.size": 9, "text.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.edgecolor": GRID, "axes.labelcolor": QUIET, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": QUIET, "ytick.color": QUIET, "lines.linewidth": 1.6, "lines.markersize": 4, "legend.frameon": False,
    "legend.fontsize": 8.5, "legend.handlelength": 1.6, "legend.borderpad": 0, "legend.columnspacing": 1.2,
}  # fmt: skip


def chart(draw: Callable[[Any], None], alt: str, height: float = 2.5) -> Html:
    """What `draw(axes)` draws, about 317 points wide: readable at the width of a phone."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r'<style type="text/css">.*?</style>|<metadata>.*?</metadata>|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL)
    svg = re.sub(r"font(-family)?: ([\d.]+px )?'DejaVu Sans'[^;\"]*", lambda found: f"font-size: {found[2]}" if found[2] else "", svg)
    svg = re.sub("|".join(CSS_VARIABLE), lambda found: CSS_VARIABLE[found[0]], svg)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    return Html(f'<svg role="img" aria-label="{escape(alt)}" {size[0]}>{svg[svg.index(">") + 1 :].strip()}')


def finite(points: Points) -> tuple[Array, Array]:
    """The points that can be drawn, in order of steps. (Beyond 1e30 matplotlib's own arithmetic overflows.)"""
    kept = sorted((x, y) for x, y in zip(*points, strict=True) if math.isfinite(x) and abs(y) < 1e30)
    return np.array([x for x, _ in kept]), np.array([y for _, y in kept])


def smoothed(values: Array, width: int) -> Array:
    """Centred moving average; at the ends over what there is."""
    window = np.ones(width)
    return np.asarray(np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same"))


def lines(
    named: Mapping[str, Points],
    alt: str,
    *,
    smooth: bool = False,
    log: bool = True,
    level: tuple[str, float] | None = None,
    mark: float | None = None,
) -> Html:
    """Curves over steps, on a logarithmic axis where all is positive and spans more than a factor 20 (and `log` allows it).

    `smooth` draws the raw values faintly behind a moving average, `level` is a dashed line, `mark` a step to point out.
    """
    series = {name: drawable for name, points in named.items() if len((drawable := finite(points))[0])}
    if not series:
        return element("p", "Nothing to draw yet.", class_="quiet")

    def draw(axes: Any) -> None:
        for i, (name, (x, y)) in enumerate(series.items()):
            look: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "linestyle": ["-", "--", ":"][i // len(SERIES) % 3]}
            look["marker"] = "o" if len(x) < 30 else None
            dense = smooth and len(x) >= 20
            if dense:
                axes.plot(x, y, **look | {"alpha": 0.28, "linewidth": 0.8})
            axes.plot(x, smoothed(y, max(3, len(y) // 25)) if dense else y, label=name if len(series) > 1 else None, **look)
            if mark in x:
                ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}
                axes.plot([mark], y[x == mark], marker="o", label="best checkpoint", **ring)
        if level and math.isfinite(level[1]):
            axes.axhline(level[1], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label=level[0])
        if log:
            logarithmic_where_wide(axes, np.concatenate([y for _, y in series.values()]))
        step_axis(axes)
        legend(axes)

    return chart(draw, alt)


def logarithmic_where_wide(axes: Any, values: Array) -> None:
    if values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 300 * values.min() else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def step_axis(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / 1000:g}k" if abs(step) >= 10_000 else f"{step:g}"))
    axes.set_xlabel("step")


def legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, min(len(labels), 52 // (max(map(len, labels)) + 5)))
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def along_log_snr(named: Mapping[str, Points], alt: str) -> Html:
    """Curves of what is not negative over the log-SNR, noise to the left.

    Points that are not finite are left out, as where a schedule ends at SNR = 0.
    """
    series = {name: drawable for name, points in named.items() if len((drawable := finite(points))[0])}
    if not series:
        return element("p", "Nothing finite to draw.", class_="quiet")

    def draw(axes: Any) -> None:
        for i, (name, (x, y)) in enumerate(series.items()):
            look = {"marker": "o" if len(x) < 30 else None, "linestyle": "--" if i else "-"}  # dashed: seen where it lies on the first
            axes.plot(x, y, label=name, color=SERIES[i % len(SERIES)], **look)
        logarithmic_where_wide(axes, np.concatenate([y for _, y in series.values()]))
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel("log-SNR (noise ←)")
        legend(axes)

    return chart(draw, alt, height=2.7)


class Bands(NamedTuple):
    """Mean error by stretch of training and interval of log-SNR."""

    intervals: list[tuple[float, float]]
    steps: tuple[float, float]
    errors: Array  # [stretches, intervals], summed
    counts: Array  # [stretches, intervals]

    def error(self, stretches: slice) -> Array:
        """Mean error [intervals] over some stretches; NaN where no sample fell."""
        count = self.counts[stretches].sum(0)
        return np.where(count > 0, self.errors[stretches].sum(0) / np.maximum(count, 1), math.nan)


def heat_map(bands: Bands) -> Html:
    """Steps to the right, log-SNR upwards, the error as colour on a logarithmic scale."""
    error = np.stack([bands.error(slice(i, i + 1)) for i in range(len(bands.errors))])
    error[~(error > 0)] = math.nan
    if np.isnan(error).all():
        return element("p", "No positive error to draw.", class_="quiet")
    first, last = bands.steps
    half = max((last - first) / max(len(error) - 1, 1), 1) / 2

    def draw(axes: Any) -> None:
        norm = LogNorm(np.nanmin(error), max(np.nanmax(error), 1.01 * np.nanmin(error)))
        corners = (first - half, last + half, 0, len(bands.intervals))
        drawn = axes.imshow(error.T, norm=norm, cmap="viridis", origin="lower", aspect="auto", interpolation="none", extent=corners)
        bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02, aspect=28)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
        bar.minorticks_off()
        bar.outline.set_visible(False)
        axes.grid(False)
        step_axis(axes)
        interval_ticks(axes.set_yticks, bands.intervals)
        axes.set_ylabel("log-SNR (noise ↓)")

    return chart(draw, "Error by log-SNR over training", height=2.7)


def profiles(bands: Bands) -> Html:
    """The error along log-SNR in the first, a middle and the last tenth of training."""
    stretches = len(bands.errors)
    tenth, middle = max(1, stretches // 10), stretches // 2
    parts = {"last tenth": slice(stretches - tenth, stretches)}
    if stretches >= 3:
        parts = {"first tenth": slice(0, tenth), "middle": slice(middle - tenth // 2, middle - tenth // 2 + tenth)} | parts
    errors = {name: bands.error(part) for name, part in parts.items()}
    centres = np.arange(len(bands.intervals)) + 0.5

    def draw(axes: Any) -> None:
        for i, (name, error) in enumerate(errors.items(), start=1):
            color, width = (SERIES[0], 2.0) if i == len(errors) else (QUIET, 1.2)
            axes.plot(centres, error, marker="o", label=name, color=color, alpha=i / len(errors), linewidth=width)
        known = np.concatenate(list(errors.values()))
        logarithmic_where_wide(axes, known[np.isfinite(known)])
        interval_ticks(axes.set_xticks, bands.intervals)
        axes.set_xlabel("log-SNR (noise ←)")
        legend(axes)

    return chart(draw, "Error along log-SNR", height=2.7)


def interval_ticks(place: Callable[..., Any], intervals: Sequence[tuple[float, float]]) -> None:
    """Edges as ticks, every second, third ... where there are many; intervals are drawn equally wide, the outer ones may be infinite."""
    edges = [low for low, _ in intervals] + [intervals[-1][1]]
    every = math.ceil(len(edges) / 9)
    place(range(0, len(edges), every), [f"{edge:.3g}".replace("inf", "∞").replace("-", "\N{MINUS SIGN}") for edge in edges[::every]])


def dots(values: Mapping[str, Sequence[float]], alt: str, level: tuple[str, float] | None = None) -> Html:
    """One row a name: every value as a dot, their mean as a bar; a `level` is a dashed line."""

    def draw(axes: Any) -> None:
        for row, given in enumerate(values.values()):
            x = [value for value in given if abs(value) < 1e30]
            if x:
                axes.plot(x, [row] * len(x), "o", color=SERIES[0], alpha=0.65, markersize=6, markeredgewidth=0)
                axes.plot([np.mean(x)], [row], "|", color=INK, markersize=16, markeredgewidth=2)
        if level and math.isfinite(level[1]):
            axes.axvline(level[1], color=SERIES[1], linewidth=1.3, linestyle=(0, (4, 3)), label=level[0])
            axes.figure.legend(loc="outside upper right")
        axes.set_yticks(range(len(values)), [name if len(name) <= 22 else name[:21] + "…" for name in values], color=INK)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)

    return chart(draw, alt, height=0.9 + 0.3 * len(values))
