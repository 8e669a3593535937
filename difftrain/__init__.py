"""difftrain: training methods for diffusion models, each as one formula in its own slot.

The names that people use are importable from here. They load on first use: `import difftrain` alone
imports nothing outside the standard library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftrain.core.errors import InputError as InputError
    from difftrain.core.rng import Rng as Rng
    from difftrain.data.items import Clip as Clip
    from difftrain.data.items import Item as Item
    from difftrain.data.items import MapDataset as MapDataset
    from difftrain.data.items import StreamDataset as StreamDataset
    from difftrain.data.items import TensorItem as TensorItem
    from difftrain.data.loader import Loader as Loader
    from difftrain.data.transform import Transform as Transform
    from difftrain.evaluation import FeatureStatistics as FeatureStatistics
    from difftrain.evaluation import frechet_distance as frechet_distance
    from difftrain.evaluation import kernel_distance as kernel_distance
    from difftrain.evaluation import precision_recall as precision_recall
    from difftrain.objective.noise import InputPerturbation as InputPerturbation
    from difftrain.objective.objective import Objective as Objective
    from difftrain.objective.regularizers import ErrorPropagation as ErrorPropagation
    from difftrain.objective.regularizers import NoiseConstraint as NoiseConstraint
    from difftrain.objective.regularizers import StepVariation as StepVariation
    from difftrain.objective.schedule import NoiseLevel as NoiseLevel
    from difftrain.objective.schedule import NoiseSchedule as NoiseSchedule
    from difftrain.objective.types import Batch as Batch
    from difftrain.objective.weightings import P2 as P2
    from difftrain.objective.weightings import Debiased as Debiased
    from difftrain.objective.weightings import MinSNR as MinSNR
    from difftrain.objective.weightings import SoftMinSNR as SoftMinSNR
    from difftrain.recipe.reading import load
    from difftrain.training.callbacks import Callback as Callback
    from difftrain.training.settings import Training as Training
    from difftrain.training.trainer import Trainer as Trainer

    load_recipe = load

__version__ = "0.1.0"

# Where each name lives; a pair where it has another name there.
HOMES: dict[str, str | tuple[str, str]] = {
    "Batch": "objective.types",
    "Callback": "training.callbacks",
    "Clip": "data.items",
    "Debiased": "objective.weightings",
    "ErrorPropagation": "objective.regularizers",
    "FeatureStatistics": "evaluation",
    "InputError": "core.errors",
    "InputPerturbation": "objective.noise",
    "Item": "data.items",
    "Loader": "data.loader",
    "MapDataset": "data.items",
    "MinSNR": "objective.weightings",
    "NoiseConstraint": "objective.regularizers",
    "NoiseLevel": "objective.schedule",
    "NoiseSchedule": "objective.schedule",
    "Objective": "objective.objective",
    "P2": "objective.weightings",
    "Rng": "core.rng",
    "SoftMinSNR": "objective.weightings",
    "StepVariation": "objective.regularizers",
    "StreamDataset": "data.items",
    "TensorItem": "data.items",
    "Trainer": "training.trainer",
    "Training": "training.settings",
    "Transform": "data.transform",
    "frechet_distance": "evaluation",
    "kernel_distance": "evaluation",
    "load_recipe": ("recipe.reading", "load"),
    "precision_recall": "evaluation",
}

__all__ = [*sorted(HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = HOMES[name]
    module, attribute = home if isinstance(home, tuple) else (home, name)
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
