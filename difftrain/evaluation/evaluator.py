"""From generated blocks, spread over processes, to scores: the same numbers on every process and any number of them.

Each process brings its blocks of the generated set with their indices. Features, labels and (where a metric needs them)
pixels are put in index order on all processes, and every process computes the same scores from them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difftrain.data.items import Images
from difftrain.distributed import sum_over_processes
from difftrain.evaluation.evidence import Evidence, GeneratedSet, Metric, Need, RealSet, check_needs, name_of
from difftrain.evaluation.features import Classifies, FeatureExtractor
from difftrain.registry import InputError, dump


class Generated(NamedTuple):
    """One block of the generated set: sample indices, images uint8 [b, C, H, W], and the labels [b] asked for, if any."""

    indices: list[int]
    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """Scores by name (each with at least `value`) and everything that fixes them."""

    scores: dict[str, dict[str, Any]]
    protocol: dict[str, Any]
    num_samples: int

    def to_json(self, step: int | None) -> dict[str, Any]:
        """What evaluation.json holds; step: the optimizer step of the weights, None where there is none."""
        return {"step": step, "num_samples": self.num_samples, "scores": self.scores, "protocol": self.protocol}


def evaluate(
    generated: Iterable[Generated], *, num_samples: int, reference: Images, training: Images | None, features: FeatureExtractor,
    metrics: Sequence[Metric], seed: int, sampling: dict[str, Any] | None = None,
) -> Evaluation:
    """Score the generated set. Called on every process, each with its own blocks; all get the same Evaluation.

    Over all processes the indices must be 0..num_samples-1, each once. reference and training are the same on all
    processes. seed: of the splits behind the floors. sampling: how the images were made, kept in the protocol.
    Raises InputError before the first block is asked for if something that a metric needs is not there.
    """
    given: set[Need] = {"reference", "pixels", "labels"}
    given |= {"training"} if training is not None else set()
    given |= {"classifier"} if isinstance(features, Classifies) else set()
    check_needs(metrics, given)
    real = RealSet(reference, features)
    collected = Collected(num_samples, real, features, frozenset[Need]().union(*(metric.needs for metric in metrics)))
    for block in generated:
        collected.add(block)
    found = collected.over_processes()
    check_needs(metrics, given - ({"labels"} if found.labels is None else set()))
    seen = RealSet(training, features) if training is not None else None
    evidence = Evidence(found, real, seen, features.name, seed)
    protocol = {
        "num_samples": num_samples, "seed": seed, "features": features.protocol(), "reference": real.protocol(),
        "training": seen.protocol() if seen else None, "metrics": [dump(metric) for metric in metrics], "sampling": sampling,
    }
    return Evaluation(scores_of(metrics, evidence), protocol, num_samples)


def scores_of(metrics: Sequence[Metric], evidence: Evidence) -> dict[str, dict[str, Any]]:
    scores: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        found = metric(evidence)
        twice = sorted(set(found) & set(scores))
        if twice:
            raise InputError(f"metric {name_of(metric)!r}: the score {twice[0]!r} is there already. List each metric once.")
        scores |= found
    return scores


class Collected:
    """This process's part of the generated set, each sample at its index, zero elsewhere: a sum over processes joins the parts."""

    def __init__(self, num_samples: int, reference: RealSet, extractor: FeatureExtractor, needs: frozenset[Need]):
        if num_samples < 1:
            raise InputError(f"num_samples = {num_samples}: expected at least 1.")
        self.num_samples, self.extractor = num_samples, extractor
        self.image_shape = reference.images.pixels.shape[1:]
        self.times_seen = torch.zeros(num_samples + 1, dtype=torch.long)  # the last entry counts indices out of range
        self.features = torch.zeros(num_samples, reference.features.shape[1])
        self.labels = torch.zeros(num_samples, dtype=torch.long)  # label + 1; 0 where there is none
        self.predicted = torch.zeros(num_samples, dtype=torch.long) if "classifier" in needs else None
        self.pixels = torch.zeros(num_samples, *self.image_shape, dtype=torch.uint8) if "pixels" in needs else None

    def add(self, block: Generated) -> None:
        self.check(block)
        places = torch.tensor(block.indices, dtype=torch.long)
        inside = (places >= 0) & (places < self.num_samples)
        self.times_seen.index_add_(0, torch.where(inside, places, self.num_samples), torch.ones_like(places))
        places, images = places[inside], block.images[inside.to(block.images.device)]
        self.features[places] = self.extractor(images).float().cpu()
        if block.labels is not None:
            self.labels[places] = block.labels.cpu()[inside] + 1
        if self.predicted is not None:
            assert isinstance(self.extractor, Classifies)
            self.predicted[places] = self.extractor.classify(images).cpu()
        if self.pixels is not None:
            self.pixels[places] = images.cpu()

    def check(self, block: Generated) -> None:
        if block.images.dtype != torch.uint8 or block.images.shape[1:] != self.image_shape:
            raise InputError(
                f"generated images must be uint8 [b, {', '.join(map(str, self.image_shape))}] as the reference is, "
                f"got {block.images.dtype} {list(block.images.shape)}."
            )
        if len(block.indices) != len(block.images) or (block.labels is not None and len(block.labels) != len(block.images)):
            raise InputError(f"a block has {len(block.indices)} indices and {len(block.images)} images: one index and one label per image.")

    def over_processes(self) -> GeneratedSet:
        """The whole set, on every process. Raises InputError, on all of them, unless each index is there once."""
        times_seen = sum_over_processes(self.times_seen)
        missing, twice = (times_seen[:-1] == 0).nonzero().flatten(), (times_seen[:-1] > 1).nonzero().flatten()
        if len(missing) or len(twice) or times_seen[-1]:
            raise InputError(
                f"the generated set must hold the indices 0 to {self.num_samples - 1} once each, over all processes: "
                f"{len(missing)} missing {missing[:5].tolist()}, {len(twice)} more than once {twice[:5].tolist()}, "
                f"{int(times_seen[-1])} out of range."
            )
        labels = sum_over_processes(self.labels)
        if 0 < int((labels == 0).sum()) < self.num_samples:
            raise InputError(f"{int((labels == 0).sum())} of {self.num_samples} generated images have no label: label all of them or none.")
        joined = [None if part is None else sum_over_processes(part) for part in (self.pixels, self.predicted)]
        return GeneratedSet(sum_over_processes(self.features), joined[0], None if int(labels[0]) == 0 else labels - 1, joined[1])
