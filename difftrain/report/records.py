"""What a run folder holds, as far as it can be read: each file may be missing, and a log's last line may be cut off."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from difftrain.evaluation.scores import BETTER, HIGHER, LOWER, NEAR_ONE
from difftrain.report.page import number
from difftrain.report.plots import Bands

Record = dict[str, Any]

TITLES = {"frechet_distance": "Fréchet distance", "frechet_video_distance": "Fréchet video distance", "fid": "FID", "kid": "KID"}


def best_step(in_loop: list[Record]) -> Any:
    """The step whose score picks the checkpoint (`selected_by`, smaller is better, the first of equals); None where none does."""
    picking = [record for record in in_loop if math.isfinite(number(record.get("selected_by")))]
    return min(picking, key=lambda record: number(record["selected_by"])).get("step") if picking else None


def mapping(value: object) -> Record:
    return value if isinstance(value, dict) else {}


def dig(record: object, *keys: str) -> Any:
    """record[key][key]..., None where something on the way is missing."""
    for key in keys:
        record = mapping(record).get(key)
    return record


def read_json(path: Path) -> Record:
    """The object in the file; empty where there is none, or none that can be read."""
    try:
        return mapping(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):  # the report shows what is there; a file cut off is as good as missing
        return {}


def read_recipe(path: Path) -> Record:
    try:
        return mapping(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))) if path.exists() else {}
    except yaml.YAMLError:  # its text is shown all the same
        return {}


def read_lines(path: Path, limit: int = 2000) -> tuple[list[Record], int]:
    """About `limit` objects of a JSON-lines file, evenly taken and with the last ones; and that every how many-th was taken.

    Only these are parsed, so that a log of a million lines costs seconds. A line that is no JSON was cut off when a run was killed.
    """
    if not path.exists():
        return [], 1
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
    every = max(1, math.ceil(num_lines / limit))
    with path.open("rb") as file:
        return list(objects(line for i, line in enumerate(file) if i % every == 0 or i >= num_lines - 2)), every


def objects(texts: Iterable[bytes]) -> Iterator[Record]:
    for text in texts:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def by_step(records: list[Record]) -> list[Record]:
    """In order of steps; a step that was run again after a resume counts once, as it was run last."""
    last = {step: record for record in records if math.isfinite(step := number(record.get("step")))}
    return [last[step] for step in sorted(last)]


def scores_of(record: Record) -> dict[str, Record]:
    return {name: score if isinstance(score, dict) else {"value": score} for name, score in mapping(record.get("scores")).items()}


def title_of(score: str) -> str:
    return TITLES.get(score) or score.replace("_", " ").capitalize()


def better_of(score: str) -> str:
    """What to read into the score, as a note; empty for a score of which no better side is known."""
    notes = {LOWER: "lower is better", HIGHER: "higher is better", NEAR_ONE: "near 1 is best; far below: copies"}
    return notes.get(BETTER.get(score, ""), "")


def seconds_of(environment: Record) -> dict[str, float]:
    return {name: number(value) for name, value in mapping(environment.get("seconds")).items() if number(value) > 0}


def grids_of(run: Path, with_final: bool = True) -> list[Path]:
    """Sample grids in order of steps, samples/final.png last."""
    final = run / "samples" / "final.png"
    return sorted((run / "samples").glob("step-*.png")) + ([final] if with_final and final.exists() else [])


def label_of(grid: Path) -> str:
    step = grid.stem.removeprefix("step-")
    return f"step {int(step):,}" if step.isdecimal() else grid.stem


def bands_of(log: list[Record], stretches: int = 40) -> Bands | None:
    """The logged bands gathered into at most 40 equal stretches of training, each sample counting once."""
    rows = [(record["step"], *band) for record in log for band in map(read_band, record.get("bands") or []) if band]
    if not rows:
        return None
    intervals = sorted({interval for _, interval, _, _ in rows})
    first, last = rows[0][0], rows[-1][0]
    stretches = min(stretches, len({step for step, *_ in rows}))
    errors, counts = np.zeros((2, stretches, len(intervals)))
    for step, interval, error, count in rows:
        cell = min(int((step - first) / max(last - first, 1) * stretches), stretches - 1), intervals.index(interval)
        errors[cell] += error * count
        counts[cell] += count
    return Bands(intervals, (first, last), errors, counts)


def read_band(band: object) -> tuple[tuple[float, float], float, float] | None:
    """(low, high) of log-SNR, error, count; None for a band without samples. An end that JSON cannot hold (null) is infinite."""
    ends, error, count = dig(band, "log_snr"), number(dig(band, "error")), number(dig(band, "count"))
    if not (isinstance(ends, list) and len(ends) == 2 and math.isfinite(error) and count > 0):
        return None
    low, high = map(number, ends)
    return (-math.inf if math.isnan(low) else low, math.inf if math.isnan(high) else high), error, count
