"""Noise schedules: x_t = alpha x0 + sigma eps, with alpha and sigma tabulated in float64 over T timesteps.

Not a sampler. Tables are computed here in float64, also for a diffusers scheduler (from its config: its own float32
tables are off by 2e-4 at t = 0), and differences are taken before anything is rounded.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from difftrain.registry import SCHEDULES, InputError, Positive, PositiveInt

Kind = Literal["diffusion", "flow"]


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    """v [B] as [B, 1, ..., 1] with the dtype, device and number of dimensions of x."""
    if v.shape != x.shape[:1]:
        raise ValueError(f"expected one value per sample, shape [{x.shape[0]}], got {list(v.shape)}")
    return v.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class NoiseLevel:
    """alpha and sigma of x_t = alpha x0 + sigma eps, each [B] float64."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """(alpha / sigma)^2, [B]; inf where sigma is 0."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        """Natural logarithm of the SNR, [B]."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def __getitem__(self, rows: Any) -> "NoiseLevel":
        return NoiseLevel(self.alpha[rows], self.sigma[rows])


class NoiseSchedule:
    """Tables alpha[T] and sigma[T] (float64, CPU); t = 0 is the cleanest level.

    config: the diffusers scheduler config with the same levels, from which samplers and exported pipelines are made. log_shift: of a
    config that is shifted by the resolution, the shift at hand, diffusers' mu.
    """

    def __init__(
        self, alpha: Tensor, sigma: Tensor, config: Mapping[str, Any], kind: Kind = "diffusion", log_shift: float | None = None
    ):
        self.alpha, self.sigma, self.config, self.kind = alpha.double(), sigma.double(), dict(config), kind
        self.log_shift = log_shift

    def __repr__(self) -> str:
        ends = f"SNR {self.level(torch.tensor([0])).snr.item():.4g} to {self.level(torch.tensor([-1])).snr.item():.4g}"
        return f"NoiseSchedule({self.kind}, {self.num_timesteps} timesteps, {ends})"

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    @property
    def has_zero_terminal_snr(self) -> bool:
        return bool(self.alpha[-1] == 0)

    def level(self, t: Tensor) -> NoiseLevel:
        """The noise level at table index t [B] long, on t's device."""
        return NoiseLevel(self.alpha.to(t.device)[t], self.sigma.to(t.device)[t])

    def level_before(self, t: Tensor, steps: int = 1) -> NoiseLevel:
        """The level `steps` indices below t; below index 0 lies the clean image (alpha 1, sigma 0)."""
        below = (t - steps).clamp(min=0)
        clean = t - steps < 0
        level = self.level(below)
        return NoiseLevel(level.alpha.masked_fill(clean, 1.0), level.sigma.masked_fill(clean, 0.0))

    def model_time(self, t: Tensor) -> Tensor:
        """What the denoiser is fed at index t: the index itself, for flow models 1000 sigma (T sigma) as a float32."""
        return t if self.kind == "diffusion" else (self.sigma.to(t.device)[t] * self.num_timesteps).float()

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        return diffuse(x0, eps, self.level(t))

    @staticmethod
    @SCHEDULES.register("linear")
    def linear(
        num_timesteps: PositiveInt = 1000, beta_start: Positive = 1e-4, beta_end: Positive = 0.02, zero_terminal_snr: bool = False
    ) -> "NoiseSchedule":
        """beta_t linear from beta_start to beta_end.

        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239.
        zero_terminal_snr rescales to SNR = 0 at the end (Lin et al. 2023, arXiv:2305.08891).
        """
        config = {"beta_schedule": "linear", "beta_start": beta_start, "beta_end": beta_end}
        return from_betas(spaced(beta_start, beta_end, num_timesteps), config, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("scaled_linear")
    def scaled_linear(
        num_timesteps: PositiveInt = 1000, beta_start: Positive = 0.00085, beta_end: Positive = 0.012, zero_terminal_snr: bool = False
    ) -> "NoiseSchedule":
        """sqrt(beta_t) linear from sqrt(beta_start) to sqrt(beta_end).

        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
        """
        config = {"beta_schedule": "scaled_linear", "beta_start": beta_start, "beta_end": beta_end}
        betas = spaced(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps) ** 2
        return from_betas(betas, config, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("cosine")
    def cosine(num_timesteps: PositiveInt = 1000, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """alpha^2 = cos^2((t/T + 0.008) / 1.008 pi/2), beta_t at most 0.999.

        Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672.
        """
        betas = betas_of(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num_timesteps)
        return from_betas(betas, {"beta_schedule": "squaredcos_cap_v2"}, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("sigmoid")
    def sigmoid(
        num_timesteps: PositiveInt = 1000, start: float = -3.0, end: float = 3.0, tau: Positive = 1.0, zero_terminal_snr: bool = False
    ) -> "NoiseSchedule":
        """alpha^2 = (S(end) - S(start + u (end - start))) / (S(end) - S(start)), S(z) = sigmoid(z / tau), u = t/T.

        Jabri et al. 2022, "Scalable Adaptive Computation for Iterative Generation", arXiv:2212.11972.
        """

        def alpha_squared(u: Tensor) -> Tensor:
            low, high = (torch.sigmoid(torch.tensor(z / tau, dtype=torch.float64)) for z in (start, end))
            return (high - torch.sigmoid((start + u * (end - start)) / tau)) / (high - low)

        betas = betas_of(alpha_squared, num_timesteps)
        return from_betas(betas, {"trained_betas": betas.tolist()}, zero_terminal_snr)

    @staticmethod
    @SCHEDULES.register("flow")
    def flow(num_timesteps: PositiveInt = 1000, shift: Positive = 1.0) -> "NoiseSchedule":
        """alpha = 1 - sigma; sigma' = (i + 1)/T at index i, sigma = shift sigma' / (1 + (shift - 1) sigma').

        Rectified flow with the resolution shift of Esser et al. 2024, "Scaling Rectified Flow Transformers", arXiv:2403.03206.
        """
        unshifted = spaced(1 / num_timesteps, 1, num_timesteps)
        sigma = shift * unshifted / (1 + (shift - 1) * unshifted)
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": num_timesteps, "shift": shift}
        return NoiseSchedule(1 - sigma, sigma, config, kind="flow")

    @staticmethod
    def from_diffusers(scheduler: Any, sequence_length: int | None = None) -> "NoiseSchedule":
        """The schedule that a diffusers scheduler's config states, recomputed in float64.

        sequence_length: tokens of an image, for flow schedules whose shift depends on the resolution (use_dynamic_shifting).
        """
        config = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
        name = config.get("_class_name") or type(scheduler).__name__
        num = config.get("num_train_timesteps", 1000)
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):  # multistep solvers serve flow models too
            if config.get("use_dynamic_shifting"):
                if sequence_length is None:
                    raise InputError(f"{name} shifts its noise levels by the resolution (use_dynamic_shifting); "
                                     "write the shift of your resolution instead: schedule: {type: flow, shift: 3.0}.")
                return dynamically_shifted(config, num, sequence_length)
            return NoiseSchedule.flow(num, float(config.get("shift") or config.get("flow_shift") or 1.0))
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        tables: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: spaced(start, end, num),
            "scaled_linear": lambda: spaced(start**0.5, end**0.5, num) ** 2,
            "squaredcos_cap_v2": lambda: betas_of(lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num),
            "sigmoid": lambda: torch.sigmoid(spaced(-6, 6, num)) * (end - start) + start,
        }
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        elif config.get("beta_schedule") in tables:
            betas = tables[config["beta_schedule"]]()
        else:
            raise InputError(f"{name}: unknown beta_schedule {config.get('beta_schedule')!r}; known: {', '.join(tables)}. "
                             "Write the schedule out instead: schedule: {type: cosine}.")
        keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
        kept = {key: config[key] for key in keys if config.get(key) is not None}
        if config.get("snr_shift_scale", 1) != 1:  # CogVideoX: SNR divided by the scale; written out for samplers that do not know it
            betas = shifted(betas, config["snr_shift_scale"])
            kept = {"trained_betas": betas.tolist()}
        return from_betas(betas, kept, bool(config.get("rescale_betas_zero_snr", False)))


def dynamically_shifted(config: Mapping[str, Any], num: int, sequence_length: int) -> NoiseSchedule:
    """The flow schedule with shift e^mu (time_shift_type linear: mu), mu linear in the number of tokens of an image.

    Esser et al. 2024, arXiv:2403.03206, section 5.3.2, in the form of diffusers' Flux and SD3 pipelines.
    """
    if config.get("shift_terminal"):
        raise InputError(f"the scheduler stretches its noise levels to shift_terminal {config['shift_terminal']}, which no schedule here "
                         "does. Write the schedule out instead: schedule: {type: flow, shift: 3.0}.")
    shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = least + (most - least) * (sequence_length - shortest) / (longest - shortest)
    shift = mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    plain = NoiseSchedule.flow(num, shift)
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return NoiseSchedule(plain.alpha, plain.sigma, kept, "flow", log_shift=mu)


def diffuse(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """x_t = alpha x0 + sigma eps, in the dtype of x0."""
    return expand_like(level.alpha, x0) * x0 + expand_like(level.sigma, x0) * eps


def from_betas(betas: Tensor, config: Mapping[str, Any], zero_terminal_snr: bool = False) -> "NoiseSchedule":
    """alpha^2 = cumulative product of 1 - beta [T] float64."""
    wrong = ~((betas >= 0) & (betas <= 1))
    if wrong.any():
        t = int(wrong.nonzero()[0])
        raise InputError(f"schedule: beta_t must lie within 0 and 1, got {betas[t].item():.4g} at t = {t}. "
                         "Write smaller values, or start below end.")
    alpha_squared = torch.cumprod(1 - betas.double(), 0)
    if zero_terminal_snr:  # Lin et al. 2023, arXiv:2305.08891, algorithm 1: shift and scale sqrt(alpha_bar), the first stays
        root = alpha_squared.sqrt()
        alpha_squared = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        config = {**config, "rescale_betas_zero_snr": True}
    config = {"num_train_timesteps": len(betas), **config}
    return NoiseSchedule(alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), config)


def shifted(betas: Tensor, scale: float) -> Tensor:
    """The betas [T] whose SNR is that of `betas` divided by `scale`."""
    alpha_squared = torch.cumprod(1 - betas, 0)
    alpha_squared = alpha_squared / (scale + (1 - scale) * alpha_squared)
    return 1 - alpha_squared / torch.cat([alpha_squared.new_ones(1), alpha_squared[:-1]])


def betas_of(alpha_squared: Callable[[Tensor], Tensor], num_timesteps: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = 1 - f((t+1)/T) / f(t/T), at most max_beta."""
    f = alpha_squared(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps)
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def spaced(start: float, end: float, num: int) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)
