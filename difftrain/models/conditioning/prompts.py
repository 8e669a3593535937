"""Prompts as conditioning: captions in training, prompts by number in sampling."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.pipelines.text_encoders import PromptTokenizer, TextEncoders
from difftrain.objective.types import Cond

MOST_KEPT = 256  # prompts whose states are kept, so that a grid does not encode them again
MOST_BYTES = 2**30  # of states that are remembered in the host's memory


class HasText(Protocol):
    """A model with tokenizers and text encoders."""

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizers."""

    @property
    def text(self) -> TextEncoders:
        """The frozen text encoders, read when they are first asked for."""

    def release_text(self) -> None:
        """Free the frozen text encoders; they are read again when they are asked for again."""


class TextConditioning(Conditioning):
    """States of prompts, and the other inputs of a text-to-image network: sizes and guidance.

    Args:
        model: The model, whose text encoders encode prompts.
        prompts: Prompts of generated samples; sample i takes prompt i modulo their number.
        size: (height, width) in pixels of generated images.
        size_conditioning: Whether the network takes the sizes (original height, original width,
            crop top, crop left, height, width).
        guidance_input: The guidance that the network takes as an input, (in training, in
            sampling); None for a network without that input.
        trains_text: Whether text encoders train: the network then takes token ids.
    """

    conditions = can_guide = True
    num_classes = None

    def __init__(
        self,
        model: HasText,
        prompts: Sequence[str],
        size: tuple[int, int],
        size_conditioning: bool = False,
        guidance_input: tuple[float, float] | None = None,
        trains_text: bool = False,
    ):
        self.model = model
        self.prompts: list[str] = list(prompts)
        self.num_prompts = len(prompts)
        self.size = size
        self.size_conditioning = size_conditioning
        self.guidance_input = guidance_input
        self.trains_text = trains_text
        self.device = torch.device("cpu")
        self._numbers: dict[str, int] = {}
        for number, prompt in enumerate(self.prompts):
            self._numbers.setdefault(prompt, number)
        self._states: dict[str, Cond] = {}
        self._remembered: dict[str, Cond] = {}

    def to(self, device: torch.device) -> "TextConditioning":
        """Encode text on this device from now on."""
        self.device = device
        return self

    def of(self, micro: MicroBatch, rng: Rng) -> Cond:
        """Return the conditioning of a training batch.

        Captions' states come from the cache where the batch brings them. Where text encoders
        train, token ids take their place.
        """
        if micro.cond is not None:
            cond = dict(micro.cond)
        else:
            assert micro.captions is not None
            cond = self._encoded(micro.captions)
        if self.size_conditioning:
            assert micro.geometry is not None
            cond["sizes"] = micro.geometry
        if self.guidance_input is not None:
            cond["guidance"] = torch.full((len(micro.samples),), self.guidance_input[0])
        return cond

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        """Return the numbers [B] of prompts; new prompts get the next numbers."""
        for prompt in prompts:
            if prompt not in self._numbers:
                self._numbers[prompt] = len(self.prompts)
                self.prompts.append(prompt)
        return torch.tensor([self._numbers[prompt] for prompt in prompts])

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """Return the numbers [B] of the prompts of generated samples."""
        return torch.tensor([i % self.num_prompts for i in indices])

    def captions_of(self, labels: Tensor) -> list[str]:
        """Return the prompts by their numbers [B]."""
        return [self.prompts[number] for number in labels.tolist()]

    def __call__(self, labels: Tensor | None, rng: Rng | None = None) -> Cond:
        """Return the conditioning of prompts by their numbers [B], for images of size `size`."""
        assert labels is not None
        return self._of_prompts(self.captions_of(labels))

    def null(self, num: int) -> Cond:
        """Return the conditioning of `num` empty prompts."""
        return self._of_prompts([""] * num)

    def described(self) -> dict[str, Any]:
        """Return the tokens that each text encoder reads, the size and the guidance input."""
        found: dict[str, Any] = {"max_tokens": self.model.tokenizer.limits}
        if self.size_conditioning:
            found["size"] = list(self.size)
        if self.guidance_input is not None:
            found["guidance_input"] = self.guidance_input[1]
        return found

    def remember(self) -> None:
        """Encode the empty prompt and all known prompts now, as many as fit into `MOST_BYTES`.

        Sampling them needs no text encoder afterwards. Text encoders that are read again for other
        prompts are freed by `release`.
        """
        left = MOST_BYTES
        for prompt in dict.fromkeys(["", *self.prompts]):
            state = self._encoded([prompt])
            left -= sum(value.nbytes for value in state.values())
            if left < 0:
                break
            self._remembered[prompt] = {name: value.cpu() for name, value in state.items()}

    def release(self) -> None:
        """Free text encoders that were read again after `remember`."""
        if self._remembered:
            self._states.clear()
            self.model.release_text()

    def _of_prompts(self, prompts: Sequence[str]) -> Cond:
        states = [self._state(prompt) for prompt in prompts]
        cond = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        if self.size_conditioning:
            sizes = torch.tensor([(*self.size, 0, 0, *self.size)], dtype=torch.float32)
            cond["sizes"] = sizes.expand(len(prompts), -1)
        if self.guidance_input is not None:
            cond["guidance"] = torch.full((len(prompts),), self.guidance_input[1])
        return cond

    def _state(self, prompt: str) -> Cond:
        """The encoded prompt, kept; the oldest of too many states goes."""
        if prompt in self._remembered:
            kept = self._remembered[prompt]
            return {name: value.to(self.device) for name, value in kept.items()}
        if prompt not in self._states:
            if len(self._states) >= MOST_KEPT:
                oldest = next(iter(self._states))
                del self._states[oldest]
            self._states[prompt] = self._encoded([prompt])
        return self._states[prompt]

    def _encoded(self, prompts: Sequence[str]) -> Cond:
        """States of prompts, or their token ids where text encoders train."""
        if self.trains_text:
            return self.model.tokenizer(prompts)
        return self.model.text.to(self.device).encode(prompts)
