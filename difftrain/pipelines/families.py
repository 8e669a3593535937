"""The pipelines that can be fine-tuned on captioned images: what tells one family of diffusers pipelines from another.

A family knows its parts' folders and classes, how the states of its text encoders become conditioning, and how its denoiser is called.
Everything else (schedule, parameterization, latent scale and shift) is read from the pipeline itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftrain.batch import Cond
from difftrain.pipelines.text import Tower

Encoders = Mapping[str, Any]
Ids = Mapping[str, Tensor]


class Family(ABC):
    """One family. told_sizes, told_guidance: whether its denoiser is told image sizes, and a guidance that it was distilled with."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    denoiser_class: ClassVar[str]
    denoiser_folder: ClassVar[str]
    towers: tuple[Tower, ...]
    patch: ClassVar[int] = 1  # latent sides are multiples of it
    even_sigmas: ClassVar[bool] = False  # how the pipeline spaces the noise levels of its sampler, see SampleGenerator

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Of x_t, from the denoiser's config."""
        return config["in_channels"]

    def told_sizes(self, config: Mapping[str, Any]) -> bool:
        return False

    def told_guidance(self, config: Mapping[str, Any]) -> bool:
        return False

    @abstractmethod
    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Conditioning tensors [B, ...] of token ids [B, L] by encoder."""

    @abstractmethod
    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The network's output [B, C, H, W]; everything in the network's dtype but `time`."""


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder's last states.

    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
    """

    name = "stable_diffusion"
    pipeline_class, denoiser_class, denoiser_folder = "StableDiffusionPipeline", "UNet2DConditionModel", "unet"
    towers = (Tower("text_encoder", "tokenizer", "CLIPTextModel"),)

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        return {"encoder_hidden_states": encoders["text_encoder"](ids["text_encoder"])[0]}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return model(x_t, time, cond["encoder_hidden_states"]).sample


class StableDiffusionXL(Family):
    """Stable Diffusion XL: the last but one states of two CLIP text encoders, the second one's projection, and the image's sizes.

    Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv:2307.01952.
    """

    name = "stable_diffusion_xl"
    pipeline_class, denoiser_class, denoiser_folder = "StableDiffusionXLPipeline", "UNet2DConditionModel", "unet"
    towers = (
        Tower("text_encoder", "tokenizer", "CLIPTextModel", reads_last=False),
        Tower("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
    )

    def told_sizes(self, config: Mapping[str, Any]) -> bool:
        return True

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        first, second = (encoders[tower.encoder](ids[tower.encoder], output_hidden_states=True) for tower in self.towers)
        words = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": words, "text_embeds": second.text_embeds}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["sizes"]}
        return model(x_t, time, cond["encoder_hidden_states"], added_cond_kwargs=added).sample


@dataclass(frozen=True)
class StableDiffusion3(Family):
    """Stable Diffusion 3: two CLIP text encoders and, where the pipeline has it, a T5, of whose tokens max_tokens are read.

    Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206.
    """

    width: int  # of the words that the transformer attends to (joint_attention_dim)
    max_tokens: int = 256
    has_t5: bool = True
    name: ClassVar[str] = "stable_diffusion_3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    denoiser_class: ClassVar[str] = "SD3Transformer2DModel"
    denoiser_folder: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 2

    @property
    def towers(self) -> tuple[Tower, ...]:  # type: ignore[override]
        clip = tuple(Tower(f"text_encoder{n}", f"tokenizer{n}", "CLIPTextModelWithProjection") for n in ("", "_2"))
        return (*clip, Tower("text_encoder_3", "tokenizer_3", "T5EncoderModel", self.max_tokens)) if self.has_t5 else clip

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        clips = [encoders[name](ids[name], output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        words = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        words = nn.functional.pad(words, (0, self.width - words.shape[-1]))
        if self.has_t5:
            t5 = encoders["text_encoder_3"](ids["text_encoder_3"])[0].to(words)
        else:
            t5 = words.new_zeros(len(words), self.max_tokens, self.width)
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        return {"encoder_hidden_states": torch.cat([words, t5], dim=1), "pooled_projections": pooled}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return model(
            hidden_states=x_t, timestep=time, encoder_hidden_states=cond["encoder_hidden_states"],
            pooled_projections=cond["pooled_projections"],
        ).sample


@dataclass(frozen=True)
class Flux(Family):
    """FLUX.1: a T5's states as words, CLIP's pooled state; latents packed two by two; a guidance input where the model was distilled.

    Black Forest Labs 2024, FLUX.1; Esser et al. 2024, arXiv:2403.03206, for the flow and its shift.
    """

    max_tokens: int = 512
    name: ClassVar[str] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    denoiser_class: ClassVar[str] = "FluxTransformer2DModel"
    denoiser_folder: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 2
    even_sigmas: ClassVar[bool] = True

    @property
    def towers(self) -> tuple[Tower, ...]:  # type: ignore[override]
        t5 = Tower("text_encoder_2", "tokenizer_2", "T5EncoderModel", self.max_tokens)
        return Tower("text_encoder", "tokenizer", "CLIPTextModel", attended=False), t5

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        return config["in_channels"] // self.patch**2

    def told_guidance(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("guidance_embeds"))

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        pooled = encoders["text_encoder"](ids["text_encoder"]).pooler_output
        return {"encoder_hidden_states": encoders["text_encoder_2"](ids["text_encoder_2"])[0], "pooled_projections": pooled}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        words, (height, width) = cond["encoder_hidden_states"], x_t.shape[2:]
        guidance = {"guidance": cond["guidance"]} if "guidance" in cond else {}
        output = model(
            hidden_states=packed(x_t), timestep=time / 1000, encoder_hidden_states=words, pooled_projections=cond["pooled_projections"],
            img_ids=places(height // 2, width // 2, x_t), txt_ids=x_t.new_zeros(words.shape[1], 3), **guidance,
        ).sample
        return unpacked(output, height, width)


def packed(x: Tensor) -> Tensor:
    """[B, C, H, W] as a sequence of 2 x 2 patches [B, H/2 W/2, 4C], row by row, channels outermost within a patch."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`."""
    b, _, width_of_one = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, width_of_one // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, width_of_one // 4, height, width)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) of each patch [height width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(like)
