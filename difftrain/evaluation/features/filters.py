"""Pillow's filters as matrices of weights, one row for each output pixel."""

import torch
from torch import Tensor


def filter_weights(num_in: int, num_out: int, mode: str) -> Tensor:
    """Return the weights of a resize along one side, [num_out, num_in] float64; rows sum to 1.

    The filter is as wide as the pixels of the smaller side.

    Args:
        num_in: Pixels of the input along the side.
        num_out: Pixels of the output.
        mode: "bilinear" or "bicubic".
    """
    support, kernel = (1, triangle) if mode == "bilinear" else (2, keys_cubic)
    width = max(num_in / num_out, 1.0)
    centre = (torch.arange(num_out, dtype=torch.float64)[:, None] + 0.5) * (num_in / num_out)
    pixels = torch.arange(num_in, dtype=torch.float64)
    first = (centre - support * width + 0.5).floor()
    behind = (centre + support * width + 0.5).floor()
    is_inside = (pixels >= first) & (pixels < behind)
    weights = torch.where(is_inside, kernel((pixels - centre + 0.5) / width), 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def triangle(x: Tensor) -> Tensor:
    """Return the bilinear filter at distances x."""
    return (1 - x.abs()).clamp(min=0)


def keys_cubic(x: Tensor) -> Tensor:
    """Return Keys' bicubic filter with a = -1/2 at distances x."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
