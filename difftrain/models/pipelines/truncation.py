"""Captions and prompts that are longer than text encoders read, counted once, before training."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from difftrain.data.captions import Captions
from difftrain.data.items import MapDataset
from difftrain.models.pipelines.text_encoders import PromptTokenizer

MOST = 20_000  # captions that are counted, evenly spread
AT_ONCE = 1000


def truncated_captions(
    data: MapDataset, captions: Captions, tokenize: PromptTokenizer, what: str = "captions"
) -> str | None:
    """Describe how many captions of a data set are longer than text encoders read.

    Each caption counts in its first rendering. Where an item must be decoded for its caption, the
    first item alone counts.

    Args:
        data: The data set.
        captions: How captions are rendered.
        tokenize: The tokenizers.
        what: What the sentence calls the captions.

    Returns:
        A sentence as of `truncated`; None if nothing is cut off.
    """
    every = -(-len(data) // MOST)
    found: Iterator[str | None] = (caption for _, caption in data.captions())
    spread = islice(found, 0, None, every)
    texts = [captions.variant(caption, 0) for caption in spread if caption]
    counted = what if len(texts) >= len(data) else f"{what} looked at"
    return truncated(texts, tokenize, counted)


def truncated(texts: Sequence[str], tokenize: PromptTokenizer, what: str) -> str | None:
    """Describe how many texts are longer than each text encoder reads.

    Args:
        texts: The texts.
        tokenize: The tokenizers.
        what: What the sentence calls the texts.

    Returns:
        A sentence without a full stop; None if no text is cut off.
    """
    attended = [tower.encoder for tower in tokenize.towers if tower.attended]
    limits = {encoder: tokenize.limits[encoder] for encoder in attended}
    counts = longer_texts(texts, tokenize, limits)

    # Encoders that cut the same number of texts at the same limit share a part of the sentence.
    cuts: dict[tuple[int, int], list[str]] = {}
    for encoder, limit in sorted(limits.items(), key=lambda item: item[1]):
        if counts[encoder]:
            cuts.setdefault((limit, counts[encoder]), []).append(encoder)
    if not cuts:
        return None
    parts = []
    for (limit, count), encoders in cuts.items():
        are = "is" if count == 1 else "are"
        read = "reads" if len(encoders) == 1 else "read"
        parts.append(
            f"{count:,} of {len(texts):,} {what} {are} longer than the {limit} tokens that the "
            f"{' and the '.join(encoders)} {read}"
        )

    # An encoder that cuts nothing still sees the rest.
    whole = []
    for encoder, limit in limits.items():
        if not counts[encoder]:
            whole.append(f"the {encoder} reads up to {limit} and cuts none")
    if whole:
        return f"{', '.join(parts)}; {', '.join(whole)}"
    rest = "the rest of them" if len(cuts) == 1 else "what lies beyond all of these"
    return f"{', '.join(parts)}; {rest} is not seen"


def longer_texts(
    texts: Sequence[str], tokenize: PromptTokenizer, limits: dict[str, int]
) -> Counter[str]:
    """Count the texts that are longer than each encoder reads, by encoder."""
    counts = Counter[str]()
    for start in range(0, len(texts), AT_ONCE):
        lengths = tokenize.lengths(texts[start : start + AT_ONCE])
        for encoder, own in lengths.items():
            limit = limits.get(encoder, math.inf)
            counts[encoder] += sum(length > limit for length in own)
    return counts
