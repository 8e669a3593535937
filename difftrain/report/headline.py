"""The head of a run's report: its choices in one line, where it stands, and its scores as tiles."""

import math
import time
from dataclasses import dataclass
from statistics import median

from difftrain.report.records import Record, RunFiles, best_step, dig, mapping
from difftrain.report.scores import Score, reasons, scores_of, titles_in
from difftrain.report.text import MISSING, duration, number, shown

# Parts that most recipes have, so that a summary need not name them.
COMMON = {"unit", "uniform", "white", "squared", "fixed", "full"}
SLOTS = ("weighting", "timesteps", "noise", "perturbation", "error", "variance")
METER = 92  # percent of its width that the larger value of a meter fills


@dataclass(frozen=True)
class Meter:
    """A bar with a mark.

    Args:
        value: Length of the bar, in percent of the width.
        floor: Place of the mark, in percent of the width.
    """

    value: str
    floor: str


@dataclass(frozen=True)
class Tile:
    """A score as a large number.

    Args:
        title: Title of the score.
        value: Its value.
        meter: A bar with real against real marked on it.
        note: Real against real, and which direction is better.
    """

    title: str
    value: str
    meter: Meter | None
    note: str


def summary(recipe: Record) -> str:
    """Return the choices of a run in one line.

    Args:
        recipe: A resolved recipe, or as much of it as there is.

    Returns:
        Text such as "unet2d digits, linear schedule, epsilon, p2 gamma=1, EMA".
    """
    objective, model = mapping(recipe.get("objective")), mapping(recipe.get("model"))
    named_model = {key: model[key] for key in ("type", "preset") if model.get(key)}
    schedule, steps = dig(recipe, "schedule", "type"), dig(recipe, "training", "steps")
    chosen = [in_words(named_model)]
    if schedule:
        chosen.append(in_words(f"{schedule} schedule"))
    chosen.append(str(recipe.get("parameterization") or "").replace("_", " "))
    parts = [objective.get(slot) for slot in SLOTS]
    parts += [*(objective.get("regularizers") or []), recipe.get("adapter")]
    chosen += map(in_words, parts)
    if recipe.get("ema"):
        chosen.append("EMA")
    if steps:
        chosen.append(f"{shown(steps)} steps of {shown(dig(recipe, 'training', 'batch_size'))}")
    return ", ".join(filter(None, chosen))


def in_words(part: object) -> str:
    """Return a part of a recipe in words.

    Args:
        part: A name, or a mapping with a type.

    Returns:
        Text such as "p2 gamma=1"; empty for parts that most recipes have.
    """
    block = {"type": part} if isinstance(part, str) else mapping(part)
    if block.get("type") in COMMON:
        return ""
    words = [str(block.get("type") or "").replace("_", " ")]
    if "preset" in block:
        words.append(str(block["preset"]))
    for key, value in block.items():
        if math.isfinite(number(value)):
            words.append(f"{key}={shown(value)}")
    return " ".join(words)


def facts(files: RunFiles) -> dict[str, str]:
    """Return where a run stands, as far as it is known.

    Args:
        files: The run folder's content.
    """
    last = files.log[-1] if files.log else {}
    step, steps = shown(last.get("step", 0)), shown(dig(files.recipe, "training", "steps"))
    found = {
        "step": f"{step} of {steps}",
        "loss": shown(last.get("loss")),
        "images seen": shown(last.get("images")),
        "parameters": shown(files.environment.get("parameters")),
        "adapter": str(files.environment.get("trains") or MISSING),
    }
    if files.seconds:
        found["time"] = duration(sum(files.seconds.values()))
    speeds = [number(dig(record, "wall", "images_per_second")) for record in files.log]
    speeds = [speed for speed in speeds if math.isfinite(speed)]
    if speeds:
        found["images/s"] = shown(median(speeds), 3)
    best = best_step(files.in_loop)
    if best is not None:
        found["best checkpoint"] = f"step {shown(best)}"
    if files.log:
        written = time.gmtime((files.folder / "log.jsonl").stat().st_mtime)
        found["last logged"] = time.strftime("%Y-%m-%d %H:%M UTC", written)
    return {key: text for key, text in found.items() if text != MISSING}


def messages(files: RunFiles) -> list[str]:
    """Return what a reader of the report must know first.

    Args:
        files: The run folder's content.
    """
    found = []
    if files.status.get("code"):
        found.append(f"Exit code {files.status['code']}: {files.status.get('message', '')}")
    evaluation = files.latest_evaluation
    failed = reasons(evaluation, "failed")
    if failed:
        titles = titles_in([*files.in_loop, evaluation])
        names = ", ".join(titles.get(name, name) for name in failed)
        found.append(f"Could not be computed: {names}. The section “Scores” says why.")
    return found


def tiles_of(evaluation: Record) -> list[Tile]:
    """Return the scores of an evaluation as tiles."""
    return [tile_of(score) for score in scores_of(evaluation).values()]


def tile_of(score: Score) -> Tile:
    """Return a score as a tile."""
    notes = [score.note]
    if math.isfinite(score.floor):
        notes.insert(0, f"real against real {shown(score.floor)}{score.floor_note}")
    note = " · ".join(filter(None, notes))
    return Tile(score.title, shown(score.value), meter_of(score), note)


def meter_of(score: Score) -> Meter | None:
    """Return the bar of a score; None without a floor that compares with it."""
    largest = max(score.value, score.level)
    if not (math.isfinite(score.value + score.level) and largest > 0):
        return None
    value_share = max(score.value, 0) / largest * METER
    floor_share = max(score.level, 0) / largest * METER
    return Meter(f"{value_share:.1f}%", f"{floor_share:.1f}%")
