"""Bringing pictures of several sizes to one size for scores, as a recipe's transform does it."""

from dataclasses import dataclass
from typing import Any

import PIL.Image
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt, check_arguments
from difftrain.core.rng import Rng
from difftrain.data.opening import seen
from difftrain.data.transform import Resize, Size, Transform, covering_size, to_pixels

FILTER: Resize = "bicubic"
MOST_PIXELS = 2**27  # of a picture that is kept whole; Pillow opens none of more than 2**27.4


@dataclass(frozen=True)
class Resizing:
    """Resizes the shorter side of each picture (bicubic, antialiased), and perhaps crops it.

    Args:
        side: The shorter side, in pixels.
        crop: Whether the square in the middle is taken; else the whole picture is kept.
    """

    side: PositiveInt
    crop: bool = False

    def __post_init__(self) -> None:
        check_arguments(Resizing, vars(self), "resize", directly=True)

    def described(self) -> dict[str, Any]:
        """Return what a protocol says of it."""
        return {"side": self.side, "filter": FILTER, "crop": "center" if self.crop else "none"}

    def transform(self, channels: int) -> "Transform | ShorterSide":
        """Return what turns pictures into pixels of 1 or 3 channels."""
        grey = channels == 1
        if self.crop:
            return Transform(self.side, channels=1 if grey else 3, resize=FILTER)
        return ShorterSide(self.side, channels=1 if grey else 3)

    def size_of(self, original: Size) -> Size:
        """Return (height, width) that a picture of this size gets."""
        square = (self.side, self.side)
        return square if self.crop else covering_size(original, square)


@dataclass(frozen=True)
class ShorterSide:
    """Resizes the shorter side of a picture to `resolution`, and keeps the whole picture.

    Args:
        resolution: The shorter side, in pixels.
        channels: 1 for grey, 3 for RGB.
    """

    resolution: PositiveInt
    channels: Any = 3

    def __call__(
        self, image: PIL.Image.Image, rng: Rng | None = None, name: str = "the image"
    ) -> Tensor:
        """Return the pixels [channels, height, width] uint8.

        Raises:
            InputError: If they would be too many.
            UnreadableImage: If the range of the picture's values is unknown.
        """
        picture = seen(image, self.channels, name)
        whole = picture.image
        size = covering_size((whole.height, whole.width), (self.resolution, self.resolution))
        check_bound((whole.height, whole.width), size, name)
        if size != (whole.height, whole.width):
            whole = whole.resize(size[::-1], PIL.Image.Resampling[FILTER.upper()])
        return to_pixels(picture.finished(whole))

    def deterministic(self) -> "ShorterSide":
        """Return itself."""
        return self


def check_bound(original: Size, size: Size, name: str) -> None:
    """Refuse to make a picture of gigabytes of a long strip.

    Raises:
        InputError: With what to write instead.
    """
    (height, width), (tall, wide) = original, size
    if tall * wide > MOST_PIXELS:
        raise InputError(
            f"{name} is {width}x{height}: without a crop it would be resized to {wide}x{tall}. "
            "Write --crop too, a smaller --resize, or remove it."
        )
