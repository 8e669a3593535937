"""Captions and prompts that are longer than text encoders read, counted once, before training."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from difftrain.captions import Captions
from difftrain.data.items import ImageDataset
from difftrain.data.originals import captions_of
from difftrain.pipelines.text import PromptTokenizer

MOST = 20_000  # captions that are looked at, evenly spread
AT_ONCE = 1000


def truncated_captions(data: ImageDataset, captions: Captions, tokenize: PromptTokenizer, what: str = "captions") -> str | None:
    """As `truncated`, of the data's captions in their first rendering. Where an image must be decoded for its caption, the first one is
    looked at alone."""
    every = -(-len(data) // MOST)
    texts = [captions.variant(caption, 0) for _, caption in islice(captions_of(data), 0, None, every) if caption]
    return truncated(texts, tokenize, what if len(texts) >= len(data) else f"{what} looked at")


def truncated(texts: Sequence[str], tokenize: PromptTokenizer, what: str) -> str | None:
    """How many of the texts are longer than each encoder reads, and whether another one reads on; None where none is cut off. what: by
    which the sentence calls them."""
    limits = {tower.encoder: tokenize.limits[tower.encoder] for tower in tokenize.towers if tower.attended}
    counts = Counter[str]()
    for start in range(0, len(texts), AT_ONCE):
        for encoder, lengths in tokenize.lengths(texts[start : start + AT_ONCE]).items():
            counts[encoder] += sum(length > limits.get(encoder, math.inf) for length in lengths)
    cuts: dict[tuple[int, int], list[str]] = {}  # encoders by their limit, and how many texts are beyond it
    for encoder, limit in sorted(limits.items(), key=lambda item: item[1]):
        if counts[encoder]:
            cuts.setdefault((limit, counts[encoder]), []).append(encoder)
    if not cuts:
        return None
    longer = [f"{count:,} of {len(texts):,} {what} {'is' if count == 1 else 'are'} longer than the {limit} tokens that the "
              f"{' and the '.join(encoders)} read{'s' if len(encoders) == 1 else ''}" for (limit, count), encoders in cuts.items()]
    whole = [f"the {encoder} reads up to {limit} and cuts none" for encoder, limit in limits.items() if not counts[encoder]]
    unseen = "the rest of them is not seen" if len(cuts) == 1 else "what lies beyond all of these is not seen"
    return f"{', '.join(longer)}; {', '.join(whole) or unseen}"
