"""Configs of known networks by name, for `preset:`, as arguments of the diffusers class."""

from typing import Any

Config = dict[str, Any]


def dit_config(layers: int, width: int, heads: int) -> Config:
    """Return the config of a DiT on 32x32 latents of 256x256 images with a learned variance.

    diffusers keeps a copy of the label and time embedding in every block, so it counts more
    parameters (XL/2: 750 M) than the paper (675 M).

    Args:
        layers: Number of transformer blocks.
        width: Channels of a token.
        heads: Attention heads.

    Reference:
        Peebles and Xie 2023, arXiv:2212.09748, table 1.
    """
    return dict(
        sample_size=32,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        num_embeds_ada_norm=1000,
    )


PRESETS: dict[str, dict[str, Config]] = {
    "unet2d": {
        # 8x8 grey digits, ten classes and the null label: 0.65 M parameters, attention in the
        # middle block alone.
        "digits": dict(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            attention_head_dim=16,
            num_class_embeds=11,
        ),
        # Ho et al. 2020, CIFAR-10: 35.7 M parameters, attention at 16x16.
        "cifar10": dict(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            dropout=0.1,
        ),
        # Choi et al. 2022, 256x256: 93.6 M parameters, one residual block a level (resampling is
        # one too), attention at 16x16.
        "p2_256": dict(
            sample_size=256,
            in_channels=3,
            out_channels=6,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            layers_per_block=1,
            attention_head_dim=64,
            resnet_time_scale_shift="scale_shift",
            down_block_types=(
                *("ResnetDownsampleBlock2D",) * 4,
                "AttnDownBlock2D",
                "ResnetDownsampleBlock2D",
            ),
            up_block_types=(
                "ResnetUpsampleBlock2D",
                "AttnUpBlock2D",
                *("ResnetUpsampleBlock2D",) * 4,
            ),
            downsample_type="resnet",
            upsample_type="resnet",
        ),
    },
    "unet2d_condition": {
        # The text-conditional UNet of Stable Diffusion 1.x: 860 M parameters.
        "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    },
    "unet3d_condition": {
        # 16x16 grey clips of moving digits: 1.1 M parameters, most at 4x4, where the middle block
        # attends; attention over time at the input.
        "digit_clips": dict(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock3D",) * 3,
            up_block_types=("UpBlock3D",) * 3,
            attention_head_dim=4,
            cross_attention_dim=8,
        ),
        # Wang et al. 2023, arXiv:2308.06571, as text-to-video-ms-1.7b publishes it: 1411 M
        # parameters; 32x32 latents of 256x256 frames.
        "modelscope": dict(sample_size=32, cross_attention_dim=1024, attention_head_dim=64),
    },
    "dit": {
        "s2": dit_config(layers=12, width=384, heads=6),
        "b2": dit_config(layers=12, width=768, heads=12),
        "l2": dit_config(layers=24, width=1024, heads=16),
        "xl2": dit_config(layers=28, width=1152, heads=16),
    },
}
