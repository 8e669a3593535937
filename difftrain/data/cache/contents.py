"""What a data set holds: a digest of each image's content, its label, and digests of its captions.

A file that has not changed since its content was last digested is not read again.
"""

import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from difftrain.core.errors import InputError
from difftrain.core.file_digests import RememberedDigests, remove_other_formats
from difftrain.core.processes import on_all, on_main, share, sum_over_processes
from difftrain.data.captions import Captions, described
from difftrain.data.contents import READERS, as_integers
from difftrain.data.images import Original
from difftrain.data.items import MapDataset
from difftrain.data.opening import UnreadableImage
from difftrain.data.transform import Size
from difftrain.data.unreadable import ReadErrors

NO_LABEL = -(2**62)


@dataclass(eq=False)
class Contents:
    """The contents of N images.

    Args:
        digests: [N, 2] int64, digests of the images; (0, 0) of unreadable ones.
        labels: [N] int64, `NO_LABEL` where there is none.
        renderings: [N, V, 2] int64, digests of the V renderings of each caption; V = 0 where
            captions are not cached.
        prompts: The texts of this process's share of the renderings, by key.
    """

    digests: np.ndarray
    labels: np.ndarray
    renderings: np.ndarray
    prompts: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.digests)

    def latent_key(self, i: int, size: Size, variant: int) -> str:
        """Return the key of one crop of one content.

        The crop's random numbers are a function of it too, so that they belong to the image and not
        to its place in the data set.

        Args:
            i: The image.
            size: (height, width) of the crop.
            variant: The number of the crop.
        """
        crop = self.digests[i].tobytes() + struct.pack("<qqq", *size, variant)
        return blake2b(crop, digest_size=16).hexdigest()

    def prompt_key(self, i: int, variant: int) -> str:
        """Return the key of one rendering of the caption of image i."""
        key: str = self.renderings[i, variant].tobytes().hex()
        return key

    def is_readable(self, i: int) -> bool:
        """Return whether image i can be read."""
        return bool(self.digests[i].any())


def prompt_digest(prompt: str) -> bytes:
    """Return 16 bytes that belong to a text."""
    return blake2b(prompt.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Reading:
    """What is read of each image.

    Args:
        dataset: The images.
        remembered: Digests of files from earlier runs; None: the images' contents are not wanted.
        captions: How captions are rendered; None: they are not read.
    """

    dataset: MapDataset
    remembered: RememberedDigests | None
    captions: Captions | None

    def __call__(self, i: int) -> tuple[bytes, int, list[str]] | UnreadableImage:
        """Read image i.

        Returns:
            The digest of its content, its label, and the renderings of its caption; or why it
            cannot be read.

        Raises:
            InputError: If it lacks a caption.
        """
        try:
            found = self.dataset.original(i)
            content = self._content(found)
        except UnreadableImage as error:
            return error
        label = NO_LABEL if found.label is None else found.label
        return content, label, self._renderings(i, found)

    def _content(self, found: Original) -> bytes:
        if self.remembered is None:
            return bytes(16)
        return self.remembered(found.stamp, found.digest)

    def _renderings(self, i: int, found: Original) -> list[str]:
        if self.captions is None:
            return []
        caption = described(found.caption(), found.name)
        shown = self.dataset.shown(i, self.captions)
        return [shown.variant(caption, v) for v in range(self.captions.variants)]


def read_contents(
    dataset: MapDataset,
    memory: Path,
    captions: Captions | None,
    digests: bool,
    errors: ReadErrors,
    key: str,
) -> Contents:
    """Read the contents of a data set. Collective: each process reads its share.

    Args:
        dataset: The images.
        memory: The folder that remembers digests of files.
        captions: How captions are rendered; None: they are not read.
        digests: Whether the images' contents are wanted.
        errors: What becomes of an image that cannot be read.
        key: The key of the data set in the recipe.

    Raises:
        InputError: If an image is unreadable, or lacks a caption.
    """
    num_variants = 0 if captions is None else captions.variants
    table = torch.zeros(len(dataset), 3 + 2 * num_variants, dtype=torch.int64)
    prompts: dict[str, str] = {}
    on_main(lambda: remove_other_formats(memory))
    remembered = RememberedDigests(memory)
    read = Reading(dataset, remembered if digests else None, captions)
    mine = list(share(range(len(dataset))))

    def read_share() -> None:
        with ThreadPoolExecutor(READERS) as pool:
            for i, found in zip(mine, pool.map(read, mine, chunksize=16), strict=True):
                if isinstance(found, UnreadableImage):
                    errors.met(found, key)
                    found = bytes(16), NO_LABEL, []
                content, label, texts = found
                marks = [prompt_digest(text) for text in texts]
                prompts.update({mark.hex(): text for mark, text in zip(marks, texts, strict=True)})
                # An unreadable image has the renderings of the empty text.
                marks = marks or [prompt_digest("")] * num_variants
                table[i, :2] = as_integers(content)
                table[i, 2] = label
                table[i, 3:] = as_integers(b"".join(marks))
        save(remembered)

    on_all(read_share)
    values = sum_over_processes(table).numpy()
    renderings = values[:, 3:].reshape(len(dataset), num_variants, 2)
    return Contents(values[:, :2].copy(), values[:, 2].copy(), renderings.copy(), prompts)


def save(remembered: RememberedDigests) -> None:
    """Write what is new.

    Raises:
        InputError: If it cannot be written.
    """
    try:
        remembered.save()
    except OSError as error:
        raise InputError(
            f"cache.folder: {remembered.folder} cannot be written ({error}). Make room, or write "
            "another folder."
        ) from error
