"""Images to the size that a feature network takes, in the ways of the packages whose scores are published.

Each way is named for the function that it equals, and none rounds its result. Which package resizes how: presets.py.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.registry import InputError

Resize = Literal["tf1_bilinear", "torch_bilinear", "torch_antialias", "pil_bicubic"]
Size = tuple[int, int]


def resize(images: Tensor, how: Resize, size: Size = (299, 299)) -> Tensor:
    """uint8 [N, C, H, W] -> float32 [N, C, *size] in grey levels 0 .. 255, on the device of the images.

    pil_bicubic overshoots at edges by up to about 50 grey levels: whether that is cut off is the protocol's choice, not made here.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(f"resize takes uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}.")
    if how not in WAYS:
        raise InputError(f"unknown resize {how!r}; known: {', '.join(get_args(Resize))}.")
    return WAYS[how](images, size)


def tf1_bilinear(images: Tensor, size: Size) -> Tensor:
    """TensorFlow 1's ResizeBilinear without align_corners: output pixel i lies at input position i H / 299, not at a pixel's centre."""
    top, bottom, down = neighbours(images.shape[2], size[0], images.device)
    left, right, across = neighbours(images.shape[3], size[1], images.device)
    used, places = torch.cat([top, bottom]).unique(return_inverse=True)  # of 1024 rows no more than 598
    images = images.index_select(2, used)
    wide = images.index_select(3, left).float()
    wide += (images.index_select(3, right).float() - wide) * across
    above, below = (wide.index_select(2, rows) for rows in places.split(size[0]))
    return above + (below - above) * down[:, None]


def neighbours(num_in: int, num_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each output position: the input before it, the one after it, and the way between them."""
    # The position is a float32 product, as in TensorFlow: float64 would put some of them on the other side of a pixel.
    scale = torch.tensor(num_in / num_out, dtype=torch.float32, device=device)
    position = torch.arange(num_out, dtype=torch.float32, device=device) * scale
    before = position.long().clamp(max=num_in - 1)
    return before, (before + 1).clamp(max=num_in - 1), position - before


def torch_bilinear(images: Tensor, size: Size) -> Tensor:
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False)


def torch_antialias(images: Tensor, size: Size) -> Tensor:
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)


def pil_bicubic(images: Tensor, size: Size) -> Tensor:
    """Pillow's BICUBIC of each channel as a float image ("F"), to 3e-5 grey levels."""
    # The same filter (a = -1/2, widened when shrinking). PIL has its weights in float64; with float32 weights 512 -> 299 is 7e-3 off.
    return F.interpolate(images.double(), size, mode="bicubic", align_corners=False, antialias=True).float()


WAYS: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "tf1_bilinear": tf1_bilinear,
    "torch_bilinear": torch_bilinear,
    "torch_antialias": torch_antialias,
    "pil_bicubic": pil_bicubic,
}
