"""What the loader yields, as the objective's batch: latents where there is an encoder, and conditioning tensors."""

import contextlib
from dataclasses import dataclass

import torch

from difftrain.batch import Batch
from difftrain.conditioning import Conditioning
from difftrain.data.items import ImageDataset, UnreadableImage
from difftrain.data.loader import MicroBatch
from difftrain.data.transform import Transform, to_unit_range
from difftrain.latents import LatentEncoder
from difftrain.rng import Rng

TRIED = 8  # images


@dataclass
class Preparation:
    """encoder: pixels to latents; None: the network sees pixels. Cached moments are not encoded again, latents are drawn from them."""

    conditioning: Conditioning
    encoder: LatentEncoder | None = None

    def to(self, device: torch.device) -> "Preparation":
        self.conditioning.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    def try_encoder(self, data: ImageDataset, transform: Transform, device: torch.device) -> None:
        """A few images, evenly spread, through the encoder: one whose latents are not finite is an InputError before a step is trained."""
        assert self.encoder is not None
        self.encoder.to(device)
        for i in dict.fromkeys(k * len(data) // TRIED for k in range(TRIED)):
            with contextlib.suppress(UnreadableImage):  # the loader's to tell
                item = data[i]
                placed = item.place(transform, Rng(0, samples=[i]))
                self.encoder.moments(to_unit_range(placed.pixels[None].to(device)), [item.name])

    def __call__(self, micro: MicroBatch, rng: Rng, device: torch.device, dtype: torch.dtype) -> Batch:
        """x0 of `dtype` [B, ...] and conditioning tensors, on the device."""
        if micro.moments is not None:
            assert self.encoder is not None
            x0 = self.encoder.latents(micro.moments.to(device, non_blocking=True), rng)
        else:
            assert micro.pixels is not None
            pixels = to_unit_range(micro.pixels.to(device, non_blocking=True))
            x0 = self.encoder.encode(pixels, rng, micro.names) if self.encoder is not None else pixels
        cond = {name: value.to(device, non_blocking=True) for name, value in self.conditioning.of(micro, rng).items()}
        return Batch(x0.to(dtype), cond, micro.weights)
