"""A family of pipelines as a person adds it, in one file: PixArt-Sigma."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from difftrain.models.lora.files import load_lora
from difftrain.models.lora.formats import TransformerLora
from difftrain.models.model import DenoiserNetwork
from difftrain.models.pipelines.pretrained import KeyPrefixes
from difftrain.models.pipelines.text_encoders import Encoders, Ids, Tower
from difftrain.models.pipelines.text_to_image import VAE_KEYS, TextToImageDenoiser, TextToImageModel
from difftrain.models.slots import MODELS
from difftrain.objective.types import Cond
from helpers.tiny_pipelines import NOISE, t5_encoder, t5_tokenizer, vae


@MODELS.register("pixart_sigma")
class PixArtSigma(TextToImageModel):
    """PixArt-Sigma: a transformer that attends to the words of a T5, without the padding.

    Reference:
        Chen et al. 2024, "PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K
        Text-to-Image Generation", arXiv:2403.04692.
    """

    name = "pixart_sigma"
    pipeline_class = "PixArtSigmaPipeline"
    network_class = "PixArtTransformer2DModel"
    network_folder = "transformer"
    blocks = ("BasicTransformerBlock",)
    towers = (Tower("text_encoder", "tokenizer", "T5EncoderModel", max_tokens=300),)
    key_prefixes: ClassVar[KeyPrefixes] = {"transformer": ("blocks.",), "vae": VAE_KEYS}
    lora_format = TransformerLora()
    patch = 2

    def states(self, encoders: Encoders, ids: Ids) -> Cond:
        """Return the T5's states, and which of them are words."""
        tokens = ids["text_encoder"]
        is_word = (tokens != encoders["text_encoder"].config.pad_token_id).long()
        words = encoders["text_encoder"](tokens, attention_mask=is_word)[0]
        return {"encoder_hidden_states": words, "encoder_attention_mask": is_word}

    def call(self, model: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Return the predicted noise; the channels of the variance are left out."""
        sizes = {"resolution": None, "aspect_ratio": None}
        output = model(x_t, timestep=time, added_cond_kwargs=sizes, **cond).sample
        return output[:, : x_t.shape[1]]

    def with_lora(self, denoiser: DenoiserNetwork, lora: Path) -> TextToImageDenoiser:
        """Load the LoRA with this library: the pipeline has no load_lora_weights in diffusers."""
        fresh = self.denoiser()
        load_lora(fresh, lora)
        return fresh.to(denoiser.device).eval()


def save_pixart(folder: Path) -> Path:
    """Save a tiny PixArt-Sigma pipeline with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixart().save_pretrained(folder)
    return folder


def pixart() -> Any:
    from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        norm_num_groups=1,
    )
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(77),
        text_encoder=t5_encoder(32),
        vae=vae(2),
        transformer=transformer,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False),
    )
