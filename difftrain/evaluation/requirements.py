"""What metrics need, asked before anything is generated."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from difftrain.core.errors import InputError
from difftrain.core.registry import registered_name
from difftrain.data.items import ItemKind
from difftrain.evaluation.evidence import Need
from difftrain.evaluation.slots import Better, FeatureExtractor, Metric
from difftrain.evaluation.sources.base import REMEDY_OF_SIZES, Source

NEEDS: tuple[Need, ...] = get_args(Need)

REMEDIES: dict[Need, str] = {
    "reference images": "give the reference samples themselves, not their statistics",
    "training": "give the training images",
    "labels": "generate with class labels",
    "classes": "use features that come from a classifier of the labels, such as "
    "features: {type: digits_classifier}",
    "logits": "use features with logits, such as features: {type: inception}",
    "spatial": "use features with a spatial output: features: {type: inception}",
    "text": "give images with captions, and features that read text: features: {type: clip}",
    "nearest": "give training images, and samples that are images",
}

OTHER_FEATURES: dict[ItemKind, str] = {
    "images": "Write features: {type: pixels}, or any other features of images.",
    "tensors": "Write features: {type: values}.",
    "clips": "There are no features of clips yet.",
}


def check_items(features: str, takes: ItemKind, what: str, items: ItemKind) -> None:
    """Check that features look at what the samples are.

    Args:
        features: The name of the features.
        takes: What they look at.
        what: Whose samples these are, such as "generated".
        items: What the samples are.

    Raises:
        InputError: If they look at something else.
    """
    if items != takes:
        raise InputError(
            f"features {features!r} look at {takes}, but the {what} samples are {items}. "
            f"{OTHER_FEATURES[items]}"
        )


def check_needs(metrics: Sequence[Metric], available: Collection[Need], features: str) -> None:
    """Check that whatever metrics need is there.

    Args:
        metrics: The metrics.
        available: What is there.
        features: The name of the features.

    Raises:
        InputError: If something is missing, or if a metric's name belongs to other features.
    """
    for metric in metrics:
        check_features_name(metric, features)
    problems = []
    for metric in metrics:
        for need in NEEDS:
            if need in metric.needs and need not in available:
                remedy = f"{REMEDIES[need]}, or leave the metric out"
                problems.append(f"metric {registered_name(metric)!r} needs {need}: {remedy}.")
    if problems:
        raise InputError("\n".join(problems))


def check_counts(
    metrics: Sequence[Metric], counts: Mapping[str, int], width: int, preset: Mapping[str, Any]
) -> None:
    """Check that each set has as many samples as each metric needs, and its arguments.

    Args:
        metrics: The metrics.
        counts: Numbers of samples by the set's name, at least of "generated".
        width: The width of the features.
        preset: The settings of the features' protocol.

    Raises:
        InputError: If a set has too few, or if an argument cannot work, with the metric's name.
    """
    for metric in metrics:
        fewest = metric.fewest(width, preset)
        for name, count in counts.items():
            if count < fewest:
                raise InputError(
                    f"metric {registered_name(metric)!r} needs at least {fewest} {name} samples, "
                    f"and there are {count}. Give more, or change the metric's arguments."
                )
        metric.check(counts["generated"], preset)


def check_listed_once(metrics: Sequence[Metric]) -> None:
    """Check that no two metrics give one score.

    Raises:
        InputError: If two do.
    """
    seen: set[str] = set()
    for metric in metrics:
        for score in metric.scores:
            if score in seen:
                raise InputError(
                    f"metric {registered_name(metric)!r}: the score {score!r} is there already. "
                    "List each metric once."
                )
            seen.add(score)


def check_directions(metrics: Sequence[Metric]) -> None:
    """Check that each metric says which way its scores are better.

    Raises:
        InputError: If one does not.
    """
    for metric in metrics:
        overrides = type(metric).better_of is not Metric.better_of
        if not overrides and getattr(metric, "better", None) not in get_args(Better):
            known = ", ".join(repr(way) for way in get_args(Better))
            raise InputError(
                f"metric {registered_name(metric)!r} does not say which values are better. Write "
                f"in its class better = one of {known}."
            )


def check_features_name(metric: Metric, features: str) -> None:
    """Check that a metric whose name stands for certain features is used with them.

    Args:
        metric: The metric.
        features: The name of the features.

    Raises:
        InputError: If the name belongs to other features.
    """
    if metric.only_with is not None and features != metric.only_with:
        raise InputError(
            f"metric {registered_name(metric)!r} is defined for features {metric.only_with!r} "
            f"alone, but the features are {features!r}. Write {metric.instead}."
        )


def check_sizes(
    source: Source, features: FeatureExtractor | type[FeatureExtractor], in_pixels: bool
) -> None:
    """Check that images of several sizes go through features that take any size.

    Args:
        source: The images.
        features: What turns them into features, or its class.
        in_pixels: Whether they are compared with training images in pixels too.

    Raises:
        InputError: If they need one size.
    """
    if not source.sizes_differ:
        return
    if in_pixels:
        raise InputError(
            f"{source.sizes_differ}: images of several sizes cannot be compared in pixels. "
            f"{REMEDY_OF_SIZES}, or leave out nearest_neighbour_ratio."
        )
    if not features.takes_any_size:
        raise InputError(
            f"{source.sizes_differ}: features {features.name!r} expect images of one size. "
            f"{REMEDY_OF_SIZES}, or write features that resize each image: inception, clip or "
            "dinov2."
        )
