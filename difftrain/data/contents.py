"""What a data set holds, as one digest: of each item, its label and its caption, in their order."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from difftrain.core.console import wing_logger
from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.file_digests import RememberedDigests
from difftrain.core.processes import on_all, share, sum_over_processes
from difftrain.data.images import Original
from difftrain.data.items import MapDataset, TensorItem
from difftrain.data.opening import UnreadableImage

logger = wing_logger(__name__)

READERS = 8  # threads
AT_ONCE = 64  # items that a thread reads in turn


@dataclass(frozen=True)
class ItemDigests:
    """The digest of one item after the other: its file's bytes or values, its label, its caption.

    Args:
        dataset: The items.
        remembered: Digests of files that have not changed since they were read.
    """

    dataset: MapDataset
    remembered: RememberedDigests

    def __call__(self, i: int) -> bytes:
        """Return 16 bytes that belong to item i.

        Raises:
            InputError: If it cannot be read.
        """
        if self.dataset.items_are == "tensors":
            item: TensorItem = self.dataset[i]
            content, about = values_digest(item), f"{item.label!r};{None!r}"
        else:
            found = self._original(i)
            content, about = self._file_digest(found), f"{found.label!r};{found.caption()!r}"
        return blake2b(content + about.encode(), digest_size=16).digest()

    def of_content(self, i: int) -> bytes:
        """Return 16 bytes that belong to the picture or the values of item i alone.

        Raises:
            InputError: If it cannot be read.
        """
        if self.dataset.items_are == "tensors":
            return values_digest(self.dataset[i])
        return self._file_digest(self._original(i))

    def all(self, chosen: Sequence[int], contents_alone: bool = False) -> Iterator[bytes]:
        """Yield the digests of some items in turn, read by several threads.

        Args:
            chosen: The items.
            contents_alone: Whether labels and captions are left out.
        """
        read = self.of_content if contents_alone else self

        def read_part(part: Sequence[int]) -> list[bytes]:
            return [read(i) for i in part]

        parts = [chosen[start : start + AT_ONCE] for start in range(0, len(chosen), AT_ONCE)]
        with ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(read_part, parts):
                yield from found

    def _file_digest(self, found: Original) -> bytes:
        try:
            return self.remembered(found.stamp, found.digest)
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error

    def _original(self, i: int) -> Original:
        try:
            return self.dataset.original(i)
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error


def values_digest(item: TensorItem) -> bytes:
    """Return 16 bytes that belong to the values of an item."""
    return bytes.fromhex(digest(item.values)).rjust(16, b"\0")


def content_digest(dataset: MapDataset, chosen: Sequence[int], memory: Path) -> str:
    """Return a digest of what some items of a data set hold. Collective: the reading is dealt out.

    Two sets with one digest have the same bytes of files (or values), labels and captions, in one
    order. Where they lie, and what their files are called, does not count.

    Args:
        dataset: The data set.
        chosen: The items.
        memory: The folder that remembers digests of files.

    Raises:
        InputError: On every process, if an item cannot be read.
    """
    remembered = RememberedDigests(memory)
    read = ItemDigests(dataset, remembered)
    mine = list(share(range(len(chosen))))
    table = torch.zeros(len(chosen), 2, dtype=torch.int64)

    def read_share() -> None:
        found = b"".join(read.all([chosen[place] for place in mine]))
        if found:
            table[mine] = as_integers(found).reshape(-1, 2)

    on_all(read_share)
    keep(remembered)
    return digest(sum_over_processes(table))


def as_integers(content: bytes) -> torch.Tensor:
    """Return bytes as int64, eight each."""
    return torch.from_numpy(np.frombuffer(content, dtype=np.int64).copy())


def keep(remembered: RememberedDigests) -> None:
    """Write what is new, where that is possible; else the files are read again next time."""
    try:
        remembered.save()
    except OSError as error:
        logger.debug(f"{remembered.folder}: {error}")
