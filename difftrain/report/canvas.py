"""What charts draw on: matplotlib's axes with a few helpers."""

from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from difftrain.report.style import DASHED, INK, Array, Level

LEGEND_WIDTH = 52  # characters


class Canvas:
    """The axes of one chart, with what several charts draw on them.

    Args:
        axes: matplotlib's axes.
    """

    def __init__(self, axes: Any):
        self.axes = axes

    def level(self, level: Level) -> None:
        """Draw a dashed horizontal line.

        Args:
            level: Name for the legend, and height.
        """
        look = {"color": INK, "linewidth": 1.1, "linestyle": DASHED}
        self.axes.axhline(level.value, label=level.name or None, **look)

    def ring(self, x: float, y: Array, label: str) -> None:
        """Draw a ring around a point.

        Args:
            x: Where the point is.
            y: [1], its height.
            label: Name for the legend.
        """
        face = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": INK}
        self.axes.plot([x], y, marker="o", linestyle="none", label=label, **face)

    def log_scale_where_wide(self, values: Array) -> None:
        """Make the y axis logarithmic where positive values span more than a factor of 20.

        Args:
            values: [N], all values that are drawn.
        """
        if values.min() <= 0 or values.max() <= 20 * values.min():
            return
        self.axes.set_yscale("log")
        subs = (1, 2, 5) if values.max() < 300 * values.min() else (1,)
        self.axes.yaxis.set_major_locator(LogLocator(subs=subs))
        self.axes.yaxis.set_minor_locator(NullLocator())
        self.axes.yaxis.set_major_formatter(FuncFormatter(plain))

    def step_axis(self) -> None:
        """Label the x axis with training steps, in thousands where they are many."""
        self.few_ticks(self.axes.xaxis, 5, integer=True)
        self.axes.xaxis.set_major_formatter(FuncFormatter(in_thousands))
        self.axes.set_xlabel("step")

    def few_ticks(self, axis: Any, most: int, integer: bool = False) -> None:
        """Place a few ticks.

        Args:
            axis: The x or y axis.
            most: Largest number of intervals between ticks.
            integer: Place ticks at whole numbers only.
        """
        axis.set_major_locator(MaxNLocator(most, integer=integer))

    def color_bar(self, image: Any) -> None:
        """Draw a colour bar beside the axes.

        Args:
            image: What `imshow` returned, with a logarithmic norm.
        """
        bar = self.axes.figure.colorbar(image, ax=self.axes, pad=0.02, aspect=28)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
        bar.minorticks_off()
        bar.outline.set_visible(False)

    def legend(self) -> None:
        """Show the names of the curves above the axes, if there are any."""
        handles, labels = self.axes.get_legend_handles_labels()
        if labels:
            longest = max(map(len, labels))
            columns = max(1, min(len(labels), LEGEND_WIDTH // (longest + 5)))
            self.axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def plain(value: float, _: int) -> str:
    """Format a tick without padding."""
    return f"{value:g}"


def in_thousands(step: float, _: int) -> str:
    """Format a step as 20k from 10,000 on."""
    return f"{step / 1000:g}k" if abs(step) >= 10_000 else f"{step:g}"
