"""Samples as pictures: grids of images, contact sheets of clips, scatter plots of points."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.core.files import write_beside

MOST_COLUMNS = 20  # classes that get a column each


def grid(images: Tensor, columns: int, padding: int = 1) -> Tensor:
    """Arrange images [N, C, H, W] uint8 in rows on white.

    Args:
        images: The images.
        columns: Images in a row.
        padding: Pixels between images.

    Returns:
        One picture [C, H', W'] uint8.
    """
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    sides = (rows * (height + padding) + padding, columns * (width + padding) + padding)
    sheet = torch.full((channels, *sides), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = padding + row * (height + padding)
        left = padding + column * (width + padding)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def contact_sheet(clips: Tensor) -> Tensor:
    """Arrange clips [N, C, F, H, W] uint8 as one picture, a row a clip."""
    return grid(clips.transpose(1, 2).flatten(0, 1), columns=clips.shape[2])


def to_pil(image: Tensor) -> Any:
    """Turn an image [C, H, W] uint8 of one or three channels into a Pillow image."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def save_grid(samples: Tensor, file: Path, num_classes: int | None) -> None:
    """Save a picture of samples.

    Args:
        samples: Images [N, C, H, W] or clips [N, C, F, H, W], uint8, or tensors [N, ...] in
            floating point, of which the first two values are drawn as points.
        file: A PNG file.
        num_classes: With up to 20 classes, images get one column a class.
    """
    if samples.is_floating_point():
        save_scatter(samples, file)
        return
    if samples.ndim == 5:
        sheet = contact_sheet(samples)
    else:
        has_columns = num_classes is not None and num_classes <= MOST_COLUMNS
        columns = num_classes if num_classes and has_columns else math.ceil(len(samples) ** 0.5)
        sheet = grid(samples, min(columns, len(samples)))
    with write_beside(file) as beside:
        to_pil(sheet).save(beside)


def save_scatter(points: Tensor, file: Path) -> None:
    """Save a scatter plot of tensors [N, ...], by the first two values of each.

    Args:
        points: The samples. Tensors of a single value are drawn over their index.
        file: A PNG file.
    """
    from matplotlib.figure import Figure

    flat = points.float().flatten(1)
    if flat.shape[1] > 1:
        x, y = flat[:, 0], flat[:, 1]
    else:
        x, y = torch.arange(len(flat)), flat[:, 0]
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(x.numpy(), y.numpy(), s=6, alpha=0.6, linewidths=0)
    axes.set_title(f"{len(flat)} samples")
    axes.grid(alpha=0.3)
    if flat.shape[1] > 1:
        axes.set_aspect("equal", adjustable="datalim")
    with write_beside(file) as beside:
        figure.savefig(beside, dpi=110)
