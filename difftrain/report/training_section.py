"""The sections "Training", "Noise levels" and "Time" of a run's report."""

import math
from dataclasses import dataclass

from difftrain.report.band_charts import HeatMap, Profiles
from difftrain.report.bands import bands_of
from difftrain.report.charts import DENSE, Points, StepCurves, WeightCurves
from difftrain.report.fine_tuning import held_out_cards
from difftrain.report.page import Card, Table
from difftrain.report.records import CHANGED, Record, RunFiles, dig, mapping
from difftrain.report.style import SERIES
from difftrain.report.text import duration, number, numbers, recipe_value, shown

# The errors of a parameterization, as a chart's legend names them.
ERRORS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class TimeShare:
    """One phase of a run in the bar of its time.

    Args:
        name: The phase.
        text: Its duration.
        percent: Its share of all time.
        color: Index of its colour.
    """

    name: str
    text: str
    percent: float
    color: int


def training_cards(log: list[Record], validation: list[Record]) -> list[Card]:
    """Return the curves of a training.

    Args:
        log: Logged records in order of steps.
        validation: Held-out losses in order of steps.
    """
    if not log:
        return []
    note = "faint line: before smoothing" if len(log) >= DENSE else ""
    cards = [curve_card(log, "Loss", "loss", note), *held_out_cards(validation)]
    terms = {term: over(log, "terms", term) for term in names_in(log, "terms")}
    if terms:
        chart = StepCurves("Terms over steps", terms, smooth=True)
        cards.append(Card("Terms of the loss", chart, "weighted; they sum to the loss"))
    cards.append(curve_card(log, "Gradient norm", "grad_norm"))
    rate = StepCurves("Learning rate over steps", {"Learning rate": over(log, "lr")}, log=False)
    cards.append(Card("Learning rate", rate))
    for measure in names_in(log, "measures"):
        curve = {measure: over(log, "measures", measure)}
        chart = StepCurves(f"{measure} over steps", curve, smooth=True)
        cards.append(Card(measure, chart, "measured by a regularizer, not part of the loss"))
    return cards


def curve_card(log: list[Record], title: str, key: str, note: str = "") -> Card:
    """Return a smoothed curve of one logged value."""
    chart = StepCurves(f"{title} over steps", {title: over(log, key)}, smooth=True)
    return Card(title, chart, note)


def names_in(log: list[Record], key: str) -> list[str]:
    """Return all names below a key of the log, in order of their first appearance."""
    names: dict[str, None] = {}
    for record in log:
        names |= dict.fromkeys(mapping(record.get(key)))
    return list(names)


def over(log: list[Record], *keys: str) -> Points:
    """Return the steps and a logged value, NaN where it is missing."""
    return [record["step"] for record in log], [number(dig(record, *keys)) for record in log]


def change_table(changes: list[Record]) -> Table | None:
    """Return what resumes changed in the recipe; None without any change.

    Args:
        changes: Lines {"step": s, "changed": {key: [before, after]}} of the log.
    """
    rows = []
    for record in changes:
        for key, values in mapping(record[CHANGED]).items():
            if isinstance(values, list) and len(values) == 2:
                before, after = map(recipe_value, values)
                rows.append([shown(record.get("step")), key, before, after])
    return Table(["step", "key", "before", "after"], rows) if rows else None


def noise_level_cards(files: RunFiles) -> list[Card]:
    """Return the weight and the error along the noise level.

    Args:
        files: The run folder's content.
    """
    cards = []
    if files.weights:
        cards.append(weight_card(files.weights))
    bands = bands_of(files.log)
    if bands is not None:
        note = "mean error of a sample, not weighted"
        profiles = Profiles("Error along log-SNR", bands)
        cards.append(Card("Error by noise level", profiles, note))
        heat_map = HeatMap("Error by log-SNR over training", bands)
        cards.append(Card("Error over training", heat_map, note))
    return cards


def weight_card(weights: Record) -> Card:
    """Return the weight on the trained error, and the equivalent weight on the epsilon error.

    Args:
        weights: The content of weights.json.
    """
    trained = ERRORS.get(str(weights.get("trained_error")), "trained")
    named = {f"on the {trained} error": "weight"}
    if trained != "epsilon":
        named["the same on the epsilon error"] = "weight_on_epsilon"
    log_snr = numbers(weights.get("log_snr"))
    curves = {}
    for name, key in named.items():
        values = numbers(weights.get(key))
        if len(values) == len(log_snr):
            curves[name] = (log_snr, values)
    chart = WeightCurves("Weight along log-SNR", curves)
    note = "does not include how often each timestep is sampled"
    return Card("Weight by noise level", chart, note)


def speed_card(log: list[Record]) -> Card | None:
    """Return the throughput over steps; None before anything is logged."""
    if not log:
        return None
    curve = {"images/s": over(log, "wall", "images_per_second")}
    chart = StepCurves("Images per second over steps", curve, smooth=True, log=False)
    return Card("Images per second", chart)


def time_shares(seconds: dict[str, float]) -> list[TimeShare]:
    """Return how the time of a run divides.

    Args:
        seconds: Seconds by phase.
    """
    total = sum(seconds.values())
    shares = []
    for i, (name, part) in enumerate(seconds.items()):
        shares.append(TimeShare(name, duration(part), 100 * part / total, i % len(SERIES)))
    return shares


def evaluation_share(in_loop: list[Record]) -> str:
    """Return how much time evaluation took within training, in words; empty if it is not known."""
    share = number(dig(in_loop[-1], "wall", "share")) if in_loop else math.nan
    if not math.isfinite(share):
        return ""
    return f"Since the last start, evaluation took {100 * share:.1f} % of the time of training."
