"""Whether generated images are copies of training images."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.evidence import NEAREST, Evidence, Need
from difftrain.evaluation.metrics.common import Scores
from difftrain.evaluation.rows import Rows, whole
from difftrain.registry import METRICS, InputError

WORST = 10
NEAR = 0.01  # quantile of the held-out distances


@METRICS.register("nearest_neighbour_ratio")
@dataclass(frozen=True)
class NearestNeighbourRatio:
    """mean_g min_i |g - x_i| / mean_r min_i |r - x_i|: generated g and held-out reference r to training images x, in pixels.

    About 1 when generated images are as far from the training set as unseen real ones are; towards 0 when they are copies. A few copies
    hardly move it: `share_near` is the share of generated images nearer than `near`, the 1 % quantile of the reference's distances (0.01
    is expected of unseen images), and `worst` the generated images nearest to a training image.
    """

    scores: ClassVar[tuple[str, ...]] = ("nearest_neighbour_ratio",)
    needs: ClassVar[frozenset[Need]] = frozenset({"nearest", "reference images"})

    def __call__(self, evidence: Evidence) -> Scores:
        generated, reference = (checked(s.outputs[NEAREST], name) for s, name in
                                ((evidence.generated, "generated"), (evidence.reference, "reference")))  # fmt: skip
        of_generated, of_reference = float(generated[:, 0].mean()), float(reference[:, 0].mean())
        if of_reference == 0:
            raise InputError("nearest_neighbour_ratio: every reference image is a training image too. Give held-out images as reference.")
        near = float(reference[:, 0].quantile(NEAR))
        return {
            "nearest_neighbour_ratio": {
                "value": of_generated / of_reference, "generated": of_generated, "reference": of_reference,
                "near": near, "share_near": float((generated[:, 0] < near).double().mean()), "worst": worst(generated),
                "count": len(generated), "reference_count": len(reference),
            }
        }  # fmt: skip


def checked(nearest: Rows, name: str) -> Tensor:
    """[N, 2] float64: distance and index of the nearest training image."""
    check_rows(nearest, name, at_least=1)
    return whole(nearest).double()


def worst(nearest: Tensor) -> list[dict[str, Any]]:
    """The generated images nearest to a training image, nearest first."""
    order = nearest[:, 0].argsort(stable=True)[:WORST].tolist()
    return [{"index": i, "distance": float(nearest[i, 0]), "training": int(nearest[i, 1])} for i in order]
