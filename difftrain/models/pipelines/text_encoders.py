"""Prompts to conditioning tensors: tokenizers and text encoders of a pipeline.

A family of pipelines states the formula from encoder outputs to conditioning; it runs here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.core.digests import digest, weights_digest
from difftrain.objective.types import Cond

Encoders = Mapping[str, Any]
Ids = Mapping[str, Tensor]

# Names of token ids among conditioning tensors, which text encoders that train read.
IDS = "ids."
EMPTY = "ids.empty"

PROBE = "a photo, 1/2 of it: Çà et là"  # its token ids differ between tokenizers


@dataclass(frozen=True)
class Tower:
    """One text encoder of a pipeline.

    Args:
        encoder: Its folder.
        tokenizer: The folder of its tokenizer.
        class_name: Its class in transformers.
        max_tokens: Tokens that it reads; None for what the tokenizer states.
        reads_last: Whether the output of its last layer is used.
        attended: Whether the network attends to its words, and not to a pooled state alone.
    """

    encoder: str
    tokenizer: str
    class_name: str
    max_tokens: int | None = None
    reads_last: bool = True
    attended: bool = True


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenizers of one pipeline.

    Args:
        towers: The text encoders that read the tokens.
        tokenizers: The tokenizers of transformers by folder.
    """

    towers: Sequence[Tower]
    tokenizers: Mapping[str, Any]

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Return the token ids of prompts.

        Ids are padded to the encoder's length and cut there, as diffusers' pipelines do.

        Returns:
            {"ids.text_encoder": [B, L] long, ..., "ids.empty": [B] bool}.
        """
        ids: Cond = {EMPTY: torch.tensor([prompt == "" for prompt in prompts])}
        limits = self.limits
        for tower in self.towers:
            tokens = self.tokenizers[tower.tokenizer](
                list(prompts),
                padding="max_length",
                max_length=limits[tower.encoder],
                truncation=True,
                return_tensors="pt",
            )
            ids[IDS + tower.encoder] = tokens.input_ids
        return ids

    @property
    def limits(self) -> dict[str, int]:
        """Number of tokens that each encoder reads, by folder."""
        limits = {}
        for tower in self.towers:
            stated = self.tokenizers[tower.tokenizer].model_max_length
            limits[tower.encoder] = tower.max_tokens or stated
        return limits

    def lengths(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """Return the number of tokens of each prompt by encoder, before any are cut."""
        lengths = {}
        for tower in self.towers:
            tokens = self.tokenizers[tower.tokenizer](list(prompts)).input_ids
            lengths[tower.encoder] = [len(own) for own in tokens]
        return lengths


class TextEncoders(nn.Module):
    """The text encoders of one pipeline, frozen and in eval mode.

    Args:
        tokenize: Their tokenizers.
        encoders: The encoders by folder.
        states: The family's formula: (encoders by folder, ids [B, L] by folder) to conditioning
            tensors [B, ...].
        zeroes_empty: Whether an empty prompt is all zeros, as SDXL was trained, and not the
            encoders' output for it.
    """

    def __init__(
        self,
        tokenize: PromptTokenizer,
        encoders: Mapping[str, nn.Module],
        states: Callable[[Encoders, Ids], Cond],
        zeroes_empty: bool = False,
    ):
        super().__init__()
        self.tokenize, self.states = tokenize, states
        self.zeroes_empty = zeroes_empty
        self.encoders = nn.ModuleDict(encoders).requires_grad_(False).eval()

    def by_folder(self) -> dict[str, nn.Module]:
        """Return the encoders by their folder in the pipeline."""
        return dict(self.encoders.items())

    def freeze_unread(self) -> None:
        """Freeze the weights that the conditioning does not depend on.

        DistributedDataParallel waits for the gradient of every weight that trains.
        """
        for tower in self.tokenize.towers:
            if tower.reads_last:
                continue
            encoder: Any = self.encoders[tower.encoder]
            last = f"layers.{encoder.config.num_hidden_layers - 1}."
            for name, parameter in encoder.named_parameters():
                if last in name or "final_layer_norm" in name:
                    parameter.requires_grad_(False)

    def forward(self, ids: Cond) -> Cond:
        """Return conditioning tensors [B, ...] of token ids, with gradient where encoders train.

        Args:
            ids: What `tokenize` returns.
        """
        device = next(self.parameters()).device
        by_encoder = {}
        for name, value in ids.items():
            if name != EMPTY:
                by_encoder[name.removeprefix(IDS)] = value.to(device)
        cond = self.states(self.by_folder(), by_encoder)
        if not self.zeroes_empty:
            return cond
        is_empty = ids[EMPTY].to(device)
        zeroed = {}
        for name, value in cond.items():
            zeroed[name] = value.masked_fill(is_empty.reshape(-1, *[1] * (value.ndim - 1)), 0)
        return zeroed

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """Return conditioning tensors [B, ...] of prompts, without gradient."""
        cond: Cond = self(self.tokenize(prompts))
        return cond

    def identity(self) -> dict[str, str]:
        """Return what the states of a prompt depend on apart from its words.

        Returns:
            Digests of the weights and of the tokenizers, and how an empty prompt is encoded.
        """
        ids = self.tokenize([PROBE])
        named: list[str | Tensor] = []
        for name in sorted(ids):
            named += [name, ids[name]]
        return {
            "text encoder": weights_digest(self.state_dict()),
            "tokenizer": digest(*named),
            "empty prompt": str(self.zeroes_empty),
        }


def token_ids(cond: Cond) -> Cond:
    """Return the token ids among conditioning tensors."""
    return {name: value for name, value in cond.items() if name.startswith(IDS)}
