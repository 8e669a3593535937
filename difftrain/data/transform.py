"""One image to uint8 pixels of a stated size: upright, without transparency, resized, cropped, perhaps mirrored.

Random crops and flips draw from the `Rng` that is passed in, so they belong to a sample and not to the worker that
happened to read it. `to_unit_range` and `to_uint8` are the one conversion between pixels and what a model sees.
"""

import dataclasses
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from difftrain.registry import InputError, PositiveInt, check_arguments
from difftrain.rng import Rng

Size = tuple[int, int]  # (height, width)
Geometry = tuple[int, int, int, int, int, int]
Resize = Literal["lanczos", "bicubic", "bilinear", "none"]
ORIENTATION = 0x0112  # the EXIF tag; its value 1, or anything unknown, means: as stored
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL.Image.Transpose.ROTATE_180, 4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE, 6: PIL.Image.Transpose.ROTATE_270, 7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}  # fmt: skip


class Placed(NamedTuple):
    """Pixels uint8 [C, H, W], of a clip [C, F, H, W], and of an image where they come from.

    geometry: original height and width, top and left of the crop in the resized image (mirrored, if it is), height and width of the
    crop: what SDXL is told, Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """

    pixels: Tensor
    geometry: Geometry | None


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
        return self.place(image, rng, name).pixels

    def place(self, image: PIL.Image.Image, rng: Rng | None = None, name: str = "the image", size: Size | None = None) -> Placed:
        """The same with its geometry; size: (height, width) to cover and to crop to, instead of the square."""
        original = with_channels(upright(image), self.channels, name)
        height, width = size or (self.resolution, self.resolution)
        resized = self._resized(original, (height, width), name)
        left, top = self._corner((resized.width - width, resized.height - height), rng)
        pixels = to_pixels(resized.crop((left, top, left + width, top + height)))
        if self.flip and draws(rng, "transform.flip", 1)[0] < 0.5:
            pixels, left = pixels.flip(-1), resized.width - width - left
        return Placed(pixels, (original.height, original.width, top, left, height, width))

    @property
    def is_random(self) -> bool:
        """Whether an image looks different from sample to sample."""
        return self.crop == "random" or self.flip

    def deterministic(self) -> "Transform":
        """The same with a centre crop and no flip: for references and validation."""
        return dataclasses.replace(self, crop="center", flip=False)

    def _resized(self, image: PIL.Image.Image, size: Size, name: str) -> PIL.Image.Image:
        """The smallest image of its aspect that covers `size`."""
        covering = covering_size((image.height, image.width), size)
        if self.resize == "none" and covering[0] > image.height:
            raise InputError(
                f"{name} is {image.width}x{image.height}, smaller than resolution {self.resolution}, and resize is none. "
                f"Write resize: bicubic, or a resolution of at most {min(image.size)}."
            )
        if self.resize == "none" or covering == (image.height, image.width):
            return image
        return image.resize(covering[::-1], PIL.Image.Resampling[self.resize.upper()])

    def _corner(self, spare: tuple[int, int], rng: Rng | None) -> tuple[int, int]:
        spare_x, spare_y = spare
        if self.crop == "center":
            return spare_x // 2, spare_y // 2
        u, v = draws(rng, "transform.crop", 2)
        return int(u * (spare_x + 1)), int(v * (spare_y + 1))


def covering_size(original: Size, size: Size) -> Size:
    """(height, width) of the smallest image of the original's aspect that covers `size`."""
    (h, w), (height, width) = original, size
    return (height, round(w * height / h)) if height * w >= width * h else (round(h * width / w), width)


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
