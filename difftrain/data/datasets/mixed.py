"""Several data sets as one, each repeated as often as it is to count."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any

from difftrain.core.errors import InputError
from difftrain.core.registry import PositiveInt
from difftrain.data.images import Original
from difftrain.data.items import DATASETS, Dataset, Item, MapDataset
from difftrain.data.left_out import LeftOut
from difftrain.data.transform import Size


@DATASETS.register("mixed")
class Mixed(MapDataset):
    """Images of several data sets, one set after the other, each repeated a number of times.

    All sets are map-style data sets of images, with the same class names or none of them labelled,
    and with captions or none.

    Args:
        sets: The data sets.
        repeats: How often the images of each set count in an epoch; default: once.
    """

    def __init__(
        self, sets: Annotated[list[Any], DATASETS], repeats: list[PositiveInt] | None = None
    ):
        self.sets: list[MapDataset] = sets
        self.repeats = repeats or [1] * len(sets)
        if not sets:
            raise InputError(
                "mixed: sets is empty. Write the data sets, such as sets: [{type: image_folder, "
                "path: photos}]."
            )
        if len(self.repeats) != len(sets):
            raise InputError(
                f"mixed: {len(self.repeats)} repeats for {len(sets)} sets. Write one number for "
                f"each set, such as repeats: {[1] * len(sets)}."
            )
        self.class_names = sets[0].class_names
        for number, dataset in enumerate(sets):
            self._check(number, dataset)
        counts = [len(one) * times for one, times in zip(sets, self.repeats, strict=True)]
        self.ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Item:
        dataset, own = self._place(i)
        item: Item = dataset[own]
        return item

    def original(self, i: int) -> Original:
        """Return what the image's own set knows of it; see `MapDataset.original`."""
        dataset, own = self._place(i)
        return dataset.original(own)

    def size(self, i: int) -> Size:
        """Return (height, width) of image i, as its own set says."""
        dataset, own = self._place(i)
        return dataset.size(own)

    def label_counts(self) -> Counter[int] | None:
        """Count the images of every set by class id, with their repeats; None without labels."""
        counts = Counter[int]()
        for dataset, times in zip(self.sets, self.repeats, strict=True):
            own = dataset.label_counts()
            if own is None:
                return None
            for label, count in own.items():
                counts[label] += count * times
        return counts

    def captions(self) -> Iterator[tuple[str, str | None]]:
        """Yield (name, caption) of the images of every set, not repeated."""
        for dataset in self.sets:
            yield from dataset.captions()

    def weight(self, key: int) -> float | None:
        """Return what image `key` counts in the loss, as its own set says."""
        dataset, own = self._place(key)
        return dataset.weight(own)

    def left_out(self) -> list[LeftOut]:
        """Return what every set leaves out."""
        return [
            LeftOut(f"sets.{number}: {one.name}", one.reason)
            for number, dataset in enumerate(self.sets)
            for one in dataset.left_out()
        ]

    def name_of(self, i: int) -> str:
        """Return what the image's own set calls it."""
        dataset, own = self._place(i)
        return dataset.name_of(own)

    def _place(self, i: int) -> tuple[MapDataset, int]:
        """Return the set that item i belongs to, and its index there."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect_right(self.ends, i)
        dataset = self.sets[number]
        start = self.ends[number - 1] if number else 0
        return dataset, (i - start) % len(dataset)

    def _check(self, number: int, dataset: Dataset) -> None:
        # It is a map-style data set of images.
        where = f"mixed: sets.{number}"
        if not isinstance(dataset, MapDataset):
            raise InputError(
                f"{where} is a stream, whose items cannot be counted. Write streaming: false."
            )
        if dataset.items_are != "images":
            raise InputError(
                f"{where} holds {dataset.items_are}; only images can be mixed. Leave it out."
            )

        # It has the classes and captions of the first one.
        first, own = self.sets[0].original(0), dataset.original(0)
        if dataset.class_names != self.class_names or (own.label is None) != (first.label is None):
            raise InputError(
                f"{where} has {classes_in_words(dataset, own)}, but sets.0 has "
                f"{classes_in_words(self.sets[0], first)}. Write the same labels for all sets, or "
                "labels: none for all of them."
            )
        first_has, own_has = first.caption() is not None, own.caption() is not None
        if first_has != own_has:
            has, lacks = (0, number) if first_has else (number, 0)
            raise InputError(
                f"mixed: sets.{has} has captions, but sets.{lacks} has none. Write captions for "
                "all sets, or for none."
            )


def classes_in_words(dataset: MapDataset, first: Original) -> str:
    """Describe the classes of a data set.

    Args:
        dataset: The data set.
        first: Its first image.
    """
    if dataset.class_names is not None:
        return f"the classes {', '.join(dataset.class_names)}"
    return "no labels" if first.label is None else "class ids without names"
