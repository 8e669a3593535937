"""One image to pixels: modes, orientation, size, crop and flip."""

import struct
from io import BytesIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.opening import upright
from difftrain.data.transform import Transform, covering_size, to_uint8, to_unit_range

EVERY_VALUE = np.arange(256, dtype=np.uint8).reshape(16, 16)
NUMBERS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def as_it_is(channels=3, resolution=16, **options):
    return Transform(resolution, channels, resize="none", **options)


def pixels_of(array):
    array = np.asarray(array)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def test_an_rgb_image_of_the_right_size_is_left_exactly_as_it_is():
    found = Transform(16)(PIL.Image.fromarray(NUMBERS))

    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, pixels_of(NUMBERS))


def test_grey_to_rgb_and_back_is_exact():
    rgb = as_it_is(3)(PIL.Image.fromarray(EVERY_VALUE))
    grey = as_it_is(1)(PIL.Image.fromarray(rgb.permute(1, 2, 0).numpy()))

    assert torch.equal(rgb, pixels_of(EVERY_VALUE).expand(3, -1, -1))
    assert torch.equal(grey, pixels_of(EVERY_VALUE))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_white_is_white_in_every_mode(mode, channels):
    white = (
        PIL.Image.fromarray(np.full((8, 8), 65535, np.uint16))
        if mode.startswith("I")
        else PIL.Image.new("RGB", (8, 8), "white")
    )

    found = as_it_is(channels, 8)(white.convert(mode) if mode != "I;16" else white)

    assert torch.equal(found, torch.full((channels, 8, 8), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("alpha", "expected"), [(255, (200, 100, 50)), (0, (255, 255, 255)), (51, (244, 224, 214))]
)
def test_transparency_is_laid_on_white(alpha, expected):
    found = as_it_is(3, 2)(PIL.Image.new("RGBA", (2, 2), (200, 100, 50, alpha)))

    assert tuple(found[:, 0, 0].tolist()) == expected  # 51 / 255 of the colour, 204 / 255 of white


def test_a_transparent_palette_colour_becomes_white():
    image = PIL.Image.new("P", (2, 2), 3)
    image.putpalette([0, 0, 0] * 256)
    stored = BytesIO()
    image.save(stored, "PNG", transparency=3)

    assert as_it_is(1, 2)(PIL.Image.open(stored)).tolist() == [[[255, 255], [255, 255]]]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(format_name):
    stored = BytesIO()
    PIL.Image.fromarray(
        np.array([[0, 128, 129], [257, 300, 32768], [514, 65000, 65535]], np.uint16)
    ).save(stored, format_name)

    found = as_it_is(1, 3)(PIL.Image.open(stored))

    assert found.tolist() == [[[0, 0, 1], [1, 1, 128], [2, 253, 255]]]  # round(v / 257)


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.ones((4, 4), np.float32), "floating-point"),
        (np.full((4, 4), 70000, np.int32), "32-bit"),
    ],
)
def test_pixels_without_a_stated_range_are_an_error(pixels, kind):
    with pytest.raises(
        InputError, match=f"scan.tif cannot be read: it has {kind}.*convert it to 8 or 16 bits"
    ):
        as_it_is(1, 4)(PIL.Image.fromarray(pixels), name="scan.tif")


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format_name):
    image = PIL.Image.fromarray(EVERY_VALUE).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    stored = BytesIO()
    image.save(stored, format_name, exif=exif.tobytes())

    found = as_it_is()(PIL.Image.open(stored))

    assert torch.equal(
        found, pixels_of(PIL.ImageOps.exif_transpose(PIL.Image.open(stored)).convert("RGB"))
    )


# What each EXIF orientation says about the place of the picture's first row and first column.
TURNED = {
    1: NUMBERS,
    2: NUMBERS[:, ::-1],
    3: NUMBERS[::-1, ::-1],
    4: NUMBERS[::-1],
    5: NUMBERS.transpose(1, 0, 2),
    6: np.rot90(NUMBERS, -1),
    7: NUMBERS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(NUMBERS),
}


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_upright_image_is_turned_as_exif_defines(orientation, format_name):
    stored = BytesIO(with_orientation(orientation, format_name))

    assert np.array_equal(np.asarray(upright(PIL.Image.open(stored))), TURNED[orientation])


def with_orientation(orientation, format_name):
    image, stored = PIL.Image.fromarray(NUMBERS), BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(stored, format_name, exif=exif.tobytes())
    return stored.getvalue()


@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_jpeg_is_the_stored_one_turned(orientation):
    stored = with_orientation(orientation, "JPEG")
    as_stored = np.asarray(PIL.Image.open(BytesIO(stored)))

    found = np.asarray(upright(PIL.Image.open(BytesIO(stored))))

    if orientation == 5:
        assert np.array_equal(found, as_stored.transpose(1, 0, 2))
    assert np.array_equal(
        found, np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(BytesIO(stored))))
    )


def test_turning_leaves_the_given_image_alone():
    image = PIL.Image.open(BytesIO(with_orientation(6, "PNG")))

    turned = upright(image)

    assert np.array_equal(np.asarray(image), NUMBERS)
    assert np.array_equal(np.asarray(upright(image)), np.asarray(turned))
    assert np.array_equal(np.asarray(upright(turned)), np.asarray(turned))


def test_an_image_whose_other_exif_tags_cannot_be_written_again_is_turned():
    """A date with the tag of the bits per sample: Pillow reads it, and cannot write it."""
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2020:01:01 00:00:00"
    damaged = exif.tobytes().replace(b"\x01\x32\x00\x02", b"\x01\x02\x00\x02")
    stored = BytesIO()
    PIL.Image.fromarray(NUMBERS).save(stored, "PNG", exif=damaged)
    with pytest.raises(struct.error):
        PIL.ImageOps.exif_transpose(PIL.Image.open(stored))

    assert np.array_equal(np.asarray(upright(PIL.Image.open(stored))), TURNED[6])


def test_damaged_exif_leaves_the_image_as_stored():
    stored = BytesIO()
    PIL.Image.fromarray(NUMBERS).save(stored, "PNG", exif=b"Exif\0\0no such thing")

    assert torch.equal(as_it_is()(PIL.Image.open(stored)), pixels_of(NUMBERS))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (10, 33), (16, 17)])
def test_the_shorter_side_is_resized_and_the_middle_kept(size):
    image = PIL.Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    width, height = (round(side * 16 / min(size)) for side in size)
    resized = pixels_of(image.resize((width, height), PIL.Image.Resampling.LANCZOS))

    found = Transform(16, resize="lanczos")(image)

    assert torch.equal(found, resized[:, (height - 16) // 2 :, (width - 16) // 2 :][:, :16, :16])


@pytest.mark.parametrize("resize", ["lanczos", "bicubic", "bilinear"])
def test_resizing_is_antialiased(resize):
    stripes = PIL.Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))

    found = Transform(8, 1, resize=resize)(stripes)[:, :, 1:-1].float()

    assert (
        found - 127.5
    ).abs().max() <= 3  # a filter that only samples would give 0 or 255; 3: the rounded weights


def test_random_crops_reach_every_place_equally():
    image = PIL.Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5))
    transform = as_it_is(1, 2, crop="random")

    corners = torch.tensor(
        [transform(image, Rng(0, samples=[k]))[0, 0, 0].item() for k in range(1200)]
    )

    counts = corners.bincount()
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]
    assert (
        counts[counts > 0] - 100
    ).abs().max() < 40  # 4 standard deviations of a binomial count around 100


def test_a_flip_mirrors_half_of_the_samples_left_to_right():
    image = PIL.Image.fromarray(NUMBERS)
    plain = as_it_is()(image)

    found = [as_it_is(flip=True)(image, Rng(0, samples=[k])) for k in range(400)]

    assert all(torch.equal(f, plain) or torch.equal(f, plain.flip(2)) for f in found)
    assert abs(sum(torch.equal(f, plain) for f in found) - 200) < 40  # 4 standard deviations


def test_crop_and_flip_are_those_of_the_sample():
    image, transform = (
        PIL.Image.fromarray(NUMBERS),
        as_it_is(resolution=8, crop="random", flip=True),
    )

    assert torch.equal(transform(image, Rng(3, samples=[7])), transform(image, Rng(3, samples=[7])))
    assert not torch.equal(
        transform(image, Rng(3, samples=[7])), transform(image, Rng(4, samples=[7]))
    )


def test_the_deterministic_transform_needs_no_generator():
    image = PIL.Image.fromarray(NUMBERS)

    found = as_it_is(resolution=8, crop="random", flip=True).deterministic()

    assert found == as_it_is(resolution=8)
    assert torch.equal(found(image), pixels_of(NUMBERS)[:, 4:12, 4:12])


def test_an_image_smaller_than_the_crop_is_an_error_with_a_remedy():
    with pytest.raises(InputError) as error:
        as_it_is(resolution=32)(PIL.Image.new("RGB", (40, 20)), name="a/b.png")

    assert str(error.value) == (
        "a/b.png is 40x20, smaller than resolution 32, and resize is none. Write resize: "
        "bicubic, or a resolution of at most 20."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "transform.resolution: expected greater than or equal to 1, got 0"),
        ({"resolution": 8, "channels": 4}, "transform.channels: expected 1 or 3, got 4"),
        (
            {"resolution": 8, "resize": "nearest"},
            "transform.resize: expected 'lanczos', 'bicubic', 'bilinear' or 'none', got 'nearest'",
        ),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        Transform(**options)


def test_every_pixel_survives_the_unit_range():
    pixels = torch.arange(256, dtype=torch.uint8)

    unit = to_unit_range(pixels)

    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (-1, 1)
    assert torch.equal(to_uint8(unit), pixels)


def test_values_beyond_the_range_are_clamped_and_others_rounded():
    assert to_uint8(torch.tensor([-1.5, -1 + 0.6 / 127.5, 0.999, 2.0])).tolist() == [0, 1, 255, 255]


# Sizes and geometry


@pytest.mark.parametrize("original", [(20, 40), (40, 20), (10, 33), (16, 17), (7, 3)])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (24, 8)])
def test_an_image_covers_its_size_and_no_more(original, size):
    height, width = covering_size(original, size)

    assert height == size[0] or width == size[1]
    assert height >= size[0]
    assert width >= size[1]
    assert abs(height / width - original[0] / original[1]) * width <= 0.5 * max(
        1, original[0] / original[1]
    )  # rounded to a pixel


def test_an_image_is_cropped_to_a_stated_size():
    image = PIL.Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    )
    resized = pixels_of(image.resize((24, 36), PIL.Image.Resampling.BICUBIC))

    pixels, geometry = Transform(16).place(image, size=(12, 24))

    assert torch.equal(pixels, resized[:, 12:24])
    assert geometry == (30, 20, 12, 0, 12, 24)


def test_the_geometry_of_a_square_is_that_of_the_resized_image():
    placed = Transform(16).place(PIL.Image.new("RGB", (64, 32)))

    assert placed.geometry == (32, 64, 0, 8, 16, 16)
    assert torch.equal(placed.pixels, Transform(16)(PIL.Image.new("RGB", (64, 32))))


def test_the_crops_place_is_found_again_in_the_mirrored_image():
    image = PIL.Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    )
    transform, mirrored = as_it_is(resolution=8, crop="random", flip=True), set()

    for k in range(20):
        pixels, (height, width, top, left, *size) = transform.place(image, Rng(0, samples=[k]))
        assert [height, width, *size] == [20, 30, 8, 8]
        sides = [
            pixels_of(side)[:, top : top + 8, left : left + 8]
            for side in (np.array(image), np.array(image)[:, ::-1])
        ]
        matches = [torch.equal(pixels, side) for side in sides]
        assert any(matches)
        mirrored.add(matches[1])

    assert mirrored == {True, False}


def test_the_original_size_is_that_of_the_upright_image():
    image = PIL.Image.fromarray(NUMBERS[:, :8])
    exif = image.getexif()
    exif[0x0112] = 6
    stored = BytesIO()
    image.save(stored, "JPEG", exif=exif.tobytes())

    assert Transform(4).place(PIL.Image.open(stored)).geometry == (8, 16, 0, 2, 4, 4)


def test_it_is_known_whether_samples_differ():
    assert [
        as_it_is(**options).is_random for options in ({}, {"flip": True}, {"crop": "random"})
    ] == [False, True, True]
