"""The look of a report: HTML that escapes by construction, one style sheet, numbers as text, pictures inside the page.

Owns the one relation between markup and text: `element` escapes every child that is not itself `Html`. Knows nothing of runs.
"""

import base64
import io
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

MISSING = "\N{EN DASH}"


class Html(str):
    """Markup. Whatever else reaches `element` is text and is escaped there."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """<tag attributes>children</tag>; `class_` stands for class."""
    listed = "".join(f' {name.rstrip("_")}="{escape(str(value))}"' for name, value in attributes.items())
    return Html(f"<{tag}{listed}>{joined(*children)}</{tag}>")


def joined(*children: object) -> Html:
    return Html("".join(child if isinstance(child, Html) else escape(str(child)) for child in children))


def section(title: str, *children: object) -> Html:
    """A headed section, or nothing where all its parts are empty."""
    return element("section", element("h2", title), *children) if any(map(str, children)) else Html()


def card(title: str, chart: object, note: str = "") -> Html:
    return element("figure", element("figcaption", title, " ", element("small", note) if note else ""), chart, class_="card")


def details(title: str, *children: object) -> Html:
    return element("details", element("summary", title), *children)


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Html:
    """Rows of text or Html; the first column is the row's name. Scrolls sideways where the screen is narrow."""
    lines = [element("tr", element("th", row[0], scope="row"), *map(table_cell, row[1:])) for row in rows]
    top = element("tr", *(element("th", name, scope="col") for name in head))
    return element("div", element("table", element("thead", top), element("tbody", *lines)), class_="wide")


def table_cell(content: object) -> Html:
    return element("td", content, class_="long" if len(str(content)) > 40 else "short")


def quiet(text: str) -> Html:
    return element("p", text, class_="quiet")


def picture(path: Path, caption: str, largest: int) -> Html:
    """The PNG at `path` inside the page, at most `largest` pixels a side; text where the file is not a readable picture."""
    try:
        with Image.open(path) as image:
            image.load()
            width, data = image.width, path.read_bytes()
            if max(image.size) > largest or image.format != "PNG":
                image.thumbnail((largest, largest))
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                data = buffer.getvalue()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # a run killed while it wrote this picture, or one still being written
        return element("p", f"{path.name} could not be read.", class_="quiet")
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    look = "pixels" if width <= 320 else "smooth"  # digits are 8 x 8: enlarged, their pixels should stay pixels
    image_tag = Html(f'<img class="{look}" src="{source}" alt="{escape(caption)}">')
    return element("figure", image_tag, element("figcaption", caption))


def number(value: object) -> float:
    """The value as a float; NaN for null, text, booleans and whatever else a log may hold."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else math.nan


def shown(value: object, digits: int = 4) -> str:
    """Four digits, thousands apart, a dash for what is no finite number."""
    x = number(value)
    if not math.isfinite(x):
        return MISSING
    return f"{x:,.0f}" if x.is_integer() or abs(x) >= 10**digits else f"{x:.{digits}g}"


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"


def flat(value: Any, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, the keys dotted."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, child in value.items() for key, leaf in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()}


def write_page(path: Path, title: str, *body: object) -> Path:
    """Writes the page beside `path`, then moves it there: a reader sees the old page or the new one."""
    head = element("head", Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
                   element("title", title), element("style", Html(CSS)))  # fmt: skip
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(f"<!DOCTYPE html>\n{element('html', head, element('body', *body), lang='en')}\n", encoding="utf-8")
    os.replace(beside, path)
    return path


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --quiet: #5d6878; --grid: #dde2e9;
  --c0: #2461c9; --c1: #cf5a1a; --c2: #14805a; --c3: #8a3fb0; --c4: #94700a; --c5: #bb2f63;
  --good: #14805a; --warn: #a85b00; --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1b2129; --ink: #e7ebf1; --quiet: #9ba7b7; --grid: #343d49;
    --c0: #7fabff; --c1: #ff9d66; --c2: #53cf9f; --c3: #cd98ea; --c4: #e2bf55; --c5: #ff86ae;
    --good: #53cf9f; --warn: #f0b357; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.6rem clamp(.8rem, 3vw, 2rem) 3rem; max-width: 1200px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.quiet, small, figcaption { color: var(--quiet); }
small { display: block; font-weight: 400; font-size: .84rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1rem; }
.badge { border: 1.5px solid; border-radius: 99px; padding: .05rem .75rem; font-weight: 600; font-size: .9rem; }
.finished { color: var(--good); } .running { color: var(--c0); } .stopped { color: var(--warn); } .failed { color: var(--bad); }
.message { border-left: 4px solid var(--warn); background: var(--card); padding: .5rem .9rem; white-space: pre-wrap; }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .5rem 0; color: var(--quiet); }
.facts b { color: var(--ink); font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: .9rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 210px), 1fr)); gap: .9rem; margin-top: 1.2rem; }
.card, .tile, .wide, details { margin: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--grid);
  border-radius: 10px; }
.card > figcaption { color: var(--ink); font-weight: 600; font-size: .95rem; margin-bottom: .3rem; }
.card { display: flex; flex-direction: column; } .card svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg * { stroke-linejoin: round; } svg text { font-family: inherit; }
.tile b { display: block; font-size: 2.1rem; line-height: 1.15; font-weight: 650; font-variant-numeric: tabular-nums; }
.meter { position: relative; height: 8px; border-radius: 4px; background: var(--grid); margin: .5rem 0; }
.meter i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--c0); }
.meter u { position: absolute; top: -4px; bottom: -4px; width: 3px; margin-left: -1px; background: var(--ink); }
.wide { overflow-x: auto; padding: .3rem .6rem; margin: .9rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; } thead th:empty { padding: 0; }
td.short { white-space: nowrap; } td.long { overflow-wrap: anywhere; min-width: 12rem; }
tbody th { overflow-wrap: anywhere; min-width: 9rem; }
.samples { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 1.2rem; align-items: start; }
.film { display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem; }
.side { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); gap: 1rem; }
@media (max-width: 700px) { .samples { grid-template-columns: 1fr; } .film { gap: .5rem; } }
.samples figure, .side figure { margin: 0; }
.samples figcaption, .side figcaption { font-size: .88rem; overflow-wrap: anywhere; }
img { display: block; width: 100%; border-radius: 4px; } .pixels { image-rendering: pixelated; }
.split { display: flex; height: 1.1rem; border-radius: 5px; overflow: hidden; margin: .5rem 0; background: var(--grid); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
details { margin: .7rem 0; } summary { cursor: pointer; font-weight: 600; } details .wide { border: 0; padding: 0; }
pre { overflow-x: auto; font: .84rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { background: none; padding: 0; font-size: 11pt; } pre { white-space: pre-wrap; }
  .cards, .pairs { grid-template-columns: repeat(2, 1fr); } h2 { break-after: avoid; } .card, .tile, tr, .samples { break-inside: avoid; }
  table { font-size: .8rem; } th, td { padding: .25rem .35rem; } td.short { white-space: normal; } tbody th { min-width: 6rem; }
  details::details-content { content-visibility: visible; } }
"""
