"""The slots of the objective: each protocol beside its registry, in the order of a training step.

A protocol lists every member that is used. The registry of noise schedules is in `schedule`, beside
`NoiseSchedule`.
"""

from typing import Literal, Protocol

from torch import Tensor

from difftrain.core.registry import Registry
from difftrain.core.rng import Rng
from difftrain.objective.parameterization import Estimate, Parameterization
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule
from difftrain.objective.types import Batch, DenoisingPass, Timesteps


class TimestepSampler(Protocol):
    """Draws a timestep for each sample."""

    def __call__(self, num_timesteps: int, rng: Rng) -> Timesteps:
        """Draw timesteps.

        Args:
            num_timesteps: T, the length of the schedule's table.
            rng: Random draws of the samples.
        """
        ...


TIMESTEPS = Registry(
    "timesteps", "distribution of the timesteps", ["difftrain.objective.timesteps"]
)


class NoiseSampler(Protocol):
    """Draws the noise that is added to x0 and is the target."""

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        """Draw eps.

        Args:
            x0: Clean samples [B, ...].
            rng: Random draws of the samples.

        Returns:
            eps [B, ...], of the shape, dtype and device of x0.
        """
        ...


NOISES = Registry("noise", "noise that is the target", ["difftrain.objective.noise"])


class Perturbation(Protocol):
    """Changes the noise in the denoiser's input, and never the noise in the target."""

    @property
    def target(self) -> Literal["clean", "implied_eps"]:
        """What is trained.

        "clean" is the parameterization's own target. With "implied_eps" it is the eps that the
        output implies at the perturbed input, whatever the parameterization.
        """
        ...

    def __call__(self, eps: Tensor, level: NoiseLevel, rng: Rng) -> Tensor:
        """Return the noise of the input [B, ...].

        Args:
            eps: The noise of the target [B, ...]. It must not be changed in place.
            level: Noise levels [B].
            rng: Random draws of the samples.
        """
        ...


PERTURBATIONS = Registry(
    "perturbation", "change of the noise in the input alone", ["difftrain.objective.noise"]
)


class Error(Protocol):
    """Distance between output and target."""

    @property
    def squared(self) -> bool:
        """Whether it is the squared error, the only one for which weightings can be converted."""
        ...

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the error of each sample [B], averaged over all other dimensions.

        Args:
            output: What the denoiser returned [B, ...].
            target: What it is compared with, of the same shape.
        """
        ...


ERRORS = Registry("error", "distance between output and target", ["difftrain.objective.losses"])


class Variance(Protocol):
    """The reverse process's variance, and so the number of the denoiser's output channels."""

    @property
    def output_channels(self) -> int:
        """Channels of the output for each channel of x_t: 1, or 2 with a learned variance."""
        ...

    def split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the output.

        Args:
            output: What the denoiser returned [B, output_channels C, ...].
            x_t: Its input [B, C, ...].

        Returns:
            The prediction [B, C, ...], and what predicts the variance [B, C, ...] or None.

        Raises:
            InputError: If the denoiser has the wrong number of output channels.
        """
        ...

    def bound(
        self,
        batch: Batch,
        t: Tensor,
        x_t: Tensor,
        estimate: Estimate,
        predicted: Tensor,
        schedule: NoiseSchedule,
    ) -> Tensor:
        """Return each sample's term of the variational bound [B], already weighted.

        It is called only if `split` returned something that predicts the variance.

        Args:
            batch: The clean samples.
            t: Table indices [B], long.
            x_t: The denoiser's input [B, C, ...].
            estimate: x0 and eps that the prediction implies.
            predicted: What predicts the variance [B, C, ...].
            schedule: The noise schedule.
        """
        ...

    def log_variance(self, predicted: Tensor, level: NoiseLevel, before: NoiseLevel) -> Tensor:
        """Return the logarithm of the variance [B, C, ...] of a reverse step.

        It is called only if `split` returned something that predicts the variance.

        Args:
            predicted: What predicts the variance [B, C, ...].
            level: Noise levels [B] before the step.
            before: Noise levels [B] after the step, with sigma > 0.
        """
        ...


VARIANCES = Registry(
    "variance", "fixed or learned variance of the reverse process", ["difftrain.objective.variance"]
)


class Weighting(Protocol):
    """Weight of a sample's error by its noise level."""

    @property
    def stated_for(self) -> Parameterization | None:
        """The parameterization whose error it weights. None: whichever error is trained."""
        ...

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the weights [B], float64 and not negative.

        Args:
            level: Noise levels [B].
        """
        ...


WEIGHTINGS = Registry(
    "weighting",
    "weight of a sample's error by its noise level",
    ["difftrain.objective.weightings", "difftrain.objective.kohya_weightings"],
)


class Regularizer(Protocol):
    """A loss term that is added to the error: an `nn.Module` whose buffers are its state.

    `difftrain.objective.regularizers.WeightedTerm` is a base class with defaults for everything but
    the call. The state must not change in passes without gradient, such as validation.
    """

    weight: float
    """Factor of the term, not negative. A term of weight 0 is not evaluated."""
    every: int
    """The term is evaluated at each k-th step, with k times its weight."""
    warmup: int
    """Steps over which the weight grows linearly to its full value."""
    differentiates_input: bool
    """Whether it takes gradients with respect to x_t."""
    needs_double_backward: bool
    """Whether its gradient is a second derivative: attention then needs the math kernel."""
    needs_full_precision: bool
    """Whether a denoiser that computes in half precision makes the term meaningless."""

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        """Check before training that the term is defined.

        Args:
            schedule: The noise schedule.
            shape: The shape of a micro-batch x0 [B, ...].

        Raises:
            InputError: If it is not.
        """
        ...

    def __call__(self, p: DenoisingPass) -> Tensor:
        """Return the term before weighting: [B], or [] for a statistic of the batch."""
        ...


REGULARIZERS = Registry("regularizer", "additional loss term", ["difftrain.objective.regularizers"])
