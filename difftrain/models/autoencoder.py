"""Pixels to latents and back through a frozen variational autoencoder; videos frame by frame."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from difftrain.core.digests import weights_digest
from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN, Positive
from difftrain.core.rng import Rng
from difftrain.models.files import expanded, looks_local, readable_errors
from difftrain.models.slots import ENCODERS

VAEDType = Literal["float32", "bfloat16", "float16"]
# Frames in one call of the autoencoder: activations of a whole clip would not fit into memory.
FRAMES_AT_ONCE = 8


@ENCODERS.register("vae")
class LatentEncoder:
    """z = (E(x) - shift) scale, x in [-1, 1], with diffusers' AutoencoderKL.

    Latents are float32 in any precision of the VAE. scale and shift are the VAE's own
    scaling_factor and shift_factor, or by channel its latents_mean and latents_std.

    Args:
        path: A local folder or hub id of the VAE, or of a pipeline with a vae folder.
        sample: Whether to draw from the posterior, keyed by sample, instead of taking its mode.
        scale: Replaces the VAE's own scaling_factor.
        dtype: The precision in which the VAE runs.
        vae: The VAE itself, where the program has it already.

    Raises:
        InputError: If there is no such VAE, or its config is incomplete.

    Reference:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv:2112.10752.
    """

    def __init__(
        self,
        path: str,
        sample: bool = True,
        scale: Positive | None = None,
        dtype: VAEDType = "float32",
        vae: Annotated[Any, GIVEN] = None,
    ):
        self.path, self.sample = path, sample
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.vae: Any = (vae if vae is not None else load_vae(path)).requires_grad_(False).eval()
        # diffusers' own `to` warns about a dtype for any model.
        nn.Module.to(self.vae, self.dtype)
        config = self.vae.config
        self.scale: float = scale or config.scaling_factor
        self.shift: float = config.get("shift_factor") or 0.0
        self.mean: list[float] | None = config.get("latents_mean")  # by channel
        self.std: list[float] | None = config.get("latents_std")
        if (self.mean is None) != (self.std is None):
            raise InputError(
                f"encoder.path: the config of the VAE in {path!r} states only one of latents_mean "
                "and latents_std. Write both into its config.json, or neither."
            )

    @property
    def factor(self) -> int:
        """Pixels of one latent along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def pixel_channels(self) -> int:
        """Channels of the images."""
        return int(self.vae.config.in_channels)

    def latent_shape(self, item: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the latents of one item.

        Args:
            item: (C, H, W) of an image or (C, F, H, W) of a clip, in pixels.

        Raises:
            InputError: If the VAE takes images of another number of channels.
        """
        channels, *frames, height, width = item
        if channels != self.pixel_channels:
            raise InputError(
                f"transform.channels: {channels}, but the encoder takes {self.pixel_channels}. "
                f"Write transform: {{channels: {self.pixel_channels}}}."
            )
        return self.channels, *frames, height // self.factor, width // self.factor

    def to(self, device: torch.device) -> "LatentEncoder":
        """Move the VAE to a device."""
        self.vae.to(device)
        return self

    def identity(self) -> dict[str, str]:
        """Return what latents depend on apart from the pixels: the VAE's weights and precision."""
        return {
            "VAE": weights_digest(self.vae.state_dict()),
            "precision of the VAE": str(self.dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode(self, pixels: Tensor, rng: Rng, names: Sequence[str] | None = None) -> Tensor:
        """Return the latents of pixels.

        Args:
            pixels: Images [B, C, H, W] or clips [B, C, F, H, W] in [-1, 1].
            rng: The samples' draws.
            names: What messages call the images. Values are checked if names are given, and
                always in half precision.

        Returns:
            Latents [B, C, H/f, W/f] or [B, C, F, H/f, W/f], float32.

        Raises:
            InputError: If latents that were checked are not finite.
        """
        return self.latents(self.moments(pixels, names), rng)

    @torch.no_grad()
    def moments(self, pixels: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Return mean and standard deviation of the posterior of pixels.

        Args:
            pixels: Images [B, C, H, W] or clips [B, C, F, H, W] in [-1, 1].
            names: What messages call the images. Values are checked if names are given, and
                always in half precision.

        Returns:
            Moments [B, 2C, H/f, W/f], of clips with F after 2C, float32.

        Raises:
            InputError: If moments that were checked are not finite.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        parameters = by_frames(
            lambda x: self.vae.encode(x).latent_dist.parameters, pixels.to(self.dtype)
        )
        posterior = DiagonalGaussianDistribution(parameters.float())
        moments = torch.cat([posterior.mean, posterior.std], dim=1)
        # A check waits for the device.
        if names is not None or self.dtype != torch.float32:
            self._refuse_broken(moments, names)
        return moments

    def latents(self, moments: Tensor, rng: Rng) -> Tensor:
        """Return latents [B, C, h, w] of posteriors with these moments [B, 2C, h, w].

        Args:
            moments: Mean and standard deviation, as `moments` returns them.
            rng: The samples' draws, which are used if `sample` is on.
        """
        z, std = moments.chunk(2, dim=1)
        if self.sample:
            z = z + std * rng.normal(z.shape[1:], "encoder").to(z)
        shift, scale = self._affine(z)
        latents: Tensor = (z - shift) * scale
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, C, H, W] or [B, C, F, H, W], about in [-1, 1], float32."""
        shift, scale = self._affine(latents)
        z = (latents.float() / scale + shift).to(self.dtype)
        return by_frames(lambda x: self.vae.decode(x).sample, z).float()

    def _affine(self, z: Tensor) -> tuple[Any, Any]:
        """(shift, scale): numbers, or tensors by channel that broadcast to z."""
        if self.mean is None:
            return self.shift, self.scale
        by_channel = (-1, *[1] * (z.ndim - 2))
        mean = torch.tensor(self.mean, device=z.device).reshape(by_channel)
        std = torch.tensor(self.std, device=z.device).reshape(by_channel)
        return mean, self.scale / std

    def _refuse_broken(self, moments: Tensor, names: Sequence[str] | None) -> None:
        is_broken = (~torch.isfinite(moments)).flatten(1).any(dim=1)
        broken = is_broken.nonzero().flatten().tolist()
        if not broken:
            return
        whose = f"{len(broken)} of {len(moments)} images"
        if names is not None:
            whose = ", ".join(names[i] for i in broken)
        remedy = "Look at the images, and at the VAE's weights."
        if self.dtype != torch.float32:
            remedy = (
                "The VAE of SDXL overflows in half precision. Write encoder: {type: vae, path: "
                f"{self.path}, dtype: float32}}, or the path of a VAE made for float16."
            )
        precision = str(self.dtype).removeprefix("torch.")
        raise InputError(
            f"the latents of {whose} are not finite with the VAE in {precision}. {remedy}"
        )


def load_vae(path: str) -> Any:
    """Load an AutoencoderKL.

    Args:
        path: A local folder or hub id of the VAE, or of a pipeline with a vae folder.

    Raises:
        InputError: If there is none.
    """
    from diffusers import AutoencoderKL

    folder = Path(path).expanduser()
    if looks_local(path) and not folder.is_dir():
        raise InputError(
            f"encoder.path: there is no folder {path!r}. "
            "Write the folder of a diffusers AutoencoderKL, or a hub id."
        )
    inner = "vae" if (folder / "vae").is_dir() else None
    with readable_errors(path, "encoder.path"):
        return AutoencoderKL.from_pretrained(expanded(path), subfolder=inner)


def by_frames(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of images [N, C, H, W] to images or to the frames of clips.

    Frames go through in pieces of one clip, so a result does not depend on the rest of the batch.

    Args:
        function: The function.
        x: Images [B, C, H, W] or clips [B, C, F, H, W].

    Returns:
        Its outputs, of the same order of dimensions.
    """
    if x.ndim == 4:
        return function(x)
    clips = []
    for clip in x:
        pieces = clip.transpose(0, 1).split(FRAMES_AT_ONCE)
        frames = torch.cat([function(piece) for piece in pieces])
        clips.append(frames.transpose(0, 1))
    return torch.stack(clips)
