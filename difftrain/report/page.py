"""The pieces of a page that templates show, and the one place that renders templates."""

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from difftrain.core.files import write_text
from difftrain.report.charts import Chart

PIXELATED = 320  # pictures up to this width are shown with sharp pixels: digits have 8 x 8


@dataclass(frozen=True)
class Card:
    """A titled chart.

    Args:
        title: Title.
        chart: The chart.
        note: What a reader must know to read it.
    """

    title: str
    chart: Chart
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text. The first cell of a row is its name.

    Args:
        head: Title of each column.
        rows: Cells, as many in each row as there are columns.
    """

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Args:
        caption: Caption.
        source: A data URL; empty where the file could not be read.
        pixelated: Show enlarged pixels with sharp edges.
    """

    caption: str
    source: str = ""
    pixelated: bool = False


def read_picture(path: Path, caption: str, largest: int) -> Picture:
    """Read a picture for the page.

    Args:
        path: A PNG file. It may be cut off, if a run was killed while writing it.
        caption: Caption.
        largest: Most pixels a side; larger pictures are reduced.

    Returns:
        The picture, or one without a source whose caption says that the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            width, data = image.width, path.read_bytes()
            if max(image.size) > largest or image.format != "PNG":
                data = reduced(image, largest)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return Picture(f"{path.name} could not be read.")
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return Picture(caption, source, pixelated=width <= PIXELATED)


def reduced(image: Image.Image, largest: int) -> bytes:
    """Return a PNG of the image with at most `largest` pixels a side."""
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def svg(chart: Chart) -> Markup:
    """Draw a chart. matplotlib is imported here, when the first chart is drawn."""
    from difftrain.report import drawing

    return drawing.svg(chart)


@cache
def environment() -> Environment:
    """Return the templates' environment, which escapes all text."""
    environment = Environment(
        loader=PackageLoader("difftrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = svg
    return environment


def write_page(path: Path, template: str, page: object) -> Path:
    """Render a page and write it: a reader sees the old page or the new one.

    Args:
        path: The HTML file.
        template: Name of a template.
        page: What the template shows as `page`.

    Returns:
        `path`.
    """
    write_text(path, environment().get_template(template).render(page=page))
    return path
