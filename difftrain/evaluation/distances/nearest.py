"""How near each image lies to the training images, in pixels.

Other scores do not notice copies: a copy of the training set scores well.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.core.errors import InputError

SIDE = 64  # larger images are averaged down to this many pixels a side
CHUNK = 4096  # training images that are compared at once
# Pixels that are multiplied at once: sums of so many products of -128..127 are at most 2^24, so
# float32 holds them exactly, in any order and with inputs rounded to 8 bits.
PIXELS = 1024
MOST_HELD = 2**30  # bytes of training images that stay on the device
CPU = torch.device("cpu")


class Piece(NamedTuple):
    """Some training images.

    Args:
        pixels: Their pixels [m, P] uint8.
        squares: |x - 128|^2 [m] of each, int32.
    """

    pixels: Tensor
    squares: Tensor

    def to(self, device: torch.device) -> "Piece":
        """Return the piece on a device."""
        return Piece(self.pixels.to(device), self.squares.to(device))


class NearestTraining:
    """Finds the nearest training image of each image.

    Distances are Euclidean over pixels in [0, 1], of images averaged down to at most 64 x 64. They
    are computed from integers, so they are the same on every device, and that of a copy is 0. Of
    several nearest images the first one counts.

    Args:
        training: The training images, in blocks [m, C, H, W] uint8. Each block is averaged down
            before the next one is taken, so full-size images never lie in memory together.
        device: Where images are compared. It holds up to 1 GiB of training images; others are
            moved there at each call.

    Raises:
        InputError: If there are none.
    """

    def __init__(self, training: Iterable[Tensor], device: torch.device = CPU):
        self.shape: tuple[int, ...] = ()
        self.device = device
        rows = []
        for block in training:
            self.shape = tuple(block.shape[1:])
            rows.append(shrunk(block))
        if not any(map(len, rows)):
            raise InputError("there are no training images to compare with.")
        self.pieces: list[Piece] = []
        num_held = max(MOST_HELD // bytes_of_one(self.shape), CHUNK)
        for number, pixels in enumerate(torch.split(torch.cat(rows), CHUNK)):
            piece = Piece(pixels, squared_norms(pixels))
            is_held = (number + 1) * CHUNK <= num_held
            self.pieces.append(piece.to(device) if is_held else piece)

    def __call__(self, images: Tensor) -> Tensor:
        """Compare images [b, C, H, W] uint8 with all training images.

        Returns:
            [b, 2] float64 on the CPU: the distance to the nearest training image, and its index.

        Raises:
            InputError: If the images have another shape than the training images.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(
                f"images {list(images.shape[1:])} cannot be compared with training images "
                f"{list(self.shape)}."
            )
        # The averages are taken on the CPU: a device may round them differently.
        own = shrunk(images.cpu())
        own_piece = Piece(own, squared_norms(own)).to(self.device)
        most = torch.iinfo(torch.int32).max
        nearest = torch.full((len(own),), most, dtype=torch.int32, device=self.device)
        index = torch.zeros_like(nearest)
        start = 0
        for piece in self.pieces:
            squares = squared_distances(own_piece, piece.to(self.device))
            least = squares.amin(dim=1)
            place = first_place(squares, least) + start
            is_nearer = least < nearest
            nearest = torch.where(is_nearer, least, nearest)
            index = torch.where(is_nearer, place, index)
            start += len(piece.pixels)
        distance = nearest.cpu().double().sqrt() / 255
        return torch.stack([distance, index.cpu().double()], dim=1)


def squared_distances(a: Piece, b: Piece) -> Tensor:
    """Return the squared distances of all pairs of images, [n, m] int32, exactly."""
    x, y = centred(a.pixels), centred(b.pixels)
    products = torch.zeros(len(x), len(y), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], PIXELS):
        part = slice(start, start + PIXELS)
        products += (x[:, part] @ y[:, part].T).int()
    return a.squares[:, None] + b.squares - 2 * products


def squared_norms(pixels: Tensor) -> Tensor:
    """Return |x - 128|^2 [n] int32 of pixels [n, P] uint8."""
    return (pixels.int() - 128).square().sum(dim=1, dtype=torch.int32)


def first_place(values: Tensor, least: Tensor) -> Tensor:
    """Return the first column [n] of values [n, m] that holds the row's least value [n]."""
    columns = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    return torch.where(values == least[:, None], columns, values.shape[1]).amin(dim=1)


def shrunk(images: Tensor) -> Tensor:
    """Average images [b, C, H, W] uint8 down to at most 64 x 64, as rows [b, P] uint8."""
    if max(images.shape[2:]) > SIDE:
        sides = (min(images.shape[2], SIDE), min(images.shape[3], SIDE))
        images = F.adaptive_avg_pool2d(images.float(), sides).round().to(torch.uint8)
    return images.flatten(1)


def centred(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as whole numbers -128..127 in float32."""
    return pixels.float() - 128


def bytes_of_one(shape: tuple[int, ...]) -> int:
    """Return the bytes that are kept of a training image of a shape (C, H, W)."""
    channels, height, width = shape
    return channels * min(height, SIDE) * min(width, SIDE)
