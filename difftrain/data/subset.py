"""Some items of a data set, as a data set."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from difftrain.data.captions import Captions
from difftrain.data.images import Original
from difftrain.data.items import MapDataset
from difftrain.data.left_out import LeftOut
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Size


class Subset(MapDataset):
    """Some items of a data set.

    Args:
        dataset: The data set.
        chosen: Their indices.
    """

    def __init__(self, dataset: MapDataset, chosen: Sequence[int]):
        self.dataset, self.chosen = dataset, list(chosen)
        self.class_names = dataset.class_names
        self.num_frames, self.item_shape = dataset.num_frames, dataset.item_shape

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> object:
        return self.dataset[self.chosen[i]]

    def original(self, i: int) -> Original:
        """Return what is known of item i before it is decoded; see `MapDataset.original`."""
        return self.dataset.original(self.chosen[i])

    def size(self, i: int) -> Size:
        """Return (height, width) of image i."""
        return self.dataset.size(self.chosen[i])

    def weight(self, key: int) -> float | None:
        """Return what an item counts in the loss."""
        return self.dataset.weight(self.chosen[key])

    def shown(self, key: int, captions: Captions) -> Captions:
        """Return how the caption of an item is shown."""
        return self.dataset.shown(self.chosen[key], captions)

    def name_of(self, i: int) -> str:
        """Return what a message calls item i."""
        return self.dataset.name_of(self.chosen[i])

    def left_out(self) -> list[LeftOut]:
        """Return what the whole data set leaves out."""
        return self.dataset.left_out()

    def is_labelled(self) -> bool:
        """Return whether the items have labels."""
        return self.dataset.is_labelled()

    def is_captioned(self) -> bool:
        """Return whether the items have captions."""
        return self.dataset.is_captioned()

    def label_counts(self) -> Counter[int] | None:
        """Count the items by class id: those of the whole set, without the items left out."""
        counts = self.dataset.label_counts()
        if counts is None:
            return None
        for i in sorted(set(range(len(self.dataset))) - set(self.chosen)):
            # What the data set could not read has not counted.
            with contextlib.suppress(UnreadableImage):
                label = self.dataset.original(i).label
                if label is not None:
                    counts[label] -= 1
        return +counts

    def captions(self) -> Iterator[tuple[str, str | None]]:
        """Yield (name, caption) of the items, or of the first alone, as the data set does."""
        found = list(self.dataset.captions())
        if len(found) == len(self.dataset):
            yield from (found[i] for i in self.chosen)
        else:
            original = self.original(0)
            yield original.name, original.caption()
