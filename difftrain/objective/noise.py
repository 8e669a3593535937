"""The noise that is added and is the target, and the perturbation that only the input gets."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegative, PositiveInt
from difftrain.core.rng import Rng
from difftrain.objective.schedule import NoiseLevel
from difftrain.objective.slots import NOISES, PERTURBATIONS


@NOISES.register("white")
@dataclass(frozen=True)
class White:
    """White noise: ``eps ~ N(0, I)``."""

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        """Draw eps of the shape, dtype and device of x0."""
        return rng.normal(x0.shape[1:], "noise").to(x0)


@NOISES.register("offset")
@dataclass(frozen=True)
class Offset:
    """Offset noise: ``eps = z + strength c``, z ~ N(0, I), c ~ N(0, 1) for each sample and channel.

    c is one number for all places and frames. Strength 0 is white noise.

    Args:
        strength: Standard deviation of the offset.

    Reference:
        Guttenberg 2023, "Diffusion with Offset Noise", CrossLabs.
    """

    strength: NonNegative = 0.1

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        """Draw eps of the shape, dtype and device of x0."""
        eps = rng.normal(x0.shape[1:], "noise")
        if self.strength > 0:
            one_per_channel = (x0.shape[1], *[1] * (x0.ndim - 2))
            eps = eps + self.strength * rng.normal(one_per_channel, "noise.offset")
        return eps.to(x0)


@NOISES.register("mixed")
@dataclass(frozen=True)
class Mixed:
    """Mixed noise: ``eps_i = (z_i + ratio c) / sqrt(1 + ratio^2)`` in frame i, z_i and c ~ N(0, I).

    c is one image for all frames of a clip. The variance is 1 at every ratio, and the correlation
    of two frames is ``ratio^2 / (1 + ratio^2)``. Ratio 0 is white noise.

    It needs clips [B, C, F, H, W]. Sampling starts from white noise here, and from this noise in
    the paper.

    Args:
        ratio: Standard deviation of the shared noise over that of each frame's own.

    Reference:
        Ge et al. 2023, "Preserve Your Own Correlation: A Noise Prior for Video Diffusion Models",
        arXiv:2305.10474, mixed noise model.
    """

    ratio: NonNegative = 1.0

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        """Draw eps of the shape, dtype and device of x0."""
        if x0.ndim != 5:
            raise InputError(
                "noise Mixed is shared over the frames of a clip, x0 [B, C, F, H, W], but the data "
                f"has the shape {list(x0.shape)}. Train on video, or write noise: {{type: white}}."
            )
        eps = rng.normal(x0.shape[1:], "noise")
        if self.ratio > 0:
            channels, _, height, width = x0.shape[1:]
            shared = rng.normal((channels, 1, height, width), "noise.shared")
            eps = (eps + self.ratio * shared) / math.sqrt(1 + self.ratio**2)
        return eps.to(x0)


@PERTURBATIONS.register("input_perturbation")
@dataclass(frozen=True)
class InputPerturbation:
    """Input perturbation: ``eps_in = eps + gamma xi``, xi ~ N(0, I), and the target stays eps.

    The input is ``x_t = alpha x0 + sigma eps_in``. The paper calls the method DDPM-IP. gamma = 0
    draws nothing and is the plain objective.

    Args:
        gamma: Strength of the perturbation.
        target: For outputs other than epsilon the paper's target has two readings. "clean" keeps
            the parameterization's own target (x0, v or u of the unperturbed pair), as other
            trainers do. "implied_eps" compares the eps that the output implies at the perturbed
            input with the clean eps, which is the published loss for every parameterization.
        decay_steps: Optimizer steps over which gamma falls linearly to 0. The paper's gamma is
            constant.

    Reference:
        Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models",
        arXiv:2301.11706.
    """

    gamma: NonNegative = 0.1
    target: Literal["clean", "implied_eps"] = "clean"
    decay_steps: PositiveInt | None = None

    def __call__(self, eps: Tensor, level: NoiseLevel, rng: Rng) -> Tensor:
        """Return the noise of the input [B, ...]."""
        gamma = self.gamma_at(rng.step)
        if gamma == 0:
            return eps
        return eps + gamma * rng.normal(eps.shape[1:], "perturbation").to(eps)

    def gamma_at(self, step: int) -> float:
        """Return gamma at an optimizer step, counted from 0."""
        if self.decay_steps is None:
            return self.gamma
        return self.gamma * max(0.0, 1 - step / self.decay_steps)
