"""Draws charts as SVG with matplotlib, in stand-in colours that become the page's variables.

So one chart reads well on light pages, dark pages and paper. Never touches pyplot.
"""

import io
import re

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from difftrain.report.canvas import Canvas
from difftrain.report.charts import Chart
from difftrain.report.style import GRID, INK, QUIET, SERIES

CSS_VARIABLE = {
    **{color: f"var(--c{i})" for i, color in enumerate(SERIES)},
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    GRID: "var(--grid)",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "difftrain",
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "legend.borderpad": 0,
    "legend.columnspacing": 1.2,
}
WIDTH = 4.4  # inches, about 317 points: readable at the width of a phone


def svg(chart: Chart) -> Markup:
    """Draw a chart as an SVG element for the page.

    Args:
        chart: A chart that is not empty.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, chart.height), layout="constrained")
        chart.draw(Canvas(figure.subplots()))
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return for_page(buffer.getvalue(), chart.alt)


def for_page(text: str, alt: str) -> Markup:
    """Turn matplotlib's SVG file into an element that takes fonts and colours from the page.

    Args:
        text: The file. matplotlib escapes all text in it.
        alt: What the chart shows.
    """
    # The page needs neither the file's head nor its styles, metadata and names of groups.
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    unused = r'<style type="text/css">.*?</style>|<metadata>.*?</metadata>|(?<=<g) id="[^"]*"'
    text = re.sub(unused, "", text, flags=re.DOTALL)

    # Of a font, only its size stays.
    text = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font(-family)?: 'DejaVu Sans'[^;\"]*", "", text)

    text = re.sub("|".join(CSS_VARIABLE), lambda found: CSS_VARIABLE[found[0]], text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    inside = text[text.index(">") + 1 :].strip()
    return Markup(f'<svg role="img" aria-label="{escape(alt)}" {size[0]}>{inside}')
