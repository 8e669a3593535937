"""Several data sets as one, each repeated as often as it is to count."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Any

from difftrain.data.items import ImageDataset, ImageStream, Item, frames_of
from difftrain.data.originals import Original, captions_of, original
from difftrain.data.transform import Size
from difftrain.registry import DATASETS, InputError, PositiveInt


@DATASETS.register("mixed")
class Mixed:
    """The images of all `sets`, one set after the other; those of set i count repeats[i] times an epoch (default: once).

    All sets are tables of images, with the same class names or none of them labelled, and with captions or none.
    """

    def __init__(self, sets: Annotated[list[Any], DATASETS], repeats: list[PositiveInt] | None = None):
        self.sets: list[ImageDataset] = sets
        self.repeats = repeats or [1] * len(sets)
        if not sets:
            raise InputError("mixed: sets is empty. Write the data sets, such as sets: [{type: image_folder, path: photos}].")
        if len(self.repeats) != len(sets):
            raise InputError(f"mixed: {len(self.repeats)} repeats for {len(sets)} sets. Write one number for each set, such as repeats: "
                             f"{[1] * len(sets)}.")
        self.class_names = sets[0].class_names
        for number, dataset in enumerate(sets):
            self._check(number, dataset)
        self.ends = list(accumulate(len(dataset) * times for dataset, times in zip(sets, self.repeats, strict=True)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Item:
        dataset, own = self._place(i)
        return dataset[own]

    def original(self, i: int) -> Original:
        dataset, own = self._place(i)
        return original(dataset, own)

    def size(self, i: int) -> Size:
        """(height, width) of image i."""
        return self.original(i).size()

    def captions_of_all(self) -> Iterator[tuple[str, str | None]]:
        """(name, caption) of the images of every set, not repeated."""
        for dataset in self.sets:
            yield from captions_of(dataset)

    def _place(self, i: int) -> tuple[ImageDataset, int]:
        """The set that item i is of, and which of its items it is."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = bisect_right(self.ends, i)
        dataset = self.sets[number]
        return dataset, (i - (self.ends[number - 1] if number else 0)) % len(dataset)

    def _check(self, number: int, dataset: ImageDataset) -> None:
        where = f"mixed: sets.{number}"
        if isinstance(dataset, ImageStream):
            raise InputError(f"{where} is a stream, whose items cannot be counted. Write streaming: false.")
        if frames_of(dataset) is not None:
            raise InputError(f"{where} holds clips; only images can be mixed. Leave it out.")
        first, own = original(self.sets[0], 0), original(dataset, 0)
        if dataset.class_names != self.class_names or (own.label is None) != (first.label is None):
            raise InputError(f"{where} has {in_words(dataset, own)}, but sets.0 has {in_words(self.sets[0], first)}. Write the same "
                             "labels for all sets, or labels: none for all of them.")
        if (own.caption() is None) != (first.caption() is None):
            has, lacks = (number, 0) if first.caption() is None else (0, number)
            raise InputError(f"mixed: sets.{has} has captions, but sets.{lacks} has none. Write captions for all sets, or for none.")


def in_words(dataset: ImageDataset, first: Original) -> str:
    """The classes of a data set."""
    if dataset.class_names is not None:
        return f"the classes {', '.join(dataset.class_names)}"
    return "no labels" if first.label is None else "class ids without names"
