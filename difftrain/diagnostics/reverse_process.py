"""A reverse process over some of a schedule's timesteps, level by level, with keyed noise.

It does what sampling does, open to inspection.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.diagnostics.base import Subject
from difftrain.objective.parameterization import Estimate
from difftrain.objective.transitions import ancestral, ddim, posterior

StepKind = Literal["ancestral", "mean", "ddim"]


class Stage(NamedTuple):
    """One step of a reverse process.

    Args:
        t: The table index at which the network was evaluated.
        below: The table index that the step reaches; -1 is the clean sample.
        estimate: What the network's output implies at t.
        x: The state [B, ...] at `below`.
    """

    t: int
    below: int
    estimate: Estimate
    x: Tensor


def one_step(
    subject: Subject,
    x: Tensor,
    estimate: Estimate,
    predicted: Tensor | None,
    t: int,
    below: int,
    step: StepKind,
    rng: Rng,
) -> Tensor:
    """Take one step. As in samplers, the step to the clean sample adds no noise.

    Args:
        subject: Whose schedule it is.
        x: The state [B, ...] at t.
        estimate: What the network's output implies there.
        predicted: What predicts the variance [B, ...], if the model learns it.
        t: A table index.
        below: A smaller one; -1 is the clean sample.
        step: "ancestral" draws from q(x_s | x_t, x0_hat), with the learned variance where there
            is one; "mean" takes that posterior's mean, "ddim" is deterministic, and on flow
            schedules the Euler step.
        rng: The samples' draws.

    Returns:
        The state [B, ...] at `below`.
    """
    level, before = subject.level(t, len(x)), subject.level(below, len(x))
    if step == "ancestral":
        noise = rng.normal(x.shape[1:], f"diagnostics.step {below}").to(x)
        log_variance = None
        if predicted is not None and below >= 0:
            log_variance = subject.variance.log_variance(predicted, level, before)
        return ancestral(x, estimate, level, before, noise, log_variance)
    if step == "mean":
        return posterior(estimate.x0, x, level, before).mean
    return ddim(x, estimate, level, before)


def descent(
    subject: Subject,
    x: Tensor,
    timesteps: Sequence[int],
    labels: Tensor | None,
    step: StepKind,
    rng: Rng,
    guidance: float = 1.0,
    clips: bool | None = None,
) -> Iterator[Stage]:
    """Yield the steps from x at the last of some timesteps down to the clean sample.

    Args:
        subject: The network and its schedule.
        x: The state [B, ...] at the last timestep.
        timesteps: Table indices, ascending.
        labels: Labels [B], if the network takes any.
        step: How a step is taken, see `one_step`.
        rng: The samples' draws.
        guidance: Scale of guidance.
        clips: Whether x0_hat is clipped, see `Subject.estimate`.
    """
    for k in reversed(range(len(timesteps))):
        t = timesteps[k]
        below = timesteps[k - 1] if k else -1
        found, predicted = subject.reverse_estimate(x, t, labels, guidance, clips)
        x = one_step(subject, x, found, predicted, t, below, step, rng)
        yield Stage(t, below, found, x)


def last_state(stages: Iterator[Stage]) -> Tensor:
    """Return x0 [B, ...] at the end of a descent."""
    x = torch.empty(0)
    for stage in stages:
        x = stage.x
    return x
