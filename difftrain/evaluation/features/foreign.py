"""Feature networks that are not part of the library: a TorchScript file, and code of your own.

Nothing else is known about them, so whatever they return is checked at every call.
"""

import importlib
from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN, PositiveInt
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.features.base import check_images
from difftrain.evaluation.features.inception_weights import digest_of_file
from difftrain.evaluation.features.torchscript import is_torchscript, load_torchscript
from difftrain.evaluation.slots import FEATURES, FeatureExtractor
from difftrain.models.files import first_line

InputRange = Literal["0..255", "0..1", "-1..1"]
SCALES: dict[str, tuple[float, float]] = {  # x a + b of uint8 x
    "0..255": (1, 0),
    "0..1": (1 / 255, 0),
    "-1..1": (2 / 255, -1),
}
CPU = torch.device("cpu")


class ForeignFeatures(FeatureExtractor):
    """Images through a network that is not ours, batch by batch.

    Args:
        what: What messages call the network.
        batch_size: Images that go through it together.
        shape: (C, H, W) of the images to come, if it is known.
    """

    def __init__(self, what: str, batch_size: int, shape: tuple[int, int, int] | None):
        self.what, self.batch_size, self.shape = what, batch_size, shape
        self.width: int | None = None

    @abstractmethod
    def network(self, images: Tensor) -> Any:
        """Return what should be features [b, D] of images [b, 3, H, W] uint8."""

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features; before the first image, a black one asks the network."""
        if self.width is None:
            self._rows(torch.zeros(1, *(self.shape or (3, 64, 64)), dtype=torch.uint8))
        assert self.width is not None
        return {MAIN: self.width}

    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return the features of images [N, 1 or 3, H, W] uint8.

        Raises:
            InputError: If the network fails, or returns anything but finite features.
        """
        check_images(samples, self.name)
        unknown = sorted(set(outputs) - {MAIN})
        if unknown:
            raise InputError(
                f"features {self.name!r} have no output {unknown[0]!r}; known: {MAIN}."
            )
        if not outputs:
            return {}
        if not len(samples):
            return {MAIN: torch.empty(0, self.widths[MAIN])}
        return {MAIN: self._rows(samples)}

    @torch.no_grad()
    def _rows(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of at least one image."""
        batches = torch.split(images.expand(-1, 3, -1, -1), self.batch_size)
        return torch.cat([self._checked(self._called(batch), len(batch)) for batch in batches])

    def _called(self, batch: Tensor) -> Any:
        try:
            return self.network(batch)
        except Exception as error:  # code that is not ours can raise anything
            raise InputError(
                f"features {self.name!r}: {self.what} failed on {batch.dtype} images "
                f"{list(batch.shape)}: {error}"
            ) from error

    def _checked(self, rows: Any, num: int) -> Tensor:
        """Return rows as features [num, D] float32 on the CPU."""
        wanted = f"[{num}, {self.width or 'D'}], one row per image"
        expected = f"expected a floating-point tensor {wanted}"
        if not isinstance(rows, Tensor):
            raise InputError(
                f"features {self.name!r}: {self.what} returned a {type(rows).__name__}, {expected}."
            )
        is_matrix = rows.ndim == 2 and len(rows) == num
        if not (is_matrix and rows.is_floating_point() and self._fits(rows.shape[1])):
            raise InputError(
                f"features {self.name!r}: {self.what} returned {rows.dtype} {list(rows.shape)}, "
                f"{expected}."
            )
        features: Tensor = rows.float().cpu()
        num_broken = int((~features.isfinite()).any(dim=1).sum())
        if num_broken:
            raise InputError(
                f"features {self.name!r}: {self.what} returned values that are not finite for "
                f"{num_broken} of {num} images."
            )
        self.width = features.shape[1]
        return features

    def _fits(self, width: int) -> bool:
        return self.width is None or width == self.width


@FEATURES.register("torchscript")
class TorchScript(ForeignFeatures):
    """Features [N, D] of a network in a TorchScript file.

    Grey images are repeated to three channels; nothing is resized. The file is code: it can read
    and write files, so load only what you trust.

    Args:
        path: The file.
        range: What the network takes for uint8 0..255: "0..255" (as float32), "0..1" or "-1..1".
            It fixes the numbers, so it has no default.
        batch_size: Images that go through the network together.
        device: Where it computes.
        shape: (C, H, W) of the images to come.

    Raises:
        InputError: If the file is missing, or cannot be read.
    """

    name = "torchscript"

    def __init__(
        self,
        path: str,
        range: InputRange,
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = CPU,
        shape: Annotated[tuple[int, int, int] | None, GIVEN] = None,
    ):
        file = Path(path).expanduser()
        super().__init__(str(file), batch_size, shape)
        if not file.is_file():
            raise InputError(
                f"features 'torchscript': there is no file {file}. Write the path of a "
                "TorchScript file."
            )
        if not is_torchscript(file):
            raise InputError(
                f"features 'torchscript': {file} is not a TorchScript file. Make one with "
                "torch.jit.trace(network, example).save(file)."
            )
        try:
            self.script = load_torchscript(file, device).eval()
        except RuntimeError as error:
            raise InputError(
                f"features 'torchscript': {file} cannot be read: {first_line(error)}"
            ) from error
        self.weights, self.range, self.device = digest_of_file(file), range, device

    def network(self, images: Tensor) -> Any:
        """Return what the file's network makes of images [b, 3, H, W] uint8."""
        a, b = SCALES[self.range]
        return self.script(images.to(self.device).float() * a + b)

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return {
            "type": self.name,
            "sha256": self.weights,
            "range": self.range,
            "resize": None,
            "grey": "repeated",
        }


@FEATURES.register("imported")
class Imported(ForeignFeatures):
    """Features [N, D] of code of your own: a callable of images [N, 3, H, W] uint8.

    `path` names a callable, or a class that is constructed without arguments and whose objects are
    called. The protocol records the answer of its method `protocol()`, JSON-able, or without one
    the version that the recipe gives: change it whenever the code's numbers change. A
    `FeatureExtractor` of your own, registered in `FEATURES`, says more.

    Args:
        path: "module:name", such as "my_lab.features:MyExtractor".
        version: Stands for the numbers that the code gives.
        batch_size: Images that go through the code together.
        device: Where images are put.
        shape: (C, H, W) of the images to come.

    Raises:
        InputError: If there is no such object, if it cannot be called, or if nothing says which
            numbers it gives.
    """

    name = "imported"

    def __init__(
        self,
        path: str,
        version: str = "",
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = CPU,
        shape: Annotated[tuple[int, int, int] | None, GIVEN] = None,
    ):
        super().__init__(path, batch_size, shape)
        found = resolved(path)
        self.code = found() if isinstance(found, type) else found
        if not callable(self.code):
            raise InputError(
                f"features 'imported': {path} is a {type(self.code).__name__}, expected a callable "
                "uint8 [N, 3, H, W] -> [N, D]."
            )
        self.path, self.version, self.device = path, version, device
        self.described = own_protocol(self.code)
        if self.described is None and not version:
            raise InputError(
                f"features 'imported': {path} has no version, so a change of its code would go "
                "unnoticed. Write version: in the features block, or give the object a method "
                "protocol()."
            )

    def network(self, images: Tensor) -> Any:
        """Return what the code makes of images [b, 3, H, W] uint8."""
        return self.code(images.to(self.device))

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return {
            "type": self.name,
            "path": self.path,
            "version": self.version,
            "own": self.described,
            "grey": "repeated",
        }


def own_protocol(code: Any) -> Any:
    """Return what a method `protocol()` says of a callable; None if it has no such method."""
    try:
        protocol = code.protocol
    except AttributeError:  # a plain function
        return None
    return protocol()


def resolved(path: str) -> Any:
    """Import the object of "module:name".

    Raises:
        InputError: With what is missing, the module or the name.
    """
    module, _, name = path.partition(":")
    if not (module and name):
        raise InputError(
            "features 'imported': path must be module:name, such as my_lab.features:MyExtractor, "
            f"got {path!r}."
        )
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InputError(
            f"features 'imported': cannot import {module!r} ({error}). Install it, or put its "
            "folder on PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise InputError(f"features 'imported': {module} has no {name!r}.") from error
