"""The final scores: where they are kept, what failed, and the exit code that follows."""

import math
from pathlib import Path
from typing import Any

from difftrain.core.errors import ExitCode
from difftrain.core.files import append, write_json
from difftrain.core.processes import is_main
from difftrain.core.registry import dump
from difftrain.evaluation.agreement import AgreedError, Failure
from difftrain.evaluation.parts import part_block
from difftrain.evaluation.results import Evaluation
from difftrain.recipe.schema import EvaluationSettings
from difftrain.report.scores import Score
from difftrain.training.scores import NEAREST_FILE, save_worst

SCORES_FILE = "scores.jsonl"  # of a run, with a line for each evaluation; no resume cuts it


def failed_evaluation(settings: EvaluationSettings, error: Exception) -> Evaluation:
    """Return an evaluation in which every score failed for one reason.

    Args:
        settings: The recipe's evaluation block.
        error: Why nothing could be scored.
    """
    failure = error.failure if isinstance(error, AgreedError) else Failure.of(error)
    names = [name for metric in settings.metrics for name in metric.scores]
    protocol = {
        "features": dump(settings.features),
        "reference": dump(settings.reference),
        "num_samples": settings.num_samples,
        "metrics": [part_block(metric) for metric in settings.metrics],
    }
    return Evaluation({}, protocol, {"count": 0}, failures=dict.fromkeys(names, failure))


def keep_scores(
    evaluation: Evaluation, run: Path, step: int, weights: str, is_final: bool
) -> dict[str, Any]:
    """Append scores to scores.jsonl; those of the final weights become evaluation.json too.

    Args:
        evaluation: The scores.
        run: The run folder.
        step: The step of the weights.
        weights: Which weights these are, "ema" or "model".
        is_final: Whether these are the weights that the run ends with.

    Returns:
        What is written.
    """
    found = {**evaluation.to_json(step), "weights": weights}
    if is_final:
        save_worst(evaluation, run / "samples" / NEAREST_FILE)
    if is_main():
        if evaluation.scores:
            append(run / SCORES_FILE, found)
        if is_final:
            write_json(run / "evaluation.json", found)
    return found


def score_lines(evaluation: Evaluation) -> list[str]:
    """Return a line for each score, with its real-against-real floor where it has one."""
    lines = []
    for name, stated in evaluation.scores.items():
        score = Score.of(name, stated)
        line = f"  {name:<26}{score.value:>10.4g}"
        if math.isfinite(score.floor):
            line += f"   real against real {score.real_against_real}"
        if math.isfinite(score.ratio):
            line += f", ratio {score.ratio:.2f}"
        lines.append(line)
    lines += [f"  {name:<26}    failed: {f.reason}" for name, f in evaluation.failures.items()]
    lines += [f"  {name:<26}  left out: {why}" for name, why in evaluation.left_out.items()]
    return lines


def outcome(evaluation: Evaluation) -> tuple[int, str]:
    """Return the exit code of an evaluation, and a message about what failed."""
    failures = evaluation.failures
    if not failures:
        return ExitCode.DONE, ""
    reasons = "; ".join(f"{name}: {failure.reason}" for name, failure in failures.items())
    is_input = all(failure.is_input for failure in failures.values())
    return (ExitCode.WRONG_INPUT if is_input else ExitCode.FAILED), f"scores failed: {reasons}"
