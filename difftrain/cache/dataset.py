"""A table whose latents, or states of captions, or both are read from a cache: nothing is encoded any more."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from difftrain.batch import Cond
from difftrain.cache.contents import NO_LABEL
from difftrain.cache.shards import Entry, ShardReader
from difftrain.captions import Captions, described
from difftrain.data.items import ImageDataset, Sample, UnreadableImage, weight_of
from difftrain.data.originals import original
from difftrain.data.transform import Size, Transform
from difftrain.rng import Rng

ABSENT = -1


@dataclass(eq=False)
class Cached:
    """Entries by item and variant. places: (file, row) [N, V, 2], ABSENT where there is none."""

    reader: ShardReader
    places: np.ndarray

    def read(self, i: int, rng: Rng, stream: str) -> Entry | None:
        """One of the item's variants, drawn; None where there is none."""
        variants = self.places.shape[1]
        v = int(rng.uniform(stream).item() * variants) if variants > 1 else 0
        file, row = self.places[i, v].tolist()
        return None if file == ABSENT else self.reader(file, row)


class CachedDataset:
    """The items of a table, of which samples bring what is cached instead of pixels and captions.

    captions: how captions are shown; None: samples have none. labels: [N] int64, NO_LABEL where there is none. latents, states: what is
    cached; None: nothing of the kind. empty: the states of the empty prompt.
    """

    def __init__(
        self, dataset: ImageDataset, transform: Transform, captions: Captions | None, labels: np.ndarray, latents: Cached | None,
        states: Cached | None, empty: Cond | None,
    ):
        self.dataset, self.transform, self.captions, self.labels = dataset, transform, captions, labels
        self.latents, self.states, self.empty = latents, states, empty
        self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        """The item itself, decoded."""
        return self.dataset[i]

    def sample(self, i: int, rng: Rng, size: Size | None = None) -> Sample:
        """What training reads of item i: its latents' moments or pixels of `size`, its caption's states or the caption."""
        cond = self._states(i, rng)
        if self.latents is None:
            item = self.dataset[i]
            placed = item.place(self.transform, rng, size)
            caption = self._caption(item.caption, item.name, rng)
            return Sample(item.label, caption, placed.pixels, placed.geometry, cond=cond, weight=weight_of(self.dataset, i), name=item.name)
        entry = self.latents.read(i, rng, "cache.latents")
        if entry is None:
            raise UnreadableImage(original(self.dataset, i).name, "it could not be decoded when the cache was made")
        height, width, top, left, *crop = entry["geometry"].tolist()
        assert size is None or tuple(crop) == size, "the cache was made for other buckets"
        label = None if self.labels[i] == NO_LABEL else int(self.labels[i])
        geometry = (height, width, top, left, *crop)
        return Sample(label, self._own_caption(i, rng), None, geometry, entry["moments"], cond, weight_of(self.dataset, i))

    def _states(self, i: int, rng: Rng) -> Cond | None:
        if self.states is None:
            return None
        assert self.captions is not None
        return self.empty if self.captions.drops(rng) else self.states.read(i, rng, "cache.text")

    def _own_caption(self, i: int, rng: Rng) -> str | None:
        """The caption as it is shown, read without the image."""
        if self.captions is None or self.states is not None:
            return None
        found = original(self.dataset, i)
        return self._caption(found.caption(), found.name, rng)

    def _caption(self, caption: str | None, name: str, rng: Rng) -> str | None:
        if self.captions is None or self.states is not None:
            return None
        return self.captions(described(caption, name), rng)
