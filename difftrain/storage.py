"""Files that appear whole or not at all, and digests that say what is in them."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
os.umask(UMASK := os.umask(0))
MODE = 0o666 & ~UMASK  # of new files, as open() makes them; safetensors makes them readable for their owner alone
AT_ONCE = 2**22  # values that are summed at once: a text encoder's table of words would need gigabytes


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """Within: a path beside `path` to write to; it takes the place of `path` at the end, or vanishes with an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield beside
        beside.chmod(MODE)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def digest(*parts: Tensor | str | None) -> str:
    """16 hexadecimal digits of the SHA-256 of texts and of tensors' types, shapes and values, in this order."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype}{list(part.shape)}".encode())
            state.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            state.update(f"{part!r};".encode())
    return state.hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A digest of the names, types, shapes and values of weights: the same on every device and for any number of threads."""
    return digest("".join(f"{name}:{value.dtype}{list(value.shape)}:{checksum(value)};" for name, value in sorted(weights.items())))


@torch.no_grad()
def checksum(values: Tensor) -> int:
    """The sum of the values' bits, read as integers and weighted by their places, modulo 2^64: exact in any order of summation."""
    bits = values.detach().contiguous().reshape(-1).view(INTEGERS[values.element_size()])
    total = 0
    for start in range(0, len(bits), AT_ONCE):
        part = bits[start : start + AT_ONCE].to(torch.int64)
        total += int((part * torch.arange(start + 1, start + 1 + len(part), device=part.device)).sum())
    return total % 2**64
