"""The logged errors by noise level, gathered into stretches of training."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from difftrain.report.records import Record, mapping
from difftrain.report.text import number

Array = np.ndarray[Any, Any]
Interval = tuple[float, float]  # low and high end in log-SNR


class LoggedBand(NamedTuple):
    """Mean error of some samples within an interval of log-SNR."""

    interval: Interval
    error: float
    num: float


@dataclass(frozen=True)
class Bands:
    """Errors by stretch of training and interval of log-SNR.

    Args:
        intervals: Sorted intervals.
        steps: First and last step.
        errors: [stretches, intervals], summed over samples.
        counts: [stretches, intervals], number of samples.
    """

    intervals: list[Interval]
    steps: tuple[float, float]
    errors: Array
    counts: Array

    def error(self, stretches: slice) -> Array:
        """Return the mean error over some stretches.

        Args:
            stretches: Which stretches of training.

        Returns:
            [intervals], NaN for intervals without samples.
        """
        count = self.counts[stretches].sum(0)
        return np.where(count > 0, self.errors[stretches].sum(0) / np.maximum(count, 1), math.nan)


def bands_of(log: list[Record], most: int = 40) -> Bands | None:
    """Gather the logged bands into equal stretches of training; each sample counts once.

    Args:
        log: Records in order of steps.
        most: Largest number of stretches.

    Returns:
        The bands; None without samples.
    """
    rows: list[tuple[float, LoggedBand]] = []
    for record in log:
        bands = map(read_band, record.get("bands") or [])
        rows += [(record["step"], band) for band in bands if band is not None]
    if not rows:
        return None

    # No more stretches than logged steps, so that none is empty for that reason alone.
    intervals = sorted({band.interval for _, band in rows})
    first, last = rows[0][0], rows[-1][0]
    stretches = min(most, len({step for step, _ in rows}))
    errors = np.zeros((stretches, len(intervals)))
    counts = np.zeros((stretches, len(intervals)))
    for step, band in rows:
        stretch = min(int((step - first) / max(last - first, 1) * stretches), stretches - 1)
        column = intervals.index(band.interval)
        errors[stretch, column] += band.error * band.num
        counts[stretch, column] += band.num
    return Bands(intervals, (first, last), errors, counts)


def read_band(band: object) -> LoggedBand | None:
    """Read one band of a logged record.

    Args:
        band: {"log_snr": [low, high], "error": float, "count": int}. JSON has no infinity: an
            end that is null is infinite.

    Returns:
        The band; None without samples or if it cannot be read.
    """
    fields = mapping(band)
    ends = fields.get("log_snr")
    error, count = number(fields.get("error")), number(fields.get("count"))
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    if not math.isfinite(error) or not count > 0:
        return None
    low, high = number(ends[0]), number(ends[1])
    low = -math.inf if math.isnan(low) else low
    high = math.inf if math.isnan(high) else high
    return LoggedBand((low, high), error, count)
