"""Builds caches on each of two processes under torchrun, one after the other.

What each process encoded, and the entries, go to FOLDER/made-RANK.pt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from difftrain.core.errors import InputError
from difftrain.core.launch import join_processes
from difftrain.core.processes import process_index
from difftrain.core.rng import Rng
from difftrain.data.buckets import Buckets
from difftrain.data.cache import Cache, build_cache, encoding
from difftrain.data.captions import Captions
from difftrain.data.transform import Transform
from helpers.cached import Encoder, Words, captioned

FOLDER = Path(sys.argv[1])
encoding.PIXELS_AT_ONCE = 128  # two images at once


def built(place, encoder=None):
    encoder, text = encoder or Encoder(), Words()
    table = build_cache(
        captioned(FOLDER / "photos"),
        Transform(8),
        encoder,
        text,
        Captions(),
        Cache(str(FOLDER / place)),
    )
    samples = [table.sample(i, Rng(0)) for i in range(len(table))]
    entries = {
        "moments": torch.stack([s.moments for s in samples]),
        "words": torch.stack([s.cond["text_embeds"] for s in samples]),
    }
    return {"encoded": (encoder.images, len(text.prompts)), **entries}


class Overflows(Encoder):
    """An encoder whose latents are not finite, on the second process alone."""

    def moments(self, pixels, names=None):
        if process_index() == 1 and self.images >= 2:
            raise InputError("the latents of a.png are not finite")
        return super().moments(pixels, names)


def refused():
    try:
        built("broken", Overflows())
    except InputError as error:
        return str(error)


if __name__ == "__main__":
    join_processes()
    plan = Buckets(step=4).plan(captioned(FOLDER / "photos"), Transform(8), 0, 4)
    made = {
        "first": built("cache"),
        "again": built("cache"),
        "refused": refused(),
        "after": built("broken"),
        "table": plan.table(),
    }
    torch.save(made, FOLDER / f"made-{process_index()}.pt")
