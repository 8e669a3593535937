"""Feature networks that are not part of the library: a TorchScript file, and a callable of one's own module.

What they return is checked at every call, since nothing else is known about them.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from difftrain.evaluation.extractor import check_images
from difftrain.evaluation.inception_weights import digest_of_file, is_torchscript
from difftrain.registry import FEATURES, GIVEN, InputError, PositiveInt

InputRange = Literal["0..255", "0..1", "-1..1"]
SCALES: dict[str, tuple[float, float]] = {"0..255": (1, 0), "0..1": (1 / 255, 0), "-1..1": (2 / 255, -1)}  # x a + b


class ForeignFeatures:
    """Batches through `function`, and checks of what comes back. shape: (C, H, W) of the images to come."""

    name: str
    gives: ClassVar[frozenset[str]] = frozenset()
    preset: Mapping[str, Any] = {}
    function: Callable[[Tensor], Any]
    batch_size: int
    what: str  # how messages call the network
    shape: tuple[int, int, int] | None
    width: int | None = None

    @property
    def widths(self) -> Mapping[str, int]:
        """Known after the first images; until then a black image asks the network."""
        if self.width is None:
            self.extract(torch.zeros(1, *(self.shape or (3, 64, 64)), dtype=torch.uint8))
        assert self.width is not None
        return {"features": self.width}

    @torch.no_grad()
    def extract(self, images: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 [N, 1 or 3, H, W] -> {"features": [N, D] float32 on the CPU}. Raises InputError for rows that are no features."""
        check_images(images, self.name)
        if unknown := set(outputs) - {"features"}:
            raise InputError(f"features {self.name!r} have no output {min(unknown)!r}; known: features.")
        if not outputs:
            return {}
        if not len(images):
            return {"features": torch.empty(0, self.widths["features"])}
        images = images.expand(-1, 3, -1, -1)
        return {"features": torch.cat([self.checked(self.called(batch), len(batch)) for batch in images.split(self.batch_size)])}

    def called(self, batch: Tensor) -> Any:
        try:
            return self.function(batch)
        except Exception as error:  # of code that is not ours: everything can come
            shape = list(batch.shape)
            raise InputError(f"features {self.name!r}: {self.what} failed on {batch.dtype} images {shape}: {error}") from error

    def checked(self, rows: Any, num: int) -> Tensor:
        expected = f"expected a floating-point tensor [{num}, {self.width or 'D'}], one row per image"
        if not isinstance(rows, Tensor):
            raise InputError(f"features {self.name!r}: {self.what} returned a {type(rows).__name__}, {expected}.")
        if rows.ndim != 2 or len(rows) != num or not rows.is_floating_point() or rows.shape[1] != (self.width or rows.shape[1]):
            raise InputError(f"features {self.name!r}: {self.what} returned {rows.dtype} {list(rows.shape)}, {expected}.")
        rows = rows.float().cpu()
        if not rows.isfinite().all():
            wrong = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
            raise InputError(f"features {self.name!r}: {self.what} returned values that are not finite for {len(wrong)} of {num} images.")
        self.width = rows.shape[1]
        return rows


@FEATURES.register("torchscript")
class TorchScript(ForeignFeatures):
    """Rows [N, D] of a TorchScript file; grey images are repeated to three channels, nothing is resized.

    range: what the network takes for uint8 0 .. 255: "0..255" (as float32), "0..1" or "-1..1". It fixes the numbers: no default.
    """

    name = "torchscript"

    def __init__(
        self,
        path: str,
        range: InputRange,
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = torch.device("cpu"),  # noqa: B008
        shape: Annotated[tuple[int, int, int] | None, GIVEN] = None,
    ):
        file = Path(path).expanduser()
        if not file.is_file():
            raise InputError(f"features 'torchscript': no file {file}.")
        if not is_torchscript(file):
            raise InputError(f"features 'torchscript': {file} is no TorchScript: torch.jit.trace(network, example).save(file).")
        try:
            network = torch.jit.load(file, map_location=device).eval()
        except RuntimeError as error:
            raise InputError(f"features 'torchscript': {file} cannot be read: {str(error).strip().splitlines()[0]}") from error
        self.weights, self.range, self.what = digest_of_file(file), range, str(file)
        self.batch_size, self.shape = batch_size, shape
        a, b = SCALES[range]
        self.function = lambda images: network(images.to(device).float() * a + b)

    def protocol(self) -> dict[str, Any]:
        return {"type": self.name, "sha256": self.weights, "range": self.range, "resize": None, "grey": "repeated"}


@FEATURES.register("imported")
class Imported(ForeignFeatures):
    """Rows of one's own code: `path: my_lab.features:MyExtractor`, a callable uint8 [N, 3, H, W] -> [N, D], or a class of such objects.

    A class is constructed without arguments; with a method `protocol()` its JSON-able answer is recorded, and without one the version that
    the recipe gives: change it whenever the code's numbers change.
    """

    name = "imported"

    def __init__(
        self,
        path: str,
        version: str = "",
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = torch.device("cpu"),  # noqa: B008
        shape: Annotated[tuple[int, int, int] | None, GIVEN] = None,
    ):
        found = imported(path)
        made = found() if isinstance(found, type) else found
        if not callable(made):
            raise InputError(f"features 'imported': {path} is a {type(made).__name__}, expected a callable uint8 [N, 3, H, W] -> [N, D].")
        self.path, self.version, self.what = path, version, path
        self.batch_size, self.shape = batch_size, shape
        self.described = made.protocol() if callable(getattr(made, "protocol", None)) else None
        if self.described is None and not version:
            raise InputError(
                f"features 'imported': nothing says which numbers {path} gives. Add version: to the recipe, or a method protocol() to it."
            )
        self.function = lambda images: made(images.to(device))

    def protocol(self) -> dict[str, Any]:
        return {"type": self.name, "path": self.path, "version": self.version, "own": self.described, "grey": "repeated"}


def imported(path: str) -> Any:
    """The object of "module:name". Raises InputError, saying which of the two is missing."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise InputError(f"features 'imported': path must be module:name, such as my_lab.features:MyExtractor, got {path!r}.")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(f"features 'imported': cannot import {module!r} ({error}). Install it, or start where it lies.") from error
    except AttributeError as error:
        raise InputError(f"features 'imported': {module} has no {name!r}.") from error
