"""Whether generated images are copies of training images."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.evidence import NEAREST, Evidence
from difftrain.evaluation.rows import Rows
from difftrain.evaluation.slots import METRICS, Metric, Scores

NUM_WORST = 10
NEAR = 0.01  # quantile of the held-out distances


@METRICS.register("nearest_neighbour_ratio")
@dataclass(frozen=True)
class NearestNeighbourRatio(Metric):
    """mean_g min_i |g - x_i| / mean_r min_i |r - x_i| in pixels, with training images x.

    g are generated images, r held-out ones. The ratio is about 1 when generated images are as far
    from the training set as unseen real ones, and near 0 when they are copies. A few copies
    hardly move it. Therefore `share_near` is the share of generated images nearer than `near`,
    the 1 % quantile of the reference's distances (0.01 is expected of unseen images), and `worst`
    lists the generated images nearest to a training image.
    """

    scores = ("nearest_neighbour_ratio",)
    needs = frozenset({"nearest", "reference images"})
    better = "near 1"

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the ratio."""
        generated = nearest_rows(evidence.generated.outputs[NEAREST], "generated")
        reference = nearest_rows(evidence.reference.outputs[NEAREST], "reference")
        of_generated, of_reference = float(generated[:, 0].mean()), float(reference[:, 0].mean())
        if of_reference == 0:
            raise InputError(
                "nearest_neighbour_ratio: every reference image is a training image too. Give "
                "held-out images as reference."
            )
        near = float(reference[:, 0].quantile(NEAR))
        return {
            "nearest_neighbour_ratio": {
                "value": of_generated / of_reference,
                "generated": of_generated,
                "reference": of_reference,
                "near": near,
                "share_near": float((generated[:, 0] < near).double().mean()),
                "worst": nearest_cases(generated),
                "count": len(generated),
                "reference_count": len(reference),
            }
        }


def nearest_rows(nearest: Rows, name: str) -> Tensor:
    """Return distance and index of the nearest training image of a set, [N, 2] float64."""
    check_rows(nearest, name, at_least=1)
    return nearest.whole().double()


def nearest_cases(nearest: Tensor) -> list[dict[str, Any]]:
    """List the images nearest to a training image, nearest first, from rows [N, 2]."""
    order = nearest[:, 0].argsort(stable=True)[:NUM_WORST].tolist()
    return [
        {"index": i, "distance": float(nearest[i, 0]), "training": int(nearest[i, 1])}
        for i in order
    ]
