"""Networks of a user's own, as a recipe's `imports:` brings them."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from difftrain.core.registry import PositiveInt
from difftrain.models.slots import MODELS


@MODELS.register("own_points")
class Points(nn.Module):
    """A network of points [B, D], whose first and last layer share a weight.

    Args:
        width: Width of the hidden layer.
        classes: Rows of the label table; 0 for a network without labels.
    """

    def __init__(self, width: PositiveInt = 8, classes: int = 0):
        super().__init__()
        self.embed = nn.Embedding(classes, width) if classes else None
        self.first = nn.Linear(2, width)
        self.time = nn.Linear(1, width)
        self.last = nn.Linear(width, 2)
        self.again = self.last

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        hidden = self.first(x_t) + self.time(t.to(x_t)[:, None] / 1000)
        if self.embed is not None:
            hidden = hidden + self.embed(cond["class_labels"])
        if "shift" in cond:
            hidden = hidden + cond["shift"][:, None]
        return self.last(hidden.tanh()) + 0 * self.again(hidden)


@MODELS.register("own_function")
def own_function(width: PositiveInt = 4) -> Points:
    """Return a network of points."""
    return Points(width)


@MODELS.register("own_unannotated")
def own_unannotated(width: PositiveInt = 4):
    """Return a network of points, without saying so."""
    return Points(width)


@MODELS.register("own_picky")
class Picky(nn.Module):
    """A network whose constructor and call need values, so they fail on the meta device."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = float(self.layer.weight.abs().mean())

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.layer(x_t) * (1.0 if float(t[0]) >= 0 else self.scale)


@MODELS.register("own_values")
class Values(nn.Module):
    """A network whose call alone needs values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.layer(x_t) if t.max().item() < 1 else x_t


@MODELS.register("own_broken")
class Broken(nn.Module):
    """A network that fails in one way.

    Args:
        how: What its constructor, or its call, does.
    """

    def __init__(self, how: str):
        super().__init__()
        if how == "construct":
            raise ValueError("no such width")
        self.how, self.layer = how, nn.Linear(2 if how != "parameters" else 0, 2)
        if how == "parameters":
            del self.layer

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if self.how == "call":
            return self.layer(torch.cat([x_t, x_t], dim=1))
        if self.how == "key":
            return self.layer(x_t) + cond["context"]
        if self.how == "shape":
            return self.layer(x_t)[:, :1]
        return (self.layer(x_t),)


@MODELS.register("own_half")
class Half(Points):
    """A network in bfloat16."""

    def __init__(self):
        super().__init__(8)
        self.to(torch.bfloat16)


@MODELS.register("own_no_network")
class NoNetwork:
    """A class that is no network."""


@MODELS.register("own_stack")
class Stack(nn.Module):
    """A network around another registered network.

    Args:
        inner: The other network.
    """

    def __init__(self, inner: Annotated[Any, MODELS]):
        super().__init__()
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.inner(x_t, t, cond)
