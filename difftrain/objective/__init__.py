"""The mathematics of training: schedules, parameterizations, weightings, regularizers, losses.

`Objective` puts the parts together. It is imported on first use, so that importing one part does
not import all of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftrain.objective.objective import Objective

__all__ = ["Objective"]


def __getattr__(name: str) -> Any:
    if name == "Objective":
        from difftrain.objective.objective import Objective

        return Objective
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
