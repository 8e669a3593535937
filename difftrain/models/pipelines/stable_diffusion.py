"""Stable Diffusion 1.x and 2.x."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from difftrain.models.lora.formats import UNetLora
from difftrain.models.lora.kohya import Layers, kohya_state, version_metadata
from difftrain.models.pipelines.pretrained import KeyPrefixes
from difftrain.models.pipelines.text_encoders import Encoders, Ids, Tower
from difftrain.models.pipelines.text_to_image import VAE_KEYS, TextToImageModel
from difftrain.models.slots import MODELS
from difftrain.objective.types import Cond

# By the width of the words: kohya's name of the version, and that of the model specification.
VERSIONS = {
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2"),
}


class StableDiffusionLora(UNetLora):
    """LoRA files of Stable Diffusion 1.x and 2.x; kohya's keys keep diffusers' layer names."""

    def kohya_state(self, model: nn.Module, layers: Mapping[str, Layers]) -> dict[str, Tensor]:
        """Return a LoRA under the names of kohya's scripts and ComfyUI."""
        prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}
        return kohya_state({prefixes[folder]: inner for folder, inner in layers.items()})

    def kohya_metadata(self, model: Any) -> dict[str, str]:
        """Return the version, where the width of the words tells it."""
        known = VERSIONS.get(model.config.get("cross_attention_dim"))
        return {} if known is None else version_metadata(*known)


@MODELS.register("stable_diffusion")
@dataclass(eq=False)
class StableDiffusion(TextToImageModel):
    """Stable Diffusion 1.x and 2.x: a UNet2DConditionModel that attends to a CLIP's last states.

    The arguments are those of `TextToImageModel`.

    Reference:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv:2112.10752.
    """

    name = "stable_diffusion"
    pipeline_class = "StableDiffusionPipeline"
    network_class = "UNet2DConditionModel"
    network_folder = "unet"
    blocks = ("ResnetBlock2D", "BasicTransformerBlock")
    towers = (Tower("text_encoder", "tokenizer", "CLIPTextModel"),)
    key_prefixes: ClassVar[KeyPrefixes] = {
        "unet": ("model.diffusion_model.", "down_blocks."),
        "vae": VAE_KEYS,
        "text_encoder": ("cond_stage_model.",),
    }
    lora_format = StableDiffusionLora()

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Return the last states of the text encoder."""
        return {"encoder_hidden_states": encoders["text_encoder"](ids["text_encoder"])[0]}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the network's prediction [B, C, H, W]."""
        output: Tensor = model(x_t, time, cond["encoder_hidden_states"]).sample
        return output
