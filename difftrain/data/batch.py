"""What training reads: one sample, and the micro-batch that samples make."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.data.transform import Geometry, Size
from difftrain.objective.types import Cond


@dataclass(frozen=True)
class Sample:
    """One sample; each field is None where the sample has nothing of the kind.

    Args:
        label: Class id.
        caption: Caption as the network sees it.
        pixels: [C, H, W] uint8; of a clip [C, F, H, W].
        geometry: See `difftrain.data.transform.Placed`.
        moments: [2C, h, w], mean and standard deviation of the latents' posterior.
        cond: Conditioning tensors by the network's argument names, without the batch's dimension.
        weight: What the sample counts in the loss.
        name: What a message calls the sample.
        values: x0 itself, of a data set of tensors, in floating point.
    """

    label: int | None = None
    caption: str | None = None
    pixels: Tensor | None = None
    geometry: Geometry | None = None
    moments: Tensor | None = None
    cond: Cond | None = None
    weight: float | None = None
    name: str = ""
    values: Tensor | None = None


class SampleSource(Protocol):
    """Makes samples, from decoded items or from a cache."""

    def sample(self, key: Any, rng: Rng, size: Size | None = None) -> Sample:
        """Return one sample.

        Args:
            key: An index of a map-style data set, or a row of a stream.
            rng: The `Rng` of the sample.
            size: (height, width) of its bucket; None without buckets.

        Raises:
            UnreadableImage: If the item cannot be decoded.
        """
        ...


@dataclass(frozen=True)
class MicroBatch:
    """The b samples of one backward on one process; fields are None where samples have none.

    Args:
        step: The optimizer step that the samples belong to.
        samples: Their positions in the global batch of the step.
        pixels: [b, C, H, W] uint8; of clips [b, C, F, H, W].
        labels: [b] long.
        captions: Captions as the network sees them, "" where one is dropped; None where `cond`
            holds cached states of them.
        skipped: What was replaced since it cannot be read, see `difftrain.data.unreadable.entry`.
        moments: [b, 2C, h, w], cached mean and standard deviation of the latents' posterior.
        cond: {name: [b, ...]}, cached states of captions, or the conditioning tensors of a data set
            of tensors.
        geometry: [b, 6] float32, see `difftrain.data.transform.Placed`; None of clips.
        weights: [b], what each sample counts in the loss.
        names: What messages call the samples.
        values: [b, ...], x0 of a data set of tensors, in floating point.
    """

    step: int
    samples: list[int]
    pixels: Tensor | None
    labels: Tensor | None
    captions: list[str] | None
    skipped: list[dict[str, Any]]
    moments: Tensor | None = None
    cond: Cond | None = None
    geometry: Tensor | None = None
    weights: Tensor | None = None
    names: list[str] | None = None
    values: Tensor | None = None
