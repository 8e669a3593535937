"""What a data set says of its images, asked before anything is trained: labels, captions."""

from difftrain.data.huggingface import HuggingFaceStream
from difftrain.data.image_folder import METADATA, ImageFolder
from difftrain.data.items import ImageDataset, ImageStream, UnreadableImage
from difftrain.data.mixed import Mixed
from difftrain.data.originals import original
from difftrain.registry import InputError


def left_out(data: ImageDataset | ImageStream) -> list[str]:
    """What of the folders is not in the data set, a sentence for each of them."""
    if isinstance(data, Mixed):
        return [line for dataset in data.sets for line in left_out(dataset)]
    unlisted = data.unlisted() if isinstance(data, ImageFolder) else []
    if not unlisted or not isinstance(data, ImageFolder):
        return []
    are, them = ("image is", "it") if len(unlisted) == 1 else ("images are", "them")
    return [f"{len(unlisted):,} {are} left out, as {METADATA} in {data.root} does not list {them}: the first is {unlisted[0]}"]


def is_captioned(data: ImageDataset | ImageStream) -> bool:
    """Whether the first image of a table has a caption."""
    return not isinstance(data, ImageStream) and original(data, 0).caption() is not None


def is_labelled(data: ImageDataset | ImageStream) -> bool:
    """Whether the items have labels; of a table the first readable item says so."""
    if isinstance(data, ImageStream):
        return isinstance(data, HuggingFaceStream) and data.columns.label is not None
    problem: UnreadableImage | None = None
    for i in range(len(data)):
        try:
            return data[i].label is not None
        except UnreadableImage as error:
            problem = problem or error
    raise InputError(f"data: none of the {len(data)} images can be read. The first: {problem}.")


def some_captions(data: ImageDataset | ImageStream, num: int = 64) -> list[str]:
    """At most `num` captions of the data, evenly spread."""
    if isinstance(data, ImageStream):
        raise InputError("sampling.prompts: required with a stream, whose captions are not known before. Write some, such as "
                         "prompts: [a photo of a cat].")
    found = [data[n * len(data) // min(num, len(data))] for n in range(min(num, len(data)))]
    without = next((item.name for item in found if not item.caption), None)
    if without is not None:
        raise InputError(f"data: {without} has no caption, and the model is trained on captioned images. Write captions: sidecar or "
                         "metadata (image_folder), or caption_column: ... (huggingface).")
    return list(dict.fromkeys(item.caption for item in found))
