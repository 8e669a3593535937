"""Running average of the weights, whose decay is a function of the step."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from difftrain.registry import EMAS, NonNegative, Positive, UnitInterval


class Decay(Protocol):
    def __call__(self, step: int, batch_size: int) -> float:
        """The fraction of the average kept at the update after `step` (from 0)."""
        ...


@EMAS.register("decay")
@dataclass(frozen=True)
class ConstantDecay:
    """decay, during warm-up at most (1 + step) / (10 + step).

    The warm-up forgets the first weights sooner; it is TensorFlow's ExponentialMovingAverage with num_updates.
    """

    decay: UnitInterval = 0.9999
    warmup: bool = True

    def __call__(self, step: int, batch_size: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@EMAS.register("half_life")
@dataclass(frozen=True)
class HalfLife:
    """0.5^(batch_size / h), h = min(images, ramp * images seen): the same average whatever the batch size.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, appendix F.
    ramp = 0 does not ramp up.
    """

    images: Positive = 500_000.0
    ramp: NonNegative = 0.05

    def __call__(self, step: int, batch_size: int) -> float:
        half_life = min(self.images, self.ramp * (step + 1) * batch_size) if self.ramp > 0 else self.images
        return 0.5 ** (batch_size / half_life)


class WeightAverage:
    """The average of a module's trained parameters, in their own dtype (float32 at least) and on their device."""

    def __init__(self, module: nn.Module, decay: Decay):
        self.module, self.decay = module, decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in self.parameters.items()}
        self.average = {name: p.detach().to(wide[name], copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, batch_size: int) -> None:
        """average <- average + (1 - decay) (weights - average)."""
        weights = [p.detach().to(self.average[name].dtype) for name, p in self.parameters.items()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay(step, batch_size))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within: the module holds the average; its own weights come back afterwards."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a root stays gathered after a forward without backward, and would go on with the old values
