"""Configs of networks of some thousand parameters, and a small autoencoder."""

from pathlib import Path
from typing import Any

import torch

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "num_class_embeds": 11,
}
UNLABELLED = {key: value for key, value in UNET.items() if key != "num_class_embeds"}
CONDITION: dict[str, Any] = {
    **UNLABELLED,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
UNET3D: dict[str, Any] = {
    "sample_size": 12,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock3D"] * 2,
    "up_block_types": ["UpBlock3D"] * 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 4,
}
TINY_DIT: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 4,
}
TINY_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
}  # two pixels for each latent


def vae(folder: Path) -> Path:
    """Save a small autoencoder with random weights, as diffusers saves it."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**TINY_VAE).save_pretrained(folder)
    return folder
