"""`difftrain evaluate` and `reference` on folders of pictures of several sizes."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.commands import command, refused

from difftrain.data.transform import Transform
from difftrain.evaluation import frechet_distance

PIXELS = ["--features", "pixels"]


def photos(folder, seed, num=12):
    """Pictures of several sizes, two of them grey."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(num):
        size = (9 + i % 3, 12 - i % 4) if i % 4 < 2 else (9 + i % 4, 9 + i % 3, 3)
        noise = random.integers(0, 256, size, dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def two(tmp_path):
    return photos(tmp_path / "a", 0), photos(tmp_path / "b", 1)


def cropped(folder, side=6):
    transform = Transform(side)
    return torch.stack([transform(PIL.Image.open(file)) for file in sorted(folder.iterdir())])


def test_without_a_resize_the_message_names_folder_file_and_remedy(two):
    a, b = two

    message = refused("evaluate", "--generated", a, "--reference", b, *PIXELS)

    assert f"{a}/01.png is 11x10, but {a}/00.png is 12x9" in message
    assert "Write --resize SIDE --crop" in message
    assert "Write --resize SIDE --crop" in refused("reference", b, *PIXELS, "--out", a / "x.npz")


def test_resized_and_cropped_as_a_transform_does_it(two, tmp_path):
    a, b = two
    alike = [*PIXELS, "--resize", "6", "--crop"]
    stats, found = tmp_path / "stats.npz", tmp_path / "scores.json"

    command("evaluate", "--generated", a, "--reference", b, *alike, "--json", found)
    whole = json.loads(found.read_text())
    command("reference", b, *alike, "--out", stats)
    command("evaluate", "--generated", a, "--reference", stats, *alike, "--json", found)
    of_stats = json.loads(found.read_text())

    rows = [cropped(folder).flatten(1).double() / 255 for folder in two]
    expected = frechet_distance(*rows)
    for scores in (whole, of_stats):
        assert scores["scores"]["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-6)
        assert scores["protocol"]["reference"]["resized"]["side"] == 6
    assert "Write --resize 6 --crop" in refused(
        "evaluate", "--generated", a, "--reference", stats, *PIXELS, "--resize", "7", "--crop"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop"], "--crop: it needs a size. Write --resize 256 --crop"),
        (["--resize", "0"], "--resize 0: expected a number of pixels"),
        (["--on-error", "maybe"], "--on-error maybe: expected stop or skip"),
    ],
)
def test_options_that_mean_nothing_are_refused(two, options, message):
    a, b = two

    assert message in refused("evaluate", "--generated", a, "--reference", b, *PIXELS, *options)
    assert message in refused("reference", b, *PIXELS, "--out", a / "x.npz", *options)


def test_broken_pictures_are_named_or_skipped(two):
    a, b = two
    (a / "03.png").write_bytes(b"no picture")
    given = ["evaluate", "--generated", a, "--reference", b, *PIXELS, "--resize", "6", "--crop"]

    assert f"{a}/03.png cannot be read" in refused(*given)
    told = command(*given, "--on-error", "skip").out
    assert "--generated: 11 items are read, 1 is left out" in told
