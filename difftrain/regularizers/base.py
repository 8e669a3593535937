"""What the regularizers of this package have in common: how much, how often, from when on."""

from torch import nn

from difftrain.schedule import NoiseSchedule


class WeightedTerm(nn.Module):
    """weight: factor of the term, 0: not evaluated. every: evaluated each k-th step with k times the weight. warmup: steps over which
    the weight grows linearly to its full value."""

    differentiates_input = False
    needs_double_backward = False
    needs_full_precision = False

    def __init__(self, weight: float, every: int, warmup: int):
        super().__init__()
        self.weight, self.every, self.warmup = weight, every, warmup

    def check(self, schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
        """Refuses what it cannot do with micro-batches x0 of `shape` [B, ...] on this schedule."""
