"""The final scores in words: what failed, what was left out, and the exit code that follows."""

import math

from difftrain.core.errors import ExitCode
from difftrain.core.registry import dump
from difftrain.evaluation.agreement import AgreedError, Failure
from difftrain.evaluation.parts import part_block
from difftrain.evaluation.results import Evaluation
from difftrain.recipe.schema import EvaluationSettings
from difftrain.report.scores import Score


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
