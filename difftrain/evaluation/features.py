"""Images to feature vectors: the contract, the pixels themselves, and a classifier trained on the data at hand.

A trained extractor is trained, or read from its cache, by the main process alone; the others receive its weights, so the
numbers are the same on all. Distances between such features are never called FID: that name belongs to one network.
"""

from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from difftrain.data.digits import Digits
from difftrain.data.items import ImageDataset, Images, ImageStream, load_images
from difftrain.data.transform import Transform, to_unit_range
from difftrain.evaluation.classifier import NUM_FEATURES, SETTINGS, STEPS
from difftrain.evaluation.storage import digest
from difftrain.evaluation.weights import shared_classifier
from difftrain.registry import DATASETS, FEATURES, GIVEN, InputError, NonNegativeInt, PositiveInt, dump

BATCH = 256


class FeatureExtractor(Protocol):
    """uint8 images [N, C, H, W] -> float32 features [N, num_features]; row i depends on image i alone."""

    name: str
    num_features: int

    def protocol(self) -> dict[str, Any]:
        """JSON-able: everything that fixes the numbers."""

    def __call__(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Classifies(Protocol):
    """What an extractor that also names classes has beside the rest."""

    def classify(self, images: Tensor) -> Tensor:
        """The most likely class of each image, [N] long."""


@FEATURES.register("pixels")
class Pixels:
    """f(x) = x / 255, flattened: D = C H W."""

    name = "pixels"

    def __init__(self, shape: Annotated[tuple[int, int, int], GIVEN]):
        self.shape = tuple(shape)
        self.num_features = self.shape[0] * self.shape[1] * self.shape[2]

    def protocol(self) -> dict[str, Any]:
        return {"type": self.name, "images": list(self.shape), "resize": None, "input": "uint8 / 255"}

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images, self.shape, self.name)
        return images.flatten(1).float() / 255


class ClassifierFeatures:
    """The 64 features before the last layer of a classifier trained on labelled images; `accuracy` is that on unseen ones."""

    name: str
    num_features = NUM_FEATURES

    def learn(self, training: Images, unseen: Images, source: Any, seed: int, steps: int, cache: Path | None) -> None:
        """source: what the protocol calls the training images. cache: a folder for the weights, or None."""
        assert training.labels is not None
        assert unseen.labels is not None
        num_classes = int(torch.cat([training.labels, unseen.labels]).max()) + 1
        self.network = shared_classifier(training, num_classes, seed, steps, cache, self.name)
        self.accuracy = float((self.classify(unseen.pixels) == unseen.labels).double().mean())
        self.described = {
            "type": self.name, "seed": seed, "steps": steps, "settings": SETTINGS,
            "training": {"data": source, "count": len(training), "digest": digest(training.pixels, training.labels)},
            "weights": digest(*self.network.state_dict().values()), "accuracy": self.accuracy,
            "images": list(self.network.shape), "resize": None, "input": "uint8 / 127.5 - 1",
        }  # fmt: skip

    def protocol(self) -> dict[str, Any]:
        return dict(self.described)

    def __call__(self, images: Tensor) -> Tensor:
        return self._batched(images, self.network.features)

    def classify(self, images: Tensor) -> Tensor:
        return self._batched(images, self.network).argmax(dim=1)

    @torch.no_grad()
    def _batched(self, images: Tensor, function: torch.nn.Module) -> Tensor:
        check_images(images, self.network.shape, self.name)
        return torch.cat([function(to_unit_range(batch.cpu())) for batch in images.split(BATCH)])


@FEATURES.register("digits_classifier")
class DigitsClassifier(ClassifierFeatures):
    """Features of a classifier of the handwritten digits, trained on their part `classifier`; accuracy on `held_out`."""

    name = "digits_classifier"

    def __init__(self, seed: NonNegativeInt = 0, cache: Annotated[Path | None, GIVEN] = None):
        training, unseen = (load_images(Digits(part), Transform(8, channels=1, resize="none")) for part in ("classifier", "held_out"))
        self.learn(training, unseen, {"type": "digits", "part": "classifier"}, seed, STEPS, cache)


@FEATURES.register("classifier")
class Classifier(ClassifierFeatures):
    """Features of a classifier of one's own labelled images, trained on four of five; accuracy on the fifth.

    `data` must be neither the images that the diffusion model trains on nor the reference: their features would be known by heart.
    """

    name = "classifier"

    def __init__(
        self,
        data: Annotated[ImageDataset, DATASETS],
        transform: Annotated[Transform, GIVEN],
        seed: NonNegativeInt = 0,
        steps: PositiveInt = STEPS,
        cache: Annotated[Path | None, GIVEN] = None,
    ):
        if isinstance(data, ImageStream):
            raise InputError("features 'classifier' read their images several times: give a data set without streaming.")
        training, unseen = four_fifths(load_images(data, transform), self.name)
        self.learn(training, unseen, dump(data) if hasattr(data, "registered_as") else type(data).__name__, seed, steps, cache)


def four_fifths(images: Images, name: str) -> tuple[Images, Images]:
    """Four of five images of each class, and every fifth one."""
    if images.labels is None:
        raise InputError(f"features {name!r} train a classifier and need labelled images. Without labels: features: {{type: pixels}}.")
    ordered = images.labels.argsort(stable=True)
    fifth = torch.arange(len(ordered)) % 5 == 4
    if not fifth.any():
        raise InputError(f"features {name!r}: {len(images)} images are too few to train a classifier on.")
    first, second = (Images(images.pixels[rows], images.labels[rows]) for rows in (ordered[~fifth], ordered[fifth]))
    return first, second


def check_images(images: Tensor, shape: tuple[int, ...], name: str) -> None:
    if images.dtype != torch.uint8 or images.shape[1:] != shape:
        raise InputError(f"features {name!r} take uint8 images [N, {', '.join(map(str, shape))}], got {images.dtype} {list(images.shape)}.")
