"""Pixels to latents and back through a frozen variational autoencoder; videos frame by frame."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from difftrain.denoisers import expanded, looks_local, readable_errors
from difftrain.registry import ENCODERS, GIVEN, InputError, Positive
from difftrain.rng import Rng

FRAMES_AT_ONCE = 8  # through the autoencoder, whose activations at full resolution are what a long clip has no memory for


@ENCODERS.register("vae")
class LatentEncoder:
    """z = (E(x) - shift) scale, x in [-1, 1], with diffusers' AutoencoderKL.

    Rombach et al. 2022, arXiv:2112.10752. path: a local folder or hub id of the VAE, or of a pipeline with a vae folder.
    sample: draw from the posterior (keyed by sample) rather than take its mode. The VAE's own scaling_factor and
    shift_factor are used unless `scale` is given. It runs in float32.
    """

    def __init__(self, path: str, sample: bool = True, scale: Positive | None = None, vae: Annotated[Any, GIVEN] = None):
        self.path, self.sample = path, sample
        self.vae = (vae if vae is not None else self._load(path)).requires_grad_(False).eval()
        self.scale = scale or self.vae.config.scaling_factor
        self.shift = getattr(self.vae.config, "shift_factor", None) or 0.0

    @property
    def factor(self) -> int:
        """Pixels for each latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.vae.config.latent_channels

    @property
    def pixel_channels(self) -> int:
        return self.vae.config.in_channels

    def to(self, device: torch.device) -> "LatentEncoder":
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor, rng: Rng) -> Tensor:
        """Latents [B, C, H/f, W/f] of pixels [B, 3, H, W] in [-1, 1]; [B, C, F, H/f, W/f] of [B, 3, F, H, W]."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        posterior = DiagonalGaussianDistribution(by_frames(lambda x: self.vae.encode(x).latent_dist.parameters, pixels.float()))
        latents = posterior.mean
        if self.sample:
            latents = latents + posterior.std * rng.normal(latents.shape[1:], "encoder").to(latents)
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] or [B, 3, F, H, W], about [-1, 1]."""
        return by_frames(lambda x: self.vae.decode(x).sample, latents.float() / self.scale + self.shift)

    @staticmethod
    def _load(path: str) -> Any:
        from diffusers import AutoencoderKL

        folder = Path(path).expanduser()
        if looks_local(path) and not folder.is_dir():
            raise InputError(f"encoder.path: there is no folder {path!r}. Write the folder of a diffusers AutoencoderKL, or a hub id.")
        inner = "vae" if (folder / "vae").is_dir() else None
        with readable_errors(path, "encoder.path"):
            return AutoencoderKL.from_pretrained(expanded(path), subfolder=inner)


def by_frames(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images [N, C, H, W] applied to them, or to the frames of clips [B, C, F, H, W], FRAMES_AT_ONCE of one clip at a time:
    what becomes of a clip does not depend on its neighbours in the batch."""
    if x.ndim == 4:
        return function(x)
    return torch.stack([torch.cat([function(part) for part in clip.transpose(0, 1).split(FRAMES_AT_ONCE)]).transpose(0, 1) for clip in x])
