"""Images to feature vectors without a download: the pixels themselves, and a classifier trained on the data at hand.

A trained extractor is trained, or read from its cache, by the main process alone; the others receive its weights, so the
numbers are the same on all. Distances between such features are never called FID: that name belongs to one network.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from difftrain.data.digits import Digits
from difftrain.data.items import ImageDataset, Images, ImageStream, load_images
from difftrain.data.transform import Transform, to_unit_range
from difftrain.evaluation.classifier import NUM_FEATURES, SETTINGS, STEPS
from difftrain.evaluation.extractor import check_images
from difftrain.evaluation.weights import shared_classifier
from difftrain.registry import DATASETS, FEATURES, GIVEN, InputError, NonNegativeInt, PositiveInt, dump
from difftrain.storage import digest

BATCH = 256
CPU = torch.device("cpu")


@FEATURES.register("pixels")
class Pixels:
    """f(x) = x / 255, flattened: D = C H W."""

    name = "pixels"
    gives: ClassVar[frozenset[str]] = frozenset()
    preset: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, shape: Annotated[tuple[int, int, int], GIVEN]):
        self.shape = tuple(shape)
        self.widths = {"features": math.prod(self.shape)}

    def protocol(self) -> dict[str, Any]:
        return {"type": self.name, "images": list(self.shape), "resize": None, "input": "uint8 / 255"}

    def extract(self, images: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        check_images(images, self.name, self.shape)
        return {"features": images.flatten(1).float().cpu() / 255}


class ClassifierFeatures:
    """The 64 features before the last layer of a classifier trained on labelled images; `accuracy` is that on unseen ones."""

    name: str
    trains_here: ClassVar[bool] = True  # so that it is not built before the run may begin
    gives: ClassVar[frozenset[str]] = frozenset({"logits", "classes"})
    preset: ClassVar[Mapping[str, Any]] = {}

    def learn(
        self, training: Images, unseen: Images, source: Any, seed: int, steps: int, cache: Path | None, device: torch.device
    ) -> None:
        """source: what the protocol calls the training images. cache: a folder for the weights, or None."""
        assert training.labels is not None
        assert unseen.labels is not None
        self.num_classes = int(torch.cat([training.labels, unseen.labels]).max()) + 1
        self.widths = {"features": NUM_FEATURES, "logits": self.num_classes}
        network = shared_classifier(training, self.num_classes, seed, steps, cache, self.name)
        weights = digest(*network.state_dict().values())
        self.network, self.device = network.to(device), device
        guesses = torch.cat([self.extract(part, ("logits",))["logits"].argmax(dim=1) for part in unseen.pixels.split(BATCH)])
        self.accuracy = float((guesses == unseen.labels).double().mean())
        self.described = {
            "type": self.name, "seed": seed, "steps": steps, "settings": SETTINGS,
            "training": {"data": source, "count": len(training), "digest": digest(training.pixels, training.labels)},
            "weights": weights, "accuracy": self.accuracy,
            "images": list(self.network.shape), "resize": None, "input": "uint8 / 127.5 - 1",
        }  # fmt: skip

    def protocol(self) -> dict[str, Any]:
        return dict(self.described)

    @torch.no_grad()
    def extract(self, images: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        check_images(images, self.name, self.network.shape)
        features = torch.cat([self.network.features(to_unit_range(part.to(self.device))) for part in images.split(BATCH)])
        rows = {"features": features, "logits": self.network.head(features)}
        return {name: rows[name].float().cpu() for name in outputs}


@FEATURES.register("digits_classifier")
class DigitsClassifier(ClassifierFeatures):
    """Features of a classifier of the handwritten digits, trained on their part `classifier`; accuracy on `held_out`."""

    name = "digits_classifier"

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        cache: Annotated[Path | None, GIVEN] = None,
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        training, unseen = (load_images(Digits(part), Transform(8, channels=1, resize="none")) for part in ("classifier", "held_out"))
        self.learn(training, unseen, {"type": "digits", "part": "classifier"}, seed, STEPS, cache, device)


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
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        if isinstance(data, ImageStream):
            raise InputError("features 'classifier' read their images several times: give a data set without streaming.")
        training, unseen = four_fifths(load_images(data, transform), self.name)
        self.learn(training, unseen, dump(data) if hasattr(data, "registered_as") else type(data).__name__, seed, steps, cache, device)


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
