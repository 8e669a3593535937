"""`WeightedTerm`, the base class of regularizers."""

from torch import Tensor, nn

from difftrain.core.registry import NonNegative, NonNegativeInt, PositiveInt
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import DenoisingPass


class WeightedTerm(nn.Module):
    """A regularizer without its formula: a subclass defines `forward`, and what differs.

    Args:
        weight: Factor of the term. A term of weight 0 is not evaluated.
        every: The term is evaluated at each k-th step, with k times its weight.
        warmup: Steps over which the weight grows linearly to its full value.
    """

    differentiates_input: bool = False
    """Whether the term takes gradients with respect to x_t."""
    needs_double_backward: bool = False
    """Whether the gradient of the term is a second derivative."""
    needs_full_precision: bool = False
    """Whether a denoiser that computes in half precision makes the term meaningless."""

    def __init__(
        self, weight: NonNegative = 1.0, every: PositiveInt = 1, warmup: NonNegativeInt = 0
    ):
        super().__init__()
        self.weight = weight
        self.every = every
        self.warmup = warmup

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        """Check before training that the term is defined; by default it always is.

        Args:
            schedule: The noise schedule.
            shape: The shape of a micro-batch x0 [B, ...].

        Raises:
            InputError: If it is not.
        """

    def forward(self, p: DenoisingPass) -> Tensor:
        """Return the term before weighting: [B], or [] for a statistic of the batch.

        Args:
            p: The evaluated batch.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward")
