"""Captions that are longer than text encoders read, counted once, before training."""

from collections import Counter
from itertools import islice

from difftrain.captions import Captions
from difftrain.data.items import ImageDataset
from difftrain.data.originals import captions_of
from difftrain.distributed import is_main
from difftrain.pipelines.text import PromptTokenizer

MOST = 20_000  # captions that are looked at, evenly spread
AT_ONCE = 1000


def tell_truncated(data: ImageDataset, captions: Captions, tokenize: PromptTokenizer) -> None:
    """Say once, on the main process, how many captions are cut off; nothing where none is."""
    message = truncated(data, captions, tokenize) if is_main() else None
    if message is not None:
        print(message, flush=True)


def truncated(data: ImageDataset, captions: Captions, tokenize: PromptTokenizer) -> str | None:
    """How many captions, in their first rendering, are longer than each encoder reads. Where an image must be decoded for its caption,
    the first one is looked at alone."""
    every = -(-len(data) // MOST)
    texts = [captions.variant(caption, 0) for _, caption in islice(captions_of(data), 0, None, every) if caption]
    counts: Counter[str] = Counter()
    for start in range(0, len(texts), AT_ONCE):
        for encoder, lengths in tokenize.lengths(texts[start : start + AT_ONCE]).items():
            counts[encoder] += sum(length > tokenize.limits[encoder] for length in lengths)
    by_limit = {tokenize.limits[encoder]: (count, encoder) for encoder, count in counts.items() if count}
    if not by_limit:
        return None
    of = f"{len(texts):,} captions{'' if len(texts) >= len(data) else ' looked at'}"
    longer = [f"{count:,} of {of} {'is' if count == 1 else 'are'} longer than the {limit} tokens that the {encoder} reads"
              for limit, (count, encoder) in sorted(by_limit.items())]
    return f"text: {', '.join(longer)}; the rest of them is not seen"
