"""What the report of a fine-tuning run adds: the prompts of its samples, and the held-out loss."""

import math

from difftrain.report.bands import Interval
from difftrain.report.charts import StepCurves
from difftrain.report.page import Card
from difftrain.report.records import Record, dig, mapping
from difftrain.report.text import number

MOST_PROMPTS, MOST_CURVES = 16, 5

Loss = tuple[float, float]  # mean loss, and over how many timesteps


def prompts_of(recipe: Record) -> str:
    """Return the prompts of the samples in one sentence; empty where the recipe has none."""
    prompts = dig(recipe, "sampling", "prompts")
    if not isinstance(prompts, list) or not prompts:
        return ""
    listed = " · ".join(str(prompt) or "(no prompt)" for prompt in prompts[:MOST_PROMPTS])
    if len(prompts) > MOST_PROMPTS:
        listed += f" · and {len(prompts) - MOST_PROMPTS} more"
    return f"Prompts, in turn, row by row: {listed}"


def held_out_cards(validation: list[Record]) -> list[Card]:
    """Return charts of the held-out loss over steps, in total and by noise level.

    Args:
        validation: Records in order of steps.
    """
    if not validation:
        return []
    steps = [number(record.get("step")) for record in validation]
    values = [number(record.get("value")) for record in validation]
    total = StepCurves("Held-out loss over steps", {"held-out": (steps, values)})
    note = "on images that are not trained on, with the same noise each time, not weighted"
    cards = [Card("Held-out loss", total, note)]

    # Neighbouring bands of log-SNR share a curve, so that the chart stays readable.
    losses = [losses_of(record) for record in validation]
    intervals = sorted({interval for found in losses for interval in found})
    curves = {}
    for low, high in gathered(intervals):
        means = [mean_within(found, (low, high)) for found in losses]
        curves[f"log-SNR {low:.3g} to {high:.3g}"] = (steps, means)
    if curves:
        title = "Held-out loss by noise level"
        cards.append(Card(title, StepCurves(title, curves), "low log-SNR is noise"))
    return cards


def losses_of(record: Record) -> dict[Interval, Loss]:
    """Return the losses of a validation record by interval of log-SNR."""
    found: dict[Interval, Loss] = {}
    for band in record.get("bands") or []:
        ends = mapping(band).get("log_snr")
        if isinstance(ends, list) and len(ends) == 2:
            interval = (number(ends[0]), number(ends[1]))
            found[interval] = (number(band.get("loss")), number(band.get("timesteps")))
    return found


def gathered(intervals: list[Interval]) -> list[Interval]:
    """Return at most `MOST_CURVES` intervals that cover the given sorted ones."""
    if not intervals:
        return []
    size = math.ceil(len(intervals) / MOST_CURVES)
    starts = range(0, len(intervals), size)
    parts = [intervals[start : start + size] for start in starts]
    return [(part[0][0], part[-1][1]) for part in parts]


def mean_within(losses: dict[Interval, Loss], within: Interval) -> float:
    """Return the mean loss over the timesteps of all intervals inside one; NaN without any."""
    total = count = 0.0
    for (low, high), (loss, timesteps) in losses.items():
        if within[0] <= low and high <= within[1]:
            total += loss * timesteps
            count += timesteps
    return total / count if count else math.nan
