"""The colours and lines of charts."""

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# Colours that `drawing` replaces by the variables of the style sheet.
SERIES = [f"#0a000{i}" for i in range(6)]
INK, QUIET, GRID = "#0b0001", "#0b0002", "#0b0003"

DASHED = (0, (4, 3))


class Level(NamedTuple):
    """A dashed line across a chart; a value of NaN draws nothing."""

    name: str
    value: float
