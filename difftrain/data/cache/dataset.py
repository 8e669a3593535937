"""A data set whose latents, or states of captions, or both are read from a cache."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from difftrain.core.rng import Rng
from difftrain.data.batch import Sample
from difftrain.data.cache.contents import NO_LABEL
from difftrain.data.cache.shards import Entry, ShardReader
from difftrain.data.captions import Captions, described
from difftrain.data.images import Original
from difftrain.data.items import DecodedSamples, Item, MapDataset
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Size, Transform
from difftrain.objective.types import Cond

ABSENT = -1


@dataclass(eq=False)
class Cached:
    """Entries of a cache by item and variant.

    Args:
        reader: Reads the entries.
        places: (file, row) [N, V, 2] of each, `ABSENT` where there is none.
    """

    reader: ShardReader
    places: np.ndarray

    def read(self, i: int, rng: Rng, stream: str) -> Entry | None:
        """Return a random one of an item's variants; None where there is none.

        Args:
            i: The item.
            rng: The `Rng` of the sample.
            stream: The name of its stream.
        """
        num_variants = self.places.shape[1]
        v = 0
        if num_variants > 1:
            v = int(rng.uniform(stream).item() * num_variants)
        file, row = self.places[i, v].tolist()
        return None if file == ABSENT else self.reader(file, row)


class CachedDataset(MapDataset):
    """A data set whose samples bring what is cached instead of pixels and captions.

    Args:
        dataset: N images.
        transform: Turns them into pixels.
        captions: How captions are shown; None: samples have none.
        labels: [N] int64, `NO_LABEL` where there is none.
        latents: The cached latents; None: latents are not cached.
        states: The cached states of captions; None: text is not cached.
        empty: The states of the empty prompt.
    """

    def __init__(
        self,
        dataset: MapDataset,
        transform: Transform,
        captions: Captions | None,
        labels: np.ndarray,
        latents: Cached | None,
        states: Cached | None,
        empty: Cond | None,
    ):
        self.dataset = dataset
        self.transform = transform
        self.labels = labels
        self.latents = latents
        self.states = states
        self.empty = empty
        self.class_names = dataset.class_names
        self.captions_shown = captions

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Item:
        """Decode image i."""
        item: Item = self.dataset[i]
        return item

    def original(self, i: int) -> Original:
        """Return what the data set knows of image i; see `MapDataset.original`."""
        return self.dataset.original(i)

    def weight(self, key: int) -> float | None:
        """Return what image `key` counts in the loss."""
        return self.dataset.weight(key)

    def sample_source(
        self, transform: Transform | None, captions: Captions | None = None
    ) -> "CachedDataset":
        """Return this data set, which makes samples with its own transform and captions."""
        return self

    def sample(self, key: int, rng: Rng, size: Size | None = None) -> Sample:
        """Return what training reads of image `key`.

        Args:
            key: The image.
            rng: The `Rng` of the sample.
            size: (height, width) of its bucket; None without buckets.

        Returns:
            Its latents' moments, or pixels of `size`; its caption's states, or the caption.

        Raises:
            UnreadableImage: If the image cannot be decoded.
        """
        cond = self._states(key, rng)
        if self.latents is None:
            return dataclasses.replace(self._decoded(key, rng, size), cond=cond)
        entry = self.latents.read(key, rng, "cache.latents")
        if entry is None:
            raise UnreadableImage(
                self.original(key).name, "it could not be decoded when the cache was made"
            )
        height, width, top, left, *crop = entry["geometry"].tolist()
        assert size is None or tuple(crop) == size, "the cache was made for other buckets"
        label = int(self.labels[key])
        return Sample(
            label=None if label == NO_LABEL else label,
            caption=self._caption(key, rng),
            geometry=(height, width, top, left, *crop),
            moments=entry["moments"],
            cond=cond,
            weight=self.weight(key),
        )

    def _decoded(self, i: int, rng: Rng, size: Size | None) -> Sample:
        shown = self.captions_shown if self.states is None else None
        sample = DecodedSamples(self.dataset, self.transform, shown).sample(i, rng, size)
        return sample if shown is not None else dataclasses.replace(sample, caption=None)

    def _states(self, i: int, rng: Rng) -> Cond | None:
        if self.states is None:
            return None
        assert self.captions_shown is not None
        return (
            self.empty if self.captions_shown.drops(rng) else self.states.read(i, rng, "cache.text")
        )

    def _caption(self, i: int, rng: Rng) -> str | None:
        """Return the caption as it is shown, read without the image."""
        if self.captions_shown is None or self.states is not None:
            return None
        found = self.original(i)
        shown = self.dataset.shown(i, self.captions_shown)
        return shown(described(found.caption(), found.name), rng)
