"""A small convolutional classifier, trained on the spot: the feature network that needs no download.

Trained on one thread under its own random state, so that a seed gives the same weights on any number of processes of a
machine, and the program's own random numbers stay where they were.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftrain.data.items import Images
from difftrain.data.transform import to_unit_range
from difftrain.registry import InputError
from difftrain.rng import Rng

NUM_FEATURES = 64
STEPS = 300  # three seconds on one core for 8 x 8 digits, 98 % of unseen ones right; twice as many steps add nothing
SETTINGS: dict[str, Any] = {  # what fixes the weights beside data, seed and steps
    "version": 1,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "weight_decay": 1e-2,
    "noise": 0.1,
    "shift": 1,
    "label_smoothing": 0.05,
}


class ClassifierNetwork(nn.Module):
    """Images [B, C, H, W] in [-1, 1] -> `features` [B, 64], and from them by one linear layer the logits [B, classes].

    Stages of convolution, batch normalisation and pooling halve the shorter side to 2 or 3; a pooled 2 x 2 grid remains.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, dropout: float = 0.25):
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 8:
            raise InputError(f"images of {height} x {width} pixels are too small for the classifier: expected at least 8 x 8.")
        self.shape = tuple(shape)
        widths = [min(32 * 2**stage, 128) for stage in range(min(height, width).bit_length() - 2)]
        layers = convolution(channels, widths[0])
        for before, after in zip([widths[0], *widths], widths, strict=False):
            layers += [*convolution(before, after), nn.MaxPool2d(2)]
        grid = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * widths[-1], NUM_FEATURES), nn.ReLU()]
        self.features = nn.Sequential(*layers, *grid)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, classes]
        return self.head(self.features(images))


def convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


def train_classifier(images: Images, num_classes: int, seed: int, steps: int = STEPS) -> ClassifierNetwork:
    """A classifier of `images` in eval mode, on the CPU; the same for the same images, seed and steps.

    Raises InputError without labels or with labels outside 0..num_classes-1.
    """
    labels = checked_labels(images, num_classes)
    with torch.enable_grad(), one_thread(), Rng(seed).global_state("classifier", torch.device("cpu")):
        network = ClassifierNetwork(images.pixels.shape[1:], num_classes).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, SETTINGS["learning_rate"], total_steps=steps)
        for rows in batches(len(labels), steps):
            logits = network(augmented(to_unit_range(images.pixels[rows])))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=SETTINGS["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    return network.eval().requires_grad_(False)


def checked_labels(images: Images, num_classes: int) -> Tensor:  # [N] long
    if images.labels is None:
        raise InputError("a classifier is trained on labelled images, but these have no labels: use features: {type: pixels}.")
    if len(images.labels) == 0:
        raise InputError("no images to train a classifier on.")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"labels run from {low} to {high}, but {num_classes} classes are numbered 0 to {num_classes - 1}.")
    return images.labels


def batches(num_images: int, steps: int) -> tuple[Tensor, ...]:
    """Row numbers of each step's batch: one permutation after another, cut into equal pieces."""
    needed = steps * int(SETTINGS["batch_size"])
    order = torch.cat([torch.randperm(num_images) for _ in range(-(-needed // num_images))])
    return order[:needed].split(SETTINGS["batch_size"])


def augmented(images: Tensor) -> Tensor:
    """Images [B, C, H, W], each shifted by up to one pixel (edges repeated) and with a little noise."""
    shift = SETTINGS["shift"]
    num, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * shift + 1, (2, num, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)  # [B, H], [B, W]
    moved = padded[torch.arange(num)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return moved.permute(0, 3, 1, 2) + SETTINGS["noise"] * torch.randn_like(images)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within: torch computes on one thread, so that sums are taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
