"""Builds a feature extractor for images that no run has made."""

from pathlib import Path
from typing import Any

import torch

from difftrain.data.transform import Transform
from difftrain.data.unreadable import ReadErrors
from difftrain.evaluation.requirements import check_sizes
from difftrain.evaluation.slots import FEATURES, FeatureExtractor
from difftrain.evaluation.sources.base import Source


def features_of_images(
    block: str | dict[str, Any],
    key: str,
    images: Source | None,
    device: torch.device,
    cache: Path,
    errors: ReadErrors | None = None,
) -> FeatureExtractor:
    """Build the feature extractor of a block for images.

    Args:
        block: A name, or a block such as {"type": "inception", "protocol": "clean"}.
        key: What messages call the block.
        images: The images; None where they are not known yet.
        device: Where it computes.
        cache: Where the classifiers that it trains are kept.
        errors: What becomes of images that it is trained on and that cannot be read; None ends
            the work.

    Raises:
        InputError: If the block cannot be built, or if the images need one size and differ.
    """
    part = FEATURES.parse(block, key)
    if images is not None:  # before a classifier is trained for them
        constructor: Any = FEATURES.constructors[part.name]
        check_sizes(images, constructor, in_pixels=False)
    shape = (3, 0, 0) if images is None else images.shape
    channels, height, width = shape
    side = max(1, min(height, width))
    transform = Transform(side, channels=1 if channels == 1 else 3, resize="none")
    extractor: FeatureExtractor = part.build(
        shape=shape, transform=transform, device=device, cache=cache, errors=errors
    )
    return extractor
