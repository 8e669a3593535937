"""What happens at regular steps with the averaged weights.

A callback of your own derives from `Callback`; registered under a name, a recipe's `callbacks:` can
list it.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import nn

from difftrain.core.processes import is_main
from difftrain.core.registry import Registry
from difftrain.generation.generator import SampleGenerator, generate
from difftrain.generation.pictures import save_grid

CALLBACKS = Registry("callback", "what happens at regular steps", [])


class Callback(ABC):
    """Looks at the averaged weights each `every` steps, and at the last one.

    Attributes:
        every: Steps between two calls.
        protocol: What the last value depended on. Values of different protocols are not compared.
    """

    every: int
    protocol: str | None = None

    @abstractmethod
    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> float | None:
        """Look at the network. Collective: every process calls it.

        Args:
            denoiser: The network in eval mode, with its averaged weights.
            step: Number of finished steps.
            training_seconds: Seconds that were spent on training so far.

        Returns:
            The value by which the best checkpoint is chosen (smaller is better), or None.
        """


class SampleGrid(Callback):
    """Saves samples 0 to num - 1 as samples/step-NNNNNNN.png, from the same noise at every step.

    Args:
        every: Steps between two grids.
        generator: Generates the samples.
        num: Number of samples.
        folder: Where the pictures go.
        device: Where the network is.
    """

    def __init__(
        self,
        every: int,
        generator: SampleGenerator,
        num: int,
        folder: Path,
        device: torch.device,
    ):
        self.every = every
        self.generator = generator
        self.num = num
        self.folder = folder
        self.device = device

    def __call__(self, denoiser: nn.Module, step: int, training_seconds: float) -> None:
        """Save the grid of this step."""
        samples = generate(self.generator, denoiser, self.num, self.device)
        if is_main():
            file = self.folder / f"step-{step:07d}.png"
            save_grid(samples, file, self.generator.conditioning.num_classes)
