"""From samples to scores: the same numbers on every process and on any number of them.

Whatever a metric needs is checked before the first sample is generated. Rows lie in folders while
they are gathered, so a stopped evaluation goes on where it was. Those of data sets stay there, for
every other evaluation that looks at the same samples in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.processes import barrier, is_main
from difftrain.core.registry import registered_name
from difftrain.evaluation.agreement import Failure, together
from difftrain.evaluation.evidence import MAIN, NEAREST, SPATIAL, Evidence, Need
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.metric_scores import compute_scores
from difftrain.evaluation.parts import part_block
from difftrain.evaluation.real_sets import RealSet, RealSets, outputs_of
from difftrain.evaluation.reference import ReferenceStatistics
from difftrain.evaluation.requirements import (
    NEEDS,
    check_counts,
    check_directions,
    check_features_name,
    check_items,
    check_listed_once,
    check_needs,
    check_sizes,
)
from difftrain.evaluation.results import Evaluation
from difftrain.evaluation.slots import FeatureExtractor, Metric, Scores
from difftrain.evaluation.sources.base import Source
from difftrain.evaluation.worst_cases import draw_worst_cases

MEMORIZATION = "nearest_neighbour_ratio"  # its worst cases become a picture


@dataclass
class Evaluator:
    """Scores one set of generated samples after another against one reference.

    Args:
        reference: What samples are compared with.
        training: What the network was trained on, at most as many images as fit into memory; None
            if it is not known.
        features: What turns samples into features.
        metrics: The metrics that were asked for. Each must be computable.
        folder: Where rows of generated samples are kept until their scores stand, shared by all
            processes.
        seed: Seed of random subsets, such as those behind the floors.
        shows_worst: Whether to draw the generated images nearest to training images.
        added_metrics: Metrics that were not asked for. If one cannot be computed,
            `Evaluation.left_out` says why. One whose score a metric of `metrics` gives too is
            dropped.
        why_no_training: Why there are no training samples, for messages.
        store: Where rows of data sets are kept, perhaps shared with other runs; None: in `folder`.
    """

    reference: Source | ReferenceStatistics
    training: Source | None
    features: FeatureExtractor
    metrics: Sequence[Metric]
    folder: Path
    seed: int
    shows_worst: bool = False
    added_metrics: Sequence[Metric] = ()
    why_no_training: str = "there are no training images"
    store: Path | None = None
    _floors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._real = RealSets(
            self.reference, self.training, self.features, self.store or self.folder
        )

    def check(self, generated: Source) -> None:
        """Check that everything is there that the metrics need.

        Args:
            generated: The samples to be scored. None is generated here.

        Raises:
            InputError: If something is missing.
        """
        check_listed_once(self.metrics)
        check_directions([*self.metrics, *self.added_metrics])
        self._check_items("generated", generated)
        if not isinstance(self.reference, ReferenceStatistics):
            self._check_items("reference", self.reference)
        in_pixels = any(NEAREST in metric.needs for metric in self.metrics)
        for source in (generated, self.reference, self.training if in_pixels else None):
            if isinstance(source, Source):
                check_sizes(source, self.features, in_pixels)
        available = set(NEEDS) - set(self.missing(generated))
        check_needs(self.metrics, available, self.features.name)
        self._check_each(self.metrics, generated)

    def missing(self, generated: Source) -> dict[Need, str]:
        """Return what is not there, of all that metrics can need, and why.

        Args:
            generated: The samples to be scored.
        """
        found: dict[Need, str] = {}
        name, gives = self.features.name, self.features.gives
        outputs: tuple[Need, ...] = ("classes", "logits", "spatial", "text")
        for output in outputs:
            if output not in gives:
                found[output] = f"features {name!r} give no {output}"
        if "text" in gives and not generated.has_captions:
            found["text"] = "the generated samples have no captions"
        if not generated.has_labels:
            found["labels"] = "the generated samples have no labels"
        if self.training is None:
            found["training"] = self.why_no_training
        if isinstance(self.reference, ReferenceStatistics):
            of_reference = "the reference is a statistics file, without samples"
            found |= {"reference images": of_reference, "training": of_reference}
        if "training" in found:
            found["nearest"] = found["training"]
        if generated.items_are != "images":
            found["nearest"] = "the samples are not images"
        return found

    def __call__(
        self,
        generated: Source,
        sampling: dict[str, Any] | None = None,
        key: dict[str, Any] | None = None,
    ) -> Evaluation:
        """Score a set of samples. Collective: all processes get the same result.

        A metric that raises an error is recorded in `Evaluation.failures`, and the others go on.

        Args:
            generated: The samples.
            sampling: How they were made, kept in the protocol.
            key: What else identifies this set, so that a stopped evaluation can go on.

        Raises:
            InputError: Before the first sample is generated, if something that a metric needs is
                missing.
            AgreedError: If samples cannot be generated, read or extracted on one of several
                processes.
        """
        # What can be computed
        together(lambda: self.check(generated))
        added, left_out = self._added(generated)
        metrics = [*self.metrics, *added]
        # Real samples
        reference = self._real.reference_set(metrics)
        training = self._real.training_set(metrics, len(generated), len(reference.features))
        copied = self._why_not_compared(reference)
        if copied is not None:
            left_out |= self._without_comparison(added, copied)
            metrics = [metric for metric in metrics if NEAREST not in metric.needs]
        # Generated samples
        extraction = self._generated_rows(generated, metrics, key)
        evidence = Evidence(
            extraction(),
            reference.features,
            None if training is None else training.features,
            self.features.name,
            self.seed,
            self.features.preset,
            self._floors,
        )
        # Scores
        scores, failures = compute_scores(metrics, evidence)
        for score in sorted(score_names(added)):
            if score in failures:
                left_out[score] = failures.pop(score).reason
        protocol = {
            "num_samples": len(generated),
            "seed": self.seed,
            "features": self.features.protocol(),
            "reference": reference.described,
            "training": None if training is None else training.described,
            "metrics": [part_block(metric) for metric in self.metrics],
            "added": [part_block(metric) for metric in added],
            "sampling": sampling,
        }
        worst = self._worst(extraction, scores)
        content = extraction.content()
        if generated.is_generated:
            barrier()  # everybody has read what it needs
            if is_main():
                extraction.store.remove()
        return Evaluation(scores, protocol, content, worst, failures, left_out)

    def _check_items(self, what: str, source: Source) -> None:
        check_items(self.features.name, self.features.takes, what, source.items_are)

    def _check_each(self, metrics: Sequence[Metric], generated: Source) -> None:
        """Check names, counts and statistics that metrics need."""
        counts = {"generated": len(generated)}
        if not isinstance(self.reference, ReferenceStatistics):
            counts["reference"] = len(self.reference)
        check_counts(metrics, counts, self.features.widths[MAIN], self.features.preset)
        for metric in metrics:
            check_features_name(metric, self.features.name)
            if isinstance(self.reference, ReferenceStatistics) and SPATIAL in metric.needs:
                self.reference.check_spatial(registered_name(metric))

    def _added(self, generated: Source) -> tuple[list[Metric], dict[str, str]]:
        """Return the added metrics that can be computed, and why others' scores cannot."""
        given = score_names(self.metrics)
        added: list[Metric] = []
        left_out: dict[str, str] = {}
        for metric in self.added_metrics:
            if given & set(metric.scores):
                continue
            reason = self._why_not(metric, generated)
            if reason is None:
                added.append(metric)
            else:
                left_out |= dict.fromkeys(metric.scores, reason)
        return added, left_out

    def _why_not(self, metric: Metric, generated: Source) -> str | None:
        """Return why a metric cannot be computed; None if it can."""
        missing = self.missing(generated)
        for need in NEEDS:
            if need in metric.needs and need in missing:
                return missing[need]
        try:
            self._check_each([metric], generated)
        except Exception as error:
            return Failure.of(error).reason
        return None

    def _why_not_compared(self, reference: RealSet) -> str | None:
        """Return why generated images cannot be compared with training images; None if they can."""
        nearest = reference.features.outputs.get(NEAREST)
        if nearest is None or nearest.whole()[:, 0].any():
            return None
        return "every reference image is a training image"

    def _without_comparison(self, added: Sequence[Metric], reason: str) -> dict[str, str]:
        """Return the scores that are left out.

        Raises:
            InputError: If one of them was asked for.
        """
        if any(NEAREST in metric.needs for metric in self.metrics):
            raise InputError(
                f"{MEMORIZATION} compares with held-out images, but {reason}. Give held-out "
                "images as reference, or leave the metric out."
            )
        without = [metric for metric in added if NEAREST in metric.needs]
        return dict.fromkeys(score_names(without), reason)

    def _generated_rows(
        self, generated: Source, metrics: Sequence[Metric], key: dict[str, Any] | None
    ) -> Extraction:
        """Return what extracts the generated samples."""
        compared = self._real.nearest_training(metrics)
        base = self.folder if generated.is_generated else self.store or self.folder
        return Extraction(
            generated,
            self.features,
            outputs_of(metrics),
            base,
            "generated",
            compared,
            (key or {}) | self._real.training_key(compared),
            keeps_images=self.shows_worst and compared is not None,
            reads_text=any("text" in metric.needs for metric in metrics),
        )

    def _worst(self, extraction: Extraction, scores: Scores) -> Tensor | None:
        """Draw the generated images nearest to training images, if they were found."""
        cases = scores.get(MEMORIZATION, {}).get("worst", [])
        if not cases or not self.shows_worst or self.training is None:
            return None
        return draw_worst_cases(extraction, self.training, cases)


def score_names(metrics: Sequence[Metric]) -> set[str]:
    """Return the names of the scores of some metrics."""
    return set[str]().union(*(metric.scores for metric in metrics))
