"""What a data set's images are: a digest of each one's content, its label, and what its caption can read.

A file that has not changed since its content was last digested is not read again.
"""

import contextlib
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from difftrain.cache.shards import written
from difftrain.captions import Captions, described
from difftrain.data.items import ImageDataset, UnreadableImage
from difftrain.data.originals import Original, original
from difftrain.data.transform import Size
from difftrain.distributed import on_all, share, sum_over_processes
from difftrain.registry import InputError
from difftrain.storage import digest

READERS = 8  # threads
NO_LABEL = -(2**62)


@dataclass(eq=False)
class Contents:
    """Of N images: digests [N, 2] int64 (0, 0 of unreadable ones), labels [N] int64, renderings [N, V, 2] int64, digests of what each
    caption can read (V = 0 where captions are not cached). prompts: the texts of this process's share of them, by key."""

    digests: np.ndarray
    labels: np.ndarray
    renderings: np.ndarray
    prompts: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.digests)

    def latent_key(self, i: int, size: Size, variant: int) -> str:
        """Names one crop of one content. Draws are keyed by it too, so that they belong to the image and not to its place."""
        return blake2b(self.digests[i].tobytes() + struct.pack("<qqq", *size, variant), digest_size=16).hexdigest()

    def prompt_key(self, i: int, variant: int) -> str:
        return self.renderings[i, variant].tobytes().hex()

    def is_readable(self, i: int) -> bool:
        return bool(self.digests[i].any())


def prompt_digest(prompt: str) -> bytes:
    return blake2b(prompt.encode(), digest_size=16).digest()


def read_contents(dataset: ImageDataset, memory: Path, captions: Captions | None, digests: bool, on_error: str) -> Contents:
    """The contents of a table. Collective: each process reads its share. memory: the folder that remembers digests of files.

    captions: how they are rendered; None: they are not read. digests: whether the images' contents are wanted too.
    """
    variants = 0 if captions is None else captions.variants
    table, prompts = torch.zeros(len(dataset), 3 + 2 * variants, dtype=torch.int64), dict[str, str]()
    remembered = Remembered(memory)

    def read(i: int) -> tuple[int, bytes, int | None, list[str]]:
        try:
            found = original(dataset, i)
            content = remembered(found) if digests else bytes(16)
        except UnreadableImage as error:
            if on_error == "stop":
                raise InputError(f"{error}. Repair or remove it, or write on_error: skip.") from error
            return i, bytes(16), None, []
        texts = renderings(found, captions) if captions is not None else []
        return i, content, found.label, texts

    def read_all() -> None:
        with ThreadPoolExecutor(READERS) as pool:
            for i, content, label, texts in pool.map(read, share(range(len(dataset))), chunksize=16):
                marks = [prompt_digest(text) for text in texts or [""] * variants]
                prompts.update({mark.hex(): text for mark, text in zip(marks, texts, strict=False)})
                values = np.frombuffer(content + b"".join(marks), dtype=np.int64).copy()
                table[i, :2], table[i, 2] = torch.from_numpy(values[:2]), NO_LABEL if label is None else label
                table[i, 3:] = torch.from_numpy(values[2:])
        remembered.save()

    on_all(read_all)
    values = sum_over_processes(table).numpy()
    return Contents(values[:, :2].copy(), values[:, 2].copy(), values[:, 3:].reshape(len(dataset), variants, 2).copy(), prompts)


def renderings(found: Original, captions: Captions) -> list[str]:
    caption = described(found.caption(), found.name)
    return [captions.variant(caption, v) for v in range(captions.variants)]


class Remembered:
    """Digests by the stamps of files, from what earlier runs and other processes have written into a folder."""

    def __init__(self, folder: Path):
        self.folder, self.known, self.new = folder, dict[str, str](), dict[str, str]()
        for file in self._files():
            with contextlib.suppress(ValueError):  # a damaged one: what it held is digested again
                self.known.update(json.loads(file.read_text()))

    def __call__(self, found: Original) -> bytes:
        if found.stamp is None:
            return found.digest()
        mark = digest(found.stamp)
        if mark not in self.known:
            self.known[mark] = self.new[mark] = found.digest().hex()
        return bytes.fromhex(self.known[mark])

    def save(self) -> None:
        """Each process writes a file of its own."""
        if self.new:
            text = json.dumps(self.new, sort_keys=True)
            with written(self.folder / f"{digest(text)}.json") as beside:
                beside.write_text(text)

    def _files(self) -> Iterator[Path]:
        return (file for file in sorted(self.folder.glob("*.json")) if not file.name.startswith("."))
