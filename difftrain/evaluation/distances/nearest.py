"""How near each image lies to the training images, in pixels.

Other scores do not notice copies: a copy of the training set scores well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.core.errors import InputError

SIDE = 64  # larger images are averaged down to this many pixels a side
CHUNK = 4096  # training images that are compared at once
CANDIDATES = 4  # nearest ones in float32, of which the exact distance is computed


class NearestTraining:
    """Finds the nearest training image of each image.

    Distances are Euclidean over pixels in [0, 1], of images averaged down to at most 64 x 64. The
    distance of a copy is exactly 0.

    Args:
        training: The training images [M, C, H, W] uint8.

    Raises:
        InputError: If there are none.
    """

    def __init__(self, training: Tensor):
        if not len(training):
            raise InputError("there are no training images to compare with.")
        self.shape = tuple(training.shape[1:])
        self.small = torch.cat([shrunk(part) for part in torch.split(training, CHUNK)])

    def __call__(self, images: Tensor) -> Tensor:
        """Compare images [b, C, H, W] uint8 with all training images.

        Returns:
            [b, 2] float64: the distance to the nearest training image, and its index.

        Raises:
            InputError: If the images have another shape than the training images.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(
                f"images {list(images.shape[1:])} cannot be compared with training images "
                f"{list(self.shape)}."
            )
        own = shrunk(images)
        index = self._candidates(own)
        exact = (self.small[index].long() - own[:, None].long()).square().sum(dim=2)
        nearest = exact.min(dim=1)
        distance = nearest.values.double().sqrt() / 255
        return torch.stack(
            [distance, index.gather(1, nearest.indices[:, None])[:, 0].double()], dim=1
        )

    def _candidates(self, own: Tensor) -> Tensor:
        """Return ascending indices [b, k] of the nearest training images, found in float32."""
        wide = centred(own)
        squares = wide.square().sum(dim=1, keepdim=True)
        near = torch.zeros(len(own), 0)
        index = torch.empty(len(own), 0, dtype=torch.long)
        for start in range(0, len(self.small), CHUNK):
            others = centred(self.small[start : start + CHUNK])
            distances = squares + others.square().sum(dim=1) - 2 * wide @ others.T
            best = distances.topk(min(CANDIDATES, len(others)), dim=1, largest=False)
            near = torch.cat([near, best.values], dim=1)
            index = torch.cat([index, best.indices + start], dim=1)
        kept = near.topk(min(CANDIDATES, near.shape[1]), dim=1, largest=False).indices
        return index.gather(1, kept).sort(dim=1).values


def shrunk(images: Tensor) -> Tensor:
    """Average images [b, C, H, W] uint8 down to at most 64 x 64, as rows [b, P] uint8."""
    if max(images.shape[2:]) > SIDE:
        sides = (min(images.shape[2], SIDE), min(images.shape[3], SIDE))
        images = F.adaptive_avg_pool2d(images.float(), sides).round().to(torch.uint8)
    return images.flatten(1)


def centred(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 about 0, where products lose the least."""
    return pixels.float() - 127.5


def bytes_of_one(shape: tuple[int, ...]) -> int:
    """Return the bytes that are kept of a training image of a shape (C, H, W)."""
    channels, height, width = shape
    return channels * min(height, SIDE) * min(width, SIDE)
