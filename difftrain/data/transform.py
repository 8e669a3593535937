"""One image to uint8 pixels of a stated size: upright, opaque, resized, cropped, perhaps mirrored.

Random crops and flips use the `Rng` that is passed in, so they belong to a sample and not to the
worker that reads it. `to_unit_range` and `to_uint8` are the one conversion between pixels and what
a model sees.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt, check_arguments
from difftrain.core.rng import Rng
from difftrain.data.opening import seen

Size = tuple[int, int]  # (height, width)
Geometry = tuple[int, int, int, int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom
Resize = Literal["lanczos", "bicubic", "bilinear", "none"]

# Times the pixels of a crop that an enlarged image may have; of a larger one only the crop is made
MOST_ENLARGED = 4
REACH = 4  # pixels on each side of a place that a filter may look at; Lanczos has 3


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
            InputError: If the image is too small for a crop without resizing.
            UnreadableImage: If the range of its values is unknown.
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
        picture = seen(image, self.channels, name)
        whole = picture.image
        height, width = size or (self.resolution, self.resolution)
        covering = self._covering((whole.height, whole.width), (height, width), name)
        left, top = self._corner((covering[1] - width, covering[0] - height), rng)
        box = (left, top, left + width, top + height)
        pixels = to_pixels(picture.finished(self._cut(whole, covering, box)))
        if self.flip and uniforms(rng, "transform.flip", 1)[0] < 0.5:
            pixels = pixels.flip(-1)
            left = covering[1] - width - left
        return Placed(pixels, (whole.height, whole.width, top, left, height, width))

    @property
    def is_random(self) -> bool:
        """Whether the same image looks different in different samples."""
        return self.crop == "random" or self.flip

    def deterministic(self) -> "Transform":
        """Return this transform with a center crop and no flip, for references and validation."""
        return dataclasses.replace(self, crop="center", flip=False)

    def _covering(self, original: Size, size: Size, name: str) -> Size:
        """Return (height, width) of the picture from which the crop is taken.

        Raises:
            InputError: If it is too small for a crop without resizing.
        """
        covering = covering_size(original, size)
        if self.resize == "none" and covering[0] > original[0]:
            height, width = original
            raise InputError(
                f"{name} is {width}x{height}, smaller than resolution {self.resolution}, and "
                "resize is none. Write resize: bicubic, or a resolution of at most "
                f"{min(original)}."
            )
        return original if self.resize == "none" else covering

    def _cut(self, image: PIL.Image.Image, covering: Size, box: Box) -> PIL.Image.Image:
        """Return a box of the image in its resized form.

        Args:
            image: The image.
            covering: (height, width) of the resized form.
            box: Left, top, right and bottom in the resized form.
        """
        height, width = covering
        if covering == (image.height, image.width):
            return image.crop(box)
        assert self.resize != "none"
        resample = PIL.Image.Resampling[self.resize.upper()]
        left, top, right, bottom = box
        most = MOST_ENLARGED * (right - left) * (bottom - top)
        if height <= image.height or width * height <= most:
            return image.resize((width, height), resample).crop(box)
        return enlarged_box(image, covering, box, resample)

    def _corner(self, spare: tuple[int, int], rng: Rng | None) -> tuple[int, int]:
        """Return (left, top) of the crop, where `spare` pixels (x, y) are to be cropped away."""
        spare_x, spare_y = spare
        if self.crop == "center":
            return spare_x // 2, spare_y // 2
        u, v = uniforms(rng, "transform.crop", 2)
        return int(u * (spare_x + 1)), int(v * (spare_y + 1))


def enlarged_box(
    image: PIL.Image.Image, covering: Size, box: Box, resample: PIL.Image.Resampling
) -> PIL.Image.Image:
    """Return a box of the image enlarged to `covering`, without making the rest.

    A long strip would become a picture of gigabytes, of which little is kept. Columns are resized
    before rows, as Pillow does with a whole image; with both at once it may take the other order.
    A pixel differs from that of the whole by at most a level.

    Args:
        image: The image.
        covering: (height, width) of the enlarged image.
        box: Left, top, right and bottom in it.
        resample: Pillow's filter.
    """
    left, top, right, bottom = box
    across, down = image.width / covering[1], image.height / covering[0]
    # The rows that the filter reaches
    first = max(0, math.floor(top * down) - REACH)
    last = min(image.height, math.ceil(bottom * down) + REACH)
    rows = image.crop((0, first, image.width, last))
    columns = (left * across, 0, min(right * across, image.width), rows.height)
    narrow = rows.resize((right - left, rows.height), resample, box=columns)
    own = (0, top * down - first, narrow.width, min(bottom * down - first, rows.height))
    return narrow.resize((right - left, bottom - top), resample, box=own)


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
