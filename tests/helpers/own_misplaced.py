"""A regularizer of a user's that keeps a tensor on the CPU, which no GPU would accept."""

import torch
from torch import Tensor

from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.slots import REGULARIZERS
from difftrain.objective.types import DenoisingPass


@REGULARIZERS.register("own_misplaced")
class OwnMisplaced(WeightedTerm):
    """Compares with numbers that stay where they were made."""

    def forward(self, p: DenoisingPass) -> Tensor:
        """Return the mean difference from ones [B]."""
        x0 = p.estimate.x0
        return (x0 - torch.ones(x0.shape)).flatten(1).mean(1)
