"""Scores from a classifier's logits: how sure, how varied, and how right its predictions are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt, registered_name
from difftrain.core.rng import Rng
from difftrain.evaluation.agreement import dealt_values
from difftrain.evaluation.checks import check_count, check_rows
from difftrain.evaluation.evidence import Evidence
from difftrain.evaluation.requirements import check_features_name
from difftrain.evaluation.rows import Rows, SelectedRows
from difftrain.evaluation.slots import METRICS, Metric, Scores


@METRICS.register("class_agreement")
@dataclass(frozen=True)
class ClassAgreement(Metric):
    """The share of generated images to which the features' classifier gives their label."""

    scores = ("class_agreement",)
    needs = frozenset({"labels", "classes", "logits"})
    better = "higher"

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the share."""
        logits, labels = evidence.generated.outputs["logits"], evidence.generated.labels
        assert labels is not None
        check_rows(logits, "generated", at_least=1)
        most = int(labels.max())
        if most >= logits.width:
            raise InputError(
                f"class_agreement: the samples have the class {most}, but the classifier of "
                f"{evidence.features_name!r} knows the classes 0 to {logits.width - 1}. Give it "
                "images of the same classes."
            )
        predicted = torch.cat([rows.argmax(dim=1) for rows in logits.blocks()])
        value = float((labels == predicted).double().mean())
        score = {"value": value, "count": len(labels), "classifier": evidence.features_name}
        return {"class_agreement": score}


@METRICS.register("classifier_score")
@dataclass(frozen=True)
class ClassifierScore(Metric):
    """exp(mean KL(p(y|x) || p(y))), with p(y) the mean of p(y|x) over a part of the images.

    It runs from 1 to the number of classes, and is given as the mean over parts, with their
    `std`. It is the Inception score only with the Inception's logits.

    Args:
        splits: Number of equal parts; None takes what the features' protocol says, else 10.
        split_size: Images in each of consecutive parts, of which the last may be shorter. It
            replaces splits.
        shuffle: Whether images are put in random order first; None takes what the protocol says,
            else true.

    Reference:
        Salimans et al. 2016, "Improved Techniques for Training GANs", arXiv:1606.03498.
    """

    splits: PositiveInt | None = None
    split_size: PositiveInt | None = None
    shuffle: bool | None = None
    score: ClassVar[str] = "classifier_score"
    needs = frozenset({"logits"})
    better = "higher"

    @property
    def scores(self) -> tuple[str, ...]:
        """The score."""
        return (self.score,)

    def check(self, num_generated: int, preset: Mapping[str, Any]) -> None:
        """Refuse more parts than samples, and two ways of giving the parts."""
        splits, _ = self.division(preset)
        if num_generated < splits:
            raise InputError(
                f"metric {registered_name(self)!r}: splits: {splits}, but {num_generated} samples "
                f"are generated. Write splits: {num_generated} or fewer, or generate more."
            )

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the mean over the parts. Collective."""
        logits = evidence.generated.outputs["logits"]
        check_rows(logits, "generated", at_least=1)
        # The parts
        splits, size = self.division(evidence.preset)
        check_count(len(logits), "generated", splits or 1)
        shuffle = evidence.preset.get("is_shuffle", True) if self.shuffle is None else self.shuffle
        order = torch.arange(len(logits))
        if shuffle:
            generator = Rng(evidence.seed).shared("classifier_score")
            order = torch.randperm(len(logits), generator=generator)
        parts = list(torch.tensor_split(order, splits) if splits else torch.split(order, size))
        # Their scores
        found = dealt_values(parts, lambda part: inception_score(SelectedRows(logits, part)))
        score = {
            "value": float(found.mean()),
            "std": float(found.std(correction=0)),
            "splits": len(parts),
            "split_size": max(map(len, parts)),
            "shuffle": shuffle,
            "count": len(logits),
            "features": evidence.features_name,
        }
        return {self.score: score}

    def division(self, preset: Mapping[str, Any]) -> tuple[int, int]:
        """Return (number of parts, images in each), one of them 0.

        Args:
            preset: The settings of the extractor's protocol.

        Raises:
            InputError: If both are given.
        """
        if self.splits is not None and self.split_size is not None:
            raise InputError(
                f"{self.score}: splits and split_size both say how many parts there are. Write one "
                "of them."
            )
        if self.splits is None and self.split_size is None:
            size = preset.get("is_split_size") or 0
            return (0, size) if size else (preset.get("is_splits") or 10, 0)
        return self.splits or 0, self.split_size or 0


@METRICS.register("inception_score")
@dataclass(frozen=True)
class InceptionScore(ClassifierScore):
    """exp(mean KL(p(y|x) || p(y))) of the Inception's predictions.

    The parts are those of the features' protocol (torch-fidelity: 10 of shuffled images; ADM:
    consecutive ones of 5,000), else 10 of shuffled images.

    Args:
        splits: As of classifier_score.
        split_size: As of classifier_score.
        shuffle: As of classifier_score.

    Reference:
        Salimans et al. 2016, "Improved Techniques for Training GANs", arXiv:1606.03498.
    """

    score: ClassVar[str] = "inception_score"
    only_with = "inception"
    instead = "classifier_score"

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the mean over the parts. Collective."""
        check_features_name(self, evidence.features_name)
        return ClassifierScore.__call__(self, evidence)


def inception_score(logits: Rows) -> Tensor:
    """Compute exp(mean KL(p(y|x) || p(y))) [] of logits [N, classes], in float64.

    The exponent is the entropy of the mean prediction less the mean entropy of the predictions.
    """
    total = torch.zeros(logits.width, dtype=torch.float64)
    negative_entropy = torch.zeros((), dtype=torch.float64)
    for rows in logits.blocks():
        log_p = rows.double().log_softmax(dim=1)
        total += log_p.exp().sum(dim=0)
        negative_entropy += torch.special.entr(log_p.exp()).sum().neg()
    marginal_entropy: Tensor = torch.special.entr(total / len(logits)).sum()
    return (negative_entropy / len(logits) + marginal_entropy).exp()
