"""Stable Diffusion 3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from difftrain.core.registry import PositiveInt
from difftrain.models.lora.formats import TransformerLora
from difftrain.models.lora.kohya import Layers, unscaled_state
from difftrain.models.pipelines.pretrained import KeyPrefixes
from difftrain.models.pipelines.text_encoders import Encoders, Ids, Tower
from difftrain.models.pipelines.text_to_image import VAE_KEYS, TextToImageModel
from difftrain.models.slots import MODELS
from difftrain.objective.types import Cond


class StableDiffusion3Lora(TransformerLora):
    """LoRA files of Stable Diffusion 3; ComfyUI reads diffusers' names, which carry no alpha."""

    def kohya_state(self, model: nn.Module, layers: Mapping[str, Layers]) -> dict[str, Tensor]:
        """Return a LoRA under the names of ComfyUI."""
        return unscaled_state(layers)


@MODELS.register("stable_diffusion_3")
@dataclass(eq=False)
class StableDiffusion3(TextToImageModel):
    """Stable Diffusion 3: a flow-matching transformer under two CLIPs and an optional T5.

    Args:
        max_tokens: Tokens of a prompt that the T5 reads. Other arguments are those of
            `TextToImageModel`.

    Reference:
        Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis", arXiv:2403.03206.
    """

    max_tokens: PositiveInt = 256

    name = "stable_diffusion_3"
    pipeline_class = "StableDiffusion3Pipeline"
    network_class = "SD3Transformer2DModel"
    network_folder = "transformer"
    blocks = ("JointTransformerBlock",)
    key_prefixes: ClassVar[KeyPrefixes] = {
        "transformer": ("model.diffusion_model.", "joint_blocks.", "transformer_blocks."),
        "vae": VAE_KEYS,
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    }
    lora_format = StableDiffusion3Lora()

    @property
    def has_t5(self) -> bool:
        """Whether the pipeline has a T5."""
        return self.pipeline.has("text_encoder_3")

    @property
    def towers(self) -> Sequence[Tower]:
        """Two CLIPs and, where the pipeline has it, a T5."""
        clips = [
            Tower("text_encoder", "tokenizer", "CLIPTextModelWithProjection"),
            Tower("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
        ]
        t5 = Tower("text_encoder_3", "tokenizer_3", "T5EncoderModel", self.max_tokens)
        return [*clips, t5] if self.has_t5 else clips

    @property
    def patch(self) -> int:
        """Number of latents of which the sides of x_t must be multiples."""
        return int(self.network_config.get("patch_size") or 1)

    @property
    def most_latents(self) -> int | None:
        """The longest side of x_t that the table of positions holds."""
        positions = self.network_config.get("pos_embed_max_size")
        return None if positions is None else int(positions * self.patch)

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Return the words of all encoders one after another, and the CLIPs' projections.

        The last but one states of the CLIPs stand side by side, padded to the width of the T5's.
        Without a T5 its words are zeros.
        """
        clips = [
            encoders[name](ids[name], output_hidden_states=True)
            for name in ("text_encoder", "text_encoder_2")
        ]
        width = self.network_config["joint_attention_dim"]
        words = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        words = nn.functional.pad(words, (0, width - words.shape[-1]))
        if self.has_t5:
            t5 = encoders["text_encoder_3"](ids["text_encoder_3"])[0].to(words)
        else:
            t5 = words.new_zeros(len(words), self.max_tokens, width)
        return {
            "encoder_hidden_states": torch.cat([words, t5], dim=1),
            "pooled_projections": torch.cat([clip.text_embeds for clip in clips], dim=-1),
        }

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the network's prediction [B, C, H, W]."""
        output: Tensor = model(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            pooled_projections=cond["pooled_projections"],
        ).sample
        return output
