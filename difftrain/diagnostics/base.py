"""What a diagnostic looks at: a network with its schedule, and clean samples in the space in which it works.

Work is cut into blocks of sample indices and dealt over the processes. Sums are taken from the gathered rows, in one order, so that
any number of processes gives the same numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.processes import sum_over_processes
from difftrain.core.registry import Registry
from difftrain.core.rng import Rng
from difftrain.data.items import Images
from difftrain.data.transform import to_unit_range
from difftrain.generation.generator import blocks
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.objective import parameterization as prm
from difftrain.objective.parameterization import Estimate, Parameterization
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, diffuse
from difftrain.objective.slots import Variance
from difftrain.objective.types import Denoiser

DIAGNOSTICS = Registry(
    "diagnostic", "what a trained network does along the noise levels", ["difftrain.diagnostics"]
)


Result = dict[str, Any]


class KeptLatents:
    """Latents [B, ...] of images by their places, each encoded once; a posterior's draw is keyed by the place."""

    def __init__(self, encoder: LatentEncoder, pixels: Callable[[Sequence[int]], Tensor]):
        self.encoder, self.pixels = encoder, pixels
        self.kept: dict[int, Tensor] = {}

    def __call__(self, indices: Sequence[int]) -> Tensor:
        if any(i not in self.kept for i in indices):
            latents = self.encoder.encode(self.pixels(indices), Rng(0, 0, indices))
            self.kept |= dict(zip(indices, latents.cpu(), strict=True))
            self.device = latents.device
        return torch.stack([self.kept[i] for i in indices]).to(self.device)


@dataclass(frozen=True)
class Clean:
    """`num` clean samples: x0(indices) [B, ...] as the network sees them, and their labels [num]. pixels(indices): of latents, the images
    themselves, in [0, 1]."""

    num: int
    x0: Callable[[Sequence[int]], Tensor]
    labels: Tensor | None = None
    pixels: Callable[[Sequence[int]], Tensor] | None = None

    def __len__(self) -> int:
        return self.num

    @staticmethod
    def of_images(images: Images, encoder: LatentEncoder | None, device: torch.device) -> "Clean":
        """Pixels in [-1, 1], or their latents."""

        def pixels(indices: Sequence[int]) -> Tensor:
            return to_unit_range(images.pixels[list(indices)]).to(device)

        if encoder is None:
            return Clean(len(images), pixels, images.labels)
        return Clean(
            len(images),
            KeptLatents(encoder, pixels),
            images.labels,
            lambda indices: (pixels(indices) + 1) / 2,
        )

    def spread(self, num: int) -> "Clean":
        """At most `num` of the samples, evenly spread (a folder is sorted by class)."""
        chosen = (
            [k * self.num // num for k in range(num)] if num < self.num else list(range(self.num))
        )
        labels = self.labels[chosen] if self.labels is not None else None
        pixels = self.pixels
        of_chosen = (
            (lambda indices: pixels([chosen[i] for i in indices])) if pixels is not None else None
        )
        return Clean(
            len(chosen), lambda indices: self.x0([chosen[i] for i in indices]), labels, of_chosen
        )

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        return self.labels[list(indices)] if self.labels is not None else None


@dataclass(frozen=True)
class Subject:
    """clips: x0_hat to [-1, 1], as samplers do with pixels. guidance: of generation; errors are those of the network without it.
    shape: of one x. described: what every result states of the run, such as its step."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    parameterization: Parameterization
    variance: Variance
    conditioning: Conditioning
    shape: tuple[int, ...]
    held_out: Clean
    training: Clean | None = None
    encoder: LatentEncoder | None = None
    clips: bool = True
    guidance: float = 1.0
    block_size: int = 100
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    described: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, clean in (("held-out", self.held_out), ("training", self.training)):
            if self.conditioning.conditions and clean is not None and clean.labels is None:
                raise InputError(
                    f"the model takes class labels, but the {name} images have none. Give images with labels (labels: "
                    "folders, label_column: ...)."
                )

    def output(self, x: Tensor, t: int, labels: Tensor | None, guidance: float = 1.0) -> Tensor:
        """The network's output [B, ...] at x [B, ...] and table index t, without variance channels, guided if asked to."""
        time = self.schedule.model_time(torch.full((len(x),), t, device=x.device))
        cond = {name: value.to(x.device) for name, value in self.conditioning(labels).items()}
        if guidance == 1.0:
            return self._prediction(self.denoiser(x, time, cond), x)
        null = {name: value.to(x.device) for name, value in self.conditioning.null(len(x)).items()}
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        with_label, without = self.denoiser(torch.cat([x, x]), torch.cat([time, time]), both).chunk(
            2
        )
        with_label, without = self._prediction(with_label, x), self._prediction(without, x)
        return without + guidance * (with_label - without)

    def estimate(
        self,
        x: Tensor,
        t: int,
        labels: Tensor | None,
        guidance: float = 1.0,
        clips: bool | None = None,
    ) -> Estimate:
        """x0 and eps that the output implies; x0 clipped where samplers clip it, eps as it is."""
        found = prm.estimate(
            self.parameterization, self.output(x, t, labels, guidance), x, self.level(t, len(x))
        )
        return (
            Estimate(found.x0.clamp(-1, 1), found.eps)
            if (self.clips if clips is None else clips)
            else found
        )

    def level(self, t: int, num: int) -> NoiseLevel:
        """The level at table index t, [num] times; t = -1 is the clean image."""
        return self.schedule.level_before(torch.full((num,), t, device=self.device), steps=0)

    def noised(
        self, clean: Clean, indices: Sequence[int], t: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x0, eps, x_t ~ q(x_t | x0)), each [B, ...]; t = -1 is x0 itself. The noise is keyed by t and sample."""
        x0 = clean.x0(indices)
        eps = Rng(seed, t, indices).normal(x0.shape[1:], "diagnostics.noise").to(x0)
        return x0, eps, diffuse(x0, eps, self.level(t, len(x0)))

    def pixels(self, x: Tensor) -> Tensor:
        """x0 [B, ...] as images in [0, 1], not rounded to 8 bits."""
        return (
            ((self.encoder.decode(x) if self.encoder is not None else x).clamp(-1, 1) + 1) / 2
        ).to(x)

    def log_snr(self, timesteps: Sequence[int]) -> list[float | None]:
        return plain(self.schedule.level_before(torch.tensor(timesteps), steps=0).log_snr)

    def protocol(self, part: Any, clean: Clean | None = None, **more: Any) -> Result:
        """What a result states beside its numbers."""
        images = {} if clean is None else {"num_images": len(clean)}
        registered: tuple[Any, str, dict[str, Any]] = part.registered_as
        return {
            **self.described,
            "shape": list(self.shape),
            "arguments": dict(registered[2]),
            **images,
            **more,
        }

    def _prediction(self, output: Tensor, x: Tensor) -> Tensor:
        return self.variance.split(output.to(torch.promote_types(output.dtype, x.dtype)), x)[0]


class Diagnostic(Protocol):
    """A registered part: plain values in the constructor, one call, the same result on every process."""

    num: int  # images that it looks at, at most

    def check(self, subject: Subject) -> None:
        """Raises InputError for what it cannot do with this subject, before anything is computed."""
        ...

    def __call__(self, subject: Subject) -> Result:
        """A JSON-able dict with at least `value` and `protocol`. Collective."""
        ...


def by_sample(
    num: int, width: Sequence[int], size: int, rows: Callable[[list[int]], Tensor]
) -> Tensor:
    """[num, *width] float64 on the CPU, on every process: rows(indices) [B, *width] of blocks of `size` samples. Collective."""
    found = torch.zeros(num, *width, dtype=torch.float64)
    for indices in blocks(num, size):
        found[indices] = rows(indices).double().cpu()
    return sum_over_processes(found)


def by_block(
    num: int, width: Sequence[int], size: int, sums: Callable[[list[int]], Tensor]
) -> Tensor:
    """Sum [*width] float64 on the CPU, on every process, of sums(indices) of all blocks, added in the blocks' order. Collective."""
    found = torch.zeros(math.ceil(num / size), *width, dtype=torch.float64)
    for indices in blocks(num, size):
        found[indices[0] // size] = sums(indices).double().cpu()
    return sum_over_processes(found).sum(0)


def moments(x: Tensor) -> Tensor:
    """(sum, sum of squares) [2, D] float64 over the samples of x [B, ...]."""
    flat = x.flatten(1).double()
    return torch.stack([flat.sum(0), flat.square().sum(0)])


def population_std(sums: Tensor, num: int) -> Tensor:
    """Standard deviation [..., D] (ddof 0) of moments [..., 2, D] of `num` samples."""
    mean, square = sums[..., 0, :] / num, sums[..., 1, :] / num
    return (square - mean**2).clamp(min=0).sqrt()


def spread_timesteps(num_timesteps: int, num: int) -> list[int]:
    """`num` table indices, ascending, both ends among them: ADM's "respacing". One alone is the noisiest."""
    if num > num_timesteps:
        raise InputError(
            f"{num} noise levels, but the schedule has {num_timesteps} timesteps. Write at most {num_timesteps}."
        )
    return [round((num_timesteps - 1) * (k + (num == 1)) / max(1, num - 1)) for k in range(num)]


def trailing_timesteps(num_timesteps: int, num: int) -> list[int]:
    """The indices, ascending, of diffusers' `trailing` spacing."""
    if num > num_timesteps:
        raise InputError(
            f"{num} steps, but the schedule has {num_timesteps} timesteps. Write at most {num_timesteps}."
        )
    return sorted(round(num_timesteps - k * num_timesteps / num) - 1 for k in range(num))


def plain(values: Tensor) -> list[float | None]:
    """Numbers for JSON; what is not finite is None."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are finite; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
