"""What a data set holds, as one digest: of each item, its label and its caption, in their order."""

from collections.abc import Sequence
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
from difftrain.data.images import Original, UnreadableImage
from difftrain.data.items import MapDataset, TensorItem

logger = wing_logger(__name__)

READERS = 8  # threads


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
            label, caption = self.dataset[i].label, None
        else:
            found = self._original(i)
            label, caption = found.label, found.caption()
        about = f"{label!r};{caption!r}".encode()
        return blake2b(self.of_content(i) + about, digest_size=16).digest()

    def of_content(self, i: int) -> bytes:
        """Return 16 bytes that belong to the picture or the values of item i alone.

        Raises:
            InputError: If it cannot be read.
        """
        if self.dataset.items_are == "tensors":
            item: TensorItem = self.dataset[i]
            return bytes.fromhex(digest(item.values)).rjust(16, b"\0")
        found = self._original(i)
        try:
            return self.remembered(found.stamp, found.digest)
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error

    def _original(self, i: int) -> Original:
        try:
            return self.dataset.original(i)
        except UnreadableImage as error:
            raise InputError(f"{error}. Repair or remove it.") from error


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
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(read, (chosen[place] for place in mine))
            for place, content in zip(mine, found, strict=True):
                table[place] = as_integers(content)

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
