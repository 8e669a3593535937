"""Stable Diffusion XL."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftrain.models.lora.formats import UNetLora
from difftrain.models.lora.kohya import Layers, kohya_state, version_metadata
from difftrain.models.pipelines.pretrained import KeyPrefixes
from difftrain.models.pipelines.text_encoders import Encoders, Ids, Tower
from difftrain.models.pipelines.text_to_image import VAE_KEYS, TextToImageModel
from difftrain.models.slots import MODELS
from difftrain.objective.types import Cond

# diffusers' names of layers, and those of SDXL's first release.
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
SIDE = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


class StableDiffusionXLLora(UNetLora):
    """LoRA files of Stable Diffusion XL; kohya's keys have the names of its first release."""

    def kohya_state(self, model: nn.Module, layers: Mapping[str, Layers]) -> dict[str, Tensor]:
        """Return a LoRA under the names of kohya's scripts and ComfyUI."""
        prefixes = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
        named: dict[str, Layers] = {}
        for folder, inner in layers.items():
            if folder == "unet":
                named["lora_unet"] = {released_name(model, key): inner[key] for key in inner}
            else:
                named[prefixes[folder]] = inner
        return kohya_state(named)

    def kohya_metadata(self, model: nn.Module) -> dict[str, str]:
        """Return the version."""
        return version_metadata("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")


def released_name(model: Any, name: str) -> str:
    """Return the name that a layer of diffusers' UNet had in SDXL's first release.

    down_blocks.1.attentions.0.x is input_blocks.4.1.x.

    Args:
        model: The UNet.
        name: A layer's name in it.
    """
    if name in OUTER:
        return OUTER[name]
    match = MIDDLE.fullmatch(name)
    if match is not None:
        kind, number, inner = match.groups()
        place = 2 * int(number) + (kind == "attentions")
        return f"middle_block.{place}.{RESNET.get(inner, inner)}"
    match = SIDE.fullmatch(name)
    assert match is not None, name
    side, level, kind, number, inner = match.groups()

    # The first release numbers the blocks of all levels in one row; each level has one more place
    # than layers per block, for the resampling layer or the one more layer on the way up.
    last = model.config["layers_per_block"]
    first = int(level) * (last + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + last + 1}.0.op"
    if kind == "upsamplers":
        attends = hasattr(model.get_submodule(f"up_blocks.{level}"), "attentions")
        return f"output_blocks.{first + last}.{2 if attends else 1}.{inner}"
    block = f"output_blocks.{first + int(number)}"
    if side == "down":
        block = f"input_blocks.{first + int(number) + 1}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{RESNET.get(inner, inner)}"


@MODELS.register("stable_diffusion_xl")
@dataclass(eq=False)
class StableDiffusionXL(TextToImageModel):
    """Stable Diffusion XL: a UNet2DConditionModel under two CLIPs, conditioned on image sizes.

    It attends to the last but one states of both text encoders. It also takes the projection of the
    second one, and each image's size and crop. The arguments are those of `TextToImageModel`.

    Reference:
        Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image
        Synthesis", arXiv:2307.01952.
    """

    name = "stable_diffusion_xl"
    pipeline_class = "StableDiffusionXLPipeline"
    network_class = "UNet2DConditionModel"
    network_folder = "unet"
    blocks = ("ResnetBlock2D", "BasicTransformerBlock")
    towers = (
        Tower("text_encoder", "tokenizer", "CLIPTextModel", reads_last=False),
        Tower("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection"),
    )
    key_prefixes: ClassVar[KeyPrefixes] = {
        "unet": ("model.diffusion_model.", "down_blocks."),
        "vae": VAE_KEYS,
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    }
    lora_format = StableDiffusionXLLora()
    size_conditioning = True

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Return the last but one states of both encoders, and the projection of the second."""
        first, second = (
            encoders[tower.encoder](ids[tower.encoder], output_hidden_states=True)
            for tower in self.towers
        )
        words = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": words, "text_embeds": second.text_embeds}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the network's prediction [B, C, H, W]."""
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["sizes"]}
        words = cond["encoder_hidden_states"]
        output: Tensor = model(x_t, time, words, added_cond_kwargs=added).sample
        return output
