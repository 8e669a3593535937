"""Networks of the user's own as models: any nn.Module that is called as (x_t, time, cond)."""

import ast
import inspect
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.core.files import write_beside, write_text
from difftrain.core.registry import Part
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.models.files import first_line
from difftrain.models.model import ConditioningRequest, DenoiserNetwork, ExportParts, Model
from difftrain.objective.slots import Variance
from difftrain.objective.types import Cond

WEIGHTS = "model.safetensors"
LARGE = 50_000_000  # parameters; a larger network is called without its weights first


def open_model(part: Part) -> Model:
    """Return the model of a recipe's `model:` block, whatever kind of constructor is registered.

    Args:
        part: The block. Its constructor is a subclass of `Model`, a subclass of `nn.Module`, or a
            function that returns either.

    Raises:
        InputError: If it is neither, or the model cannot be opened.
    """
    constructor = inspect.unwrap(part.slot.constructors[part.name])
    kind: Any = constructor
    if not inspect.isclass(constructor):
        kind = typing.get_type_hints(constructor).get("return")
    if not inspect.isclass(kind):
        # A function without a return annotation shows what it returns.
        with torch.random.fork_rng():
            kind = type(build(part))
    if issubclass(kind, Model):
        model: Model = part.build()
        return model
    if issubclass(kind, nn.Module):
        return OwnModel(part)
    raise InputError(
        f"model.type: {part.name!r} gives a {kind.__name__}, which is not a network. Derive it "
        "from torch.nn.Module."
    )


def build(part: Part) -> Any:
    """Return what a constructor of the user's own makes.

    Args:
        part: The constructor and its arguments.

    Raises:
        InputError: If the constructor fails, with what it says.
    """
    try:
        return part.build()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"model: {part.name!r} cannot be built: {words_of(error, part)}"
        ) from error


def words_of(error: Exception, part: Part) -> str:
    """Return what an error says, and the line of the user's module that it came from.

    Args:
        error: An error raised by the constructor, or by the network.
        part: The constructor and its arguments.
    """
    home = inspect.getsourcefile(inspect.unwrap(part.slot.constructors[part.name]))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == home]
    place = f" (line {own[-1].lineno} of {home})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


class OwnDenoiser(DenoiserNetwork):
    """A network of the user's own; x_t and conditioning arrive in the network's precision."""

    def forward(self, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Predict from x_t [B, ...] at time [B]."""
        output: Tensor = self.model(x_t.to(self.dtype), time, self.in_precision(cond))
        return output


class OwnModel(Model):
    """A registered nn.Module as a model, for items of any kind and shape.

    Labels of the data arrive as cond["class_labels"] [B] long. With label dropout, a dropped label
    is the number of classes, so a label table needs one more row.

    Args:
        part: The block of the recipe; `part.build()` returns the network.

    Raises:
        InputError: If the constructor fails, or makes no network that could train.
    """

    items = frozenset({"images", "clips", "tensors"})

    def __init__(self, part: Part):
        self.part, self.name = part, part.name
        self.path = None
        self.dtype = str(self.skeleton().dtype).removeprefix("torch.")

    def input_shape(self, item: tuple[int, ...], encoder: LatentEncoder | None) -> tuple[int, ...]:
        """Return the shape of one x_t: that of the item, or of its latents."""
        return item if encoder is None else encoder.latent_shape(item)

    def conditioning(self, request: ConditioningRequest) -> Conditioning:
        """Return the labels of the data as conditioning.

        Raises:
            InputError: If labels are to be dropped where there are none, or the number of classes
                is unknown.
        """
        if not request.is_labelled:
            return ClassConditioning(None, None, request.label_dropout, request.item_cond)
        if request.num_classes is None:
            raise InputError(
                f"data: it has labels, but does not name its classes, and the model {self.name} "
                "does not say how many there are. Give the data set class_names, or leave its "
                "labels out."
            )
        rows = request.num_classes + (request.label_dropout > 0)
        return ClassConditioning(
            request.num_classes, rows, request.label_dropout, request.item_cond
        )

    # Networks

    def skeleton(self, trains_text: bool = False) -> OwnDenoiser:
        """Return the network on the meta device; on the CPU if its constructor cannot run there."""
        try:
            with torch.device("meta"):
                return self.denoiser()
        except InputError:
            return self._on_cpu()

    def denoiser(self, trains_text: bool = False) -> OwnDenoiser:
        """Return the network with random weights from torch's global generator.

        Raises:
            InputError: If its constructor fails, or makes no network that could train.
        """
        network = build(self.part)
        if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
            raise InputError(
                f"model: {self.name!r} makes a {type(network).__name__} without parameters. "
                "Expected a torch.nn.Module with parameters that can train."
            )
        return OwnDenoiser(network)

    def _on_cpu(self) -> OwnDenoiser:
        """The network on the CPU; torch's global generator stays as it was."""
        with torch.random.fork_rng():
            return self.denoiser()

    def check_forward(
        self,
        skeleton: DenoiserNetwork,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        variance: Variance,
    ) -> None:
        """Call the network once.

        A small network is called on the CPU, where a label beyond its label table shows. A large
        one is called without weights, if it can be.

        Raises:
            InputError: If it raises an error, or returns anything but a tensor of the right shape.
        """
        if sum(p.numel() for p in skeleton.parameters()) > LARGE:
            try:
                self._check_call(skeleton, shape, conditioning, variance)
                return
            except InputError:
                # The meta device has no values, which the network may need.
                if skeleton.device.type != "meta":
                    raise
        self._check_call(self._on_cpu(), shape, conditioning, variance)

    def _check_call(
        self,
        network: DenoiserNetwork,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        variance: Variance,
    ) -> None:
        x_t = torch.zeros(2, *shape, device=network.device)
        time = torch.zeros(2, dtype=torch.long, device=network.device)
        # The largest label that occurs is that of a dropped label, or of the last class.
        last = (conditioning.num_classes or 1) - 1
        found = conditioning.null(2) or conditioning(conditioning.labels_of([last, last]))
        cond = {name: value.to(network.device) for name, value in found.items()}
        called = f"model: {self.name!r}, called with x_t {list(x_t.shape)}, time [2] and " + (
            ", ".join(f"{name} {list(value.shape)}" for name, value in cond.items()) or "no cond"
        )
        try:
            with torch.no_grad(), torch.random.fork_rng():
                output: Any = network(x_t, time, cond)
        except Exception as error:
            raise InputError(f"{called}, says: {words_of(error, self.part)}") from error
        if not isinstance(output, Tensor):
            raise InputError(
                f"{called}, returns a {type(output).__name__}. Expected a tensor of the shape of "
                "x_t."
            )
        expected = [2, shape[0] * variance.output_channels, *shape[1:]]
        if list(output.shape) != expected:
            raise InputError(f"{called}, returns {list(output.shape)}. Expected {expected}.")

    # Files

    def save(
        self,
        denoiser: DenoiserNetwork,
        folder: Path,
        parts: ExportParts,
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Write the weights, the recipe, and a program of a few lines that loads the network.

        Args:
            denoiser: The trained network.
            folder: An empty folder.
            parts: The recipe, and facts for the header of the weights' file.
            encoders: Not used; such a network has no text encoders.
        """
        from safetensors.torch import save_model

        with write_beside(folder / WEIGHTS) as beside:
            save_model(denoiser.model, str(beside), {"format": "pt", **parts.about})
        write_text(folder / "recipe.yaml", parts.recipe)
        write_text(folder / "load.py", self._program())

    def _program(self) -> str:
        """Lines of Python that build the network and load its weights."""
        constructor = inspect.unwrap(self.part.slot.constructors[self.part.name])
        name = constructor.__qualname__
        arguments = self.part.arguments
        is_importable = "<locals>" not in name
        if is_importable and is_literal(arguments):
            imported = f"from {constructor.__module__} import {name.partition('.')[0]}"
            call = f"{name}(**{arguments!r})"
        else:
            # Arguments that are parts themselves are built by the registry.
            imported = f"import {constructor.__module__}\nfrom difftrain.models.slots import MODELS"
            call = f"MODELS.parse({self.part.dump()!r}, 'model').build()"
        return (
            "from safetensors.torch import load_model\n"
            f"{imported}\n\n"
            f"net = {call}\n"
            f'load_model(net, "{WEIGHTS}")\n'
            "net.eval()\n"
        )


def is_literal(value: Any) -> bool:
    """Return whether a value is plain data that Python reads back from its repr."""
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
