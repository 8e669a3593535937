"""Pictures that can be told apart by their red channel."""

import numpy as np
import PIL.Image


def picture(value: int = 0, size: tuple[int, int] = (6, 4)) -> PIL.Image.Image:
    """An RGB image whose red channel is `value`."""
    return PIL.Image.new("RGB", size, (value, 10, 20))


def red(image: PIL.Image.Image) -> int:
    """The red channel of an image's first pixel."""
    return int(np.asarray(image.convert("RGB"))[0, 0, 0])
