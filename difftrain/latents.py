"""Pixels to latents and back through a frozen variational autoencoder; videos frame by frame."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from difftrain.pipelines.files import expanded, looks_local, readable_errors
from difftrain.registry import ENCODERS, GIVEN, InputError, Positive
from difftrain.rng import Rng

VAEDType = Literal["float32", "bfloat16", "float16"]
FRAMES_AT_ONCE = 8  # through the autoencoder, whose activations at full resolution are what a long clip has no memory for


@ENCODERS.register("vae")
class LatentEncoder:
    """z = (E(x) - shift) scale, x in [-1, 1], with diffusers' AutoencoderKL.

    Rombach et al. 2022, arXiv:2112.10752. path: a local folder or hub id of the VAE, or of a pipeline with a vae folder.
    sample: draw from the posterior (keyed by sample) rather than take its mode. scale and shift are the VAE's own scaling_factor and
    shift_factor (by channel where it states latents_mean and latents_std), unless `scale` is given. dtype: the precision that it runs in;
    latents are float32.
    """

    def __init__(
        self, path: str, sample: bool = True, scale: Positive | None = None, dtype: VAEDType = "float32",
        vae: Annotated[Any, GIVEN] = None,
    ):
        self.path, self.sample, self.dtype = path, sample, getattr(torch, dtype)
        self.vae = (vae if vae is not None else self._load(path)).requires_grad_(False).eval()
        nn.Module.to(self.vae, self.dtype)  # diffusers' own `to` warns of a dtype, whatever the model
        config = self.vae.config
        self.scale: float = scale or config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0
        self.mean, self.std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)  # by channel
        if (self.mean is None) != (self.std is None):
            raise InputError(f"encoder.path: the config of the VAE in {path!r} states only one of latents_mean and latents_std.")

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
    def encode(self, pixels: Tensor, rng: Rng, names: Sequence[str] | None = None) -> Tensor:
        """Latents [B, C, H/f, W/f] of pixels [B, 3, H, W] in [-1, 1]; [B, C, F, H/f, W/f] of [B, 3, F, H, W]."""
        return self.latents(self.moments(pixels, names), rng)

    @torch.no_grad()
    def moments(self, pixels: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Mean and standard deviation of the posterior, [B, 2C, H/f, W/f] float32, of pixels [B, 3, H, W] in [-1, 1].

        In half precision, or with the images' names, what is not finite raises InputError.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        parameters = by_frames(lambda x: self.vae.encode(x).latent_dist.parameters, pixels.to(self.dtype))
        posterior = DiagonalGaussianDistribution(parameters.float())
        moments = torch.cat([posterior.mean, posterior.std], dim=1)
        if names is not None or self.dtype != torch.float32:  # a look at the values waits for the device
            self._refuse_broken(moments, names)
        return moments

    def latents(self, moments: Tensor, rng: Rng) -> Tensor:
        """Latents [B, C, h, w] drawn from posteriors of these moments [B, 2C, h, w], or their modes."""
        z, std = moments.chunk(2, dim=1)
        if self.sample:
            z = z + std * rng.normal(z.shape[1:], "encoder").to(z)
        shift, scale = self._affine(z)
        return (z - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] or [B, 3, F, H, W], about [-1, 1], float32."""
        shift, scale = self._affine(latents)
        return by_frames(lambda x: self.vae.decode(x).sample, (latents.float() / scale + shift).to(self.dtype)).float()

    def _affine(self, z: Tensor) -> tuple[Any, Any]:
        """(shift, scale), numbers or by channel."""
        if self.mean is None:
            return self.shift, self.scale
        mean, std = (torch.tensor(values, device=z.device).reshape(-1, *[1] * (z.ndim - 2)) for values in (self.mean, self.std))
        return mean, self.scale / std

    def _refuse_broken(self, moments: Tensor, names: Sequence[str] | None) -> None:
        broken = (~torch.isfinite(moments)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if broken:
            whose = ", ".join(names[i] for i in broken) if names is not None else f"{len(broken)} of {len(moments)} images"
            precision = str(self.dtype).removeprefix("torch.")
            float32 = f"encoder: {{type: vae, path: {self.path}, dtype: float32}}"
            remedy = (f"The VAE of SDXL overflows in half precision: write {float32}, or the path of a VAE made for float16."
                      if self.dtype != torch.float32 else "Look at the images, and at the VAE's weights.")
            raise InputError(f"the latents of {whose} are not finite with the VAE in {precision}. {remedy}")

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
