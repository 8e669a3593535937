"""Grids of images, contact sheets of clips, scatter plots of points."""

import numpy as np
import PIL.Image
import pytest
import torch

from difftrain.generation.pictures import contact_sheet, grid, save_grid, to_pil


def test_a_grid_puts_images_in_rows_on_white():
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)

    sheet = grid(images, columns=2)

    assert sheet.shape == (1, 7, 7)
    places = [(1, 1), (1, 4), (4, 1), (4, 4), (0, 0), (3, 3)]
    assert [sheet[0, y, x].item() for y, x in places] == [0, 1, 2, 255, 255, 255]


def test_a_contact_sheet_has_a_row_a_clip_and_its_frames_from_left_to_right():
    clips = torch.arange(6, dtype=torch.uint8).reshape(2, 1, 3, 1, 1).expand(2, 3, 3, 4, 4)

    sheet = contact_sheet(clips)

    assert sheet.shape == (3, 11, 16)
    assert sheet[0, 2::5, 2::5].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_picture_has_the_images_channels(channels, mode):
    assert to_pil(torch.zeros(channels, 4, 5, dtype=torch.uint8)).mode == mode
    assert to_pil(torch.zeros(channels, 4, 5, dtype=torch.uint8)).size == (5, 4)


@pytest.mark.parametrize(
    ("num", "num_classes", "columns"),
    [(20, 10, 10), (5, 10, 5), (9, None, 3), (10, None, 4), (30, 1000, 6)],
)
def test_a_grid_has_a_column_a_class_where_that_fits_and_is_about_square_elsewhere(
    tmp_path, num, num_classes, columns
):
    images = torch.arange(num, dtype=torch.uint8)[:, None, None, None].expand(num, 1, 2, 2)

    save_grid(images, tmp_path / "new/grid.png", num_classes)

    found = np.asarray(PIL.Image.open(tmp_path / "new/grid.png"))
    assert np.array_equal(found, grid(images, columns)[0])


def test_clips_are_shown_as_a_contact_sheet_whatever_their_classes(tmp_path):
    clips = torch.arange(8, dtype=torch.uint8)[:, None, None, None, None].expand(8, 3, 4, 5, 5)

    save_grid(clips, tmp_path / "sheet.png", num_classes=10)

    found = np.asarray(PIL.Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(found, contact_sheet(clips).permute(1, 2, 0))


@pytest.mark.parametrize("shape", [(50, 2), (50, 1), (50, 3, 4)])
def test_tensors_are_drawn_as_points(tmp_path, shape):
    """Random points spread over many rows of the picture, and equal ones lie in one place."""
    points = torch.rand(shape, generator=torch.Generator().manual_seed(0))

    save_grid(points, tmp_path / "points.png", num_classes=None)
    save_grid(torch.zeros(shape), tmp_path / "one.png", num_classes=None)

    heights = []
    for name in ("points", "one"):
        picture = np.asarray(PIL.Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        is_point = picture.max(2) - picture.min(2) > 60  # coloured: axes and text are not
        heights.append(is_point.any(axis=1).sum())
    assert heights[0] > 10 * heights[1] > 0
