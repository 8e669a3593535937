"""How a picture is opened, for training and for scores alike: as it is meant to be seen.

It is turned upright, its colours become those of sRGB, what is transparent becomes white, and
values of 16 bits are scaled to 8.
"""

import contextlib
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from difftrain.core.errors import InputError
from difftrain.data.colour import Conversion, conversion_to_srgb

OPENED = "upright, sRGB, white where transparent, 16 bits scaled to 8"
# What decides the pixels beside the file: the way of opening, and Pillow's decoders
OPENING = {"opened": OPENED, "pillow": PIL.__version__}

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
LEVELS = "difftrain levels"  # key of an image's notes: its highest level, and if that is black
WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes of more than 8 bits a channel


class UnreadableImage(InputError):
    """An image or a video that cannot be decoded.

    Args:
        name: What a message calls the file.
        reason: Why it cannot be decoded.
        digest: Of the file's bytes, in hexadecimal digits; empty where they cannot be read.
    """

    def __init__(self, name: str, reason: str, digest: str = ""):
        super().__init__(name, reason, digest)
        self.name, self.reason, self.digest = name, reason, digest

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


@dataclass(frozen=True)
class Seen:
    """An upright picture whose colours are converted when its final size is reached.

    Args:
        image: The picture: in mode L or RGB and opaque, if its colours need no conversion.
        conversion: What turns its colours into those of sRGB; None where they are already.
        channels: 1 for grey, 3 for RGB.
    """

    image: PIL.Image.Image
    conversion: Conversion | None
    channels: Literal[1, 3]

    def finished(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return the picture in mode L or RGB, or what has been made of it.

        Args:
            image: The picture itself, or its resized and cropped form.
        """
        if self.conversion is None:
            return image
        if image.mode not in ("LA", "RGBA"):
            return with_mode(self.conversion(image), self.channels)
        # Colours are converted, and then laid on white, as browsers do it.
        opacity = image.getchannel("A")
        found = self.conversion(image.convert("L" if image.mode == "LA" else "RGB"))
        found = found.convert("RGB")
        found.putalpha(opacity)
        return with_mode(opaque(found), self.channels)


def opened(image: PIL.Image.Image, channels: Literal[1, 3], name: str) -> PIL.Image.Image:
    """Return a picture in mode L or RGB, as it is meant to be seen, in its own size.

    Args:
        image: The picture.
        channels: 1 for grey, 3 for RGB.
        name: What a message calls the picture.

    Raises:
        UnreadableImage: If the range of its values is unknown.
    """
    found = seen(image, channels, name)
    return found.finished(found.image)


def seen(image: PIL.Image.Image, channels: Literal[1, 3], name: str) -> Seen:
    """Return a picture before its colours are converted, which is quicker in the final size.

    Args:
        image: The picture.
        channels: 1 for grey, 3 for RGB.
        name: What a message calls the picture.

    Raises:
        UnreadableImage: If the range of its values is unknown.
    """
    if image.mode == "P" and image.palette is None:  # as Pillow opens some of Apple's icons
        raise UnreadableImage(name, "its pixels are numbers of colours, and it holds no colours")
    try:
        return of_colours(eight_bit(upright(image), name), channels)
    except UnreadableImage:
        raise
    except (ValueError, TypeError, OSError) as error:  # such as a palette that is not there
        raise UnreadableImage(name, str(error)) from error


def of_colours(image: PIL.Image.Image, channels: Literal[1, 3]) -> Seen:
    """Return an upright picture with what its colours need; see `seen`."""
    is_clear = image.has_transparency_data
    mode = "RGB"  # in which its colours are converted
    if image.mode in ("1", "L", "LA", "La"):
        mode = "L"
    elif image.mode in ("CMYK", "LAB"):
        mode = image.mode
    conversion = conversion_to_srgb(image, mode)
    if conversion is None:
        return Seen(with_mode(opaque(image), channels), None, channels)
    wanted = f"{mode}A" if is_clear else mode
    return Seen(
        with_alpha(image, wanted) if is_clear else in_mode(image, mode), conversion, channels
    )


def in_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Return a picture in one of Pillow's modes; itself, if it is in it."""
    return image if image.mode == mode else image.convert(mode)


def with_alpha(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Return a picture that has transparency in mode LA or RGBA."""
    if image.mode == "La":  # premultiplied; Pillow has no way to RGBA
        image = image.convert("LA")
    return in_mode(image if mode == "RGBA" else in_mode(image, "RGBA"), mode)


def with_mode(image: PIL.Image.Image, channels: Literal[1, 3]) -> PIL.Image.Image:
    """Return a picture in mode L (1 channel) or RGB (3 channels)."""
    return in_mode(image, "L" if channels == 1 else "RGB")


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image as its EXIF orientation says: turned in a copy, or the image itself.

    It is the image itself where there is no orientation, or where the EXIF data cannot be parsed.
    """
    image.load()  # a TIFF turns itself here, and forgets its orientation
    if orientation(image) == 1:
        return image
    turned = image.copy()
    # In place, so that the image stays turned if Pillow then fails to write the other EXIF tags.
    with contextlib.suppress(*DAMAGED_EXIF):
        PIL.ImageOps.exif_transpose(turned, in_place=True)
    return turned


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an image; 1 where its EXIF data cannot be parsed."""
    with contextlib.suppress(*DAMAGED_EXIF):
        return int(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
    return 1


def opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image with white where it is transparent."""
    if not image.has_transparency_data:
        return image
    clear = with_alpha(image, "RGBA")
    white = PIL.Image.new("RGBA", clear.size, "white")
    return PIL.Image.alpha_composite(white, clear).convert("RGB")


def eight_bit(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """Return a 16-bit grey image in mode L, with 0..65535 scaled to 0..255; others as they are.

    A TIFF may have 12 bits, or may count from white to black.

    Pillow's own conversion clips at 255 instead.

    Args:
        image: The image.
        name: What a message calls the image.

    Raises:
        UnreadableImage: If the values are not 16-bit integers.
    """
    if image.mode not in WIDE:
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise UnreadableImage(
            name, f"it has {kind} pixels, whose range is unknown; convert it to 8 or 16 bits"
        )
    most, is_inverted = image.info.get(LEVELS, (65535, False))
    levels = most - values.astype(np.int64) if is_inverted else values.astype(np.int64)
    scaled = ((levels * 255 + most // 2) // most).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the one value that is transparent
        scaled[values == clear] = 255
    found = PIL.Image.fromarray(scaled)
    found.info["icc_profile"] = image.info.get("icc_profile")
    return found
