"""The captions of a data set, checked and sampled before training."""

from difftrain.core.errors import InputError
from difftrain.data.captions import described
from difftrain.data.items import Dataset, MapDataset
from difftrain.data.unreadable import TRAINING, ReadErrors


def check_captions(dataset: MapDataset, key: str = "data") -> None:
    """Check that every item whose caption is quick to read has one; of other data sets the first.

    Args:
        dataset: The data set.
        key: Its key in the recipe.

    Raises:
        InputError: If a caption is missing or empty; the item is named.
    """
    for name, caption in dataset.captions():
        described(caption, name if key == "data" else f"{name} ({key})")


def every_caption(dataset: MapDataset, key: str, errors: ReadErrors | None = None) -> list[str]:
    """Return the caption of every item.

    Images are decoded only where a data set knows no quicker way to a caption.

    Args:
        dataset: The data set.
        key: Its key in the recipe.
        errors: What becomes of items that cannot be read; None ends the work.

    Raises:
        InputError: If a caption is missing or empty; the item is named.
    """
    found, errors = list(dataset.captions()), errors or ReadErrors()
    if len(found) != len(dataset):
        found = []
        for i in range(len(dataset)):
            with errors.leaving_out(key):
                original = dataset.original(i)
                found.append((original.name, original.caption()))
    return [described(caption, f"{name} ({key})") for name, caption in found]


def some_captions(dataset: Dataset, errors: ReadErrors | None = None, num: int = 64) -> list[str]:
    """Return at most `num` different captions, of items evenly spread over the data set.

    Images are decoded only where a data set knows no quicker way to a caption.

    Args:
        dataset: The data set.
        errors: What becomes of items that cannot be read; None ends the work.
        num: How many items are read, at most.

    Raises:
        InputError: If the data set is a stream, or if an item has no caption.
    """
    if not isinstance(dataset, MapDataset):
        raise InputError(
            "sampling.prompts: required with a stream, whose captions are not known before "
            "training. Write some, such as prompts: [a photo of a cat]."
        )
    count, errors = min(num, len(dataset)), errors or ReadErrors()
    captions = []
    for n in range(count):
        i = n * len(dataset) // count
        with errors.leaving_out(TRAINING):
            if dataset.items_are == "images":
                original = dataset.original(i)
                name, caption = original.name, original.caption()
            else:
                name, caption = dataset.name_of(i), dataset[i].caption
            captions.append(described(caption, name))
    return list(dict.fromkeys(captions))
