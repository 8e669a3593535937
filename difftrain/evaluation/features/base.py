"""What extractors share: the check of the images that they are given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from difftrain.core.errors import InputError


def check_images(images: Tensor, name: str, shape: Sequence[int] | None = None) -> None:
    """Check the images that an extractor is given.

    Args:
        images: What should be uint8 [N, C, H, W].
        name: The extractor's name.
        shape: The (C, H, W) that is expected; None accepts any size with 1 or 3 channels.

    Raises:
        InputError: If they are anything else.
    """
    if shape is None:
        fits = images.ndim == 4 and images.shape[1] in (1, 3)
        expected = "1 or 3, H, W"
    else:
        fits = tuple(images.shape[1:]) == tuple(shape)
        expected = ", ".join(map(str, shape))
    if images.dtype != torch.uint8 or not fits:
        raise InputError(
            f"features {name!r} take uint8 images [N, {expected}], got {images.dtype} "
            f"{list(images.shape)}."
        )
