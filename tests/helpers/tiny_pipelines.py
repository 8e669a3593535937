"""Tiny text-to-image pipelines of every family, with random weights, as diffusers saves them.

Widths that the real models keep apart (two text encoders, their projections) differ here too, so
that a mix-up cannot fit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LATENT_SIDE = 8  # of what a pipeline generates; an image's side is that times the VAE's factor
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!?-'()"


def tiny_pipeline(family: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Save a pipeline.

    Args:
        family: stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux or dit.
        folder: Where to save it.
        seed: Of the weights.
        options: Arguments of the family's function. vae_levels (2): pixels of a latent are
            2^(levels - 1). max_length (77): tokens of a prompt. Of stable_diffusion
            prediction_type ("epsilon", or "v_prediction": in the manner of SD 2). Of
            stable_diffusion_3 t5 (True); without it the pipeline loads with text_encoder_3=None,
            tokenizer_3=None. Of flux guidance (True). Of dit num_classes (1000, as DiTPipeline
            takes 1000 for "no class").
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        FAMILIES[family](**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return (family, **options) -> folder; each is built once in a session, to be read alone."""
    built: dict[str, Path] = {}

    def folder_of(family: str, **options: Any) -> Path:
        key = "-".join([family, *(f"{name}_{value}" for name, value in sorted(options.items()))])
        if key not in built:
            built[key] = tiny_pipeline(
                family, tmp_path_factory.mktemp("pipelines") / key, **options
            )
        return built[key]

    return folder_of


# Families


def stable_diffusion(
    prediction_type: str = "epsilon", vae_levels: int = 2, max_length: int = 77
) -> Any:
    from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

    noise = dict(NOISE, prediction_type=prediction_type, set_alpha_to_one=False)
    if prediction_type == "epsilon":
        text, of_family, scheduler = (
            clip(max_length),
            {"attention_head_dim": 2},
            PNDMScheduler(**noise, skip_prk_steps=True),
        )
    else:
        text, scheduler = (
            clip(max_length, hidden_act="gelu"),
            DDIMScheduler(**noise, clip_sample=False),
        )
        of_family = {"attention_head_dim": [2, 4], "use_linear_projection": True}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return StableDiffusionPipeline(
        vae=vae(vae_levels),
        text_encoder=text,
        tokenizer=clip_tokenizer(max_length),
        scheduler=scheduler,
        unet=unet(down_block_types=down, up_block_types=up, cross_attention_dim=16, **of_family),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(vae_levels: int = 2, max_length: int = 77) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    network = unet(
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=16 + 24,
        attention_head_dim=[1, 2],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # Six numbers of the image's geometry, and the pooled text.
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    return StableDiffusionXLPipeline(
        vae=vae(vae_levels, scaling_factor=0.13025, force_upcast=True),
        unet=network,
        text_encoder=clip(max_length),
        tokenizer=clip_tokenizer(max_length),
        text_encoder_2=clip(max_length, 24, projection=12, hidden_act="gelu"),
        tokenizer_2=clip_tokenizer(max_length, pad_token="!"),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_3(vae_levels: int = 2, max_length: int = 77, t5: bool = True) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=16,
    )  # text states are those of the CLIP models side by side (16 + 24), padded to T5's 48
    return StableDiffusion3Pipeline(
        vae=flow_vae(vae_levels, scaling_factor=1.5305, shift_factor=0.0609),
        transformer=transformer,
        text_encoder=clip(max_length, projection=16),
        tokenizer=clip_tokenizer(max_length),
        text_encoder_2=clip(max_length, 24, projection=24, hidden_act="gelu"),
        tokenizer_2=clip_tokenizer(max_length, pad_token="!"),
        text_encoder_3=t5_encoder(48) if t5 else None,
        tokenizer_3=t5_tokenizer(max_length) if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )


def flux(vae_levels: int = 2, max_length: int = 77, guidance: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * 16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if guidance else 1.0,
        use_dynamic_shifting=guidance,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.5,
        max_shift=1.15,
    )
    return FluxPipeline(
        vae=flow_vae(vae_levels, scaling_factor=0.3611, shift_factor=0.1159),
        transformer=transformer,
        scheduler=scheduler,
        text_encoder=clip(max_length),
        tokenizer=clip_tokenizer(max_length),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(max_length),
    )


def dit(vae_levels: int = 2, num_classes: int = 1000) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=num_classes,
        norm_num_groups=4,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    names = {0: "airplane", 1: "automobile", 2: "bird", 3: "cat"}
    return DiTPipeline(
        transformer=transformer,
        vae=vae(vae_levels),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label=names,
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "dit": dit,
}
NOISE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


# Components


def unet(**of_family: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **of_family,
    )


def vae(levels: int, **of_family: Any) -> Any:
    from diffusers import AutoencoderKL

    defaults = {"latent_channels": 4, "scaling_factor": 0.18215}
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=LATENT_SIDE * 2 ** (levels - 1),
        **{**defaults, **of_family},
    )


def flow_vae(levels: int, **of_family: Any) -> Any:
    return vae(
        levels, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **of_family
    )


def clip(
    max_length: int, width: int = 16, projection: int | None = None, hidden_act: str = "quick_gelu"
) -> Any:
    """A CLIP text model, with the projection of its pooled state if that has a width."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocabulary = clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        hidden_act=hidden_act,
        projection_dim=projection or width,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return (
        CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    ).eval()


def clip_vocabulary() -> dict[str, int]:
    """Return every byte, every byte that ends a word, and the two marks; `!` is 0, as in CLIP."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {token: number for number, token in enumerate(tokens)}


def clip_tokenizer(max_length: int, pad_token: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer that spells words letter by letter."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=clip_vocabulary(), merges=[], pad_token=pad_token, model_max_length=max_length
    )


def t5_encoder(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_vocabulary()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def t5_vocabulary() -> list[tuple[str, float]]:
    """Return pieces with log probabilities: three marks, the start of a word, single characters."""
    return [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -2.0) for piece in ["▁", *CHARACTERS]),
    ]


def t5_tokenizer(max_length: int) -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0, model_max_length=max_length)
