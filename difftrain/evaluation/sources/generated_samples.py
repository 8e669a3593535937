"""Samples that a network generates."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from difftrain.core.digests import weights_digest
from difftrain.core.registry import dump
from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.generation.generator import SampleGenerator, needs_every_process


class GeneratedSamples(Source):
    """Samples 0 to num - 1 of a network.

    Args:
        generator: The reverse process.
        denoiser: The network.
        shape: Shape of one sample: (C, H, W) in pixels, or that of a tensor.
        num: The number of samples.
        device: Where the network is.
    """

    def __init__(
        self,
        generator: SampleGenerator,
        denoiser: nn.Module,
        shape: tuple[int, ...],
        num: int,
        device: torch.device,
    ):
        self.generator, self.denoiser = generator, denoiser
        self.shape, self.num, self.device = shape, num, device
        self.items_are = generator.items
        self.block_size = generator.sampling.block_size
        labels = generator.conditioning.labels_of([0])
        if labels is not None:
            self.has_captions = generator.conditioning.captions_of(labels) is not None
            self.has_labels = not self.has_captions
        self.is_generated = True
        self.works_ahead = device.type != "cpu"  # on a CPU both threads would want the same cores
        self.every_process_takes_part = needs_every_process(denoiser)

    def __len__(self) -> int:
        return self.num

    def identity(self) -> dict[str, Any]:
        """Return the sampler, the seed, and a digest of the weights. Collective."""
        sampling = self.generator.sampling
        return {
            "sampler": dump(sampling.sampler),
            "guidance": sampling.guidance,
            "seed": sampling.seed,
            "weights": weights_digest(self.denoiser.state_dict()),
        }

    def blocks(self, wanted: Iterable[list[int]]) -> Iterator[SampleBlock]:
        """Generate the samples of each list of indices, with their labels or prompts."""
        conditioning = self.generator.conditioning
        for indices in wanted:
            samples = self.generator(self.denoiser, indices, self.device)
            labels = conditioning.labels_of(indices)
            captions = None if labels is None else conditioning.captions_of(labels)
            yield SampleBlock(samples, labels if captions is None else None, captions)
