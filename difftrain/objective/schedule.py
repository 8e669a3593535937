"""Noise schedules: x_t = alpha x0 + sigma eps, with tables of alpha and sigma over T timesteps.

A schedule is not a sampler. Its tables are float64, also those of a diffusers scheduler: they are
computed from its config, because its own float32 tables are off by 2e-4 at t = 0. Differences are
taken before anything is rounded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import Positive, PositiveInt, Registry
from difftrain.objective.betas import (
    BETAS,
    betas_of,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    spaced,
    with_divided_snr,
)

SCHEDULES = Registry("schedule", "noise level at each timestep", ["difftrain.objective.schedule"])

Kind = Literal["diffusion", "flow"]


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    """Return one value per sample in a form that multiplies samples.

    Args:
        v: [B].
        x: Samples [B, ...].

    Returns:
        [B, 1, ..., 1] with the dtype, device and number of dimensions of x.

    Raises:
        ValueError: If v has not one value per sample.
    """
    if v.shape != x.shape[:1]:
        raise ValueError(
            f"expected one value per sample, shape [{x.shape[0]}], got {list(v.shape)}"
        )
    return v.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class NoiseLevel:
    """Coefficients of x_t = alpha x0 + sigma eps.

    Args:
        alpha: [B], float64.
        sigma: [B], float64.
    """

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio (alpha / sigma)^2 [B]; inf where sigma is 0."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        """Natural logarithm of the signal-to-noise ratio [B]."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def __getitem__(self, rows: Any) -> "NoiseLevel":
        return NoiseLevel(self.alpha[rows], self.sigma[rows])


class NoiseSchedule:
    """Tables of alpha and sigma; t = 0 is the cleanest level.

    Args:
        alpha: [T].
        sigma: [T].
        config: The config of the diffusers scheduler with the same levels. Samplers and exported
            pipelines are made from it.
        kind: "diffusion" models are fed the index t, "flow" models T sigma.
        log_shift: diffusers' mu: the shift of a config that is shifted by the resolution.
    """

    def __init__(
        self,
        alpha: Tensor,
        sigma: Tensor,
        config: Mapping[str, Any],
        kind: Kind = "diffusion",
        log_shift: float | None = None,
    ):
        self.alpha, self.sigma = alpha.double(), sigma.double()
        self.config = dict(config)
        self.kind = kind
        self.log_shift = log_shift

    def __repr__(self) -> str:
        first, last = self.level(torch.tensor([0, -1])).snr.tolist()
        ends = f"SNR {first:.4g} to {last:.4g}"
        return f"NoiseSchedule({self.kind}, {self.num_timesteps} timesteps, {ends})"

    @property
    def num_timesteps(self) -> int:
        """T, the length of the tables."""
        return len(self.alpha)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether nothing of x0 is left at the last timestep."""
        return bool(self.alpha[-1] == 0)

    def level(self, t: Tensor) -> NoiseLevel:
        """Return the noise levels [B] at table indices t [B] long, on t's device."""
        return NoiseLevel(self.alpha.to(t.device)[t], self.sigma.to(t.device)[t])

    def level_before(self, t: Tensor, steps: int = 1) -> NoiseLevel:
        """Return the noise levels [B] some indices below t.

        Below index 0 lies the clean sample, with alpha 1 and sigma 0.

        Args:
            t: Table indices [B], long.
            steps: How many indices below.
        """
        below = self.level((t - steps).clamp(min=0))
        is_clean = t - steps < 0
        return NoiseLevel(
            below.alpha.masked_fill(is_clean, 1.0), below.sigma.masked_fill(is_clean, 0.0)
        )

    def model_time(self, t: Tensor) -> Tensor:
        """Return what the denoiser is fed at t [B]: the index, or T sigma in float32 on a flow."""
        if self.kind == "diffusion":
            return t
        return (self.sigma.to(t.device)[t] * self.num_timesteps).float()

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha x0 + sigma eps.

        Args:
            x0: Clean samples [B, ...].
            eps: Noise [B, ...].
            t: Table indices [B], long.
        """
        return diffuse(x0, eps, self.level(t))

    @staticmethod
    @SCHEDULES.register("linear")
    def linear(
        num_timesteps: PositiveInt = 1000,
        beta_start: Positive = 1e-4,
        beta_end: Positive = 0.02,
        zero_terminal_snr: bool = False,
    ) -> "NoiseSchedule":
        """Linear schedule: ``beta_t`` linear in t from beta_start to beta_end.

        Args:
            num_timesteps: T.
            beta_start: beta at t = 0.
            beta_end: beta at t = T - 1.
            zero_terminal_snr: Whether the schedule is rescaled to SNR = 0 at the end (Lin et al.
                2023, arXiv:2305.08891).

        Reference:
            Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
        """
        betas = linear_betas(num_timesteps, beta_start, beta_end)
        config = {"beta_schedule": "linear", "beta_start": beta_start, "beta_end": beta_end}
        return from_betas(betas, config, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("scaled_linear")
    def scaled_linear(
        num_timesteps: PositiveInt = 1000,
        beta_start: Positive = 0.00085,
        beta_end: Positive = 0.012,
        zero_terminal_snr: bool = False,
    ) -> "NoiseSchedule":
        """Scaled linear schedule: ``sqrt(beta_t)`` linear in t, beta from beta_start to beta_end.

        Args:
            num_timesteps: T.
            beta_start: beta at t = 0.
            beta_end: beta at t = T - 1.
            zero_terminal_snr: Whether the schedule is rescaled to SNR = 0 at the end (Lin et al.
                2023, arXiv:2305.08891).

        Reference:
            Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
            arXiv:2112.10752.
        """
        betas = scaled_linear_betas(num_timesteps, beta_start, beta_end)
        config = {"beta_schedule": "scaled_linear", "beta_start": beta_start, "beta_end": beta_end}
        return from_betas(betas, config, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("cosine")
    def cosine(
        num_timesteps: PositiveInt = 1000, zero_terminal_snr: bool = False
    ) -> "NoiseSchedule":
        """Cosine schedule: ``alpha^2 = cos^2((t/T + 0.008) / 1.008 pi/2)``, beta_t at most 0.999.

        Args:
            num_timesteps: T.
            zero_terminal_snr: Whether the schedule is rescaled to SNR = 0 at the end (Lin et al.
                2023, arXiv:2305.08891).

        Reference:
            Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models",
            arXiv:2102.09672.
        """
        betas = cosine_betas(num_timesteps)
        return from_betas(betas, {"beta_schedule": "squaredcos_cap_v2"}, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("sigmoid")
    def sigmoid(
        num_timesteps: PositiveInt = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: Positive = 1.0,
        zero_terminal_snr: bool = False,
    ) -> "NoiseSchedule":
        """Sigmoid schedule: ``alpha^2 = (S(end) - S(z)) / (S(end) - S(start))``, beta_t <= 0.999.

        ``S(z) = sigmoid(z / tau)``, ``z = start + u (end - start)`` and u = t/T. It is not the
        schedule that diffusers calls sigmoid, whose betas are a sigmoid.

        Args:
            num_timesteps: T.
            start: Where on the sigmoid t = 0 lies.
            end: Where on the sigmoid t = T lies.
            tau: Width of the sigmoid.
            zero_terminal_snr: Whether the schedule is rescaled to SNR = 0 at the end (Lin et al.
                2023, arXiv:2305.08891).

        Reference:
            Jabri et al. 2022, "Scalable Adaptive Computation for Iterative Generation",
            arXiv:2212.11972.
        """

        def sigmoid(z: float) -> Tensor:
            return torch.sigmoid(torch.tensor(z / tau, dtype=torch.float64))

        def alpha_squared(u: Tensor) -> Tensor:
            low, high = sigmoid(start), sigmoid(end)
            return (high - torch.sigmoid((start + u * (end - start)) / tau)) / (high - low)

        betas = betas_of(alpha_squared, num_timesteps)
        return from_betas(betas, {"trained_betas": betas.tolist()}, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("flow")
    def flow(num_timesteps: PositiveInt = 1000, shift: Positive = 1.0) -> "NoiseSchedule":
        """Rectified flow: ``alpha = 1 - sigma``, ``sigma = shift u / (1 + (shift - 1) u)``.

        u = (t + 1) / T.

        Args:
            num_timesteps: T.
            shift: Moves the levels towards noise; large images need more of it.

        Reference:
            Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
            Synthesis", arXiv:2403.03206.
        """
        u = spaced(1 / num_timesteps, 1, num_timesteps)
        sigma = shift * u / (1 + (shift - 1) * u)
        config = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": num_timesteps,
            "shift": shift,
        }
        return NoiseSchedule(1 - sigma, sigma, config, kind="flow")

    @staticmethod
    def from_diffusers(scheduler: Any, sequence_length: int | None = None) -> "NoiseSchedule":
        """Return the schedule of a diffusers scheduler, computed from its config in float64.

        Args:
            scheduler: A diffusers scheduler, or its config.
            sequence_length: Tokens of an image. Flow schedules whose shift depends on the
                resolution (use_dynamic_shifting) need it.

        Raises:
            InputError: If the config names a schedule that does not exist here.
        """
        config = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
        name = config.get("_class_name") or type(scheduler).__name__
        # Multistep solvers of flow models say so in their config, not in their name.
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            return flow_of_config(config, name, sequence_length)
        betas = betas_of_config(config, name)
        keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
        kept = {key: config[key] for key in keys if config.get(key) is not None}
        snr_scale = config.get("snr_shift_scale", 1)
        if snr_scale != 1:
            # CogVideoX. The betas are written out for samplers that do not know this key.
            betas = with_divided_snr(betas, snr_scale)
            kept = {"trained_betas": betas.tolist()}
        return from_betas(betas, kept, bool(config.get("rescale_betas_zero_snr", False)))


def diffuse(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """Return x_t = alpha x0 + sigma eps, in the dtype of x0.

    Args:
        x0: Clean samples [B, ...].
        eps: Noise [B, ...].
        level: Noise levels [B].
    """
    return expand_like(level.alpha, x0) * x0 + expand_like(level.sigma, x0) * eps


def from_betas(
    betas: Tensor, config: Mapping[str, Any], zero_terminal_snr: bool = False
) -> NoiseSchedule:
    """Return the schedule whose alpha^2 is the cumulative product of 1 - beta.

    Args:
        betas: [T].
        config: The config of a diffusers scheduler with these betas.
        zero_terminal_snr: Whether the schedule is rescaled to SNR = 0 at the end.

    Raises:
        InputError: If a beta is not between 0 and 1.
    """
    wrong = ~((betas >= 0) & (betas <= 1))
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise InputError(
            f"schedule: beta_t must lie between 0 and 1, but it is {betas[t].item():.4g} at "
            f"t = {t}. Write smaller values, or a start below the end."
        )
    alpha_squared = torch.cumprod(1 - betas.double(), 0)
    if zero_terminal_snr:
        # Lin et al. 2023, arXiv:2305.08891, algorithm 1: alpha is shifted and scaled, its first
        # value stays.
        alpha = alpha_squared.sqrt()
        alpha_squared = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        config = {**config, "rescale_betas_zero_snr": True}
    config = {"num_train_timesteps": len(betas), **config}
    return NoiseSchedule(alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), config)


def betas_of_config(config: Mapping[str, Any], name: str) -> Tensor:
    """Return the betas [T] of a diffusers scheduler.

    Args:
        config: Its config.
        name: Its class.

    Raises:
        InputError: If its beta_schedule does not exist here.
    """
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    kind = config.get("beta_schedule")
    if kind not in BETAS:
        raise InputError(
            f"{name}: unknown beta_schedule {kind!r}; known: {', '.join(BETAS)}. "
            "Write a schedule into the recipe instead: schedule: {type: cosine}."
        )
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    return BETAS[kind](config.get("num_train_timesteps", 1000), start, end)


def flow_of_config(
    config: Mapping[str, Any], name: str, sequence_length: int | None
) -> NoiseSchedule:
    """Return the schedule of a diffusers scheduler of a flow model.

    Args:
        config: Its config.
        name: Its class.
        sequence_length: Tokens of an image, if they are known.

    Raises:
        InputError: If the shift depends on the resolution, which is not known.
    """
    num = config.get("num_train_timesteps", 1000)
    if not config.get("use_dynamic_shifting"):
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return NoiseSchedule.flow(num, float(shift))
    if sequence_length is None:
        raise InputError(
            f"{name} shifts its noise levels by the resolution (use_dynamic_shifting). "
            "Write the shift for your resolution instead: schedule: {type: flow, shift: 3.0}."
        )
    return dynamically_shifted(config, num, sequence_length)


def dynamically_shifted(config: Mapping[str, Any], num: int, sequence_length: int) -> NoiseSchedule:
    """Return a flow schedule whose shift depends on the resolution.

    The shift is e^mu, or mu with time_shift_type linear, and mu is linear in the number of tokens.

    Args:
        config: The config of the diffusers scheduler.
        num: T.
        sequence_length: Tokens of an image.

    Raises:
        InputError: If the config has a shift_terminal.

    Reference:
        Esser et al. 2024, arXiv:2403.03206, section 5.3.2, in the form of diffusers' Flux and SD3
        pipelines.
    """
    if config.get("shift_terminal"):
        raise InputError(
            "the scheduler stretches its noise levels to shift_terminal "
            f"{config['shift_terminal']}, which no schedule here does. Write a schedule into the "
            "recipe instead: schedule: {type: flow, shift: 3.0}."
        )
    shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = least + (most - least) * (sequence_length - shortest) / (longest - shortest)
    is_linear = config.get("time_shift_type", "exponential") == "linear"
    plain = NoiseSchedule.flow(num, mu if is_linear else math.exp(mu))
    kept = {}
    for key, value in config.items():
        if key == "_class_name" or not key.startswith("_"):
            kept[key] = value
    return NoiseSchedule(plain.alpha, plain.sigma, kept, "flow", log_shift=mu)
