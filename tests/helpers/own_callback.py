"""An own callback, as a recipe's `imports:` brings it, that notes its steps."""

from torch import nn

from difftrain.core.registry import PositiveInt
from difftrain.training.callbacks import CALLBACKS, Callback

seen: list[int] = []


@CALLBACKS.register("own_callback")
class OwnCallback(Callback):
    """Notes the steps at which it is called.

    Args:
        every: Steps between two calls.
    """

    def __init__(self, every: PositiveInt):
        self.every = every

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        """Note the step."""
        assert not denoiser.training
        seen.append(step)
