"""Reads what a run folder holds: each file may be missing, and a log's last line may be cut off."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from difftrain.core.errors import ExitCode
from difftrain.report.text import number

Record = dict[str, Any]

MOST_LINES = 2000  # of a log that are parsed
CHANGED = "changed"  # the key of a log's lines about changes on a resume


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder, as far as it can be read.

    Args:
        folder: The run folder.
        recipe: The resolved recipe.
        environment: Versions, machine, and seconds by phase.
        status: How the run ended; its code is null or missing while it runs.
        log: Logged records, one a step, in order of steps.
        every: One in `every` logged steps is in `log`.
        changes: The lines of the log about changes on a resume.
        in_loop: Evaluations within training, in order of steps.
        validation: Held-out losses, in order of steps.
        evaluation: The final evaluation.
        scored: Every evaluation of the trained run, in the order of time.
        weights: The loss weight by noise level.
        diagnostics: Results by the name of the diagnostic.
        skipped: Images that could not be read.
    """

    folder: Path
    recipe: Record
    environment: Record
    status: Record
    log: list[Record]
    every: int
    changes: list[Record]
    in_loop: list[Record]
    validation: list[Record]
    evaluation: Record
    scored: list[Record]
    weights: Record
    diagnostics: Record
    skipped: list[Record]

    @classmethod
    def read(cls, folder: Path) -> "RunFiles":
        """Read a run folder.

        Args:
            folder: An existing folder.
        """
        lines, every = read_lines(folder / "log.jsonl", always=CHANGED)
        return cls(
            folder=folder,
            recipe=read_recipe(folder / "recipe.yaml"),
            environment=read_json(folder / "environment.json"),
            status=read_json(folder / "status.json"),
            log=by_step([line for line in lines if CHANGED not in line]),
            every=every,
            changes=[line for line in lines if CHANGED in line],
            in_loop=by_step(read_lines(folder / "evaluations.jsonl")[0]),
            validation=by_step(read_lines(folder / "validation.jsonl")[0]),
            evaluation=read_json(folder / "evaluation.json"),
            scored=read_lines(folder / "scores.jsonl", limit=10**6)[0],
            weights=read_json(folder / "weights.json"),
            diagnostics=read_json(folder / "diagnostics.json"),
            skipped=read_lines(folder / "skipped.jsonl", limit=10**6)[0],
        )

    @property
    def name(self) -> str:
        """The name of the run."""
        return Path(str(self.recipe.get("output") or self.folder.resolve())).name

    @property
    def is_trained(self) -> bool:
        """Whether the last step of the recipe is logged."""
        steps = number(dig(self.recipe, "training", "steps"))
        return bool(self.log) and self.log[-1]["step"] >= steps

    @property
    def awaits_scores(self) -> bool:
        """Whether the training is done, but not the final evaluation that the recipe asks for."""
        return self.is_trained and bool(self.recipe.get("evaluation")) and not self.evaluation

    @property
    def state(self) -> str:
        """The state of the run in one word.

        "finished", "stopped" (the same command continues it), "failed", "trained" (without final
        scores), or "running": that includes a run that was killed before it could write a status.
        """
        code = self.status.get("code")
        if code is not None:
            names = {ExitCode.DONE: "finished", ExitCode.STOPPED: "stopped"}
            return names.get(code, "failed")
        if self.awaits_scores:
            return "trained"
        return "finished" if self.is_trained else "running"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase of the run, without phases that took none."""
        phases = mapping(self.environment.get("seconds"))
        return {name: number(value) for name, value in phases.items() if number(value) > 0}

    @property
    def latest_evaluation(self) -> Record:
        """The final evaluation; before there is one, the latest within training."""
        if self.evaluation or not self.in_loop:
            return self.evaluation
        return self.in_loop[-1]


def mapping(value: object) -> Record:
    """Return the value if it is a mapping, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def dig(record: object, *keys: str) -> Any:
    """Return record[key][key]..., or None where a key is missing."""
    for key in keys:
        record = mapping(record).get(key)
    return record


def read_json(path: Path) -> Record:
    """Read the object in a JSON file; empty if there is none that can be read."""
    try:
        return mapping(json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError):  # a file that was cut off is as good as missing
        return {}


def read_recipe(path: Path) -> Record:
    """Read a recipe; empty if there is none that can be read."""
    try:
        return mapping(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")))
    except (FileNotFoundError, yaml.YAMLError):  # the page shows its text all the same
        return {}


def read_lines(
    path: Path, limit: int = MOST_LINES, always: str | None = None
) -> tuple[list[Record], int]:
    """Read about `limit` objects of a JSON-lines file, evenly spaced and with the last ones.

    Only these lines are parsed, so that a log of a million lines takes seconds. A line that is
    not JSON was cut off when a run was killed; it is left out.

    Args:
        path: The file, which may be missing.
        limit: About how many objects to read.
        always: A key; lines that contain it are always read.

    Returns:
        The objects, and n where one in n lines is read.
    """
    if not path.exists():
        return [], 1
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
    every = max(1, math.ceil(num_lines / limit))
    chosen = []
    with path.open("rb") as file:
        for i, line in enumerate(file):
            is_wanted = always is not None and f'"{always}"'.encode() in line
            if i % every == 0 or i >= num_lines - 2 or is_wanted:
                chosen.append(line)
    return list(objects(chosen)), every


def objects(texts: Iterable[bytes]) -> Iterator[Record]:
    """Yield the JSON objects among some texts."""
    for text in texts:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def by_step(records: list[Record]) -> list[Record]:
    """Sort records by step; of a step that was repeated after a resume, the last record stays."""
    last = {}
    for record in records:
        step = number(record.get("step"))
        if math.isfinite(step):
            last[step] = record
    return [last[step] for step in sorted(last)]


def best_step(in_loop: list[Record]) -> Any:
    """Return the step of the best checkpoint: the first with the smallest `selected_by`.

    Returns:
        The step; None where no evaluation selects a checkpoint.
    """
    selecting = [record for record in in_loop if math.isfinite(number(record.get("selected_by")))]
    if not selecting:
        return None
    return min(selecting, key=lambda record: number(record["selected_by"])).get("step")


def grids_of(folder: Path, with_final: bool = True) -> list[Path]:
    """Return the sample grids of a run folder in order of steps, samples/final.png last.

    Args:
        folder: The run folder.
        with_final: Include samples/final.png.
    """
    grids = sorted((folder / "samples").glob("step-*.png"))
    final = folder / "samples" / "final.png"
    if with_final and final.exists():
        grids.append(final)
    return grids


def label_of(grid: Path) -> str:
    """Return the caption of a sample grid."""
    step = grid.stem.removeprefix("step-")
    return f"step {int(step):,}" if step.isdecimal() else grid.stem
