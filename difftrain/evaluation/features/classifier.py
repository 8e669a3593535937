"""Features of a classifier trained on the data at hand, which needs no download.

The main process alone trains it, or reads it from its cache. The others receive its weights, so
the numbers are the same on all. Distances between such features are never called FID: that name
belongs to one network.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN, NonNegativeInt, PositiveInt
from difftrain.data.datasets.digits import Digits
from difftrain.data.items import DATASETS, Images, MapDataset, load_images
from difftrain.data.transform import Transform, to_unit_range
from difftrain.data.unreadable import ReadErrors
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.features.base import check_images
from difftrain.evaluation.features.classifier_network import (
    NUM_FEATURES,
    SETTINGS,
    STEPS,
    shared_classifier,
)
from difftrain.evaluation.parts import part_block
from difftrain.evaluation.slots import FEATURES, FeatureExtractor

BATCH = 256
CPU = torch.device("cpu")


class ClassifierFeatures(FeatureExtractor):
    """The 64 features before the last layer of a classifier trained on labelled images.

    Attributes:
        accuracy: Share of unseen images that it classifies correctly.
    """

    trains_here: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"logits", "classes"})

    def learn(
        self,
        training: Images,
        unseen: Images,
        source: Any,
        seed: int,
        steps: int,
        cache: Path | None,
        device: torch.device,
    ) -> None:
        """Train the classifier, or read it from its cache. Collective.

        Args:
            training: Labelled images to train on.
            unseen: Labelled images that measure its accuracy.
            source: What the protocol calls the training images.
            seed: Seed of the training.
            steps: Steps of the training.
            cache: A folder for the weights; None keeps none.
            device: Where it computes afterwards.
        """
        assert training.labels is not None
        assert unseen.labels is not None
        # The network
        self.num_classes = int(torch.cat([training.labels, unseen.labels]).max()) + 1
        network = shared_classifier(training, self.num_classes, seed, steps, cache, self.name)
        weights = digest(*network.state_dict().values())
        self.network, self.device = network.to(device), device
        # Its accuracy
        guesses = []
        for part in torch.split(unseen.pixels, BATCH):
            guesses.append(self.extract(part, ("logits",))["logits"].argmax(dim=1))
        self.accuracy = float((torch.cat(guesses) == unseen.labels).double().mean())
        # What fixes the numbers
        self.described = {
            "type": self.name,
            "seed": seed,
            "steps": steps,
            "settings": SETTINGS,
            "training": {
                "data": source,
                "count": len(training),
                "digest": digest(training.pixels, training.labels),
            },
            "weights": weights,
            "accuracy": self.accuracy,
            "images": list(self.network.shape),
            "resize": None,
            "input": "uint8 / 127.5 - 1",
        }

    @property
    def widths(self) -> Mapping[str, int]:
        """The widths of features and logits."""
        return {MAIN: NUM_FEATURES, "logits": self.num_classes}

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return dict(self.described)

    @torch.no_grad()
    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return features and logits of images [N, C, H, W] uint8, both from one pass."""
        check_images(samples, self.name, self.network.shape)
        self.check_outputs(outputs)
        parts = [to_unit_range(part.to(self.device)) for part in torch.split(samples, BATCH)]
        features = torch.cat([self.network.features(part) for part in parts])
        rows = {MAIN: features, "logits": self.network.head(features)}
        return {name: rows[name].float().cpu() for name in outputs}


@FEATURES.register("digits_classifier")
class DigitsClassifier(ClassifierFeatures):
    """64 features of a classifier of the handwritten digits of scikit-learn.

    It is trained on their part `classifier`; its accuracy is that on `held_out`.

    Args:
        seed: Seed of its training.
        cache: A folder for its weights; None keeps none.
        device: Where it computes.
    """

    name = "digits_classifier"

    @classmethod
    def learned_from(cls, arguments: Mapping[str, Any]) -> MapDataset:
        """Return the part of the digits that it trains on."""
        return Digits("classifier")

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        cache: Annotated[Path | None, GIVEN] = None,
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        as_they_are = Transform(8, channels=1, resize="none")
        training = load_images(Digits("classifier"), as_they_are)
        unseen = load_images(Digits("held_out"), as_they_are)
        source = {"type": "digits", "part": "classifier"}
        self.learn(training, unseen, source, seed, STEPS, cache, device)


@FEATURES.register("classifier")
class Classifier(ClassifierFeatures):
    """64 features of a classifier of your own labelled images.

    It is trained on four of five images; its accuracy is that on the fifth. `data` must be
    neither the images that the diffusion model trains on nor the reference: it would know their
    features by heart.

    Args:
        data: Labelled images.
        transform: How images are brought to the size that is scored.
        seed: Seed of its training.
        steps: Steps of its training.
        cache: A folder for its weights; None keeps none.
        device: Where it computes.
        errors: What becomes of images that cannot be read; None ends the work.

    Raises:
        InputError: If the images have no labels, are too few or too small, or come as a stream.
    """

    name = "classifier"

    @classmethod
    def learned_from(cls, arguments: Mapping[str, Any]) -> Any:
        """Return the images that it trains on."""
        return arguments["data"].build()

    def __init__(
        self,
        data: Annotated[MapDataset, DATASETS],
        transform: Annotated[Transform, GIVEN],
        seed: NonNegativeInt = 0,
        steps: PositiveInt = STEPS,
        cache: Annotated[Path | None, GIVEN] = None,
        device: Annotated[torch.device, GIVEN] = CPU,
        errors: Annotated[ReadErrors | None, GIVEN] = None,
    ):
        if data.is_stream:
            raise InputError(
                "features 'classifier' read their images several times, but the data is a stream. "
                "Write streaming: false."
            )
        readable = (errors or ReadErrors()).part(data, "evaluation.features.data")
        training, unseen = four_fifths(load_images(readable, transform), self.name)
        self.learn(training, unseen, part_block(data), seed, steps, cache, device)


def four_fifths(images: Images, name: str) -> tuple[Images, Images]:
    """Divide labelled images.

    Args:
        images: The images.
        name: The extractor's name, for messages.

    Returns:
        Four of five images of each class, and every fifth one.

    Raises:
        InputError: If they have no labels, or if there are fewer than five.
    """
    if images.labels is None:
        raise InputError(
            f"features {name!r} train a classifier and need labelled images. Without labels: "
            "features: {type: pixels}."
        )
    ordered = images.labels.argsort(stable=True)
    is_fifth = torch.arange(len(ordered)) % 5 == 4
    if not is_fifth.any():
        raise InputError(
            f"features {name!r}: {len(images)} images are too few to train a classifier on. Give "
            "at least 5."
        )
    first, second = ordered[~is_fifth], ordered[is_fifth]
    return (
        Images(images.pixels[first], images.labels[first]),
        Images(images.pixels[second], images.labels[second]),
    )
