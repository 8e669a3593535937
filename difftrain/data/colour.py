"""Colour profiles: what makes the colours of a picture those of sRGB, the space of all pixels here.

A profile says what the numbers of a picture mean. One that is broken, or that describes another
kind of colours than the picture has, is ignored, as browsers do.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import product
from typing import Any, Protocol

import PIL.features
import PIL.Image
import PIL.ImageCms

from difftrain.core.errors import InputError

# Colours of a profile by Pillow's mode of the picture that it can belong to
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
STEPS = 9  # colours along each channel at which a profile is compared with sRGB
UNCHANGED = 1  # most levels by which a conversion to sRGB may differ from none
MOST_PROFILES = 64  # that are kept ready


class Conversion(Protocol):
    """Turns the colours of pictures of one profile and mode into those of sRGB."""

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return a picture in mode L (of grey ones) or RGB."""
        ...


@dataclass(frozen=True, eq=False)
class ColourConversion:
    """The conversion of coloured pictures.

    Args:
        transform: Of Pillow's colour management, to RGB.
    """

    transform: Any

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return a picture in mode RGB."""
        found = PIL.ImageCms.applyTransform(image, self.transform)
        assert found is not None, "only a conversion in place returns nothing"
        return found


@dataclass(frozen=True, eq=False)
class GreyConversion:
    """The conversion of grey pictures.

    Args:
        table: The level of sRGB for each of the 256 levels.
    """

    table: list[int]

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return a picture in mode L."""
        return image.point(self.table)


def conversion_to_srgb(image: PIL.Image.Image, mode: str) -> Conversion | None:
    """Return what turns the colours of a picture into those of sRGB.

    Args:
        image: The picture, which may hold a profile.
        mode: The mode in which its colours are converted: L, RGB, CMYK or LAB.

    Returns:
        The conversion; None where there is no usable profile, or where it is that of sRGB.
    """
    profile = image.info.get("icc_profile")
    if mode == "LAB":
        return lab_to_srgb()
    if not isinstance(profile, bytes) or not profile or mode not in SPACES:
        return None
    return conversion_of(Profile(profile), mode)


class Profile:
    """The bytes of a profile, compared by their digest."""

    def __init__(self, content: bytes):
        self.content = content
        self.digest = hashlib.blake2b(content, digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@lru_cache(MOST_PROFILES)
def conversion_of(profile: Profile, mode: str) -> Conversion | None:
    """Return the conversion of a profile; see `conversion_to_srgb`.

    Raises:
        InputError: If Pillow cannot read profiles.
    """
    if not PIL.features.check("littlecms2"):
        raise InputError(
            "a picture has a colour profile, but this Pillow was built without LittleCMS, which "
            "reads it. Install Pillow from its wheel: pip install --force-reinstall pillow."
        )
    try:
        source = PIL.ImageCms.ImageCmsProfile(BytesIO(profile.content))
        if source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        transform = to_srgb(source, mode)
    except (OSError, ValueError, PIL.ImageCms.PyCMSError):
        return None
    if mode == "L":
        levels = PIL.Image.frombytes("L", (256, 1), bytes(range(256)))
        table = list(ColourConversion(transform)(levels).getchannel(0).tobytes())
        moved = max(abs(level - value) for level, value in enumerate(table))
        return None if moved <= UNCHANGED else GreyConversion(table)
    conversion = ColourConversion(transform)
    return None if mode == "RGB" and changes_nothing(conversion) else conversion


@lru_cache(1)
def lab_to_srgb() -> Conversion:
    """Return the conversion of CIELAB pictures."""
    return ColourConversion(to_srgb(PIL.ImageCms.createProfile("LAB"), "LAB"))


def to_srgb(source: Any, mode: str) -> Any:
    """Build Pillow's transform from a profile to sRGB."""
    flags = PIL.ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode == "L":  # of few levels each is computed; the quick way is off by ten of them
        flags |= PIL.ImageCms.Flags.NOOPTIMIZE
    return PIL.ImageCms.buildTransform(
        source,
        PIL.ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        PIL.ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags,
    )


def changes_nothing(conversion: ColourConversion) -> bool:
    """Return whether a conversion of RGB changes no colour by more than a rounding."""
    levels = [round(255 * step / (STEPS - 1)) for step in range(STEPS)]
    colours = bytes(value for colour in product(levels, repeat=3) for value in colour)
    after = conversion(PIL.Image.frombytes("RGB", (STEPS**2, STEPS), colours)).tobytes()
    return max(abs(a - b) for a, b in zip(colours, after, strict=True)) <= UNCHANGED
