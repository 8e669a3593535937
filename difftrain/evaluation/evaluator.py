"""From images to scores: the same numbers on every process and any number of them.

Everything that a metric needs is asked for before the first image is made. Rows lie in a folder while they are gathered, so an
evaluation that was stopped goes on where it was; those of the reference stay there for the next one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftrain.distributed import on_all
from difftrain.evaluation.evidence import NEAREST, Evidence, FeatureSet, Metric, Need, check_counts, check_needs, name_of
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.extractor import FEATURES, FeatureExtractor
from difftrain.evaluation.memorization import NearestTraining
from difftrain.evaluation.presets import digest_of
from difftrain.evaluation.rows import whole
from difftrain.evaluation.sources import ImageSource, all_images
from difftrain.evaluation.statistics import FeatureStatistics
from difftrain.registry import InputError, dump
from difftrain.sampling import grid
from difftrain.storage import digest

OUTPUTS = ("logits", "spatial")  # of an extractor, beside its features


@dataclass(frozen=True)
class Evaluation:
    """Scores by name (each with at least `value`) and everything that fixes them."""

    scores: dict[str, dict[str, Any]]
    protocol: dict[str, Any]
    generated: dict[str, Any]  # count and digest of the images
    worst: Tensor | None = field(default=None, compare=False)  # [C, H, W]: those nearest to training images, above these

    @property
    def num_samples(self) -> int:
        return int(self.generated["count"])

    def to_json(self, step: int | None) -> dict[str, Any]:
        """What evaluation.json holds; step: the optimizer step of the weights, None where there is none."""
        return {
            "step": step, "num_samples": self.num_samples, "scores": self.scores, "protocol_digest": digest_of(comparable(self.protocol)),
            "protocol": self.protocol, "generated": self.generated,
        }  # fmt: skip


def comparable(protocol: dict[str, Any]) -> dict[str, Any]:
    """The part of a protocol that scores must share to be compared: all but what was generated, how, and from which training set."""
    return {key: protocol[key] for key in ("features", "reference", "num_samples", "metrics")}


@dataclass
class Statistics:
    """A reference of which only statistics are known. by_output: the features' and perhaps others'; protocol: how they were made."""

    by_output: dict[str, FeatureStatistics]
    protocol: dict[str, Any]


@dataclass
class Evaluator:
    """Scores one set of generated images after another against one reference.

    training: the images that a model was trained on, at most as many as may lie in memory. folder: where rows are kept, shared by all
    processes. seed: of the splits behind the floors. shows_worst: the images nearest to training images are drawn, where they are found.
    """

    reference: ImageSource | Statistics
    training: ImageSource | None
    features: FeatureExtractor
    metrics: Sequence[Metric]
    folder: Path
    seed: int
    shows_worst: bool = False
    _real: dict[str, tuple[FeatureSet, dict[str, Any]]] = field(default_factory=dict)
    _nearest: NearestTraining | None = None

    def check(self, generated: ImageSource) -> None:
        """Raise InputError if something that a metric needs is not there."""
        check_needs(self.metrics, self.available(generated), self.features.name)
        counts = {"generated": len(generated)} | ({"reference": len(self.reference)} if not isinstance(self.reference, Statistics) else {})
        check_counts(self.metrics, counts, self.features.widths[FEATURES], self.features.preset)

    def __call__(self, generated: ImageSource, sampling: dict[str, Any] | None = None, key: dict[str, Any] | None = None) -> Evaluation:
        """Called on every process, all get the same Evaluation. Raises InputError before the first image is made if something that a
        metric needs is not there.

        sampling: how the images were made, kept in the protocol. key: what else tells the set from others, for going on with it.
        """
        on_all(lambda: self.check(generated))
        reference, about_reference = self.real("reference", self.reference)
        training, about_training = self.real("training", self.training)
        extraction = self.extraction("generated", generated, "generated", self.nearest(), key or {})
        found = extraction()
        evidence = Evidence(found, reference, training, self.features.name, self.seed, self.features.preset)
        scores = scores_of(self.metrics, evidence)
        protocol = {
            "num_samples": len(generated), "seed": self.seed, "features": self.features.protocol(), "reference": about_reference,
            "training": about_training, "metrics": [dump(metric) for metric in self.metrics], "sampling": sampling,
        }
        worst = self.worst_cases(generated, extraction, scores.get("nearest_neighbour_ratio", {}).get("worst", []))
        evaluation = Evaluation(scores, protocol, extraction.content(), worst)
        extraction.store.remove()
        return evaluation

    def available(self, generated: ImageSource) -> set[Need]:
        given: set[Need] = set(self.features.gives)  # type: ignore[arg-type]
        given |= {"reference images"} if not isinstance(self.reference, Statistics) else set()
        given |= {"training", "nearest"} if self.training is not None and not isinstance(self.reference, Statistics) else set()
        given |= {"labels"} if generated.has_labels else set()
        return given if generated.has_captions else given - {"text"}

    def outputs(self) -> list[str]:
        needed = frozenset[Need]().union(*(metric.needs for metric in self.metrics))
        return [FEATURES, *(output for output in OUTPUTS if output in needed)]

    def nearest(self) -> NearestTraining | None:
        if self._nearest is None and self.training is not None and any(NEAREST in metric.needs for metric in self.metrics):
            self._nearest = NearestTraining(all_images(self.training))
        return self._nearest

    def real(self, what: str, source: ImageSource | Statistics | None) -> Any:
        """The feature set and its protocol entry; (None, None) where there is none. Made once."""
        if source is None:
            return None, None
        if isinstance(source, Statistics):
            lacking = [output for output in self.outputs() if output == "spatial" and output not in source.by_output]
            if lacking:
                raise InputError("the statistics hold no spatial features (mu_s, sigma_s), which sfid compares. Make them again with "
                                 "difftrain reference, or leave sfid out.")
            return FeatureSet({}, known=source.by_output), source.protocol
        if what not in self._real:
            compared = self.nearest() if what == "reference" else None
            mark = [source.identity(), self.features.protocol(), self.outputs(), self.training_key(compared)]
            extraction = self.extraction(what, source, f"{what}-{digest(json.dumps(mark, sort_keys=True))}", compared, {})
            found = extraction()
            if NEAREST in found.outputs and not whole(found.outputs[NEAREST])[:, 0].any():
                raise InputError("nearest_neighbour_ratio compares with held-out images, but every reference image is a training image. "
                                 "Give held-out images as reference, or leave the metric out (in a recipe: memorization: false).")
            self._real[what] = found, extraction.content()
        return self._real[what]

    def worst_cases(self, generated: ImageSource, extraction: Extraction, cases: Sequence[dict[str, Any]]) -> Tensor | None:
        """Generated images above the training images nearest to them, as one picture [C, H', W'] uint8. Collective where the source is.

        cases: each with the `index` of a generated image and `training`, that of its neighbour.
        """
        if not cases or not self.shows_worst or self.training is None:
            return None
        size = generated.block_size
        starts = sorted({case["index"] // size * size for case in cases})
        own = [list(range(start, min(start + size, len(generated)))) for start in starts]
        made = extraction.kept_images([case["index"] for case in cases])
        if made is None:  # too many to be kept: those blocks are made again
            blocks = zip(own, generated.blocks(own), strict=True)
            again = {i: image for indices, block in blocks for i, image in zip(indices, block.images.cpu(), strict=True)}
            made = torch.stack([again[case["index"]] for case in cases])
        neighbours = [block.images for block in self.training.blocks([case["training"]] for case in cases)]
        return grid(torch.cat([made, *neighbours]), columns=len(cases))

    def extraction(
        self, what: str, source: ImageSource, folder: str, compared: NearestTraining | None, key: dict[str, Any]
    ) -> Extraction:
        full_key = key | self.training_key(compared)
        keeps = self.shows_worst and what == "generated" and compared is not None
        return Extraction(source, self.features, self.outputs(), self.folder / folder, what, compared, full_key, keeps)

    def training_key(self, compared: NearestTraining | None) -> dict[str, Any]:
        return {"training": self.training.identity()} if compared is not None and self.training is not None else {}


def scores_of(metrics: Sequence[Metric], evidence: Evidence) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        found = metric(evidence)
        twice = sorted(set(found) & set(scores))
        if twice:
            raise InputError(f"metric {name_of(metric)!r}: the score {twice[0]!r} is there already. List each metric once.")
        scores |= found
    return scores
