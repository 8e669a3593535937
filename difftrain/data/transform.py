"""One image to uint8 pixels of a fixed size: upright, without transparency, resized, cropped, perhaps mirrored.

Random crops and flips draw from the `Rng` that is passed in, so they belong to a sample and not to the worker that
happened to read it. `to_unit_range` and `to_uint8` are the one conversion between pixels and what a model sees.
"""

import dataclasses
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from difftrain.registry import InputError, PositiveInt, check_arguments
from difftrain.rng import Rng

Resize = Literal["lanczos", "bicubic", "bilinear", "none"]
ORIENTATION = 0x0112  # the EXIF tag; its value 1, or anything unknown, means: as stored
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL.Image.Transpose.ROTATE_180, 4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE, 6: PIL.Image.Transpose.ROTATE_270, 7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True)
class Transform:
    """Shorter side to `resolution` with the aspect kept (Pillow's filters, antialiased), then a square crop of it.

    resize "none" only crops: pixels stay exactly as they are. flip mirrors left and right with probability 1/2.
    """

    resolution: PositiveInt
    channels: Literal[1, 3] = 3
    resize: Resize = "bicubic"
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        check_arguments(Transform, vars(self), "transform", directly=True)

    def __call__(self, image: PIL.Image.Image, rng: Rng | None = None, name: str = "the image") -> Tensor:
        """Pixels [channels, resolution, resolution] uint8. rng: that of one sample, needed for a random crop or a flip.

        An image too small for a crop without resizing, or of a mode without a known range, raises InputError.
        """
        resized = self._resized(with_channels(upright(image), self.channels, name), name)
        left, top = self._corner(resized.size, rng)
        pixels = to_pixels(resized.crop((left, top, left + self.resolution, top + self.resolution)))
        return pixels.flip(-1) if self.flip and draws(rng, "transform.flip", 1)[0] < 0.5 else pixels

    def deterministic(self) -> "Transform":
        """The same with a centre crop and no flip: for references and validation."""
        return dataclasses.replace(self, crop="center", flip=False)

    def _resized(self, image: PIL.Image.Image, name: str) -> PIL.Image.Image:
        shorter = min(image.size)
        if self.resize == "none" and shorter < self.resolution:
            width, height = image.size
            raise InputError(
                f"{name} is {width}x{height}, smaller than resolution {self.resolution}, and resize is none. "
                f"Write resize: bicubic, or a resolution of at most {shorter}."
            )
        if self.resize == "none" or shorter == self.resolution:
            return image
        width, height = (round(side * self.resolution / shorter) for side in image.size)
        return image.resize((width, height), PIL.Image.Resampling[self.resize.upper()])

    def _corner(self, size: tuple[int, int], rng: Rng | None) -> tuple[int, int]:
        spare_x, spare_y = (side - self.resolution for side in size)
        if self.crop == "center":
            return spare_x // 2, spare_y // 2
        u, v = draws(rng, "transform.crop", 2)
        return int(u * (spare_x + 1)), int(v * (spare_y + 1))


def draws(rng: Rng | None, stream: str, count: int) -> list[float]:
    assert rng is not None, f"{stream} needs the Rng of the sample"
    return rng.uniform(stream, (count,))[0].tolist()


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as the camera was held (EXIF orientation); as stored where there is none or it cannot be parsed."""
    image.load()  # a TIFF turns itself here and forgets its orientation
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, struct.error):  # damaged EXIF beside good pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def with_channels(image: PIL.Image.Image, channels: int, name: str) -> PIL.Image.Image:
    """The image in mode L or RGB; transparency becomes white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = eight_bit(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def eight_bit(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """A grey image of 16 bits in mode L: 0..65535 to 0..255 in proportion (Pillow's own conversion clips at 255)."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise InputError(f"{name} has {kind} pixels, whose range is not stated. Convert it to 8 or 16 bits.")
    return PIL.Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def to_pixels(image: PIL.Image.Image) -> Tensor:
    """An L or RGB image as [C, H, W] uint8."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Values in [-1, 1] as uint8 pixels, clamped and rounded (not truncated): the inverse of `to_unit_range`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
