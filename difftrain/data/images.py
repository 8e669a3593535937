"""Image files: decoding them, and what their headers say without decoding.

Planning (buckets) and looking things up (a cache) go over a whole data set, where decoding every
image would take hours.
"""

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile
import PIL.TiffImagePlugin

from difftrain.data.opening import LEVELS, WIDE, UnreadableImage, seen, upright
from difftrain.data.transform import Size

# What Pillow's decoders raise on damaged files.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
QUARTER_TURNS = (5, 6, 7, 8)  # values of the EXIF orientation that exchange height and width


def open_image(source: str | Path | IO[bytes], name: str) -> PIL.Image.Image:
    """Decode an image file; of an animation, its first frame.

    Args:
        source: A path, or an open file.
        name: What a message calls the file.

    Raises:
        UnreadableImage: If it cannot be decoded.
    """
    if isinstance(source, (str, Path)):
        check_regular(source, name)
    try:
        return decoded(source)
    except PIL.UnidentifiedImageError:
        reason = "not in an image format that Pillow knows"
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
    # Raised out here, so that it holds no decoder: the decoder of a damaged AVIF has threads, and a
    # worker that is forked beside it hangs when it frees the decoder.
    raise UnreadableImage(name, reason, digest_of(source))


def is_address(path: str) -> bool:
    """Return whether a text is an address (http://, s3://, file://, data:), and no path."""
    return "://" in path or path.startswith("data:")


def check_regular(path: str | Path, name: str) -> None:
    """Refuse to open what is no regular file: a named pipe would be waited for without end.

    Args:
        path: The path; links are followed.
        name: What a message calls it.

    Raises:
        UnreadableImage: If it is something else, or nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadableImage(name, str(getattr(error, "strerror", None) or error)) from error
    if not stat.S_ISREG(mode):
        raise UnreadableImage(name, f"it is {kind_of(mode)}, not a regular file")


def kind_of(mode: int) -> str:
    """Return what a message calls an entry of a folder by its mode."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def digest_of(source: str | Path | IO[bytes]) -> str:
    """Return a digest of a file's bytes in hexadecimal digits; empty if they cannot be read."""
    try:
        if isinstance(source, (str, Path)):
            check_regular(source, "")
            with Path(source).open("rb") as file:  # a video may be larger than the memory
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            return found.hexdigest()
        source.seek(0)
        return content_digest(source.read()).hex()
    except (OSError, ValueError):  # a closed file is a ValueError
        return ""


def content_digest(content: bytes) -> bytes:
    """Return 16 bytes that belong to the content of a file."""
    return hashlib.blake2b(content, digest_size=16).digest()


def decoded(source: str | Path | IO[bytes]) -> PIL.Image.Image:
    """Open and decode an image file with Pillow."""
    with PIL.Image.open(source) as image:
        rescale_transparent_colour(image)
        note_levels(image)
        image.load()
        return image


def note_levels(image: PIL.ImageFile.ImageFile) -> None:
    """Note what the levels of a grey TIFF mean where Pillow leaves them as they are.

    Args:
        image: An image that is open and not decoded yet.
    """
    if isinstance(image, PIL.TiffImagePlugin.TiffImageFile) and image.mode in WIDE:
        tags = image.tag_v2
        most = 4095 if tags.get(PIL.TiffImagePlugin.BITSPERSAMPLE) == (12,) else 65535
        is_inverted = tags.get(PIL.TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        image.info[LEVELS] = (most, is_inverted)


def rescale_transparent_colour(image: PIL.ImageFile.ImageFile) -> None:
    """Bring the transparent colour of a PNG to the 8 bits to which Pillow brings its pixels.

    Pillow leaves it as it stands in the file, where a value may have 2, 4 or 16 bits.

    Args:
        image: An image that is open and not decoded yet.
    """
    colour, layout = image.info.get("transparency"), image.tile[0].args if image.tile else None
    if isinstance(colour, int) and layout in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if layout == "L;2" else 17)
    elif isinstance(colour, tuple) and layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


@dataclass(frozen=True)
class Original:
    """One item of a data set, before it is decoded.

    Args:
        name: What a message calls the item.
        label: Its class id, if it has one.
        caption: Reads its caption, if it has one.
        source: Its file, its encoded bytes, or, where the data set holds no files, the image.
        stamp: Text that changes with the file and is quick to read, see `file_stamp`; None without
            a file, and for one that was written just now.
    """

    name: str
    label: int | None
    caption: Callable[[], str | None]
    source: Path | bytes | PIL.Image.Image
    stamp: str | None = None

    def size(self) -> Size:
        """Return (height, width) as the image is meant to be seen; of a file, from its header.

        Raises:
            UnreadableImage: If the header cannot be read.
        """
        return self.look()[0]

    def look(self) -> tuple[Size, str]:
        """Return (height, width), see `size`, and Pillow's mode.

        Raises:
            UnreadableImage: If the header cannot be read.
        """
        if isinstance(self.source, PIL.Image.Image):
            image = upright(self.source)
            return (image.height, image.width), image.mode
        file = BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        if isinstance(file, Path):
            check_regular(file, self.name)
        try:
            with PIL.Image.open(file) as image:
                is_turned = self._is_turned(image)
                (width, height), mode = image.size, image.mode
        except UnreadableImage:
            raise
        except DAMAGED as error:
            raise UnreadableImage(self.name, str(error) or type(error).__name__) from error
        return ((width, height) if is_turned else (height, width)), mode

    def digest(self) -> bytes:
        """Return 16 bytes that belong to the image's content.

        Raises:
            UnreadableImage: If the file cannot be read.
        """
        if isinstance(self.source, PIL.Image.Image):
            image = upright(self.source)
            notes = [image.info.get(key) for key in ("transparency", "icc_profile")]
            looks = (image.mode, image.size, image.getpalette(), *notes)
            content = repr(looks).encode() + np.asarray(image).tobytes()
        else:
            content = self._bytes()
        return content_digest(content)

    def decoded(self) -> PIL.Image.Image:
        """Return the image.

        Raises:
            UnreadableImage: If it cannot be decoded, or if the range of its values is unknown.
        """
        if isinstance(self.source, PIL.Image.Image):
            seen(self.source, 3, self.name)
            return self.source
        file = BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        image = open_image(file, self.name)
        seen(image, 3, self.name)
        return image

    def _bytes(self) -> bytes:
        assert not isinstance(self.source, PIL.Image.Image)
        if isinstance(self.source, bytes):
            return self.source
        check_regular(self.source, self.name)
        try:
            return self.source.read_bytes()
        except OSError as error:
            raise UnreadableImage(self.name, str(error)) from error

    def _is_turned(self, image: PIL.Image.Image) -> bool:
        """Return whether the EXIF orientation exchanges height and width."""
        if image.format == "TIFF":  # its size is the turned one already
            return False
        if image.format == "PNG" and "exif" not in image.info:
            # Pillow would decode the whole image to look for a later EXIF chunk.
            content = self._bytes()
            if not any(mark in content for mark in (b"eXIf", b"exif", b"com.adobe.xmp")):
                return False
        try:
            return image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in QUARTER_TURNS
        except DAMAGED:  # damaged EXIF beside good pixels
            return False
