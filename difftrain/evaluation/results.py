"""What an evaluation found."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from difftrain.evaluation.agreement import Failure
from difftrain.evaluation.protocols import digest_of
from difftrain.evaluation.slots import Scores

COMPARED = ("features", "reference", "num_samples", "metrics", "labels")


@dataclass(frozen=True)
class Evaluation:
    """Scores and everything that fixes them.

    Args:
        scores: By name, each with `value`, `better` and `title`, and whatever else its metric
            records.
        protocol: What fixes the scores.
        generated: Count and digest of the generated samples.
        worst: The generated images nearest to training images, above these, as one picture [C, H,
            W].
        failures: Why scores are missing, by name, of metrics that raised an error.
        left_out: Why scores are missing, by name, of metrics that were added without being asked
            for.
    """

    scores: Scores
    protocol: dict[str, Any]
    generated: dict[str, Any]
    worst: Tensor | None = field(default=None, compare=False)
    failures: dict[str, Failure] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """The number of generated samples."""
        return int(self.generated["count"])

    def to_json(self, step: int | None) -> dict[str, Any]:
        """Return what evaluation.json holds.

        Args:
            step: The optimizer step of the weights; None if there is none.
        """
        found = {
            "step": step,
            "num_samples": self.num_samples,
            "scores": self.scores,
            "protocol_digest": digest_of(comparable(self.protocol)),
            "protocol": self.protocol,
            "generated": self.generated,
        }
        if self.failures:
            found["failed"] = {name: failure.reason for name, failure in self.failures.items()}
        if self.left_out:
            found["left_out"] = dict(self.left_out)
        return found


def comparable(protocol: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a protocol that scores must share to be compared.

    It is everything but what was generated, how, and from which training set. Samples without
    classes and prompts have no "labels".
    """
    return {key: protocol[key] for key in COMPARED if key in protocol}


def comparable_pair(
    one: dict[str, Any], other: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parts of two protocols that both must share to be compared.

    A model without classes and prompts is compared with any other: it cannot choose labels.
    """
    first, second = comparable(one), comparable(other)
    if "labels" not in first or "labels" not in second:
        first.pop("labels", None)
        second.pop("labels", None)
    return first, second
