"""What the evaluation block of a recipe must not ask for, found before anything is trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from difftrain.core.errors import InputError, nearest
from difftrain.core.registry import Part
from difftrain.data.items import Dataset, MapDataset
from difftrain.evaluation.slots import FEATURES, FeatureExtractor, Metric
from difftrain.models.files import looks_local
from difftrain.recipe.schema import EvaluationSettings
from difftrain.run.same_sets import SameSets


def check_item_shape(features: Part, item: tuple[int, ...]) -> None:
    """Refuse the digits' classifier for other pictures than digits."""
    if features.name == "digits_classifier" and item != (1, 8, 8):
        these = "x".join(map(str, item))
        raise InputError(
            "evaluation.features: digits_classifier looks at images of 1x8x8, but these are "
            f"{these}. Write features: {{type: classifier, data: ...}} with labelled images of "
            "your own, or {type: pixels}."
        )


def checked_features(features: Part, item: tuple[int, ...]) -> tuple[int, Mapping[str, Any]]:
    """Check what the extractor is built from, as far as this needs no training and no download.

    Returns:
        Its width and the preset of its protocol if it could be built, else (1, {}).
    """
    constructor: Any = FEATURES.constructors[features.name]
    if constructor.trains_here:
        for own in features.arguments.values():
            if isinstance(own, Part):
                own.build()
    elif looks_local(str(features.arguments.get("model", "."))):
        extractor: FeatureExtractor = features.build(shape=item)
        return extractor.widths["features"], extractor.preset
    return 1, {}


def check_select(select: str, metrics: Sequence[Metric]) -> None:
    """Refuse a score that no metric gives."""
    known = [score for metric in metrics for score in metric.scores]
    if select not in known:
        raise InputError(
            f"evaluation.in_loop.select: no metric of in_loop gives {select!r}"
            f"{nearest(select, known)}."
        )


def check_classes(
    settings: EvaluationSettings, learned_from: Dataset, class_names: Sequence[str] | None
) -> None:
    """Refuse a classifier without labels, or whose answers are no labels of the samples.

    Args:
        settings: The evaluation block.
        learned_from: What the classifier is trained on.
        class_names: The classes of the model, if they have names.

    Raises:
        InputError: With what to write instead.
    """
    name, other = settings.features.name, learned_from.class_names
    if not isinstance(learned_from, MapDataset):
        raise InputError(
            f"evaluation.features: the {name} reads its images several times, but its data is a "
            "stream. Write streaming: false."
        )
    if not learned_from.is_labelled():
        raise InputError(
            f"evaluation.features: the {name} learns classes, but its data has no labels. "
            "Write labels: in its data block, or features: {type: pixels}."
        )
    listed = list(settings.metrics)
    if settings.in_loop is not None:
        listed += settings.in_loop.metrics
    compares = any({"labels", "classes"} <= set(metric.needs) for metric in listed)
    if compares and class_names is not None and other is not None and class_names != other:
        raise InputError(
            f"evaluation.features: the {name} knows the classes {', '.join(other)}, but the "
            f"model has {', '.join(class_names)}, so its answers are no labels of the samples. "
            "Give it images of the same classes, or leave class_agreement out."
        )


def check_unseen(
    features: str,
    same: SameSets,
    learned_from: MapDataset,
    reference: MapDataset,
    training: MapDataset | None,
) -> None:
    """Refuse features of a classifier that was trained on what it is to judge.

    Args:
        features: The name of the features.
        same: Compares two sets.
        learned_from: What the classifier is trained on.
        reference: What samples are compared with.
        training: What the model is trained on, if it is known.

    Raises:
        InputError: With what to write instead.
    """
    if same(learned_from, reference):
        raise InputError(
            f"evaluation.features: the {features} is trained on the images of the reference, "
            "whose features it would know by heart. Give it other images."
        )
    if training is not None and same(learned_from, training):
        raise InputError(
            f"evaluation.features: the {features} is trained on the images that the model trains "
            "on, whose features it would know by heart. Give it other images."
        )
