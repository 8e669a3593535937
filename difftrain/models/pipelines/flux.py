"""FLUX.1."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.core.registry import NonNegative, PositiveInt
from difftrain.models.lora.formats import DiffusersLora
from difftrain.models.lora.kohya import Layers, kohya_state, side_by_side
from difftrain.models.pipelines.pretrained import KeyPrefixes
from difftrain.models.pipelines.text_encoders import Encoders, Ids, Tower
from difftrain.models.pipelines.text_to_image import VAE_KEYS, TextToImageModel
from difftrain.models.slots import MODELS
from difftrain.objective.types import Cond

# Layers by diffusers' name in a block, and the names that kohya's scripts and ComfyUI read; first
# those that are one layer there too, then the layers that stand side by side in one layer there.
DOUBLE = re.compile(r"transformer_blocks\.(\d+)\.")
SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.")
ALONE: dict[re.Pattern[str], dict[str, str]] = {
    DOUBLE: {
        "attn.to_out.0": "double_blocks.{}.img_attn.proj",
        "attn.to_add_out": "double_blocks.{}.txt_attn.proj",
        "ff.net.0.proj": "double_blocks.{}.img_mlp.0",
        "ff.net.2": "double_blocks.{}.img_mlp.2",
        "ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0",
        "ff_context.net.2": "double_blocks.{}.txt_mlp.2",
        "norm1.linear": "double_blocks.{}.img_mod.lin",
        "norm1_context.linear": "double_blocks.{}.txt_mod.lin",
    },
    SINGLE: {
        "proj_out": "single_blocks.{}.linear2",
        "norm.linear": "single_blocks.{}.modulation.lin",
    },
}
FUSED: dict[re.Pattern[str], dict[str, tuple[str, ...]]] = {
    DOUBLE: {
        "double_blocks.{}.img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "double_blocks.{}.txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    SINGLE: {"single_blocks.{}.linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}


class FluxLora(DiffusersLora):
    """LoRA files of FLUX.1; in kohya's keys, to_q, to_k and to_v are one layer."""

    loader = "FluxLoraLoaderMixin"

    def options(self, model: nn.Module) -> dict[str, Any]:
        """Return what the mixin is given besides the path."""
        return {"return_alphas": True}

    def kohya_state(self, model: nn.Module, layers: Mapping[str, Layers]) -> dict[str, Tensor]:
        """Return a LoRA under the names of kohya's scripts and ComfyUI.

        Raises:
            InputError: If a layer is outside the blocks.
        """
        named: dict[str, Layers] = {}
        for folder, inner in layers.items():
            if folder == "transformer":
                named["lora_unet"] = fused_layers(model, inner)
            else:
                named["lora_te1"] = inner
        return kohya_state(named)


def fused_layers(model: nn.Module, layers: Layers) -> Layers:
    """Return LoRA layers by kohya's names, fused where they are one layer there.

    Args:
        model: The transformer.
        layers: LoRA layers by diffusers' names.

    Raises:
        InputError: If kohya's scripts and ComfyUI have no name for a layer.
    """
    found: Layers = {}
    for name, factors in layers.items():
        target, parts = kohya_name(name)
        found[target] = side_by_side(model, parts, layers) if len(parts) > 1 else factors
    return found


def kohya_name(name: str) -> tuple[str, list[str]]:
    """Return the name of a layer for kohya's scripts, and the layers that it stands for there.

    Args:
        name: The layer's name in diffusers.

    Raises:
        InputError: If it has none.
    """
    for kind in (DOUBLE, SINGLE):
        match = kind.match(name)
        if match is None:
            continue
        inner = name[match.end() :]
        if inner in ALONE[kind]:
            return ALONE[kind][inner].format(match[1]), [name]
        for target, parts in FUSED[kind].items():
            if inner in parts:
                return target.format(match[1]), [f"{match[0]}{part}" for part in parts]
    raise InputError(
        f"the Flux layer {name} has no name that diffusers and ComfyUI both read. "
        "Use the diffusers file in lora/, or targets: attention_mlp."
    )


@MODELS.register("flux")
@dataclass(eq=False)
class Flux(TextToImageModel):
    """FLUX.1: a flow-matching transformer on packed latents, under a CLIP and a T5.

    It attends to the T5's states and takes CLIP's pooled state. A network that was distilled with
    guidance takes the guidance as an input; classifier-free guidance is sampling.guidance.

    Args:
        max_tokens: Tokens of a prompt that the T5 reads. Arguments not listed here are those of
            `TextToImageModel`.
        guidance_in_training: The guidance that a distilled network takes in training.
        guidance_in_sampling: The guidance that a distilled network takes in sampling.

    Reference:
        Black Forest Labs 2024, FLUX.1; Esser et al. 2024, arXiv:2403.03206, for the flow and its
        shift.
    """

    max_tokens: PositiveInt = 512
    guidance_in_training: NonNegative = 1.0
    guidance_in_sampling: NonNegative = 3.5

    name = "flux"
    spaces_sigmas_evenly = True
    pipeline_class = "FluxPipeline"
    network_class = "FluxTransformer2DModel"
    network_folder = "transformer"
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    key_prefixes: ClassVar[KeyPrefixes] = {
        "transformer": ("model.diffusion_model.", "double_blocks.", "transformer_blocks."),
        "vae": VAE_KEYS,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    }
    lora_format = FluxLora()
    patch = 2

    @property
    def towers(self) -> Sequence[Tower]:
        """A CLIP for the pooled state, and a T5 for the words."""
        return (
            Tower("text_encoder", "tokenizer", "CLIPTextModel", attended=False),
            Tower("text_encoder_2", "tokenizer_2", "T5EncoderModel", self.max_tokens),
        )

    @property
    def latent_channels(self) -> int:
        """Channels of x_t, before packing."""
        return int(self.network_config["in_channels"]) // self.patch**2

    @property
    def guidance_input(self) -> tuple[float, float] | None:
        """The guidance that a distilled network takes as an input; None for others."""
        if not self.network_config.get("guidance_embeds"):
            return None
        return self.guidance_in_training, self.guidance_in_sampling

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Return the T5's states, and CLIP's pooled state."""
        return {
            "encoder_hidden_states": encoders["text_encoder_2"](ids["text_encoder_2"])[0],
            "pooled_projections": encoders["text_encoder"](ids["text_encoder"]).pooler_output,
        }

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the network's prediction [B, C, H, W]."""
        height, width = x_t.shape[2:]
        words = cond["encoder_hidden_states"]
        guidance = {"guidance": cond["guidance"]} if "guidance" in cond else {}
        output = model(
            hidden_states=packed(x_t),
            timestep=time / 1000,
            encoder_hidden_states=words,
            pooled_projections=cond["pooled_projections"],
            img_ids=positions(height // 2, width // 2, x_t),
            txt_ids=x_t.new_zeros(words.shape[1], 3),
            **guidance,
        ).sample
        return unpacked(output, height, width)


def packed(x: Tensor) -> Tensor:
    """Return latents as a sequence of 2 x 2 patches, row by row.

    Args:
        x: Latents [B, C, H, W].

    Returns:
        Patches [B, H/2 W/2, 4C], channels outermost within a patch.
    """
    b, c, h, w = x.shape
    patches = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the latents [B, C, H, W] of patches [B, H/2 W/2, 4C]: the inverse of `packed`."""
    b, _, values = tokens.shape
    patches = tokens.reshape(b, height // 2, width // 2, values // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, values // 4, height, width)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Return (0, row, column) of each patch, [height width, 3], in the type and place of `like`."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(like)
