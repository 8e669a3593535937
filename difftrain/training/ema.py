"""Running average of the weights, whose decay is a function of the step."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from difftrain.core.registry import NonNegative, Positive, Registry, UnitInterval

EMAS = Registry(
    "ema",
    "decay of the weights' running average as a function of the step",
    ["difftrain.training.ema"],
)


class Decay(Protocol):
    """The decay of a running average as a function of the step."""

    def __call__(self, step: int, batch_size: int) -> float:
        """Return the fraction of the average that an update keeps, in [0, 1].

        Args:
            step: The step of the update, counted from 0.
            batch_size: Samples of one step, over all processes.
        """
        ...


@EMAS.register("decay")
@dataclass(frozen=True)
class ConstantDecay:
    """Constant decay; with warm-up ``min(decay, (1 + step) / (10 + step))``.

    The warm-up forgets the first weights sooner, as TensorFlow's ExponentialMovingAverage does with
    num_updates.

    Args:
        decay: Fraction of the average that each update keeps.
        warmup: Whether the first updates keep less.
    """

    decay: UnitInterval = 0.9999
    warmup: bool = True

    def __call__(self, step: int, batch_size: int) -> float:
        """Return the decay of the update of `step`; see `Decay`."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + step) / (10 + step))


@EMAS.register("half_life")
@dataclass(frozen=True)
class HalfLife:
    """0.5^(batch_size / h), h = min(images, ramp * images seen).

    The average is the same whatever the batch size. ramp = 0 keeps h at `images` from the start.

    Args:
        images: Half-life in images.
        ramp: Share of the images seen so far that the half-life does not exceed.

    Reference:
        Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
        arXiv:2206.00364, appendix F.
    """

    images: Positive = 500_000.0
    ramp: NonNegative = 0.05

    def __call__(self, step: int, batch_size: int) -> float:
        """Return the decay of the update of `step`; see `Decay`."""
        half_life: float = self.images
        if self.ramp > 0:
            half_life = min(self.images, self.ramp * (step + 1) * batch_size)
        kept: float = 0.5 ** (batch_size / half_life)
        return kept


class WeightAverage:
    """The running average of a module's trained parameters, on their device.

    The average has the parameters' own dtype, but is float32 at least.

    Args:
        module: The module.
        decay: The decay as a function of the step.
    """

    def __init__(self, module: nn.Module, decay: Decay):
        self.module = module
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {}
        for name, p in self.parameters.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            self.average[name] = p.detach().to(dtype, copy=True)

    @torch.no_grad()
    def update(self, step: int, batch_size: int) -> None:
        """Set average <- average + (1 - decay) (weights - average).

        Args:
            step: The step of the update, counted from 0.
            batch_size: Samples of one step, over all processes.
        """
        weights = [p.detach().to(self.average[name].dtype) for name, p in self.parameters.items()]
        share = 1 - self.decay(step, batch_size)
        torch._foreach_lerp_(list(self.average.values()), weights, share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module within the context; its own weights come back later."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by parameter name, without copies."""
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load an average that `state_dict` returned.

        Raises:
            KeyError: If a parameter's average is missing.
        """
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
        # A root stays gathered after a forward without backward, and would keep the old values.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
