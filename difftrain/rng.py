"""Randomness as a function of (seed, step, sample index, stream).

Every draw is keyed, so two processes draw what one would have drawn, and a resumed run needs no saved generator
state. Numbers are drawn on the CPU in float32 and then moved: the same noise on any device and in any precision.
"""

import contextlib
import hashlib
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def key(seed: int, step: int, index: int, stream: str) -> int:
    """A 64-bit key of one draw. Hashed, because torch's CPU generator seeds itself from the lower 32 bits alone."""
    packed = struct.pack("<qqq", seed, step, index) + stream.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


class Rng:
    """The draws that belong to some samples of one step.

    samples: positions of these samples in the global batch of the step, so that any split of the batch over
    processes and micro-batches draws the same numbers. batch_size: size of that global batch (default: all samples
    are here). Streams keep draws for different purposes apart: `rng.normal(shape, "noise")`.
    """

    def __init__(self, seed: int, step: int = 0, samples: Sequence[int] = (0,), batch_size: int | None = None):
        self.seed, self.step, self.samples = seed, step, list(samples)
        self.batch_size = len(self.samples) if batch_size is None else batch_size
        self.prefix = ""

    def child(self, prefix: str) -> "Rng":
        """The same keys with `prefix.` before every stream's name: one regularizer's own streams."""
        child = Rng(self.seed, self.step, self.samples, self.batch_size)
        child.prefix = f"{self.prefix}{prefix}."
        return child

    def of(self, rows: Sequence[int]) -> "Rng":
        """The same keys for some of the samples: `rows` are places among these samples."""
        some = Rng(self.seed, self.step, [self.samples[row] for row in rows], self.batch_size)
        some.prefix = self.prefix
        return some

    def generators(self, stream: str) -> list[torch.Generator]:
        """One CPU generator for each sample, as diffusers' samplers take them."""
        return [self._generator(sample, stream) for sample in self.samples]

    def normal(self, shape: Sequence[int], stream: str) -> Tensor:
        """Standard normal numbers [B, *shape], float32 on the CPU; row i depends on sample i alone."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators(stream)])

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1): [B, *shape], float64 on the CPU."""
        draws = [torch.rand(tuple(shape), generator=g, dtype=torch.float64) for g in self.generators(stream)]
        return torch.stack(draws)

    def shared(self, stream: str) -> torch.Generator:
        """A generator that is the same on all processes and for all micro-batches of the step."""
        return self._generator(-1, stream)

    def place_in_batch(self, stream: str) -> Tensor:
        """The samples' places [B] in one random order of the global batch, shared by all processes."""
        return torch.randperm(self.batch_size, generator=self.shared(stream))[self.samples]

    @contextlib.contextmanager
    def global_state(self, stream: str, device: torch.device) -> Iterator[None]:
        """Within: torch's global generators (they drive model dropout) start from this key; restored afterwards."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(key(self.seed, self.step, self.samples[0], self.prefix + stream))
            yield

    def _generator(self, sample: int, stream: str) -> torch.Generator:
        return torch.Generator().manual_seed(key(self.seed, self.step, sample, self.prefix + stream))


def permuted(seed: int, k: int, size: int, _cache: dict[tuple[int, int, int], Tensor] = {}) -> int:  # noqa: B006
    """Item of the k-th sample of a run over `size` items: epoch k // size is one keyed permutation of them."""
    epoch, place = divmod(k, size)
    if (seed, epoch, size) not in _cache:
        if len(_cache) >= 4:  # a batch spans few epochs; more would only hold memory
            _cache.pop(next(iter(_cache)))
        generator = torch.Generator().manual_seed(key(seed, epoch, size, "data order"))
        _cache[seed, epoch, size] = torch.randperm(size, generator=generator)
    return int(_cache[seed, epoch, size][place])
