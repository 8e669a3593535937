"""The slots of evaluation: feature extractors and metrics, each beside its registry."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import Registry
from difftrain.evaluation.evidence import MAIN, Evidence, Need

FEATURES = Registry("features", "samples to feature vectors", ["difftrain.evaluation.features"])
METRICS = Registry("metric", "scores of generated samples", ["difftrain.evaluation.metrics"])

Better = Literal["lower", "higher", "near 1"]
Scores = dict[str, dict[str, Any]]
"""Scores by name. Each is JSON-able and has at least a `value`."""


class FeatureExtractor(ABC):
    """Turns samples into rows of features; row i depends on sample i alone.

    Attributes:
        name: What scores and messages call it.
        takes: Whether it looks at uint8 images [N, C, H, W] or at tensors [N, ...] in floating
            point.
        takes_any_size: Whether it brings images of any size to its own, so that those of one set
            may differ in size.
        gives: What metrics can count on besides the features, known before one is built: "logits"
            (class scores before softmax), "spatial" (a flattened map), "classes" (the logits are
            those of the data's labels), "text" (the method `text`).
        trains_here: Whether building it trains a network, so that it is not built before a run
            may begin.
        preset: Settings of metrics that belong to its protocol, such as {"kid_subsets": 100}.
        device: Where it computes; images are compared with training images there too.
    """

    name: str
    takes: ClassVar[Literal["images", "tensors"]] = "images"
    takes_any_size: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset()
    trains_here: ClassVar[bool] = False
    preset: Mapping[str, Any] = {}
    device: torch.device = torch.device("cpu")

    @classmethod
    def learned_from(cls, arguments: Mapping[str, Any]) -> Any:
        """Return the data set that building it trains on; None if it trains on nothing.

        Args:
            arguments: The arguments of its block.
        """
        return None

    @property
    @abstractmethod
    def widths(self) -> Mapping[str, int]:
        """The width of each output; "features" is always one of them."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Return everything that fixes the numbers, JSON-able and without paths.

        Of a network these are its weights by digest, the resize, the scaling of pixels, the
        rounding.
        """

    @abstractmethod
    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return the named outputs, each [N, width] float32 on the CPU.

        Args:
            samples: What `takes` says.
            outputs: Names among those of `widths`.

        Raises:
            InputError: If the samples are of another kind, or if an output is unknown.
        """

    def text(self, captions: Sequence[str]) -> Tensor:
        """Map captions to the space of the features of images.

        Returns:
            [N, D] float32 on the CPU.

        Raises:
            InputError: If the extractor reads no text, which is the default.
        """
        raise InputError(f"features {self.name!r} read no text. Write features: {{type: clip}}.")

    def check_outputs(self, outputs: Collection[str]) -> None:
        """Refuse outputs that the extractor does not have.

        Raises:
            InputError: If one of them is unknown.
        """
        unknown = sorted(set(outputs) - set(self.widths))
        if unknown:
            raise InputError(
                f"features {self.name!r} have no output {unknown[0]!r}; known: "
                f"{', '.join(self.widths)}."
            )


class Metric(ABC):
    """Computes one score or several from what an evaluation has gathered.

    A metric of your own derives from it, is registered in `METRICS`, and says in `needs` what it
    looks at.

    Attributes:
        needs: What must be there for it.
        better: Which way its scores are better. A metric without it is refused, since a checkpoint
            would be picked by a guess; or it overrides `better_of`.
        titles: How people call its scores; a score that is not in it is called by its name.
        only_with: The features whose scores alone bear this metric's name; None: any features.
        instead: What a message proposes for other features.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    better: ClassVar[Better]
    titles: ClassVar[Mapping[str, str]] = {}
    only_with: ClassVar[str | None] = None
    instead: ClassVar[str] = "another metric"

    @property
    @abstractmethod
    def scores(self) -> tuple[str, ...]:
        """The names of its scores."""

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the scores. Collective: called on every process, with the same result on all.

        Work that is shared out over the processes goes through `difftrain.evaluation.agreement`,
        so that an error on one of them ends the metric on all.
        """

    def fewest(self, width: int, preset: Mapping[str, Any]) -> int:
        """Return how many samples it needs of each set.

        Args:
            width: The width of the features.
            preset: The settings of the extractor's protocol.
        """
        return 2

    def check(self, num_generated: int, preset: Mapping[str, Any]) -> None:
        """Refuse arguments that cannot work, before anything is trained or generated.

        Args:
            num_generated: How many samples will be generated.
            preset: The settings of the extractor's protocol.

        Raises:
            InputError: With what to write instead.
        """

    def num_real(self, num_generated: int, num_reference: int) -> int:
        """Return how many real samples its floor draws from.

        Training samples are looked at only as far as the reference has fewer. A metric that looks
        at the training set itself names "training" among its needs.

        Args:
            num_generated: How many samples are generated.
            num_reference: How many the reference has.
        """
        return 0

    def better_of(self, score: str) -> Better:
        """Return which way a score is better."""
        return self.better

    def title_of(self, score: str) -> str:
        """Return how people call a score."""
        return self.titles.get(score) or score.replace("_", " ").capitalize()


def badness(better: Better, value: float) -> float:
    """Turn a score so that smaller is better, for picking checkpoints.

    Args:
        better: Which way the score is better, as its record says.
        value: Its value.
    """
    if better == "higher":
        return -value
    return abs(value - 1) if better == "near 1" else value
