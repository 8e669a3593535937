"""The noise that is added and is the target, and the perturbation that only the input sees."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from difftrain.registry import NOISES, PERTURBATIONS, InputError, NonNegative, PositiveInt
from difftrain.rng import Rng
from difftrain.schedule import NoiseLevel


@NOISES.register("white")
@dataclass(frozen=True)
class White:
    """eps ~ N(0, I)."""

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        return rng.normal(x0.shape[1:], "noise").to(x0)


@NOISES.register("offset")
@dataclass(frozen=True)
class Offset:
    """eps = z + strength c, z ~ N(0, I), c ~ N(0, 1) one number for each sample and channel.

    Guttenberg 2023, "Diffusion with Offset Noise" (CrossLabs). strength = 0 is white noise.
    """

    strength: NonNegative = 0.1

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        eps = rng.normal(x0.shape[1:], "noise")
        if self.strength > 0:
            eps = eps + self.strength * rng.normal((x0.shape[1], *[1] * (x0.ndim - 2)), "noise.offset")
        return eps.to(x0)


@NOISES.register("mixed")
@dataclass(frozen=True)
class Mixed:
    """eps_i = (z_i + ratio c) / sqrt(1 + ratio^2) in frame i, z_i and c ~ N(0, I), c one image for all frames of a clip.

    Ge et al. 2023, "Preserve Your Own Correlation: A Noise Prior for Video Diffusion Models", arXiv:2305.10474 (its mixed model).
    The variance is 1 at any ratio, and ratio^2 / (1 + ratio^2) is the correlation of two frames; ratio = 0 is white noise.
    For video, x0 [B, C, F, H, W]. Sampling starts from white noise here, from this noise in the paper.
    """

    ratio: NonNegative = 1.0

    def __call__(self, x0: Tensor, rng: Rng) -> Tensor:
        if x0.ndim != 5:
            raise InputError(
                f"noise Mixed is shared over the frames of a clip, x0 [B, C, F, H, W], but the data has the shape {list(x0.shape)}. "
                "Train on video, or write noise: {type: white}."
            )
        eps = rng.normal(x0.shape[1:], "noise")
        if self.ratio > 0:
            channels, _, height, width = x0.shape[1:]
            eps = (eps + self.ratio * rng.normal((channels, 1, height, width), "noise.shared")) / math.sqrt(1 + self.ratio**2)
        return eps.to(x0)


@PERTURBATIONS.register("input_perturbation")
@dataclass(frozen=True)
class InputPerturbation:
    """eps_in = eps + gamma xi, xi ~ N(0, I): the input x_t = alpha x0 + sigma eps_in, the target stays eps.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models", arXiv:2301.11706.
    gamma = 0 draws nothing and is the plain objective. With decay_steps, gamma (1 - step / decay_steps) takes gamma's place: it
    falls linearly over the optimizer steps and is 0 from step decay_steps on (an addition of trainers; the paper's is constant).
    For outputs other than epsilon the paper's target has two readings: `clean` keeps the parameterization's own target (x0, v,
    u of the unperturbed pair), as other trainers do; `implied_eps` compares the eps that the output implies at the perturbed
    input with the clean eps, which is the published loss, whatever the network outputs.
    """

    gamma: NonNegative = 0.1
    target: Literal["clean", "implied_eps"] = "clean"
    decay_steps: PositiveInt | None = None

    def __call__(self, eps: Tensor, level: NoiseLevel, rng: Rng) -> Tensor:
        gamma = self.gamma_at(rng.step)
        if gamma == 0:
            return eps
        return eps + gamma * rng.normal(eps.shape[1:], "perturbation").to(eps)

    def gamma_at(self, step: int) -> float:
        """gamma of this optimizer step, counted from 0."""
        return self.gamma if self.decay_steps is None else self.gamma * max(0.0, 1 - step / self.decay_steps)
