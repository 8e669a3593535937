"""Digests that identify tensors, texts and model weights by their values."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by number of bytes
CHUNK = 2**22  # values that are summed at once; a large embedding table would need gigabytes


def digest(*parts: Tensor | str | None) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of some parts, in this order.

    Args:
        parts: Texts, and tensors, of which dtype, shape and values count.
    """
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{part.dtype}{list(part.shape)}".encode())
            state.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            state.update(f"{part!r};".encode())
    return state.hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of the names, dtypes, shapes and values of weights.

    It is the same on every device, for every number of threads, and for sharded weights, for which
    it is collective.
    """
    lines = []
    for name in sorted(weights):
        value = weights[name]
        if isinstance(value, DTensor):
            value = value.full_tensor()
        lines.append(f"{name}:{value.dtype}{list(value.shape)}:{checksum(value)};")
    return digest("".join(lines))


@torch.no_grad()
def checksum(values: Tensor) -> int:
    """Return the sum over places i = 1, 2, ... of i times the bits of value i, modulo 2^64.

    The bits are read as an integer, so the sum is exact in every order of summation.
    """
    bits = values.detach().contiguous().reshape(-1).view(INTEGERS[values.element_size()])
    total = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        total += int((part * places).sum())
    return total % 2**64
