"""Builds a feature extractor for images that no run has made."""

from pathlib import Path
from typing import Any

import torch

from difftrain.data.transform import Transform
from difftrain.evaluation.slots import FEATURES, FeatureExtractor


def features_of_images(
    block: str | dict[str, Any], key: str, shape: tuple[int, ...], device: torch.device, cache: Path
) -> FeatureExtractor:
    """Build the feature extractor of a block for images of a shape.

    Args:
        block: A name, or a block such as {"type": "inception", "protocol": "clean"}.
        key: What messages call the block.
        shape: (C, H, W) of the images; (3, 0, 0) where they are not known yet.
        device: Where it computes.
        cache: Where the classifiers that it trains are kept.

    Raises:
        InputError: If the block cannot be built.
    """
    channels, height, width = shape
    side = max(1, min(height, width))
    transform = Transform(side, channels=1 if channels == 1 else 3, resize="none")
    part = FEATURES.parse(block, key)
    extractor: FeatureExtractor = part.build(
        shape=shape, transform=transform, device=device, cache=cache
    )
    return extractor
