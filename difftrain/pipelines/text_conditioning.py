"""Prompts as conditioning: in training the captions of a batch, in sampling and diagnostics prompts by their number in a table."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from difftrain.batch import Cond
from difftrain.data.loader import MicroBatch
from difftrain.pipelines.text import PromptTokenizer, TextEncoders
from difftrain.rng import Rng

MOST_KEPT = 256  # prompts whose states are held, so that a grid of the same prompts is not encoded again


class HasText(Protocol):
    @property
    def tokenize(self) -> PromptTokenizer: ...

    @property
    def text(self) -> TextEncoders:
        """Loaded when it is first asked for."""
        ...


class TextConditioning:
    """Conditioning tensors of prompts, and what else a family's denoiser is told.

    prompts: those of generated samples, taken in turn. trains_text: the denoiser encodes token ids itself. size: (height, width) in
    pixels of generated images. told_sizes: the denoiser is told (original height, width, crop top, left, height, width).
    guidance_input: what it is told of guidance, in training and in sampling; None: nothing.
    """

    conditions = can_guide = True
    num_classes: int | None = None

    def __init__(
        self, model: HasText, prompts: Sequence[str], size: tuple[int, int], told_sizes: bool = False,
        guidance_input: tuple[float, float] | None = None, trains_text: bool = False,
    ):
        self.model, self.prompts, self.num_prompts = model, list(prompts), len(prompts)
        self.size, self.told_sizes, self.guidance_input, self.trains_text = size, told_sizes, guidance_input, trains_text
        self.device = torch.device("cpu")
        self._ids = {prompt: i for i, prompt in reversed(list(enumerate(self.prompts)))}
        self._states: dict[str, Cond] = {}

    def to(self, device: torch.device) -> "TextConditioning":
        """Where text is encoded, from now on."""
        self.device = device
        return self

    def of(self, micro: MicroBatch, rng: Rng) -> Cond:
        """Of a training batch: its captions' states (from the cache, if there are any), or their token ids; sizes; the guidance input."""
        num = len(micro.samples)
        if micro.cond is not None:
            cond = dict(micro.cond)
        else:
            assert micro.captions is not None
            cond = self._encoded(micro.captions)
        if self.told_sizes:
            assert micro.geometry is not None
            cond["sizes"] = micro.geometry
        if self.guidance_input is not None:
            cond["guidance"] = torch.full((num,), self.guidance_input[0])
        return cond

    def ids_of(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' numbers [B] in the table, which takes up those that it lacks."""
        for prompt in prompts:
            if self._ids.setdefault(prompt, len(self.prompts)) == len(self.prompts):
                self.prompts.append(prompt)
        return torch.tensor([self._ids[prompt] for prompt in prompts])

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """The prompts' numbers [B] of generated samples: prompts in turn."""
        return torch.tensor([i % self.num_prompts for i in indices])

    def captions_of(self, ids: Tensor) -> list[str]:
        return [self.prompts[i] for i in ids.tolist()]

    def __call__(self, labels: Tensor | None, rng: Rng | None = None) -> Cond:
        """Conditioning tensors of prompts by their numbers [B], for images of the generated size."""
        assert labels is not None
        return self._of_prompts(self.captions_of(labels))

    def null(self, num: int) -> Cond:
        """The conditioning of `num` samples without a prompt."""
        return self._of_prompts([""] * num)

    def remember(self) -> None:
        """Encode the prompts of generated samples now, and the empty one, so that they need no text encoder later."""
        for prompt in [*self.prompts[: MOST_KEPT - 1], ""]:
            self._state(prompt)

    def _of_prompts(self, prompts: Sequence[str]) -> Cond:
        states = [self._state(prompt) for prompt in prompts]
        cond = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        if self.told_sizes:
            cond["sizes"] = torch.tensor([(*self.size, 0, 0, *self.size)], dtype=torch.float32).expand(len(prompts), -1)
        if self.guidance_input is not None:
            cond["guidance"] = torch.full((len(prompts),), self.guidance_input[1])
        return cond

    def _state(self, prompt: str) -> Cond:
        if prompt not in self._states:
            if len(self._states) >= MOST_KEPT:
                self._states.pop(next(iter(self._states)))
            self._states[prompt] = self._encoded([prompt])
        return self._states[prompt]

    def _encoded(self, prompts: Sequence[str]) -> Cond:
        """States of prompts, or where text encoders train their token ids."""
        if self.trains_text:
            return self.model.tokenize(prompts)
        return self.model.text.to(self.device).encode(prompts)
