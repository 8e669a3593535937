"""What a diagnostic is, and what it looks at: a network with its schedule, and clean samples.

Clean samples are those of the space in which the network works: pixels, latents, or tensors.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import Registry, dump, is_registered
from difftrain.core.rng import Rng
from difftrain.data.items import Images, ItemKind
from difftrain.data.transform import to_unit_range
from difftrain.diagnostics.gathering import json_numbers
from difftrain.generation.generator import conditioned, guided
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.objective.parameterization import Estimate, Parameterization, estimate
from difftrain.objective.schedule import NoiseLevel, NoiseSchedule, diffuse
from difftrain.objective.slots import Variance
from difftrain.objective.types import Denoiser

DIAGNOSTICS = Registry(
    "diagnostic", "what a trained network does along the noise levels", ["difftrain.diagnostics"]
)

Result = dict[str, Any]
SamplesByIndex = Callable[[Sequence[int]], Tensor]
"""Gives samples [B, ...] of indices."""


class KeptLatents:
    """Latents of images by their index, each encoded once.

    Args:
        encoder: The autoencoder. The noise of a draw from its posterior is keyed by the index.
        pixels: Gives pixels [B, C, H, W] in [-1, 1] of indices.
    """

    def __init__(self, encoder: LatentEncoder, pixels: SamplesByIndex):
        self.encoder, self.pixels = encoder, pixels
        self.kept: dict[int, Tensor] = {}
        self.device = torch.device("cpu")

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Return the latents [B, ...] of some images."""
        if any(i not in self.kept for i in indices):
            latents = self.encoder.encode(self.pixels(indices), Rng(0, 0, indices))
            self.kept |= dict(zip(indices, latents.cpu(), strict=True))
            self.device = latents.device
        return torch.stack([self.kept[i] for i in indices]).to(self.device)


@dataclass(frozen=True)
class Clean:
    """Clean samples by index.

    Args:
        num: How many there are.
        x0: Gives samples [B, ...] of indices, as the network sees them.
        labels: Labels [num], if there are any.
        pixels: Of latents: gives the images themselves [B, C, H, W] in [0, 1].
        items: What the samples are.
    """

    num: int
    x0: SamplesByIndex
    labels: Tensor | None = None
    pixels: SamplesByIndex | None = None
    items: ItemKind = "images"

    def __len__(self) -> int:
        return self.num

    @staticmethod
    def of_images(images: Images, encoder: LatentEncoder | None, device: torch.device) -> "Clean":
        """Return images as pixels in [-1, 1], or as their latents.

        Args:
            images: The images.
            encoder: What makes latents of them, if the network works on latents.
            device: Where the samples are wanted.
        """

        def pixels(indices: Sequence[int]) -> Tensor:
            return to_unit_range(images.pixels[list(indices)]).to(device)

        def unit_pixels(indices: Sequence[int]) -> Tensor:
            return (pixels(indices) + 1) / 2

        if encoder is None:
            return Clean(len(images), pixels, images.labels)
        return Clean(len(images), KeptLatents(encoder, pixels), images.labels, unit_pixels)

    @staticmethod
    def of_tensors(values: Tensor, labels: Tensor | None, device: torch.device) -> "Clean":
        """Return samples that are not pictures, in float32.

        Args:
            values: The samples [N, ...].
            labels: Their labels [N], if they have any.
            device: Where the samples are wanted.
        """

        def x0(indices: Sequence[int]) -> Tensor:
            return values[list(indices)].float().to(device)

        return Clean(len(values), x0, labels, items="tensors")

    def spread(self, num: int) -> "Clean":
        """Return at most `num` of the samples, evenly spread, since a folder is sorted by class."""
        count = min(num, self.num)
        return self.chosen([k * self.num // count for k in range(count)])

    def by_label(self) -> "Clean":
        """Return the samples sorted by label, in their order where labels are equal."""
        if self.labels is None:
            return self
        return self.chosen(self.labels.argsort(stable=True).tolist())

    def chosen(self, chosen: Sequence[int]) -> "Clean":
        """Return some of the samples, in the order of their indices in `chosen`."""

        def of_chosen(samples: SamplesByIndex) -> SamplesByIndex:
            return lambda indices: samples([chosen[i] for i in indices])

        labels = None if self.labels is None else self.labels[list(chosen)]
        pixels = None if self.pixels is None else of_chosen(self.pixels)
        return Clean(len(chosen), of_chosen(self.x0), labels, pixels, self.items)

    def labels_of(self, indices: Sequence[int]) -> Tensor | None:
        """Return the labels [B] of some samples, if there are any."""
        return None if self.labels is None else self.labels[list(indices)]


@dataclass(frozen=True)
class Subject:
    """What a diagnostic looks at.

    Args:
        denoiser: The network.
        schedule: Its noise levels.
        parameterization: What it outputs.
        variance: The reverse variance, which may be learned.
        conditioning: What it is conditioned on.
        shape: Shape of one x.
        held_out: Samples that it was not trained on.
        training: Samples that it was trained on; None if they are not known.
        encoder: The autoencoder of a latent model.
        clips: Whether x0_hat is clipped to [-1, 1], as samplers do with pixels.
        guidance: Scale of guidance in generation; errors are those of the network without it.
        block_size: Samples that go through the network together.
        device: Where the network is.
        described: What every result states of the run, such as its step.
        why_no_training: Why there are no training samples, for messages.

    Raises:
        InputError: If the network takes labels, and samples have none.
    """

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
    why_no_training: str = "the training data is a stream, or it is not there"

    def __post_init__(self) -> None:
        for name, clean in (("held-out", self.held_out), ("training", self.training)):
            lacks_labels = clean is not None and clean.labels is None
            if self.conditioning.conditions and lacks_labels:
                raise InputError(
                    f"the model takes class labels, but the {name} images have none. Give images "
                    "with labels (labels: folders, label_column: ...)."
                )

    @property
    def items(self) -> ItemKind:
        """What the samples are."""
        return self.held_out.items

    def output(self, x: Tensor, t: int, labels: Tensor | None, guidance: float = 1.0) -> Tensor:
        """Evaluate the network.

        Args:
            x: Its input [B, ...].
            t: A table index.
            labels: Labels [B], if it takes any.
            guidance: Scale of guidance; 1 does not guide.

        Returns:
            Its output [B, ...], without variance channels.
        """
        prediction, _ = self.outputs(x, t, labels, guidance)
        return prediction

    def outputs(
        self, x: Tensor, t: int, labels: Tensor | None, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate the network, see `output`.

        Returns:
            Its prediction [B, ...], and what predicts the variance [B, ...], if it is learned.
        """
        time = self.schedule.model_time(torch.full((len(x),), t, device=x.device))
        cond = conditioned(self.conditioning, labels, len(x), guidance, x.device)
        output = guided(self.denoiser, x, time, cond, guidance)
        wide = output.to(torch.promote_types(output.dtype, x.dtype))
        return self.variance.split(wide, x)

    def estimate(
        self,
        x: Tensor,
        t: int,
        labels: Tensor | None,
        guidance: float = 1.0,
        clips: bool | None = None,
    ) -> Estimate:
        """Return the x0 and eps that the output implies.

        Args:
            x: The network's input [B, ...].
            t: A table index.
            labels: Labels [B], if it takes any.
            guidance: Scale of guidance; 1 does not guide.
            clips: Whether x0 is clipped to [-1, 1]; None does as samplers do. eps stays as it is.
        """
        found, _ = self.reverse_estimate(x, t, labels, guidance, clips)
        return found

    def reverse_estimate(
        self,
        x: Tensor,
        t: int,
        labels: Tensor | None,
        guidance: float = 1.0,
        clips: bool | None = None,
    ) -> tuple[Estimate, Tensor | None]:
        """Return what a reverse step needs, from one evaluation of the network; see `estimate`.

        Returns:
            The x0 and eps that the output implies, and what predicts the variance [B, ...], if it
            is learned.
        """
        output, predicted = self.outputs(x, t, labels, guidance)
        found = estimate(self.parameterization, output, x, self.level(t, len(x)))
        if self.clips if clips is None else clips:
            found = Estimate(found.x0.clamp(-1, 1), found.eps)
        return found, predicted

    def level(self, t: int, num: int) -> NoiseLevel:
        """Return the noise level at a table index, `num` times; t = -1 is the clean sample."""
        return self.schedule.level_before(torch.full((num,), t, device=self.device), steps=0)

    def noised(
        self, clean: Clean, indices: Sequence[int], t: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise to clean samples.

        Args:
            clean: The samples.
            indices: Which of them.
            t: A table index; t = -1 is x0 itself.
            seed: Seed of the noise, which is keyed by t and sample.

        Returns:
            (x0, eps, x_t ~ q(x_t | x0)), each [B, ...].
        """
        x0 = clean.x0(indices)
        eps = Rng(seed, t, indices).normal(x0.shape[1:], "diagnostics.noise").to(x0)
        return x0, eps, diffuse(x0, eps, self.level(t, len(x0)))

    def pixels(self, x: Tensor) -> Tensor:
        """Return x0 [B, ...] as images in [0, 1], not rounded to 8 bits."""
        decoded = x if self.encoder is None else self.encoder.decode(x)
        return ((decoded.clamp(-1, 1) + 1) / 2).to(x)

    def log_snr(self, timesteps: Sequence[int]) -> list[float | None]:
        """Return log SNR at table indices, as numbers for JSON."""
        return json_numbers(self.schedule.level_before(torch.tensor(timesteps), steps=0).log_snr)

    def protocol(self, part: "Diagnostic", clean: Clean | None = None, **more: Any) -> Result:
        """Return what a result states in addition to its numbers.

        Args:
            part: The diagnostic.
            clean: The samples that it looked at, if they are of a data set.
            more: What else it states.
        """
        arguments = dict(dump(part)) if is_registered(part) else {}
        arguments.pop("type", None)
        num_images = {} if clean is None else {"num_images": len(clean)}
        about = {"shape": list(self.shape), "arguments": arguments}
        return {**self.described, **about, **num_images, **more}


class Diagnostic(ABC):
    """Measures one thing about a network; a registered part with plain arguments.

    A diagnostic of your own derives from it and is registered in `DIAGNOSTICS`.

    Attributes:
        num: Samples of a data set that it looks at, at most.
        needs_images: Whether it looks at samples as images, so that tensors make no sense to it.
    """

    num: int
    needs_images: ClassVar[bool] = False

    def check(self, subject: Subject) -> None:
        """Refuse what it cannot do, before anything is computed.

        Raises:
            InputError: If it cannot look at this subject.
        """
        if self.needs_images and subject.items == "tensors":
            raise InputError(
                "it compares images, but the samples are tensors. Name other diagnostics, such as "
                "--which denoising_error."
            )

    @abstractmethod
    def __call__(self, subject: Subject) -> Result:
        """Measure. Collective: the same result on every process.

        Returns:
            A JSON-able dict with at least `value` and `protocol`. Those of difftrain have the
            `standard_error` of `value` too; it is None where a single sample cannot tell.

        Raises:
            InputError: If it cannot look at this subject, see `check`.
        """
