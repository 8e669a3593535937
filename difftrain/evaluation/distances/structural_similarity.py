"""Structural similarity (SSIM) of pairs of images."""

import torch
from torch import Tensor

WINDOW = 11  # pixels of the window, and so the smallest image that SSIM is defined for


def structural_similarity(images: Tensor, others: Tensor) -> Tensor:
    """Compute the SSIM of each image and another one.

    Args:
        images: [B, C, H, W] in [0, 1].
        others: [B, C, H, W] in [0, 1].

    Returns:
        [B] float64; NaN of clips and of images smaller than the window.

    Reference:
        Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
        Similarity".
    """
    if images.ndim != 4 or min(images.shape[-2:]) < WINDOW:
        return torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)
    from torchmetrics.functional.image import structural_similarity_index_measure

    found: Tensor = structural_similarity_index_measure(
        images.double(), others.double(), data_range=1.0, kernel_size=WINDOW, reduction="none"
    )
    return found.reshape(-1)
