"""The data that flows through an objective, and the protocols of its slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from difftrain.parameterization import Estimate, Parameterization
from difftrain.rng import Rng
from difftrain.schedule import NoiseLevel, NoiseSchedule

Cond = dict[str, Tensor]
Denoiser = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t [B, ...], time [B], cond) -> output, of x_t's shape or with twice its channels (learned variance)."""


@dataclass(frozen=True)
class Batch:
    """Clean samples x0 [B, C, H, W] or [B, C, F, H, W] and their conditioning tensors [B, ...] by the model's argument names.

    weights: [B], what each sample counts beside the others (prior preservation); None: all the same.
    """

    x0: Tensor
    cond: Cond = field(default_factory=dict)
    weights: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """What an objective returns: `total` (scalar, with gradient) and what the log shows of it.

    terms: each addend of the total by name, already weighted, detached scalars.
    errors, log_snr: the unweighted per-sample error and its noise level, [B], detached: the loss by noise-level band.
    measures: what regularizers show beside their terms, such as error_propagation.u_statistic; no part of the total.
    """

    total: Tensor
    terms: dict[str, Tensor]
    errors: Tensor
    log_snr: Tensor
    measures: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Timesteps:
    """t [B] long, and importance [B] float64: target density over sampling density, applied once, by the objective."""

    t: Tensor
    importance: Tensor


class TimestepSampler(Protocol):
    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps: ...


class NoiseSampler(Protocol):
    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        """eps of the shape, dtype and device of x0: what is added and what is the target."""
        ...


class Perturbation(Protocol):
    """Changes what the input sees; never the target's noise."""

    @property
    def target(self) -> Literal["clean", "implied_eps"]: ...

    def __call__(self, eps: Tensor, level: NoiseLevel, rng: Rng) -> Tensor: ...


class Error(Protocol):
    @property
    def squared(self) -> bool:
        """Whether this is the squared error: for it alone weightings convert between parameterizations."""
        ...

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Per-sample error [B], mean over all other dimensions."""
        ...


class Weighting(Protocol):
    @property
    def stated_for(self) -> Parameterization | None:
        """The error for which it is written; None: whatever error is trained."""
        ...

    def __call__(self, level: NoiseLevel) -> Tensor:
        """[B] float64, non-negative."""
        ...


class Variance(Protocol):
    @property
    def output_channels(self) -> int:
        """Channels of the output for each channel of x_t: 1, or 2 with a learned variance."""
        ...

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part that predicts, and what predicts the variance, if anything does."""
        ...

    def bound(self, batch: Batch, t: Tensor, x_t: Tensor, estimate: Estimate, predicted: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The variational-bound term [B], already weighted."""
        ...


class Regularizer(Protocol):
    """An nn.Module: its buffers are its state; they are not updated in passes without gradient (validation).

    It may have more: `warmup` (steps over which the weight grows to its full value), `needs_full_precision` (refused where the
    network computes in half precision) and `check(schedule, shape)`, which refuses what it cannot do with x0 of that shape [B, ...].
    """

    weight: float  # >= 0; 0: not evaluated at all
    every: int  # evaluated each k-th step, its weight then times k
    differentiates_input: bool  # asks for gradients to x_t
    needs_double_backward: bool  # asks for the math attention kernel

    def __call__(self, p: DenoisingPass) -> Tensor:
        """[B], or [] for a statistic of the batch."""
        ...


class Predict(Protocol):
    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | slice | None = None) -> Estimate: ...


@dataclass(frozen=True)
class DenoisingPass:
    """One evaluated batch, as a regularizer sees it.

    predict(x, t, rows=None) evaluates the same denoiser again with the conditions, dropped labels and dropout seed
    that those rows had in this pass. record(name, value) logs a detached scalar beside the term. importance [B]: what the
    objective multiplies values by sample with (None: 1).
    """

    batch: Batch
    t: Tensor
    level: NoiseLevel
    eps: Tensor
    x_t: Tensor
    estimate: Estimate
    predict: Predict
    schedule: NoiseSchedule
    rng: Rng
    importance: Tensor | None = None
    record: Callable[[str, Tensor], None] = lambda name, value: None

    def mean(self, values: Tensor) -> Tensor:
        """The mean [] of values [B] of this micro-batch, as the objective takes it: each times its importance."""
        return (values if self.importance is None else self.importance.to(values) * values).mean()
