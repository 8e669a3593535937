"""What the report of a fine-tuning run has beside the others': prompts under the samples, what trains, and the held-out loss."""

from difftrain.report.page import Html, card, number, quiet
from difftrain.report.plots import lines
from difftrain.report.records import Record, dig, mapping

MOST_PROMPTS, MOST_CURVES = 16, 5

Interval = tuple[float, float]


def prompts_of(recipe: Record) -> Html:
    """The recipe's prompts, which the samples take in turn; nothing where it has none."""
    prompts = dig(recipe, "sampling", "prompts")
    if not isinstance(prompts, list) or not prompts:
        return Html()
    told = " · ".join(str(prompt) or "(no prompt)" for prompt in prompts[:MOST_PROMPTS])
    more = f" · and {len(prompts) - MOST_PROMPTS} more" if len(prompts) > MOST_PROMPTS else ""
    return quiet(f"Prompts, in turn, row by row: {told}{more}")


def held_out_cards(validation: list[Record]) -> list[Html]:
    """The held-out loss over steps, and the same by noise level: neighbouring bands of log-SNR are gathered into a few curves."""
    if not validation:
        return []
    steps = [number(record.get("step")) for record in validation]
    mean = lines({"held-out": (steps, [number(record.get("value")) for record in validation])}, "Held-out loss over steps")
    losses = [losses_of(record) for record in validation]
    curves = {f"log-SNR {low:.3g} to {high:.3g}": (steps, [mean_within(found, (low, high)) for found in losses])
              for low, high in gathered(sorted({interval for found in losses for interval in found}))}  # fmt: skip
    note = "images that are not trained on, always the same noise, unweighted"
    title = "Held-out loss by noise level"
    return [card("Held-out loss", mean, note), *([card(title, lines(curves, title), "low log-SNR is noise")] if curves else [])]


def losses_of(record: Record) -> dict[Interval, tuple[float, float]]:
    """(loss, number of timesteps) by interval of log-SNR."""
    found: dict[Interval, tuple[float, float]] = {}
    for band in record.get("bands") or []:
        ends = mapping(band).get("log_snr")
        if isinstance(ends, list) and len(ends) == 2:
            found[number(ends[0]), number(ends[1])] = number(band.get("loss")), number(band.get("timesteps"))
    return found


def gathered(intervals: list[Interval]) -> list[Interval]:
    """At most MOST_CURVES intervals that cover the given ones, which are sorted."""
    size = -(-len(intervals) // MOST_CURVES)
    parts = [intervals[start : start + size] for start in range(0, len(intervals), size or 1)]
    return [(part[0][0], part[-1][1]) for part in parts]


def mean_within(losses: dict[Interval, tuple[float, float]], within: Interval) -> float:
    """The mean loss over the timesteps of the intervals within one; NaN without any."""
    inside = [found for (low, high), found in losses.items() if within[0] <= low and high <= within[1]]
    total = sum(count for _, count in inside)
    return sum(loss * count for loss, count in inside) / total if total else float("nan")
