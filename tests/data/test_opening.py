"""Pictures of every kind are trained on and scored as they are meant to be seen."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from helpers.profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    encoded,
    grey_profile,
    rgb_profile,
    srgb_of,
)
from helpers.tiff import tiff

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.datasets.image_folder import EXTENSIONS, ImageFolder
from difftrain.data.images import Original, open_image
from difftrain.data.items import Item, MapDataset
from difftrain.data.opening import UnreadableImage, opened
from difftrain.data.transform import Transform, covering_size
from difftrain.evaluation.sources import DatasetImages

SIDE = 8
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"]
MODES += ["HSV", "I;16", "I;16B", "I;16L", "I", "F"]
ENDINGS = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "JPEG": ".jpg",
    "PNG": ".png",
    "PPM": ".ppm",
    "TIFF": ".tiff",
    "WEBP": ".webp",
}
# Formats that a table may hold, and whose files a folder leaves out
OTHERS = ("DDS", "DIB", "ICNS", "ICO", "JPEG2000", "MPO", "MSP", "PCX", "QOI", "SGI", "TGA", "XBM")
LOSSLESS = ("BMP", "PNG", "PPM", "TIFF")
EXTRAS = ("plain", "transparent colour", "turned", "animated")
TURN = 6  # EXIF: the first row of the file is the right side of the picture
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
WIDE = RANDOM.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)


def picture(mode: str) -> PIL.Image.Image:
    """Return a picture of noise in one of Pillow's modes."""
    if mode in ("1", "L", "P"):
        grey = PIL.Image.fromarray(COLOURS[..., 0] // (64 if mode == "P" else 1))
        if mode == "P":
            grey = grey.convert("P")
            grey.putpalette(COLOURS[0, :, :3].tobytes())
        return grey if mode != "1" else grey.point(lambda x: 255 * (x > 99)).convert("1")
    if mode in ("I;16", "I;16B", "I;16L"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return PIL.Image.frombytes(mode, (SIDE, SIDE), WIDE.astype(order).tobytes())
    if mode in ("I", "F"):
        return PIL.Image.fromarray(WIDE.astype(np.int32 if mode == "I" else np.float32))
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    return PIL.Image.frombytes(mode, (SIDE, SIDE), COLOURS[..., :channels].tobytes())


def stored(kind: str, mode: str, extra: str) -> bytes | None:
    """Return the file of a picture, or None where Pillow does not write such a file."""
    image, options = picture(mode), {}
    if extra == "transparent colour":
        value = image.getpixel((1, 2))
        if mode not in ("1", "L", "P", "RGB", "I;16") or kind not in ("PNG", "GIF"):
            return None
        options["transparency"] = value
    if extra == "turned":
        exif = PIL.Image.Exif()
        exif[0x0112] = TURN
        options["exif"] = exif.tobytes()
    if extra == "animated":
        if kind not in ("GIF", "PNG", "TIFF", "WEBP", "AVIF"):
            return None
        options |= {"save_all": True, "append_images": [image.transpose(0)]}
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.save(file, kind, **options)
    except (OSError, ValueError, KeyError, SystemError, TypeError, AttributeError, struct.error):
        return None
    content = file.getvalue()
    return None if extra == "turned" and has_orientation(content) != TURN else content


def has_orientation(content: bytes) -> int | None:
    with PIL.Image.open(io.BytesIO(content)) as image:
        return image.getexif().get(0x0112)


def kinds() -> list[tuple[str, str, str]]:
    every = [
        (kind, mode, extra) for kind in (*ENDINGS, *OTHERS) for mode in MODES for extra in EXTRAS
    ]
    return [one for one in every if stored(*one) is not None]


def expected(mode: str, extra: str) -> np.ndarray | None:
    """Return the pixels [H, W, 3] that a lossless file must give; None where none are stated."""
    image = picture(mode)
    values = np.asarray(image).astype(float)
    if mode in ("1", "L", "P", "RGB"):
        values = np.asarray(image.convert("RGB")).astype(float)
        if extra == "transparent colour":
            same = np.asarray(image) == np.asarray(image)[2, 1]
            values[same if same.ndim == 2 else same.all(-1)] = 255
        return values
    if mode in ("I;16", "I;16B", "I;16L", "I"):
        values = (WIDE.astype(int) + 128) // 257
        if extra == "transparent colour":
            values[WIDE[2, 1] == WIDE] = 255
        return np.repeat(values[..., None], 3, axis=-1)
    if mode in ("LA", "RGBA"):
        alpha = values[..., -1:] / 255
        return np.broadcast_to(values[..., :-1] * alpha + 255 * (1 - alpha), (SIDE, SIDE, 3))
    if mode == "CMYK":
        return (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    return None


class Encoded(MapDataset):
    """One picture of a table."""

    def __init__(self, content, name):
        self.content, self.name = content, name

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return Item(open_image(io.BytesIO(self.content), self.name), name=self.name)

    def original(self, i):
        return Original(self.name, None, lambda: None, self.content)


def test_the_table_of_kinds_is_long():
    """So that a change of Pillow, or of the table, does not empty it unseen."""
    found = kinds()

    assert len(found) > 200
    assert {kind for kind, _, _ in found} == {*ENDINGS, *OTHERS}
    assert {extra for _, _, extra in found} == set(EXTRAS)
    assert set(ENDINGS.values()) <= set(EXTENSIONS)


@pytest.mark.parametrize(("kind", "mode", "extra"), kinds())
def test_each_kind_is_trained_on_as_it_is_scored(tmp_path, kind, mode, extra):
    content = stored(kind, mode, extra)
    file = tmp_path / f"picture{ENDINGS.get(kind)}"
    file.write_bytes(content)
    data = ImageFolder(str(tmp_path)) if kind in ENDINGS else Encoded(content, str(file))
    unknown = {"F": "floating-point pixels", "P": "it holds no colours"}
    image = data[0].image
    if image.mode == "F" or (kind, image.mode, mode) == ("ICNS", "P", "P"):
        with pytest.raises(UnreadableImage, match=unknown[image.mode]):
            Transform(SIDE, resize="none")(image, name=str(file))
        with pytest.raises(InputError, match=rf"picture.* {unknown[image.mode]}"):
            DatasetImages(data)
        return
    source = DatasetImages(data)

    (block,) = source.blocks([[0]])

    channels = source.shape[0]
    image = data[0].image
    side = min(image.size)  # an icon has a size of its own
    trained = Transform(side, channels=channels, resize="none")(image, name=str(file))
    assert torch.equal(block.samples[0], trained)
    pixels = expected(mode, extra)
    keeps_alpha = mode not in ("LA", "RGBA") or data[0].image.mode == mode
    if pixels is not None and kind in LOSSLESS and keeps_alpha:
        if extra == "turned":
            pixels = pixels.swapaxes(0, 1)[:, ::-1]
        found = trained.permute(1, 2, 0).numpy().astype(float)
        assert np.abs(found - pixels).max() <= (1 if mode in ("LA", "RGBA", "CMYK") else 0)


# A transparent colour of a PNG that Pillow does not write


def png(values: np.ndarray, depth: int, colour: tuple[int, ...]) -> bytes:
    """Return a grey or RGB PNG of any depth with a transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width = values.shape[:2]
    rows = b""
    for row in values.reshape(height, -1):
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if len(colour) == 3 else 0, 0, 0, 0)
    key = struct.pack(f">{len(colour)}H", *colour)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"tRNS", key),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_at_every_depth(depth):
    most = 2**depth - 1
    values = np.array([[0, most // 2, most, most - 1]])
    for key in {0, most // 2, most}:
        found = opened(open_image(io.BytesIO(png(values, depth, (key,))), "x"), 1, "x")

        seen = (values * 255 / most).round() if depth < 16 else (values + 128) // 257
        seen[values == key] = 255
        assert np.array_equal(np.asarray(found), seen)


def test_a_transparent_colour_of_16_bits_is_white():
    values = np.array([[[0, 0, 0], [65535, 256, 3], [40000, 50000, 60000]]])
    image = open_image(io.BytesIO(png(values, 16, (40000, 50000, 60000))), "x")

    found = np.asarray(opened(image, 3, "x"))

    assert found.tolist() == [[[0, 0, 0], [255, 1, 0], [255, 255, 255]]]


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True)])
def test_levels_of_a_grey_tiff_are_scaled_by_their_bits(bits, white_is_zero):
    most = 2**bits - 1
    values = np.array([0, 1, most // 2, most - 1, most, 700, 70, 7])
    content = values.astype("<u2").tobytes()
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values)
        content = bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    file = io.BytesIO(tiff(content, 4, 2, bits, white_is_zero))

    found = np.asarray(opened(open_image(file, "x"), 1, "x")).reshape(-1)

    wanted = values / most * 255
    assert np.abs(found - (255 - wanted if white_is_zero else wanted)).max() <= 0.5


def test_a_transparent_colour_that_is_none_is_named():
    image = PIL.Image.new("L", (2, 2))
    image.info["transparency"] = "no colour"

    with pytest.raises(UnreadableImage, match=r"^x\.png cannot be read: "):
        opened(image, 3, "x.png")


# Colour profiles


def spread(num: int = 9) -> np.ndarray:
    levels = np.linspace(0, 255, num).round().astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(num, -1, 3)


@pytest.mark.parametrize(
    ("primaries", "gamma"), [(DISPLAY_P3, None), (ADOBE_RGB, 2.19921875), (SRGB, 1.8)]
)
def test_colours_of_a_profile_become_those_of_srgb(tmp_path, primaries, gamma):
    levels = spread()
    icc = rgb_profile(primaries, gamma)
    PIL.Image.fromarray(levels).save(tmp_path / "photo.png", icc_profile=icc)

    (block,) = DatasetImages(ImageFolder(str(tmp_path))).blocks([[0]])

    closed_form = srgb_of(levels.astype(float), primaries, gamma)
    found = block.samples[0].permute(1, 2, 0).numpy()
    assert np.abs(found - closed_form).max() < 2.5
    assert np.abs(levels - closed_form).max() > 15  # there was something to convert


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_is_read_from_every_format(kind):
    flat = PIL.Image.new("RGB", (SIDE, SIDE), (200, 60, 40))
    file = io.BytesIO()
    flat.save(file, kind, icc_profile=rgb_profile(DISPLAY_P3, None))

    found = np.asarray(opened(open_image(file, "x"), 3, "x"))[4, 4]

    wanted = srgb_of(np.array([200.0, 60, 40]), DISPLAY_P3, None)
    assert np.abs(found - wanted).max() < 6  # losses of the format


def test_a_grey_profile_is_converted_and_grey_output_is_of_converted_colours():
    levels = np.arange(256, dtype=np.uint8)[None]
    grey = PIL.Image.fromarray(levels)
    grey.info["icc_profile"] = grey_profile(1.0)
    wanted = 255 * encoded(levels / 255)
    assert np.abs(np.asarray(opened(grey, 1, "x")) - wanted).max() < 1.5

    red = PIL.Image.new("RGB", (1, 1), (250, 20, 30))
    red.info["icc_profile"] = rgb_profile(ADOBE_RGB, 2.19921875)
    in_srgb = np.asarray(opened(red, 3, "x"))
    as_grey = np.asarray(PIL.Image.fromarray(in_srgb).convert("L"))
    assert np.array_equal(np.asarray(opened(red, 1, "x")), as_grey)


def test_white_behind_transparent_pixels_stays_white_under_a_profile():
    image = PIL.Image.new("RGBA", (2, 1), (9, 200, 9, 0))
    image.info["icc_profile"] = rgb_profile(ADOBE_RGB, 2.19921875)

    assert np.array_equal(np.asarray(opened(image, 3, "x")), np.full((1, 2, 3), 255))


@pytest.mark.parametrize("opacity", [0, 60, 128, 255])
def test_colours_are_converted_before_they_are_laid_on_white(opacity):
    levels = spread()
    rgba = np.dstack([levels, np.full(levels.shape[:2], opacity, np.uint8)])
    image = PIL.Image.fromarray(rgba)
    image.info["icc_profile"] = rgb_profile(DISPLAY_P3, None)

    found = np.asarray(opened(image, 3, "x"))

    share = opacity / 255
    wanted = srgb_of(levels.astype(float), DISPLAY_P3, None) * share + 255 * (1 - share)
    assert np.abs(found - wanted).max() < 2.5


def test_a_grey_profile_holds_for_grey_with_transparency():
    grey = np.dstack([np.arange(256, dtype=np.uint8)[None], np.full((1, 256), 128, np.uint8)])
    image = PIL.Image.fromarray(grey, "LA")
    image.info["icc_profile"] = grey_profile(1.0)

    wanted = 255 * encoded(grey[..., 0] / 255) * 128 / 255 + 255 * (1 - 128 / 255)
    assert np.abs(np.asarray(opened(image, 1, "x")) - wanted).max() < 2


def without_effect() -> dict[str, tuple[str, bytes]]:
    """Profiles that change nothing: that of sRGB, broken ones, and those of other colours."""
    of_srgb = rgb_profile(SRGB, None)
    other = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    return {
        "sRGB": ("RGB", of_srgb),
        "sRGB of LittleCMS": ("RGB", other),
        "cut": ("RGB", of_srgb[:200]),
        "no profile": ("RGB", b"nothing of the kind"),
        "empty": ("RGB", b""),
        "grey in RGB": ("RGB", grey_profile(1.0)),
        "RGB in grey": ("L", rgb_profile(ADOBE_RGB, 2.19921875)),
    }


@pytest.mark.parametrize("name", without_effect())
def test_profiles_without_effect_leave_pixels_bit_for_bit(name):
    mode, icc = without_effect()[name]
    image = PIL.Image.fromarray(COLOURS[..., :3]).convert(mode)
    plain = np.asarray(opened(image, 3, "x"))
    image.info["icc_profile"] = icc

    assert np.array_equal(np.asarray(opened(image, 3, "x")), plain)


def test_colours_are_converted_after_the_resize_in_training_and_scores_alike(tmp_path):
    levels = np.kron(spread(), np.ones((4, 1, 1), np.uint8))
    file = tmp_path / "photo.png"
    PIL.Image.fromarray(levels).save(file, icc_profile=rgb_profile(DISPLAY_P3, None))
    transform = Transform(SIDE)
    data = ImageFolder(str(tmp_path))

    (block,) = DatasetImages(data, transform).blocks([[0]])

    assert torch.equal(block.samples[0], transform(data[0].image))
    plain = transform(PIL.Image.fromarray(levels)).permute(1, 2, 0).numpy().astype(float)
    wanted = srgb_of(plain, DISPLAY_P3, None)
    assert np.abs(block.samples[0].permute(1, 2, 0).numpy() - wanted).max() < 2.5


# Long strips


@pytest.mark.parametrize(
    ("size", "side"), [((30_000, 2), 512), ((2, 30_000), 512), ((20_000, 400), 1024)]
)
def test_of_a_long_strip_only_the_crop_is_enlarged(size, side):
    strip = PIL.Image.new("L", size)
    strip.paste(200, (size[0] // 2 - 1, size[1] // 2 - 1, size[0] // 2 + 1, size[1] // 2 + 1))

    pixels = Transform(side, channels=1)(strip)

    assert pixels.shape == (1, side, side)
    assert pixels[0, side // 2, side // 2] > 150


@pytest.mark.parametrize("size", [(12, 70), (70, 12), (9, 200), (200, 9), (40, 800)])
@pytest.mark.parametrize("resize", ["lanczos", "bicubic", "bilinear"])
def test_a_crop_alone_is_the_crop_of_the_enlarged_picture(monkeypatch, size, resize):
    image = PIL.Image.fromarray(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8))
    for crop in ("center", "random"):
        transform = Transform(64, crop=crop, resize=resize)
        quick = transform(image, Rng(3, samples=[5]))
        with monkeypatch.context() as patch:
            patch.setattr("difftrain.data.transform.MOST_ENLARGED", 10**9)
            whole = transform(image, Rng(3, samples=[5]))
        assert (quick.int() - whole.int()).abs().max() <= 1
        assert (quick != whole).float().mean() < 0.01


def test_what_is_not_enlarged_beyond_the_bound_stays_bit_for_bit():
    """Shrunk, or enlarged to less than four times the crop: resized as a whole."""
    for size, side in (((40, 300), 20), ((30, 40), 64)):
        noise = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(noise)
        height, width = covering_size(size, (side, side))
        whole = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        wanted = np.asarray(whole.crop((left, top, left + side, top + side)))

        assert np.array_equal(Transform(side)(image).permute(1, 2, 0).numpy(), wanted)
