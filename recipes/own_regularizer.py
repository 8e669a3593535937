"""An own regularizer in one file, which recipes/digits_own_regularizer.yaml imports."""

from torch import Tensor

from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.types import DenoisingPass


@REGULARIZERS.register("mean_shift")
class MeanShift(WeightedTerm):
    """Mean shift: ``|mean(x0_hat) - mean(x0)|^2``, means over the pixels of each channel.

    The estimate then keeps the brightness of its image. A perfect estimate costs nothing. The
    arguments weight, every and warmup come from the base class.
    """

    def forward(self, p: DenoisingPass) -> Tensor:  # [B]
        """Return the squared shift of each sample."""
        shift = (p.estimate.x0 - p.batch.x0).flatten(2).mean(2)  # [B, C]
        p.record("largest", shift.abs().max())
        return shift.square().sum(1)
