"""Class ids of a data set: within the model's classes, and by name where both have names."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from difftrain.core.errors import InputError
from difftrain.data.images import Original
from difftrain.data.items import MapDataset
from difftrain.data.subset import Subset

MOST_CLASSES = 2**31  # class ids are below; a larger one is a mistake


class Renumbered(Subset):
    """A data set whose class ids are replaced.

    Args:
        dataset: The data set.
        ids: The new id of each of its class ids.
        class_names: Names of the classes by their new ids.
    """

    def __init__(self, dataset: MapDataset, ids: Sequence[int], class_names: list[str]):
        super().__init__(dataset, range(len(dataset)))
        self.ids, self.class_names = list(ids), class_names

    def __getitem__(self, i: int) -> Any:
        item: Any = self.dataset[i]
        return dataclasses.replace(item, label=self._new(item.label))

    def original(self, i: int) -> Original:
        """Return what is known of item i before it is decoded; see `MapDataset.original`."""
        found = self.dataset.original(i)
        return dataclasses.replace(found, label=self._new(found.label))

    def label_counts(self) -> Counter[int] | None:
        """Count the items by their new class ids."""
        counts = self.dataset.label_counts()
        if counts is None:
            return None
        return Counter({self.ids[label]: count for label, count in counts.items()})

    def _new(self, label: int | None) -> int | None:
        return None if label is None else self.ids[label]


def with_classes_of(
    dataset: MapDataset, class_names: list[str] | None, num_classes: int, key: str
) -> MapDataset:
    """Return a data set with the class ids of a model: by name where both name their classes.

    Args:
        dataset: The data set.
        class_names: The classes of the model by id, if they have names.
        num_classes: How many classes the model has.
        key: Key of the data set in the recipe.

    Raises:
        InputError: If the data set holds a class that the model does not have.
    """
    own = dataset.class_names
    if own is not None and class_names is not None and own != class_names:
        unknown = [name for name in own if name not in class_names]
        if unknown:
            raise InputError(
                f"{key}: it holds the class {unknown[0]!r}, but the model is trained on the "
                f"classes {', '.join(class_names)}. Rename or remove it, or leave its labels out "
                "(labels: none)."
            )
        dataset = Renumbered(dataset, [class_names.index(name) for name in own], class_names)
    check_ids(dataset, num_classes, key)
    return dataset


def check_ids(dataset: MapDataset, num_classes: int, key: str) -> None:
    """Refuse class ids that the model does not have, where they are known without decoding.

    Args:
        dataset: The data set.
        num_classes: How many classes the model has.
        key: Key of the data set in the recipe.

    Raises:
        InputError: If there is one.
    """
    if type(dataset).label_counts is MapDataset.label_counts:  # the loader finds it
        return
    counts = dataset.label_counts()
    wrong = sorted(label for label in counts or () if not 0 <= label < num_classes)
    if wrong:
        raise InputError(f"{key}: {wrong_id(wrong[0], num_classes)}")


def wrong_id(label: int, num_classes: int) -> str:
    """Return the message about a class id that a model does not have."""
    return (
        f"the data holds the class id {label}, but the model has {num_classes} classes, ids 0 to "
        f"{num_classes - 1}. Correct the labels, or give the model more num_class_embeds."
    )


def class_id(value: Any, where: str) -> int:
    """Return a class id that a file or a table holds.

    Args:
        value: What is there.
        where: What a message calls its place.

    Raises:
        InputError: If it is no class id.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST_CLASSES:
        raise InputError(
            f"{where}: label {value!r} is no class id. Expected a whole number from 0 on, below "
            f"{MOST_CLASSES:,}."
        )
    return value
