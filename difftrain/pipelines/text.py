"""Prompts to what a denoiser attends to: the frozen or trained text encoders of a pipeline, with their tokenizers.

A family of pipelines says how its encoders' states become conditioning tensors (`families.py`); here they are run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.batch import Cond

IDS, EMPTY = "ids.", "ids.empty"  # names of token ids among conditioning tensors: what a text encoder that trains is fed


@dataclass(frozen=True)
class Tower:
    """One text encoder of a pipeline: its folder, its tokenizer's, its transformers class, and how many tokens it reads (None: what its
    tokenizer states). reads_last: whether its last layer's states are used. attended: whether its words are, or the pooled state alone."""

    encoder: str
    tokenizer: str
    class_name: str
    max_tokens: int | None = None
    reads_last: bool = True
    attended: bool = True


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenizers of one pipeline: {folder: transformers tokenizer}."""

    towers: Sequence[Tower]
    tokenizers: Mapping[str, Any]

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Token ids of prompts, padded to each encoder's length; what does not fit is cut off, as diffusers' pipelines do.

        Returns {"ids.text_encoder": [B, L] long, ..., "ids.empty": [B] bool}.
        """
        ids: Cond = {EMPTY: torch.tensor([prompt == "" for prompt in prompts])}
        for tower in self.towers:
            given = {"padding": "max_length", "max_length": self.limits[tower.encoder], "truncation": True, "return_tensors": "pt"}
            ids[IDS + tower.encoder] = self.tokenizers[tower.tokenizer](list(prompts), **given).input_ids
        return ids

    @property
    def limits(self) -> dict[str, int]:
        """Tokens that each encoder reads."""
        return {tower.encoder: tower.max_tokens or self.tokenizers[tower.tokenizer].model_max_length for tower in self.towers}

    def lengths(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """Tokens of each prompt by encoder, before any is cut off."""
        found = {tower.encoder: self.tokenizers[tower.tokenizer](list(prompts)).input_ids for tower in self.towers}
        return {encoder: [len(tokens) for tokens in of_prompts] for encoder, of_prompts in found.items()}


class TextEncoders(nn.Module):
    """The text encoders of one pipeline, frozen and in eval mode.

    states: {encoder: module}, {encoder: ids [B, L]} -> conditioning tensors [B, ...], the family's formula. zeroes_empty: an empty prompt
    is all zeros (SDXL was trained so) rather than the states of no words.
    """

    def __init__(
        self, tokenize: PromptTokenizer, encoders: Mapping[str, nn.Module],
        states: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Cond], zeroes_empty: bool = False,
    ):
        super().__init__()
        self.tokenize, self.states, self.zeroes_empty = tokenize, states, zeroes_empty
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()

    def freeze_unread(self) -> None:
        """Freeze what has no part in the conditioning: DistributedDataParallel waits for the gradient of everything that trains."""
        for tower in self.tokenize.towers:
            encoder: Any = self.encoders[tower.encoder]
            if not tower.reads_last:
                unread = f"layers.{encoder.config.num_hidden_layers - 1}."
                for name, parameter in encoder.named_parameters():
                    if unread in name or "final_layer_norm" in name:
                        parameter.requires_grad_(False)

    def forward(self, ids: Cond) -> Cond:
        """Conditioning tensors [B, ...] of the ids that `tokenize` gives, with gradient where encoders train."""
        device = next(self.parameters()).device
        by_encoder = {name.removeprefix(IDS): value.to(device) for name, value in ids.items() if name != EMPTY}
        cond = self.states(dict(self.encoders.items()), by_encoder)
        if not self.zeroes_empty:
            return cond
        empty = ids[EMPTY].to(device)
        return {name: value.masked_fill(empty.reshape(-1, *[1] * (value.ndim - 1)), 0) for name, value in cond.items()}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning tensors [B, ...] of prompts, without gradient."""
        return self(self.tokenize(prompts))


def token_ids(cond: Cond) -> Cond:
    """Those of a batch's conditioning tensors that a text encoder reads."""
    return {name: value for name, value in cond.items() if name.startswith(IDS)}
