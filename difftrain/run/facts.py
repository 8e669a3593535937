"""What a run must know of its training data after training, kept in the run folder.

With these facts a trained run is sampled, exported and merged without the data.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from difftrain.core.errors import InputError
from difftrain.core.files import write_json
from difftrain.data.items import Dataset, ItemKind
from difftrain.data.metadata import some_captions

FILE = "facts.json"
FORMAT = 1  # of run folders; it rises when what an older version wrote can no longer be read


@dataclass(frozen=True)
class DataFacts:
    """What was trained on.

    Args:
        items: What the items are: images, clips or tensors.
        class_names: Names of the classes by id, where there are any.
        is_labelled: Whether the items have labels.
        is_stream: Whether the data was a stream.
        num_frames: Frames of each clip; None of images and tensors.
        item_shape: Shape of each item of a data set of tensors.
        prompts: Some captions, which are the prompts of samples where the recipe names none.
    """

    items: ItemKind = "images"
    class_names: list[str] | None = None
    is_labelled: bool = False
    is_stream: bool = False
    num_frames: int | None = None
    item_shape: tuple[int, ...] | None = None
    prompts: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, data: Dataset, wants_prompts: bool) -> "DataFacts":
        """Ask a data set.

        Args:
            data: The data set.
            wants_prompts: Whether captions are the prompts of samples.

        Raises:
            InputError: If prompts are wanted and the data has no captions.
        """
        return cls(
            items=data.items_are,
            class_names=data.class_names,
            is_labelled=data.is_labelled(),
            is_stream=data.is_stream,
            num_frames=data.num_frames,
            item_shape=data.item_shape,
            prompts=some_captions(data) if wants_prompts else [],
        )

    def write(self, folder: Path) -> None:
        """Write the facts into a run folder."""
        write_json(folder / FILE, {"format": FORMAT, "data": asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "DataFacts":
        """Read the facts of a run folder.

        Raises:
            InputError: If the folder was written in another format.
        """
        check_format(folder)
        data: dict[str, Any] = json.loads((folder / FILE).read_text())["data"]
        shape = data["item_shape"]
        return cls(**{**data, "item_shape": None if shape is None else tuple(shape)})


def check_format(folder: Path) -> None:
    """Refuse a run folder that another version of difftrain wrote in another format.

    Raises:
        InputError: With the formats of the folder and of this version.
    """
    file = folder / FILE
    try:
        found = json.loads(file.read_text()).get("format") if file.is_file() else None
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}). Restore it, or train again.") from error
    if found != FORMAT:
        stated = "no format number" if found is None else f"format {found}"
        raise InputError(
            f"the run folder {str(folder)!r} has {stated}, and this version of difftrain reads "
            f"format {FORMAT}. Use the version that wrote it, or write another output: (or "
            "--fresh) to train again."
        )
