"""One image to uint8 pixels of a stated size: upright, opaque, resized, cropped, perhaps mirrored.

Random crops and flips use the `Rng` that is passed in, so they belong to a sample and not to the
worker that reads it. `to_unit_range` and `to_uint8` are the one conversion between pixels and what
a model sees.
"""

import contextlib
import dataclasses
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt, check_arguments
from difftrain.core.rng import Rng

Size = tuple[int, int]  # (height, width)
Geometry = tuple[int, int, int, int, int, int]
Resize = Literal["lanczos", "bicubic", "bilinear", "none"]

# What Pillow raises on EXIF data that it cannot parse, or cannot write again.
DAMAGED_EXIF = (
    SyntaxError,
    struct.error,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    OverflowError,
)


class Placed(NamedTuple):
    """Pixels and the place in the original image that they come from.

    Args:
        pixels: [C, H, W] uint8; of a clip [C, F, H, W].
        geometry: Height and width of the original image, top and left of the crop in the resized
            (and perhaps mirrored) image, height and width of the crop; None of a clip.

    Reference:
        Podell et al. 2023, "SDXL", arXiv:2307.01952, section 2.2: the size conditioning.
    """

    pixels: Tensor
    geometry: Geometry | None


@dataclass(frozen=True)
class Transform:
    """Resizes the shorter side to `resolution` (antialiased), then takes a square crop.

    Args:
        resolution: Side of the square, in pixels.
        channels: 1 for grey, 3 for RGB.
        resize: Pillow's filter. "none" only crops: pixels stay exactly as they are.
        crop: Where the crop lies.
        flip: Whether images are mirrored left to right with probability 1/2.
    """

    resolution: PositiveInt
    channels: Literal[1, 3] = 3
    resize: Resize = "bicubic"
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        check_arguments(Transform, vars(self), "transform", directly=True)

    def __call__(
        self, image: PIL.Image.Image, rng: Rng | None = None, name: str = "the image"
    ) -> Tensor:
        """Return the pixels [channels, resolution, resolution] uint8.

        Args:
            image: The image.
            rng: The `Rng` of one sample; needed for a random crop or a flip.
            name: What a message calls the image.

        Raises:
            InputError: If the image is too small for a crop without resizing, or if the range of
                its values is unknown.
        """
        return self.place(image, rng, name).pixels

    def place(
        self,
        image: PIL.Image.Image,
        rng: Rng | None = None,
        name: str = "the image",
        size: Size | None = None,
    ) -> Placed:
        """Return the pixels with their geometry.

        Args:
            image: The image.
            rng: The `Rng` of one sample; needed for a random crop or a flip.
            name: What a message calls the image.
            size: (height, width) to cover and to crop to, instead of the square.

        Raises:
            InputError: See `__call__`.
        """
        original = with_channels(upright(image), self.channels, name)
        height, width = size or (self.resolution, self.resolution)
        resized = self._resized(original, (height, width), name)
        left, top = self._corner((resized.width - width, resized.height - height), rng)
        pixels = to_pixels(resized.crop((left, top, left + width, top + height)))
        if self.flip and uniforms(rng, "transform.flip", 1)[0] < 0.5:
            pixels = pixels.flip(-1)
            left = resized.width - width - left
        return Placed(pixels, (original.height, original.width, top, left, height, width))

    @property
    def is_random(self) -> bool:
        """Whether the same image looks different in different samples."""
        return self.crop == "random" or self.flip

    def deterministic(self) -> "Transform":
        """Return this transform with a center crop and no flip, for references and validation."""
        return dataclasses.replace(self, crop="center", flip=False)

    def _resized(self, image: PIL.Image.Image, size: Size, name: str) -> PIL.Image.Image:
        """Return the smallest image of the same aspect that covers `size`."""
        covering = covering_size((image.height, image.width), size)
        if self.resize == "none" and covering[0] > image.height:
            raise InputError(
                f"{name} is {image.width}x{image.height}, smaller than resolution "
                f"{self.resolution}, and resize is none. Write resize: bicubic, or a resolution of "
                f"at most {min(image.size)}."
            )
        if self.resize == "none" or covering == (image.height, image.width):
            return image
        return image.resize(covering[::-1], PIL.Image.Resampling[self.resize.upper()])

    def _corner(self, spare: tuple[int, int], rng: Rng | None) -> tuple[int, int]:
        """Return (left, top) of the crop, where `spare` pixels (x, y) are to be cropped away."""
        spare_x, spare_y = spare
        if self.crop == "center":
            return spare_x // 2, spare_y // 2
        u, v = uniforms(rng, "transform.crop", 2)
        return int(u * (spare_x + 1)), int(v * (spare_y + 1))


def covering_size(original: Size, size: Size) -> Size:
    """Return (height, width) of the smallest image that covers `size`.

    Args:
        original: (height, width) of the image, whose aspect is kept.
        size: (height, width) to cover.
    """
    (h, w), (height, width) = original, size
    if height * w >= width * h:
        return height, round(w * height / h)
    return round(h * width / w), width


def uniforms(rng: Rng | None, stream: str, num: int) -> list[float]:
    """Return uniform random numbers in [0, 1) of one sample.

    Args:
        rng: The `Rng` of the sample.
        stream: The name of the stream.
        num: How many numbers.
    """
    assert rng is not None, f"{stream} needs the Rng of the sample"
    numbers: list[float] = rng.uniform(stream, (num,))[0].tolist()
    return numbers


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return a copy of the image, turned as its EXIF orientation says.

    Where there is no orientation, or where the EXIF data cannot be parsed, the copy is as stored.
    """
    image.load()  # a TIFF turns itself here, and forgets its orientation
    turned = image.copy()
    # In place, so that the image stays turned if Pillow then fails to write the other EXIF tags.
    with contextlib.suppress(*DAMAGED_EXIF):
        PIL.ImageOps.exif_transpose(turned, in_place=True)
    return turned


def with_channels(image: PIL.Image.Image, channels: int, name: str) -> PIL.Image.Image:
    """Return the image in mode L or RGB, with white where it is transparent.

    Args:
        image: The image.
        channels: 1 or 3.
        name: What a message calls the image.

    Raises:
        InputError: If the range of its values is unknown.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = eight_bit(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def eight_bit(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Return a 16-bit grey image in mode L, with 0..65535 scaled to 0..255.

    Pillow's own conversion clips at 255 instead.

    Args:
        image: The image.
        name: What a message calls the image.

    Raises:
        InputError: If the values are not 16-bit integers.
    """
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise InputError(
            f"{name} has {kind} pixels, whose range is unknown. Convert it to 8 or 16 bits."
        )
    return PIL.Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def to_pixels(image: PIL.Image.Image) -> Tensor:
    """Return an L or RGB image as [C, H, W] uint8."""
    values = np.array(image)
    if values.ndim == 2:
        return torch.from_numpy(values[None])
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]: ``x / 127.5 - 1``."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Return values in [-1, 1] as uint8 pixels, clamped and rounded (not truncated).

    It is the inverse of `to_unit_range`.
    """
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
