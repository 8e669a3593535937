"""Scores from a classifier's logits: how sure and how varied its predictions are, and whether they are what was asked for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difftrain.evaluation.checks import check_count, check_rows
from difftrain.evaluation.dealing import dealt_values
from difftrain.evaluation.evidence import Evidence, Need, check_name
from difftrain.evaluation.metrics.common import Scores
from difftrain.evaluation.rows import Rows
from difftrain.evaluation.views import Selected
from difftrain.registry import METRICS, InputError, PositiveInt
from difftrain.rng import Rng


@METRICS.register("class_agreement")
@dataclass(frozen=True)
class ClassAgreement:
    """The share of generated images to which the features' classifier gives the label that was asked for."""

    scores: ClassVar[tuple[str, ...]] = ("class_agreement",)
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "classes", "logits"})

    def __call__(self, evidence: Evidence) -> Scores:
        logits, labels = evidence.generated.outputs["logits"], evidence.generated.labels
        assert labels is not None
        check_rows(logits, "generated", at_least=1)
        predicted = torch.cat([rows.argmax(dim=1) for rows in logits.blocks()])
        value = float((labels == predicted).double().mean())
        return {"class_agreement": {"value": value, "count": len(labels), "classifier": evidence.features_name}}


@METRICS.register("classifier_score")
@dataclass(frozen=True)
class ClassifierScore:
    """exp(mean KL(p(y|x) || p(y))), p(y) the mean of p(y|x) over a part of the generated images: from 1 to the number of classes.

    Salimans et al. 2016, "Improved Techniques for Training GANs", arXiv:1606.03498; the mean over parts, with their `std`. Parts: `splits`
    equal ones, or consecutive ones of `split_size` (the last may be shorter). What is left out is as in the features' protocol, else 10
    splits. shuffle: images are put in random order first. It is the Inception score only with the Inception's logits.
    """

    splits: PositiveInt | None = None
    split_size: PositiveInt | None = None
    shuffle: bool | None = None
    score: ClassVar[str] = "classifier_score"
    scores: ClassVar[tuple[str, ...]] = ("classifier_score",)
    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    def __call__(self, evidence: Evidence) -> Scores:
        logits = evidence.generated.outputs["logits"]
        check_rows(logits, "generated", at_least=1)
        shuffle = self.shuffle if self.shuffle is not None else evidence.preset.get("is_shuffle", True)
        generator = Rng(evidence.seed).shared("classifier_score")
        order = torch.randperm(len(logits), generator=generator) if shuffle else torch.arange(len(logits))
        splits, size = self.division(evidence)
        check_count(len(logits), "generated", splits or 1)
        parts = list(order.tensor_split(splits) if splits else order.split(size))
        found = dealt_values(parts, lambda part: sharpness(Selected(logits, part)))
        setting = {"splits": len(parts), "split_size": max(map(len, parts)), "shuffle": shuffle}
        fixed = {**setting, "count": len(logits), "features": evidence.features_name}
        return {self.score: {"value": float(found.mean()), "std": float(found.std(correction=0)), **fixed}}

    def division(self, evidence: Evidence) -> tuple[int, int]:
        """(number of parts, images in each), one of them 0."""
        if self.splits is not None and self.split_size is not None:
            raise InputError(f"{self.score}: splits and split_size both say how many parts there are. Write one of them.")
        if self.splits is None and self.split_size is None:
            size = evidence.preset.get("is_split_size") or 0
            return (0, size) if size else (evidence.preset.get("is_splits") or 10, 0)
        return self.splits or 0, self.split_size or 0


@METRICS.register("inception_score")
@dataclass(frozen=True)
class InceptionScore(ClassifierScore):
    """exp(mean KL(p(y|x) || p(y))) of the Inception's predictions; Salimans et al. 2016, arXiv:1606.03498.

    Parts as published by the features' protocol (torch-fidelity: 10 of shuffled images; ADM: consecutive ones of 5,000), else 10 shuffled.
    """

    score: ClassVar[str] = "inception_score"
    scores: ClassVar[tuple[str, ...]] = ("inception_score",)
    only_with: ClassVar[str] = "inception"
    instead: ClassVar[str] = "classifier_score"

    def __call__(self, evidence: Evidence) -> Scores:
        check_name(self, evidence.features_name)
        return ClassifierScore.__call__(self, evidence)


def sharpness(logits: Rows) -> Tensor:
    """exp(mean KL(p(y|x) || p(y))): the entropy of the mean prediction less the mean entropy, exponentiated. Float64."""
    total, negative_entropy = torch.zeros(logits.width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rows in logits.blocks():
        log_p = rows.double().log_softmax(dim=1)
        total += log_p.exp().sum(dim=0)
        negative_entropy += torch.special.entr(log_p.exp()).sum().neg()
    return (negative_entropy / len(logits) + torch.special.entr(total / len(logits)).sum()).exp()
