"""Samples that a network generates."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.core.digests import weights_digest
from difftrain.core.registry import dump
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.generation.conditions import Conditions
from difftrain.generation.generator import SampleGenerator, needs_every_process


class GeneratedSamples(Source):
    """Samples 0 to num - 1 of a network.

    Args:
        generator: The reverse process.
        denoiser: The network.
        shape: Shape of one sample: (C, H, W) in pixels, or that of a tensor.
        num: The number of samples.
        device: Where the network is.
        conditions: The class or prompt of each sample; None takes the conditioning's own, in turn.
        lora_scale: Scale of the network's LoRA; None where it has none.
    """

    def __init__(
        self,
        generator: SampleGenerator,
        denoiser: nn.Module,
        shape: tuple[int, ...],
        num: int,
        device: torch.device,
        conditions: Conditions | None = None,
        lora_scale: float | None = None,
    ):
        self.generator, self.denoiser = generator, denoiser
        self.shape, self.num, self.device = shape, num, device
        self.conditions, self.lora_scale = conditions, lora_scale
        self.items_are = generator.items
        self.block_size = generator.sampling.block_size
        labels = self._labels([0])
        if labels is not None:
            self.has_captions = generator.conditioning.captions_of(labels) is not None
            self.has_labels = not self.has_captions
        self.is_generated = True
        self.works_ahead = device.type != "cpu"  # on a CPU both threads would want the same cores
        self.every_process_takes_part = needs_every_process(denoiser)

    def __len__(self) -> int:
        return self.num

    def identity(self) -> dict[str, Any]:
        """Return all that decides the samples: how they are made, conditions, weights.

        Collective where the weights are sharded.
        """
        encoder = self.generator.encoder
        return {
            **self.described(),
            "num": self.num,
            "conditions": None if self.conditions is None else self.conditions.compared(),
            "encoder": None if encoder is None else encoder.identity(),
            "weights": weights_digest(self.denoiser.state_dict()),
        }

    def described(self) -> dict[str, Any]:
        """Return how the samples are made, for a protocol, without the weights."""
        sampling, conditioning = self.generator.sampling, self.generator.conditioning
        found = {
            "sampler": dump(sampling.sampler),
            "seed": sampling.seed,
            "block_size": sampling.block_size,
            "guidance": sampling.guidance,
            **conditioning.described(),
        }
        if self.lora_scale is not None:
            found["lora_scale"] = self.lora_scale
        if self.conditions is None:
            return found
        return found | self.conditions.described()

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Generate the samples of each list of indices, with their labels or prompts."""
        conditioning = self.generator.conditioning
        for indices in wanted:
            labels = self._labels(indices)
            samples = self.generator(self.denoiser, indices, self.device, labels)
            captions = None if labels is None else conditioning.captions_of(labels)
            yield SampleBlock(samples, labels if captions is None else None, captions)

    def _labels(self, indices: list[int]) -> Tensor | None:
        """Return the class ids, or the numbers of the prompts, of these samples."""
        conditioning = self.generator.conditioning
        if self.conditions is None:
            return conditioning.labels_of(indices)
        return self.conditions.labels(indices, conditioning)
