"""A regularizer of one's own in one file: registered here, imported by recipes/digits_own_regularizer.yaml, known to nothing else."""

from torch import nn

from difftrain.registry import REGULARIZERS, NonNegative, PositiveInt


@REGULARIZERS.register("mean_shift")
class MeanShift(nn.Module):
    """|mean(x0_hat) - mean(x0)|^2, means over the pixels of each channel: estimates that keep the brightness of their image.

    A perfect estimate costs nothing.
    """

    differentiates_input = False
    needs_double_backward = False

    def __init__(self, weight: NonNegative = 1.0, every: PositiveInt = 1):
        super().__init__()
        self.weight, self.every = weight, every

    def forward(self, p):  # [B]
        shift = (p.estimate.x0 - p.batch.x0).flatten(2).mean(2)  # [B, C]
        p.record("largest", shift.abs().max())
        return shift.square().sum(1)
