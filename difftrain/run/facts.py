"""What a run must know of its training data after training, kept in the run folder.

With these facts a trained run is sampled, exported and merged without the data.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from difftrain.core.errors import InputError
from difftrain.core.files import write_json
from difftrain.data.items import Dataset, ItemKind, MapDataset, TensorItem
from difftrain.data.metadata import some_captions
from difftrain.data.unreadable import ReadErrors
from difftrain.objective.types import Cond

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
        item_cond: The conditioning tensors of the first item of a data set of tensors, without the
            batch's dimension. Samples get them.
    """

    items: ItemKind = "images"
    class_names: list[str] | None = None
    is_labelled: bool = False
    is_stream: bool = False
    num_frames: int | None = None
    item_shape: tuple[int, ...] | None = None
    prompts: list[str] = field(default_factory=list)
    item_cond: Cond | None = None

    @classmethod
    def of(
        cls, data: Dataset, wants_prompts: bool, errors: ReadErrors | None = None
    ) -> "DataFacts":
        """Ask a data set.

        Args:
            data: The data set.
            wants_prompts: Whether captions are the prompts of samples.
            errors: What becomes of items that cannot be read; None ends the work.

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
            prompts=some_captions(data, errors) if wants_prompts else [],
            item_cond=first_cond(data),
        )

    def write(self, folder: Path) -> None:
        """Write the facts into a run folder."""
        data = {stated.name: getattr(self, stated.name) for stated in fields(self)}
        if self.item_cond is not None:
            data["item_cond"] = {name: as_json(value) for name, value in self.item_cond.items()}
        write_json(folder / FILE, {"format": FORMAT, "data": data})

    @classmethod
    def read(cls, folder: Path) -> "DataFacts":
        """Read the facts of a run folder.

        Raises:
            InputError: If the folder was written in another format.
        """
        check_format(folder)
        data: dict[str, Any] = json.loads((folder / FILE).read_text())["data"]
        if data.get("item_shape") is not None:
            data["item_shape"] = tuple(data["item_shape"])
        if data.get("item_cond") is not None:
            data["item_cond"] = {name: as_tensor(v) for name, v in data["item_cond"].items()}
        return cls(**data)


def first_cond(data: Dataset) -> Cond | None:
    """Return the conditioning tensors of the first item; None where the items bring none."""
    if data.items_are != "tensors" or not isinstance(data, MapDataset):
        return None
    first = data[0]
    return first.cond if isinstance(first, TensorItem) else None


def as_json(tensor: torch.Tensor) -> dict[str, Any]:
    """Return a tensor as what a JSON file can hold."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}


def as_tensor(found: dict[str, Any]) -> torch.Tensor:
    """Return the tensor that `as_json` wrote."""
    return torch.tensor(found["values"], dtype=getattr(torch, found["dtype"]))


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
