"""The head of a run's report: its state, its choices in one line, where it stands, and its scores as large numbers."""

import math
import time
from pathlib import Path
from statistics import median

from difftrain.report.page import MISSING, Html, duration, element, number, quiet, shown
from difftrain.report.records import Record, best_step, better_of, dig, mapping, scores_of, seconds_of, title_of

UNREMARKABLE = {"unit", "uniform", "white", "squared", "fixed", "full"}  # parts that a summary need not name


def state_of(status: Record, log: list[Record], recipe: Record) -> str:
    """finished, stopped (run again to go on), failed, or running: no status yet, or killed before it could write one."""
    if status.get("code") is not None:
        return {0: "finished", 75: "stopped"}.get(status["code"], "failed")
    return "finished" if log and log[-1]["step"] >= number(dig(recipe, "training", "steps")) else "running"


def summary(recipe: Record) -> str:
    """The choices that make this run: 'unet2d cifar10, linear schedule, epsilon, p2 gamma=1, input perturbation gamma=0.1, EMA'."""
    objective, model, schedule = (mapping(recipe.get(block)) for block in ("objective", "model", "schedule"))
    slots = [objective.get(slot) for slot in ("weighting", "timesteps", "noise", "perturbation", "error", "variance")]
    chosen = [
        words({key: model[key] for key in ("type", "preset") if model.get(key)}),
        words({"type": f"{schedule['type']} schedule"}) if schedule.get("type") else "",
        str(recipe.get("parameterization") or "").replace("_", " "),
        *(words(part) for part in [*slots, *(objective.get("regularizers") or []), recipe.get("adapter")]),
        "EMA" if recipe.get("ema") else "",
        f"{shown(steps)} steps of {shown(dig(recipe, 'training', 'batch_size'))}" if (steps := dig(recipe, "training", "steps")) else "",
    ]
    return ", ".join(filter(None, chosen))


def words(part: object) -> str:
    """'p2 gamma=1' for {type: p2, gamma: 1.0}; nothing for the parts that everyone has."""
    block = mapping({"type": part} if isinstance(part, str) else part)
    if block.get("type") in UNREMARKABLE:
        return ""
    arguments = [f"{key}={shown(value)}" for key, value in block.items() if math.isfinite(number(value))]
    return " ".join([str(block.get("type") or "").replace("_", " "), *([str(block["preset"])] if "preset" in block else []), *arguments])


def facts(log: list[Record], recipe: Record, environment: Record, in_loop: list[Record], run: Path) -> Html:
    last = log[-1] if log else {}
    speeds = [speed for record in log if math.isfinite(speed := number(dig(record, "wall", "images_per_second")))]
    seconds = sum(seconds_of(environment).values())
    best = best_step(in_loop)
    listed = {
        "step": f"{shown(last.get('step', 0))} of {shown(dig(recipe, 'training', 'steps'))}",
        "loss": shown(last.get("loss")),
        "images seen": shown(last.get("images")),
        "parameters": shown(environment.get("parameters")),
        "adapter": str(environment.get("trains") or MISSING),
        "time": duration(seconds) if seconds else MISSING,
        "images/s": shown(median(speeds), 3) if speeds else MISSING,
        "best checkpoint": MISSING if best is None else f"step {shown(best)}",
        "last logged": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime((run / "log.jsonl").stat().st_mtime)) if log else MISSING,
    }
    known = (element("span", key, " ", element("b", text)) for key, text in listed.items() if text != MISSING)
    return element("div", *known, class_="facts")


def score_tiles(evaluation: Record) -> Html:
    tiles = [tile(name, score) for name, score in scores_of(evaluation).items()]
    return element("div", *tiles, class_="tiles") if tiles else quiet("No evaluation yet.")


def tile(name: str, score: Record) -> Html:
    """A score as a large number, and as a bar with real against real marked on it."""
    value, floor = number(score.get("value")), number(score.get("floor"))
    against = f"real against real {shown(floor)}" if math.isfinite(floor) else ""
    note = " · ".join(filter(None, [against, better_of(name)]))
    return element("div", title_of(name), element("b", shown(value)), meter(value, floor), element("small", note), class_="tile")


def meter(value: float, floor: float) -> Html:
    if not (math.isfinite(value + floor) and max(value, floor) > 0):
        return Html()
    value_share, floor_share = (f"{max(x, 0) / max(value, floor) * 92:.1f}%" for x in (value, floor))
    return element("div", element("i", style=f"width:{value_share}"), element("u", style=f"left:{floor_share}"), class_="meter")
