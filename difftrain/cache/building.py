"""From a recipe's `cache:` to the table that training reads: looked up, what is missing encoded, and opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from difftrain.batch import Cond
from difftrain.cache.contents import Contents, prompt_digest, read_contents
from difftrain.cache.dataset import ABSENT, Cached, CachedDataset
from difftrain.cache.encoding import Crop, LatentWork, TextWork, fill
from difftrain.cache.shards import ShardFolder, ShardReader
from difftrain.captions import Captions
from difftrain.data.buckets import BucketPlan
from difftrain.data.items import ImageDataset, ImageStream, frames_of
from difftrain.data.transform import Size, Transform
from difftrain.distributed import num_processes
from difftrain.latents import LatentEncoder
from difftrain.registry import InputError, PositiveInt, check_arguments
from difftrain.storage import digest, weights_digest

PROBE = "a photo, 1/2 of it: Çà et là"  # its token ids tell tokenizers and their lengths apart


@dataclass(frozen=True)
class Cache:
    """What is encoded before training, and kept in `folder`, which runs may share.

    variants: random crops and flips of each image that are cached, of which a sample draws one. latents: the moments of each image's
    posterior under the encoder. text: the states of each caption, and of the empty one.
    """

    folder: str
    variants: PositiveInt = 1
    latents: bool = True
    text: bool = True

    def __post_init__(self) -> None:
        check_arguments(Cache, vars(self), "cache", directly=True)
        if not (self.latents or self.text):
            raise InputError("cache: with latents: false and text: false there is nothing to cache. Leave cache out.")
        if self.variants > 1 and not self.latents:
            raise InputError(f"cache.variants: {self.variants} has no effect with latents: false. Leave it out.")

    def check(
        self, dataset: ImageDataset | ImageStream, transform: Transform, captions: Captions | None, has_encoder: bool, has_text: bool
    ) -> None:
        """Refuses what cannot be cached, before anything is loaded. has_text: frozen text encoders read the captions."""
        if isinstance(dataset, ImageStream) or frames_of(dataset) is not None:
            what, remedy = ("a stream", "Write streaming: false") if isinstance(dataset, ImageStream) else ("clips", "Leave cache out")
            raise InputError(f"cache: {what} cannot be cached, only a table of images can. {remedy}.")
        if not (self.latents and has_encoder) and not (self.text and has_text):
            raise InputError("cache: there is nothing to cache: no encoder makes latents, and no frozen text encoder reads captions. Leave "
                             "cache out.")
        if self.latents and has_encoder:
            self._check_crops(transform)
        if captions is not None:
            self._check_renderings(captions, self.text and has_text)

    def _check_crops(self, transform: Transform) -> None:
        if transform.is_random and self.variants == 1:
            raise InputError(f"cache: with transform.crop: {transform.crop} and flip: {str(transform.flip).lower()} every sample looks "
                             "different, but one variant of each image is cached. Write cache: {variants: 4}, or crop: center and flip: "
                             "false.")
        if not transform.is_random and self.variants > 1:
            raise InputError(f"cache.variants: {self.variants} has no effect: with crop: center and flip: false all variants of an image "
                             "are the same. Leave it out.")

    def _check_renderings(self, captions: Captions, cached: bool) -> None:
        if cached and captions.is_random and captions.variants == 1:
            raise InputError("captions: each sample draws a template or an order of tags, but the states of one rendering of each caption "
                             "are cached. Write captions: {variants: 4}, or cache: {text: false}.")
        if not cached and captions.variants > 1:
            raise InputError(f"captions.variants: {captions.variants} has no effect without cached text: every sample is rendered anew. "
                             "Leave it out.")


def build_cache(
    dataset: ImageDataset, transform: Transform, encoder: LatentEncoder | None, text: Any | None, captions: Captions | None,
    settings: Cache, buckets: BucketPlan | None = None, device: torch.device | None = None, on_error: Literal["stop", "skip"] = "stop",
) -> CachedDataset:
    """The table with its latents and states of captions from the cache. Collective: what is missing is encoded by all processes.

    encoder, text (`difftrain.pipelines.text.TextEncoders`): None where there is none, or where what it makes changes in training.
    on_error: of an unreadable image, as for the loader. Entries belong to contents and not to runs: their crops do not depend on a
    run's seed.
    """
    settings.check(dataset, transform, captions, encoder is not None, text is not None)
    encoder, text = encoder if settings.latents else None, text if settings.text else None
    assert text is None or captions is not None
    root, device = Path(settings.folder).expanduser(), device or torch.device("cpu")
    contents = read_contents(dataset, root / "contents", captions if text is not None else None, encoder is not None, on_error)
    latents = states = empty = None
    if encoder is not None:
        crops, places = wanted_crops(contents, settings.variants, lambda i: size_of(i, transform, buckets))
        work = LatentWork(dataset, transform, encoder.to(device), crops, device, on_error)
        latents = cached_latents(work, places, root / "latents")
    if text is not None:
        states, empty = cached_states(text.to(device), contents, root / "text")
    return CachedDataset(dataset, transform, captions, contents.labels, latents, states, empty)


def cached_latents(work: LatentWork, places: np.ndarray, root: Path) -> Cached:
    """The moments of every crop, by item and variant. Collective."""
    store, keys = ShardFolder(root, latents_key(work.encoder, work.transform)), [crop.key for crop in work.crops]
    fill(store, keys, work.deal, work.encode, "latents", "image")
    reader, rows = opened(store, keys, may_lack=work.on_error == "skip")
    return Cached(reader, rows[places])


def cached_states(text: Any, contents: Contents, root: Path) -> tuple[Cached, Cond]:
    """The states of every rendering, by item and variant, and those of the empty prompt. Collective."""
    store = ShardFolder(root, text_key(text))
    keys, owners, places = wanted_prompts(contents)
    work = TextWork(text, keys, owners, contents.prompts)
    fill(store, keys, work.deal, work.encode, "text", "prompt")
    reader, rows = opened(store, keys)
    return Cached(reader, rows[places]), reader(*rows[0].tolist())


def size_of(i: int, transform: Transform, buckets: BucketPlan | None) -> Size:
    return buckets.size_of(i) if buckets is not None else (transform.resolution, transform.resolution)


def latents_key(encoder: LatentEncoder, transform: Transform) -> dict[str, str]:
    """What latents depend on beside the image, its size and its variant."""
    made_with = {"VAE": weights_digest(encoder.vae.state_dict()), "precision of the VAE": str(encoder.dtype).removeprefix("torch.")}
    return made_with | {name: str(getattr(transform, name)) for name in ("resize", "crop", "flip", "channels")}


def text_key(text: Any) -> dict[str, str]:
    """What the states of a prompt depend on beside its words."""
    ids = text.tokenize([PROBE])
    tokens = digest(*(part for name in sorted(ids) for part in (name, ids[name])))
    empty = str(getattr(text, "zeroes_empty", None))
    return {"text encoder": weights_digest(text.state_dict()), "tokenizer": tokens, "empty prompt": empty}


def wanted_crops(contents: Contents, variants: int, size_of: Callable[[int], Size]) -> tuple[list[Crop], np.ndarray]:
    """Every crop once, and which one [N, V] each item's variants are; ABSENT of unreadable images."""
    numbers, crops = dict[str, int](), list[Crop]()
    places = np.full((len(contents), variants), ABSENT, dtype=np.int64)
    for i in range(len(contents)):
        if not contents.is_readable(i):
            continue
        size = size_of(i)
        for v in range(variants):
            key = contents.latent_key(i, size, v)
            if key not in numbers:
                numbers[key] = len(crops)
                crops.append(Crop(i, size, key))
            places[i, v] = numbers[key]
    return crops, places


def wanted_prompts(contents: Contents) -> tuple[list[str], list[int], np.ndarray]:
    """Every prompt's key once, the empty one first; the process that has its text; and which one [N, V] each item's renderings are."""
    empty = prompt_digest("").hex()
    contents.prompts[empty] = ""
    numbers, owners = {empty: 0}, [0]
    num, variants, _ = contents.renderings.shape
    places = np.zeros((num, variants), dtype=np.int64)
    for i in range(num):
        for v in range(variants):
            key = contents.prompt_key(i, v)
            if key not in numbers:
                numbers[key] = len(owners)
                owners.append(i % num_processes())  # as `share` dealt the images out
            places[i, v] = numbers[key]
    return list(numbers), owners, places


def opened(store: ShardFolder, keys: Sequence[str], may_lack: bool = False) -> tuple[ShardReader, np.ndarray]:
    """The files as this process sees them, and (file, row) of each key; the last row is ABSENT's."""
    files, places = store.scan()
    lacking = sum(key not in places for key in keys)
    if lacking and not may_lack:
        raise InputError(f"{store.folder}: {lacking} entries, which other processes wrote, are not here. A cache for several machines "
                         "needs a folder that all of them share.")
    nowhere = (ABSENT, ABSENT)
    return ShardReader(files), np.array([*(places.get(key, nowhere) for key in keys), nowhere], dtype=np.int32)
