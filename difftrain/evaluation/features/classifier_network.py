"""A small convolutional classifier, trained on the spot: features without a download.

It is trained on one thread under a random state of its own. So a seed gives the same weights on
any number of processes of a machine, and the program's own random numbers stay where they were.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftrain.core.console import wing_logger
from difftrain.core.digests import digest, weights_digest
from difftrain.core.errors import InputError
from difftrain.core.files import write_beside
from difftrain.core.processes import is_main, sum_over_processes
from difftrain.core.rng import Rng
from difftrain.data.items import Images
from difftrain.data.transform import to_unit_range
from difftrain.evaluation.agreement import together

logger = wing_logger(__name__)

NUM_FEATURES = 64
WEIGHTS = "weights_digest"  # the key in the file's metadata
# On 8 x 8 digits 98 % of unseen ones are right after this many steps; twice as many add nothing.
STEPS = 300
SETTINGS: dict[str, Any] = {  # what fixes the weights apart from data, seed and steps
    "version": 1,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "weight_decay": 1e-2,
    "noise": 0.1,
    "shift": 1,
    "label_smoothing": 0.05,
}


class ClassifierNetwork(nn.Module):
    """A network from images [B, C, H, W] in [-1, 1] to `features` [B, 64], and on to logits.

    Stages of convolution, batch normalisation and pooling halve the shorter side to 2 or 3; a
    pooled 2 x 2 grid remains. One linear layer gives the logits [B, classes].

    Args:
        shape: (C, H, W) of the images, at least 8 x 8 pixels.
        num_classes: The number of classes.
        dropout: Dropout before the features.

    Raises:
        InputError: If the images are too small.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, dropout: float = 0.25):
        super().__init__()
        channels, height, width = shape
        side = min(height, width)
        if side < 8:
            raise InputError(
                f"images of {height} x {width} pixels are too small for the classifier: expected "
                "at least 8 x 8."
            )
        self.shape = tuple(shape)
        widths = [min(32 * 2**stage, 128) for stage in range(side.bit_length() - 2)]
        layers = convolution_layers(channels, widths[0])
        for before, after in zip([widths[0], *widths], widths, strict=False):
            layers += [*convolution_layers(before, after), nn.MaxPool2d(2)]
        layers += [
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * widths[-1], NUM_FEATURES),
            nn.ReLU(),
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, classes] of images [B, C, H, W]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def convolution_layers(before: int, after: int) -> list[nn.Module]:
    """Return a convolution from `before` to `after` channels, with its normalisation."""
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


def train_classifier(
    images: Images, num_classes: int, seed: int, steps: int = STEPS
) -> ClassifierNetwork:
    """Train a classifier on the CPU; the same for the same images, seed and steps.

    Args:
        images: Labelled images.
        num_classes: The number of classes.
        seed: Seed of weights, order and augmentation.
        steps: Updates.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: If the images have no labels, or labels outside 0 to num_classes - 1.
    """
    labels = checked_labels(images, num_classes)
    cpu = torch.device("cpu")
    with torch.enable_grad(), one_thread(), Rng(seed).global_state("classifier", cpu):
        # The network, and how it is trained
        network = ClassifierNetwork(images.pixels.shape[1:], num_classes).train()
        lr, decay = SETTINGS["learning_rate"], SETTINGS["weight_decay"]
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=decay)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        smoothing = SETTINGS["label_smoothing"]
        # The updates
        for rows in batch_rows(len(labels), steps):
            logits = network(augmented(to_unit_range(images.pixels[rows])))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            rates.step()
    return network.eval().requires_grad_(False)


def checked_labels(images: Images, num_classes: int) -> Tensor:
    """Return the labels [N] of images.

    Args:
        images: The images.
        num_classes: The number of classes.

    Raises:
        InputError: If there are no images, no labels, or labels outside 0 to num_classes - 1.
    """
    if images.labels is None:
        raise InputError(
            "a classifier is trained on labelled images, but these have no labels. Write features: "
            "{type: pixels}."
        )
    if len(images.labels) == 0:
        raise InputError("there are no images to train a classifier on.")
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"labels run from {low} to {high}, but {num_classes} classes are numbered 0 to "
            f"{num_classes - 1}."
        )
    return images.labels


def batch_rows(num_images: int, steps: int) -> tuple[Tensor, ...]:
    """Return the row numbers of each step's batch: one permutation after another, cut up."""
    size = int(SETTINGS["batch_size"])
    needed = steps * size
    order = torch.cat([torch.randperm(num_images) for _ in range(-(-needed // num_images))])
    return torch.split(order[:needed], size)


def augmented(images: Tensor) -> Tensor:
    """Shift images [B, C, H, W] by up to one pixel, with edges repeated, and add a little noise."""
    shift = SETTINGS["shift"]
    num, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * shift + 1, (2, num, 1))
    rows = down + torch.arange(height)  # [B, H]
    columns = right + torch.arange(width)  # [B, W]
    every = torch.arange(num)[:, None, None]
    moved = padded[every, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    noise: Tensor = SETTINGS["noise"] * torch.randn_like(images)
    return moved.permute(0, 3, 1, 2) + noise


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread within, so that sums are taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shared_classifier(
    images: Images, num_classes: int, seed: int, steps: int, cache: Path | None, name: str
) -> ClassifierNetwork:
    """Return the classifier of some images, with the same weights on every process. Collective.

    Args:
        images: Labelled images.
        num_classes: The number of classes.
        seed: Seed of the training.
        steps: Updates.
        cache: A folder where the main process keeps the weights; None keeps none.
        name: The name with which their file begins.

    Raises:
        InputError: If the images cannot be trained on, or if a file in the cache is broken.
    """

    def own() -> ClassifierNetwork:
        if is_main():
            return trained_or_cached(images, num_classes, seed, steps, cache, name)
        network = ClassifierNetwork(images.pixels.shape[1:], num_classes)
        return network.eval().requires_grad_(False)

    network = together(own)
    state = {}
    for key, value in network.state_dict().items():
        state[key] = sum_over_processes(value if is_main() else torch.zeros_like(value))
    network.load_state_dict(state)
    return network


def trained_or_cached(
    images: Images, num_classes: int, seed: int, steps: int, cache: Path | None, name: str
) -> ClassifierNetwork:
    """Train a classifier, or read it from the file of these images, seed, steps and settings.

    Args:
        images: Labelled images.
        num_classes: The number of classes.
        seed: Seed of the training.
        steps: Updates.
        cache: The folder of the file; None keeps none.
        name: The name with which the file begins.
    """
    if cache is None:
        return train_classifier(images, num_classes, seed, steps)
    settings = f"{num_classes} classes, seed {seed}, {steps} steps, {SETTINGS}"
    mark = digest(images.pixels, images.labels, settings)
    path = Path(cache) / f"{name}-{mark}.safetensors"
    if path.exists():
        found = read_classifier(path, images.pixels.shape[1:], num_classes)
        if found is not None:
            return found
        logger.info(f"{path} does not hold what was written; the classifier is trained again")
    network = train_classifier(images, num_classes, seed, steps)
    state = network.state_dict()
    with write_beside(path) as beside:
        save_file(state, beside, {WEIGHTS: weights_digest(state)})
    return network


def read_classifier(path: Path, shape: Sequence[int], num_classes: int) -> ClassifierNetwork | None:
    """Read a classifier from its file.

    Args:
        path: The file.
        shape: (C, H, W) of its images.
        num_classes: The number of its classes.

    Returns:
        The network in eval mode; None if the file holds anything else than was written.
    """
    network = ClassifierNetwork(shape, num_classes)
    try:
        state = load_file(path)
        with safe_open(path, "pt") as opened:
            written = (opened.metadata() or {}).get(WEIGHTS)
        if written != weights_digest(state):
            return None
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError):
        return None
    return network.eval().requires_grad_(False)
