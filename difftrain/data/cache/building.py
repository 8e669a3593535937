"""From a recipe's `cache:` to the data set that training reads, encoding what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from difftrain.core.errors import InputError
from difftrain.core.processes import num_processes
from difftrain.core.registry import PositiveInt, check_arguments
from difftrain.data.buckets import BucketPlan
from difftrain.data.cache.contents import Contents, prompt_digest, read_contents
from difftrain.data.cache.dataset import ABSENT, Cached, CachedDataset
from difftrain.data.cache.encoding import (
    Crop,
    LatentWork,
    MomentsEncoder,
    PromptEncoder,
    TextWork,
    fill,
)
from difftrain.data.cache.shards import ShardFolder, ShardReader
from difftrain.data.captions import Captions
from difftrain.data.items import Dataset, MapDataset
from difftrain.data.opening import OPENED
from difftrain.data.transform import Size, Transform
from difftrain.data.unreadable import TRAINING, ReadErrors
from difftrain.objective.types import Cond


@dataclass(frozen=True)
class Cache:
    """What is encoded before training, and kept in a folder that runs may share.

    Args:
        folder: The folder.
        variants: Random crops and flips of each image that are cached. Each sample gets one of
            them, at random.
        latents: Whether the moments of each image's posterior under the encoder are cached.
        text: Whether the states of each caption, and of the empty one, are cached.
    """

    folder: str
    variants: PositiveInt = 1
    latents: bool = True
    text: bool = True

    def __post_init__(self) -> None:
        check_arguments(Cache, vars(self), "cache", directly=True)
        if not (self.latents or self.text):
            raise InputError(
                "cache: with latents: false and text: false there is nothing to cache. Leave cache "
                "out."
            )
        if self.variants > 1 and not self.latents:
            raise InputError(
                f"cache.variants: {self.variants} has no effect with latents: false. Leave it out."
            )

    def check(
        self,
        dataset: Dataset,
        transform: Transform | None,
        captions: Captions | None,
        has_encoder: bool,
        has_text: bool,
    ) -> None:
        """Check that there is something to cache, before anything is loaded.

        Args:
            dataset: The images.
            transform: Turns them into pixels.
            captions: How captions are shown; None: there are none.
            has_encoder: Whether an encoder makes latents.
            has_text: Whether frozen text encoders read the captions.

        Raises:
            InputError: If the data, or the random choices of samples, cannot be cached.
        """
        if not isinstance(dataset, MapDataset):
            raise InputError(
                "cache: a stream cannot be cached, only a map-style data set of images can. Write "
                "streaming: false."
            )
        if dataset.items_are != "images":
            raise InputError(
                f"cache: {dataset.items_are} cannot be cached, only a map-style data set of images "
                "can. Leave cache out."
            )
        assert transform is not None, "images need a transform"
        if not (self.latents and has_encoder) and not (self.text and has_text):
            raise InputError(
                "cache: there is nothing to cache: no encoder makes latents, and no frozen text "
                "encoder reads captions. Leave cache out."
            )
        if self.latents and has_encoder:
            self._check_crops(transform)
        if captions is not None:
            self._check_renderings(captions, self.text and has_text)

    def _check_crops(self, transform: Transform) -> None:
        if transform.is_random and self.variants == 1:
            flip = str(transform.flip).lower()
            raise InputError(
                f"cache: with transform.crop: {transform.crop} and flip: {flip} every sample looks "
                "different, but one variant of each image is cached. Write cache: {variants: 4}, "
                "or crop: center and flip: false."
            )
        if not transform.is_random and self.variants > 1:
            raise InputError(
                f"cache.variants: {self.variants} has no effect: with crop: center and flip: false "
                "all variants of an image are the same. Leave it out."
            )

    def _check_renderings(self, captions: Captions, is_cached: bool) -> None:
        if is_cached and captions.is_random and captions.variants == 1:
            raise InputError(
                "captions: each sample gets a random template or order of tags, but the states of "
                "one rendering of each caption are cached. Write captions: {variants: 4}, or "
                "cache: {text: false}."
            )
        if not is_cached and captions.variants > 1:
            raise InputError(
                f"captions.variants: {captions.variants} has no effect without cached text, since "
                "each sample gets a rendering of its own. Leave it out."
            )


def build_cache(
    dataset: MapDataset,
    transform: Transform,
    encoder: MomentsEncoder | None,
    text: PromptEncoder | None,
    captions: Captions | None,
    settings: Cache,
    buckets: BucketPlan | None = None,
    device: torch.device | None = None,
    errors: ReadErrors | None = None,
    key: str = TRAINING,
) -> CachedDataset:
    """Return a data set with cached latents and text. Collective: all processes encode.

    Entries belong to contents and not to runs: their crops do not depend on a run's seed.

    Args:
        dataset: The images.
        transform: Turns them into pixels.
        encoder: Makes latents; None where there are none.
        text: Encodes prompts; None where there are none, or where text encoders train.
        captions: How captions are shown; None: there are none.
        settings: What is cached, and where.
        buckets: The sizes of the images; None: one size.
        device: Where images and prompts are encoded; None: on the CPU.
        errors: What becomes of an image that cannot be read; None ends the work.
        key: The key of the images' block in the recipe.

    Raises:
        InputError: If something cannot be cached, or the folder cannot be written.
    """
    # What is cached.
    settings.check(dataset, transform, captions, encoder is not None, text is not None)
    encoder = encoder if settings.latents else None
    text = text if settings.text else None
    assert text is None or captions is not None
    rendered = captions if text is not None else None
    device, errors = device or torch.device("cpu"), errors or ReadErrors()
    root = Path(settings.folder).expanduser()

    # What is known of each image.
    contents = read_contents(dataset, root / "contents", rendered, encoder is not None, errors, key)

    # Latents.
    latents = None
    if encoder is not None:
        size_of = size_function(transform, buckets)
        crops, places = wanted_crops(contents, settings.variants, size_of)
        encoder.to(device)
        work = LatentWork(dataset, transform, encoder, crops, device, errors, key)
        latents = cached_latents(work, places, root / "latents")

    # Text.
    states, empty = None, None
    if text is not None:
        text.to(device)
        states, empty = cached_states(text, contents, root / "text")
    return CachedDataset(dataset, transform, captions, contents.labels, latents, states, empty)


def cached_latents(work: LatentWork, places: np.ndarray, root: Path) -> Cached:
    """Encode the crops that are missing. Collective.

    Args:
        work: The wanted crops.
        places: Which crop [N, V] each variant of an item is.
        root: The folder of latents.

    Returns:
        The moments of every crop, by item and variant.
    """
    store = ShardFolder(root, latents_key(work.encoder, work.transform))
    fill(store, work)
    reader, rows = opened(store, work.keys, may_lack=work.errors.on_error == "skip")
    return Cached(reader, rows[places])


def cached_states(text: PromptEncoder, contents: Contents, root: Path) -> tuple[Cached, Cond]:
    """Encode the prompts that are missing. Collective.

    Args:
        text: Encodes prompts.
        contents: Says which renderings are wanted.
        root: The folder of states.

    Returns:
        The states of every rendering, by item and variant, and those of the empty prompt.
    """
    store = ShardFolder(root, text.identity())
    keys, owners, places = wanted_prompts(contents)
    fill(store, TextWork(text, keys, owners, contents.prompts))
    reader, rows = opened(store, keys)
    return Cached(reader, rows[places]), reader(*rows[0].tolist())


def latents_key(encoder: MomentsEncoder, transform: Transform) -> dict[str, str]:
    """Return what latents depend on apart from the image, its size and its variant."""
    names = ("resize", "crop", "flip", "channels")
    own = {name: str(getattr(transform, name)) for name in names}
    return encoder.identity() | own | {"opened": OPENED}


def size_function(transform: Transform, buckets: BucketPlan | None) -> Callable[[int], Size]:
    """Return a function that gives (height, width) to which an item is cropped."""
    if buckets is not None:
        return buckets.size_of
    square = (transform.resolution, transform.resolution)
    return lambda i: square


def wanted_crops(
    contents: Contents, variants: int, size_of: Callable[[int], Size]
) -> tuple[list[Crop], np.ndarray]:
    """List the crops to cache.

    Args:
        contents: The contents of N images.
        variants: V, the number of crops of each.
        size_of: Gives (height, width) of an image's crops.

    Returns:
        Every crop once, and which one [N, V] each variant is; `ABSENT` of unreadable images.
    """
    numbers: dict[str, int] = {}
    crops: list[Crop] = []
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
    """List the prompts to cache.

    Args:
        contents: The contents of N images, with V renderings of each caption.

    Returns:
        Every prompt's key once, the empty one first; the process that has its text; and which
        prompt [N, V] each rendering is.
    """
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
                owners.append(i % num_processes())  # as `share` deals the images out
            places[i, v] = numbers[key]
    return list(numbers), owners, places


def opened(
    store: ShardFolder, keys: Sequence[str], may_lack: bool = False
) -> tuple[ShardReader, np.ndarray]:
    """Open the files as this process sees them.

    Args:
        store: The store.
        keys: The wanted entries.
        may_lack: Whether entries may be missing.

    Returns:
        A reader, and (file, row) of each key; the last row stands for `ABSENT`.

    Raises:
        InputError: If entries are missing.
    """
    files, places = store.scan()
    num_missing = sum(key not in places for key in keys)
    if num_missing and not may_lack:
        raise InputError(
            f"{store.folder}: {num_missing} entries that other processes wrote are not here. A "
            "cache for several machines needs a folder that all of them share."
        )
    absent = (ABSENT, ABSENT)
    rows = [places.get(key, absent) for key in keys]
    return ShardReader(files), np.array([*rows, absent], dtype=np.int32)
