"""Run by each of two processes under torchrun: one cache after the other; what each of them encoded, and its entries, go to
FOLDER/made-RANK.pt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cached import Encoder, Words, captioned

from difftrain.cache import Cache, build_cache, encoding
from difftrain.captions import Captions
from difftrain.data.buckets import Buckets
from difftrain.data.transform import Transform
from difftrain.distributed import process_index
from difftrain.entry import join_processes
from difftrain.registry import InputError
from difftrain.rng import Rng

FOLDER = Path(sys.argv[1])
encoding.PIXELS_AT_ONCE = 128  # two images at once


def built(place, encoder=None):
    encoder, text = encoder or Encoder(), Words()
    table = build_cache(captioned(FOLDER / "photos"), Transform(8), encoder, text, Captions(), Cache(str(FOLDER / place)))
    samples = [table.sample(i, Rng(0)) for i in range(len(table))]
    entries = {"moments": torch.stack([s.moments for s in samples]), "words": torch.stack([s.cond["text_embeds"] for s in samples])}
    return {"encoded": (encoder.images, len(text.prompts)), **entries}


class Overflows(Encoder):
    """Of the second process alone."""

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
    made = {"first": built("cache"), "again": built("cache"), "refused": refused(), "after": built("broken"), "table": plan.table()}
    torch.save(made, FOLDER / f"made-{process_index()}.pt")
