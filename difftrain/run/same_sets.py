"""One set of images under two names, found by what the files hold.

A score means little where two of its sets are one: a reference that picks the best checkpoint and
gives the final score, a classifier that knows the reference by heart.
"""

from dataclasses import dataclass, field

from difftrain.core.errors import InputError
from difftrain.core.file_digests import RememberedDigests
from difftrain.core.files import DIGESTS, cache_home
from difftrain.data.contents import ItemDigests, keep
from difftrain.data.items import MapDataset


@dataclass
class SameSets:
    """Compares sets of images or tensors, each of which is read at most once.

    Args:
        remembered: Digests of files that have not changed since they were read.
    """

    remembered: RememberedDigests = field(
        default_factory=lambda: RememberedDigests(cache_home() / DIGESTS)
    )
    # By the object's number, beside the object itself, so that the number stays its own
    _known: dict[int, tuple[MapDataset, frozenset[bytes]]] = field(default_factory=dict)

    def __call__(self, a: MapDataset, b: MapDataset) -> bool:
        """Return whether two sets hold the same items, in whatever order and under any names.

        Labels and captions do not count. Sets of other sizes or kinds are not read.
        """
        if a is b:
            return True
        if len(a) != len(b) or a.items_are != b.items_are:
            return False
        try:
            return self._items(a) == self._items(b)
        except InputError:  # whoever needs the item says what is wrong with it
            return False

    def _items(self, dataset: MapDataset) -> frozenset[bytes]:
        if id(dataset) not in self._known:
            read = ItemDigests(dataset, self.remembered)
            found = frozenset(read.all(range(len(dataset)), contents_alone=True))
            keep(self.remembered)
            self._known[id(dataset)] = dataset, found
        return self._known[id(dataset)][1]
