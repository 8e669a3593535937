"""How well images fit their prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.evidence import MAIN, TEXT, Evidence
from difftrain.evaluation.requirements import check_features_name
from difftrain.evaluation.slots import METRICS, Metric, Scores


@METRICS.register("clip_score")
@dataclass(frozen=True)
class ClipScore(Metric):
    """mean max(100 cos(image, prompt), 0) of CLIP's features.

    The cosine of each pair is cut at 0, as published; torchmetrics cuts the mean. The authors
    scale by 2.5 rather than by 100. `standard_error` is that of the mean over images.

    Reference:
        Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
        arXiv:2104.08718.
    """

    scores = ("clip_score",)
    only_with = "clip"
    instead = "features: {type: clip}"
    needs = frozenset({"text"})
    better = "higher"
    titles: ClassVar[Mapping[str, str]] = {"clip_score": "CLIP score"}

    def __call__(self, evidence: Evidence) -> Scores:
        """Compute the mean over images."""
        check_features_name(self, evidence.features_name)
        images, prompts = evidence.generated.outputs[MAIN], evidence.generated.outputs[TEXT]
        check_rows(images, "generated", at_least=2)
        check_rows(prompts, "the prompts'", images.width, at_least=2)
        cosines = []
        for image, prompt in zip(images.blocks(), prompts.blocks(), strict=True):
            cosines.append(torch.cosine_similarity(image.double(), prompt.double(), dim=1))
        values = (100 * torch.cat(cosines)).clamp(min=0)
        score = {
            "value": float(values.mean()),
            "standard_error": float(values.std()) / len(values) ** 0.5,
            "count": len(values),
            "features": evidence.features_name,
        }
        return {"clip_score": score}
