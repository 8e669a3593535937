"""Randomness as a function of (seed, step, sample index, stream).

Every draw has a key, so two processes draw the numbers that one would draw, and a resumed run needs
no saved generator state. Numbers are drawn on the CPU and then moved: the noise is the same on
every device and in every precision.
"""

import contextlib
import functools
import hashlib
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SHARED = -1  # sample index of the draws that belong to no sample


def key(seed: int, step: int, index: int, stream: str) -> int:
    """Return the 64-bit key of one draw.

    The key is a hash, because torch's CPU generator drops the upper 32 bits of its seed: packed
    keys would collide.

    Args:
        seed: The run's seed.
        step: The optimizer step.
        index: The sample's index in the global batch.
        stream: What the draw is for.
    """
    packed = struct.pack("<qqq", seed, step, index) + stream.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little", signed=True)


class Rng:
    """The random draws for some samples of one step.

    Streams keep draws for different purposes apart: `rng.normal(shape, "noise")`.

    Args:
        seed: The run's seed.
        step: The optimizer step.
        samples: Indices of these samples in the global batch of the step. Every split of the batch
            over processes and micro-batches then draws the same numbers.
        batch_size: Size of the global batch. By default these samples are the whole batch.
    """

    def __init__(
        self, seed: int, step: int = 0, samples: Sequence[int] = (0,), batch_size: int | None = None
    ):
        self.seed, self.step = seed, step
        self.samples = list(samples)
        self.batch_size = len(self.samples) if batch_size is None else batch_size
        self.prefix = ""

    def child(self, prefix: str) -> "Rng":
        """Return the same samples with `prefix.` before every stream's name."""
        child = Rng(self.seed, self.step, self.samples, self.batch_size)
        child.prefix = f"{self.prefix}{prefix}."
        return child

    def of(self, rows: Sequence[int]) -> "Rng":
        """Return the draws of some of the samples.

        Args:
            rows: Positions of these samples in `samples`.
        """
        some = Rng(self.seed, self.step, [self.samples[row] for row in rows], self.batch_size)
        some.prefix = self.prefix
        return some

    def generators(self, stream: str) -> list[torch.Generator]:
        """Return one CPU generator for each sample, in the form that diffusers' samplers take."""
        return [self._generator(sample, stream) for sample in self.samples]

    def normal(self, shape: Sequence[int], stream: str) -> Tensor:
        """Draw standard normal numbers; row i depends on sample i alone.

        Args:
            shape: The shape of one row.
            stream: What the draw is for.

        Returns:
            [B, *shape] float32, on the CPU.
        """
        size = tuple(shape)
        return torch.stack([torch.randn(size, generator=g) for g in self.generators(stream)])

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw uniform numbers in [0, 1); row i depends on sample i alone.

        Args:
            stream: What the draw is for.
            shape: The shape of one row.

        Returns:
            [B, *shape] float64, on the CPU.
        """
        size, generators = tuple(shape), self.generators(stream)
        return torch.stack([torch.rand(size, generator=g, dtype=torch.float64) for g in generators])

    def shared(self, stream: str) -> torch.Generator:
        """Return a generator that is the same for all processes and micro-batches of the step."""
        return self._generator(SHARED, stream)

    def place_in_batch(self, stream: str) -> Tensor:
        """Return the samples' places [B] in a random order of the global batch.

        All processes use the same order.
        """
        order = torch.randperm(self.batch_size, generator=self.shared(stream))
        return order[self.samples]

    @contextlib.contextmanager
    def global_state(self, stream: str, device: torch.device) -> Iterator[None]:
        """Seed torch's global generators, which drive a model's dropout, and restore them after.

        Args:
            stream: What the draws are for.
            device: The device whose generator is seeded beside that of the CPU.
        """
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(key(self.seed, self.step, self.samples[0], self.prefix + stream))
            yield

    def _generator(self, sample: int, stream: str) -> torch.Generator:
        seed = key(self.seed, self.step, sample, self.prefix + stream)
        return torch.Generator().manual_seed(seed)


def permuted(seed: int, k: int, size: int) -> int:
    """Return the item that is the k-th sample of a run; each epoch is one permutation of all items.

    Args:
        seed: The run's seed.
        k: Index of the sample, counted over all steps.
        size: Number of items.
    """
    epoch, place = divmod(k, size)
    return int(epoch_order(seed, epoch, size)[place])


@functools.lru_cache(maxsize=4)  # a batch spans few epochs
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """Return the order [size] of the items in one epoch."""
    generator = torch.Generator().manual_seed(key(seed, epoch, size, "data order"))
    return torch.randperm(size, generator=generator)
