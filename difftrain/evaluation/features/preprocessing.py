"""Images to the input of a transformer, computed in torch from the numbers in the processor's file.

The processors of transformers change with what is installed beside them (torchvision or not), and
a protocol must say what was done.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.features.filters import filter_weights

Fit = Literal["processor", "square", "square_plain"]
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which the processors' files use
FIXED_POINT = 22  # bits after the point of Pillow's weights for 8-bit images


class Preprocessing(NamedTuple):
    """How uint8 images become a network's input.

    Args:
        short: The shorter side after the resize; None if the size is given as it is.
        size: (height, width) of the input, after the crop.
        mode: The filter of the resize.
        scale: Factor of the grey levels.
        mean: By channel, subtracted.
        std: By channel, divided by.
        fit: "processor" resizes the shorter side and crops, "square" resizes as a whole,
            "square_plain" does so without antialias.
    """

    short: int | None
    size: tuple[int, int]
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit

    def __call__(self, images: Tensor) -> Tensor:
        """Return the input [N, 3, *size] float32 of images [N, 1 or 3, H, W] uint8."""
        images = images.expand(-1, 3, -1, -1)
        if self.fit == "square_plain":
            x = F.interpolate(images.float(), self.size, mode=self.mode, align_corners=False)
        else:
            height, width = images.shape[2:]
            resized = pillow_resize(images, self.resized_size(height, width), self.mode)
            x = center_crop(resized, self.size)
        mean = torch.tensor(self.mean, device=x.device)[:, None, None]
        std = torch.tensor(self.std, device=x.device)[:, None, None]
        return (x * self.scale - mean) / std

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after the resize of an image of a size."""
        if self.short is None or self.fit == "square":
            return self.size
        long = int(self.short * max(height, width) / min(height, width))
        return (self.short, long) if height <= width else (long, self.short)

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers, JSON-able."""
        described = {}
        for key, value in self._asdict().items():
            described[key] = list(value) if isinstance(value, tuple) else value
        rounded = "no" if self.fit == "square_plain" else "after each pass of the resize, as Pillow"
        return {**described, "rounded": rounded, "grey": "repeated"}


def pillow_resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize uint8 images as Pillow does, to the last bit: two passes in fixed point, each rounded.

    Across first, whatever the shape: Pillow 13 goes down first for some images taller than wide,
    earlier versions do not.

    Args:
        images: [N, C, H, W] uint8.
        size: (height, width) of the result.
        mode: "bilinear" or "bicubic".

    Returns:
        [N, C, *size] float32, whole numbers 0..255.
    """
    height, width = images.shape[2:]
    x = images.double()  # holds the products and sums of the integers exactly
    if width != size[1]:
        across = pillow_weights(width, size[1], mode).to(images.device)
        x = from_fixed_point(x @ across.T)
    if height != size[0]:
        down = pillow_weights(height, size[0], mode).to(images.device)
        x = from_fixed_point(down @ x)
    return x.float()


def from_fixed_point(x: Tensor) -> Tensor:
    """Round sums of weights times grey levels to grey levels 0..255."""
    scale = float(2**FIXED_POINT)
    return ((x + scale / 2) / scale).floor().clamp(0, 255)


def pillow_weights(num_in: int, num_out: int, mode: str) -> Tensor:
    """Return a filter's weights times 2^22, [num_out, num_in] float64 integers.

    Args:
        num_in: Pixels of the input along a side.
        num_out: Pixels of the output.
        mode: "bilinear" or "bicubic".
    """
    scaled = filter_weights(num_in, num_out, mode) * float(2**FIXED_POINT)
    return (scaled.abs() + 0.5).floor() * scaled.sign()


def center_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle (height, width) of images [N, C, H, W]."""
    top = (x.shape[2] - size[0]) // 2
    left = (x.shape[3] - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]]


def preprocessing_of(config: Mapping[str, Any], fit: Fit, where: str) -> Preprocessing:
    """Read a processor's file.

    Args:
        config: What the file holds.
        fit: How images are fitted to the input's size.
        where: What a message calls the file's owner.

    Raises:
        InputError: If it leaves something open, or asks for steps that are not known here.
    """
    # What the file says
    config = config.get("image_processor", config)
    check_processor(config, where)
    short, size = sides(config["size"], where)
    resized = size
    does_crop = config.get("do_center_crop", False)
    if does_crop:
        _, size = sides(config.get("crop_size", config["size"]), where)
    # Whether the crop lies within the resized image
    if short is None and does_crop and size != resized:
        raise InputError(
            f"{where}: a processor that resizes to {config['size']} and crops to "
            f"{config['crop_size']} is not supported."
        )
    if short is not None and (short < max(size) or not does_crop):
        raise InputError(
            f"{where}: a processor that resizes the shorter side to {short} and does not crop "
            "within it is not supported."
        )
    return Preprocessing(
        short,
        size,
        FILTERS[config["resample"]],
        config.get("rescale_factor", 1 / 255),
        tuple(config["image_mean"]),
        tuple(config["image_std"]),
        fit,
    )


def check_processor(config: Mapping[str, Any], where: str) -> None:
    """Check that a processor's file holds the numbers and the steps that are known here.

    Args:
        config: What the file holds.
        where: What a message calls the file's owner.

    Raises:
        InputError: If it does not.
    """
    needed = ("size", "image_mean", "image_std", "resample")
    missing = [key for key in needed if key not in config]
    if missing:
        raise InputError(
            f"{where}: the processor's file lacks {', '.join(missing)}. Use the file of the "
            "published model."
        )
    unusual = ""
    if config["resample"] not in FILTERS:
        unusual = f"resample: {config['resample']} (known: 2 bilinear, 3 bicubic)"
    for key in ("do_normalize", "do_rescale", "do_resize"):
        if not config.get(key, True):
            unusual = f"{key}: false"
    if unusual:
        raise InputError(f"{where}: a processor with {unusual} is not supported.")


def sides(size: Any, where: str) -> tuple[int | None, tuple[int, int]]:
    """Read a size of a processor's file; older files have one number, for the shorter side.

    Args:
        size: The size.
        where: What a message calls the file's owner.

    Returns:
        The shorter side, or None if both are stated, and (height, width).

    Raises:
        InputError: If it is stated in any other way.
    """
    if isinstance(size, int):
        return size, (size, size)
    if set(size) == {"shortest_edge"}:
        short = size["shortest_edge"]
        return short, (short, short)
    if set(size) == {"height", "width"}:
        return None, (size["height"], size["width"])
    raise InputError(f"{where}: a processor's size of {size} is not supported.")
