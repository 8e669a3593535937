"""What the loader yields, as the objective's batch: latents where there is an encoder, and conditioning tensors."""

from dataclasses import dataclass

import torch

from difftrain.batch import Batch
from difftrain.conditioning import Conditioning
from difftrain.data.loader import MicroBatch
from difftrain.data.transform import to_unit_range
from difftrain.latents import LatentEncoder
from difftrain.rng import Rng


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

    def __call__(self, micro: MicroBatch, rng: Rng, device: torch.device, dtype: torch.dtype) -> Batch:
        """x0 of `dtype` [B, ...] and conditioning tensors, on the device."""
        if micro.moments is not None:
            assert self.encoder is not None
            x0 = self.encoder.latents(micro.moments.to(device, non_blocking=True), rng)
        else:
            assert micro.pixels is not None
            pixels = to_unit_range(micro.pixels.to(device, non_blocking=True))
            x0 = self.encoder.encode(pixels, rng) if self.encoder is not None else pixels
        cond = {name: value.to(device, non_blocking=True) for name, value in self.conditioning.of(micro, rng).items()}
        return Batch(x0.to(dtype), cond, micro.weights)
