"""Resizes against Pillow, against a loop over pixels, and against stored numbers of packages."""

import itertools
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.places import ROOT
from helpers.support import golden
from PIL import Image

from difftrain.core.errors import InputError
from difftrain.evaluation.features.resize import WAYS, resize

FORMULA = runpy.run_path(str(ROOT / "scripts" / "golden_inception.py"))
GOLDEN = golden("inception")["resizes"]
GREY = 1e-4  # of 255: a few roundings of float32


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.mark.parametrize(("case", "how"), [(case, how) for case in GOLDEN for how in GOLDEN[case]])
def test_each_way_equals_its_package(case, how):
    made = resize(FORMULA["images"](FORMULA["SMALL"][case]), how)
    if how == "pil_bicubic":
        made = made.clamp(0, 255)  # clean-fid's step after it

    for part, values in FORMULA["summary"](made).items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(GOLDEN[case][how][part]), rtol=0, atol=GREY
        )


def test_tensorflows_bilinear_is_that_of_a_loop_over_pixels():
    image = noise(1, 1, 5, 7)
    expected = torch.empty(1, 1, 4, 11, dtype=torch.float64)
    for i, j in itertools.product(range(4), range(11)):
        y, x = i * 5 / 4, j * 7 / 11
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 4), min(left + 1, 6)
        corners = image[0, 0].double()
        above = corners[top, left] * (1 - (x - left)) + corners[top, right] * (x - left)
        below = corners[bottom, left] * (1 - (x - left)) + corners[bottom, right] * (x - left)
        expected[0, 0, i, j] = above * (1 - (y - top)) + below * (y - top)

    torch.testing.assert_close(
        resize(image, "tf1_bilinear", (4, 11)).double(), expected, rtol=0, atol=GREY
    )


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 1, 64, 48), (1, 3, 512, 333)])
def test_tensorflows_bilinear_is_the_grid_that_nvidias_network_samples(shape):
    """Their file resizes by grid_sample with a shift of 1 / W - 1 / 299.

    openai/consistency_models, evaluations/inception_v3.py.
    """
    images = noise(*shape)
    n, c, h, w = shape
    theta = torch.eye(2, 3, dtype=torch.float64)
    theta[0, 2], theta[1, 2] = 1 / w - 1 / 299, 1 / h - 1 / 299
    grid = F.affine_grid(theta.expand(n, 2, 3), [n, c, 299, 299], align_corners=False)
    expected = F.grid_sample(
        images.double(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )

    # A position of up to 512 in float32 is off by 3e-5 pixels, and neighbours differ by up to 255.
    torch.testing.assert_close(
        resize(images, "tf1_bilinear").double(), expected, rtol=0, atol=512 * 2**-24 * 255 * 2
    )


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (2, 1, 64, 48), (1, 1, 299, 299), (1, 3, 512, 333), (1, 1, 9, 700)]
)
@pytest.mark.parametrize("size", [(299, 299), (17, 40)])
@pytest.mark.parametrize(
    ("how", "pillows", "grey"),
    # torch has the weights of the antialiased bilinear in float32
    [
        ("pil_bicubic", Image.Resampling.BICUBIC, GREY),
        ("torch_antialias", Image.Resampling.BILINEAR, 0.02),
    ],
)
def test_widened_filters_are_pillows_on_float_channels(shape, size, how, pillows, grey):
    images = noise(*shape)
    channels = [
        Image.fromarray(channel.numpy().astype(np.float32)) for image in images for channel in image
    ]
    expected = torch.stack(
        [torch.from_numpy(np.array(channel.resize(size[::-1], pillows))) for channel in channels]
    )

    assert (resize(images, how, size).flatten(0, 1) - expected).abs().max() < grey


def test_bicubic_overshoots_and_is_not_rounded():
    made = resize(noise(1, 1, 32, 32), "pil_bicubic")

    assert made.min() < -10
    assert made.max() > 265
    assert (made != made.round()).any()


@pytest.mark.parametrize("how", WAYS)
def test_the_right_size_is_left_as_it_is_and_images_do_not_mix(how):
    images = noise(3, 3, 299, 299)

    assert torch.equal(resize(images, how), images.float())
    torch.testing.assert_close(
        resize(images[:, :, :40, :50], how)[1:2],
        resize(images[1:2, :, :40, :50], how),
        rtol=0,
        atol=GREY,
    )


def test_the_antialiased_way_averages_what_the_plain_one_skips():
    stripes = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    stripes[..., ::4] = 200  # mean 50; a plain bilinear reduction by 8 meets two pixels of eight

    assert (resize(stripes, "torch_antialias", (8, 8)) - 50)[..., 1:-1].abs().max() < GREY
    assert (resize(stripes, "torch_bilinear", (8, 8)) - 50).abs().max() > 40


def test_ways_differ():
    made = [resize(noise(1, 3, 40, 72), how) for how in WAYS]

    assert [
        float((a - b).abs().max()) > 1 for a, b in itertools.combinations(made[:2] + made[3:], 2)
    ] == [True] * 3


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), noise(3, 8, 8)])
def test_other_images_are_refused(images):
    with pytest.raises(InputError, match=r"takes uint8 images \[N, C, H, W\], got"):
        resize(images, "tf1_bilinear")


def test_an_unknown_way_is_refused():
    with pytest.raises(InputError, match=r"unknown resize 'lanczos'; known: tf1_bilinear"):
        resize(noise(1, 3, 8, 8), "lanczos")
