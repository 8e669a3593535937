"""Images to the size that a feature network takes, in the ways of published packages.

Each way is named for the function that it equals, and none rounds its result. `protocols.py` says
which package resizes how.
"""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.features.filters import filter_weights

ResizeWay = Literal["tf1_bilinear", "torch_bilinear", "torch_antialias", "pil_bicubic"]
Sides = tuple[int, int]  # (height, width)

BAND = 32  # output pixels along a side that are computed together


def resize(images: Tensor, how: ResizeWay, size: Sides = (299, 299)) -> Tensor:
    """Resize images.

    pil_bicubic overshoots at edges by up to about 50 grey levels. Whether that is cut off is the
    protocol's choice and is not made here.

    Args:
        images: [N, C, H, W] uint8.
        how: The way.
        size: (height, width) of the result.

    Returns:
        [N, C, *size] float32 in grey levels 0..255, on the device of the images.

    Raises:
        InputError: If the images are of another type or shape, or if the way is unknown.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(
            f"resize takes uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}."
        )
    if how not in WAYS:
        raise InputError(f"unknown resize {how!r}; known: {', '.join(get_args(ResizeWay))}.")
    return WAYS[how](images, size)


def tf1_bilinear(images: Tensor, size: Sides) -> Tensor:
    """Resize as TensorFlow 1's ResizeBilinear without align_corners.

    Output pixel i lies at input position i H / 299, not at a pixel's centre.
    """
    top, bottom, down = adjacent_pixels(images.shape[2], size[0], images.device)
    left, right, across = adjacent_pixels(images.shape[3], size[1], images.device)
    # Only rows that are read are widened: of 1024 rows no more than 598.
    used, places = torch.unique(torch.cat([top, bottom]), return_inverse=True)
    images = images.index_select(2, used)
    wide = images.index_select(3, left).float()
    wide += (images.index_select(3, right).float() - wide) * across
    above, below = (wide.index_select(2, rows) for rows in torch.split(places, size[0]))
    return above + (below - above) * down[:, None]


def adjacent_pixels(
    num_in: int, num_out: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the input pixels before and after each output position.

    Args:
        num_in: Pixels of the input along a side.
        num_out: Pixels of the output.
        device: Where the numbers are wanted.

    Returns:
        Two indices [num_out] long, and the way [num_out] in [0, 1].
    """
    # The position is a float32 product, as in TensorFlow: float64 would put some positions on the
    # other side of a pixel.
    scale = torch.tensor(num_in / num_out, dtype=torch.float32, device=device)
    position = torch.arange(num_out, dtype=torch.float32, device=device) * scale
    before = position.long().clamp(max=num_in - 1)
    return before, (before + 1).clamp(max=num_in - 1), position - before


def torch_bilinear(images: Tensor, size: Sides) -> Tensor:
    """Resize as torch's bilinear `interpolate` without antialias."""
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)


def torch_antialias(images: Tensor, size: Sides) -> Tensor:
    """Resize as torch's bilinear `interpolate` with antialias."""
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)


def pil_bicubic(images: Tensor, size: Sides) -> Tensor:
    """Resize as Pillow's BICUBIC of each channel as a float image ("F"), to 1e-4 grey levels.

    It is the same filter (a = -1/2, widened when shrinking) with weights that are computed in
    float64, as Pillow's are, and applied in float32. It is 6.1e-5 grey levels off at most where it
    was measured: noise and black and white, sides of 1 to 1024 pixels to 299. Weights that are
    computed in float32 are 7e-3 off for 512 pixels to 299.
    """
    x = images.flatten(0, 1).float().sub_(128)  # about 0, where float32 is finest
    rows = [band.to(x) @ x[:, used] for used, band in bicubic_bands(images.shape[2], size[0])]
    lines = torch.cat(rows, dim=1).flatten(0, 1)
    columns = [
        lines[:, used] @ band.to(x).T for used, band in bicubic_bands(images.shape[3], size[1])
    ]
    return torch.cat(columns, dim=1).add_(128).reshape(*images.shape[:2], *size)


@functools.lru_cache(maxsize=64)
def bicubic_bands(num_in: int, num_out: int) -> list[tuple[slice, Tensor]]:
    """Cut the bicubic weights into bands of output pixels, since most weights are 0.

    Args:
        num_in: Pixels of the input along a side.
        num_out: Pixels of the output.

    Returns:
        By band the input pixels that it reads, and their weights [up to 32, pixels] float32.
    """
    bands = []
    for weights in torch.split(filter_weights(num_in, num_out, "bicubic"), BAND):
        read = (weights != 0).any(dim=0).nonzero().flatten()
        used = slice(int(read[0]), int(read[-1]) + 1)
        bands.append((used, weights[:, used].float()))
    return bands


WAYS: dict[str, Callable[[Tensor, Sides], Tensor]] = {
    "tf1_bilinear": tf1_bilinear,
    "torch_bilinear": torch_bilinear,
    "torch_antialias": torch_antialias,
    "pil_bicubic": pil_bicubic,
}
