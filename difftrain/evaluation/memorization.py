"""How near each image lies to the training images, in pixels: what tells a good score from a copied training set."""

import torch
import torch.nn.functional as F
from torch import Tensor

from difftrain.registry import InputError

SIDE = 64  # larger images are averaged down to this many pixels a side
CHUNK = 4096  # training images that are compared at once
CANDIDATES = 4  # nearest ones in float32, of which the exact distance is taken


class NearestTraining:
    """The nearest of the training images [M, C, H, W] uint8 to each image of a batch.

    Distances are Euclidean over pixels in [0, 1], of images averaged down to at most 64 x 64; exactly 0 for a copy.
    """

    def __init__(self, training: Tensor):
        if not len(training):
            raise InputError("no training images to compare with.")
        self.shape = tuple(training.shape[1:])
        self.small = torch.cat([reduced(part) for part in training.split(CHUNK)])

    def __call__(self, images: Tensor) -> Tensor:
        """[b, 2] float64: the distance to the nearest training image, and its index."""
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(f"images {list(images.shape[1:])} cannot be compared with training images {list(self.shape)}.")
        own = reduced(images)
        wide = centred(own)
        squares = wide.square().sum(dim=1, keepdim=True)
        near, index = torch.full((len(own), 0), 0.0), torch.empty(len(own), 0, dtype=torch.long)
        for start in range(0, len(self.small), CHUNK):
            others = centred(self.small[start : start + CHUNK])
            distances = squares + others.square().sum(dim=1) - 2 * wide @ others.T
            best = distances.topk(min(CANDIDATES, len(others)), dim=1, largest=False)
            near, index = torch.cat([near, best.values], dim=1), torch.cat([index, best.indices + start], dim=1)
        index = index.gather(1, near.topk(min(CANDIDATES, near.shape[1]), dim=1, largest=False).indices).sort(dim=1).values
        exact = (self.small[index].long() - own[:, None].long()).square().sum(dim=2)
        nearest = exact.min(dim=1)
        return torch.stack([nearest.values.double().sqrt() / 255, index.gather(1, nearest.indices[:, None])[:, 0].double()], dim=1)


def reduced(images: Tensor) -> Tensor:  # [b, C, H, W] uint8 -> [b, P] uint8
    if max(images.shape[2:]) > SIDE:
        sides = (min(images.shape[2], SIDE), min(images.shape[3], SIDE))
        images = F.adaptive_avg_pool2d(images.float(), sides).round().to(torch.uint8)
    return images.flatten(1)


def centred(pixels: Tensor) -> Tensor:
    return pixels.float() - 127.5


def bytes_of_one(shape: tuple[int, ...]) -> int:
    """Of a training image [C, H, W] that is kept for the comparison."""
    channels, height, width = shape
    return channels * min(height, SIDE) * min(width, SIDE)
