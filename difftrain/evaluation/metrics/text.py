"""How well images fit their prompts."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from difftrain.evaluation.checks import check_rows
from difftrain.evaluation.evidence import TEXT, Evidence, Need, check_name
from difftrain.evaluation.extractor import FEATURES
from difftrain.evaluation.metrics.common import Scores
from difftrain.registry import METRICS


@METRICS.register("clip_score")
@dataclass(frozen=True)
class ClipScore:
    """mean max(100 cos(image, prompt), 0) of CLIP's features; Hessel et al. 2021, "CLIPScore", arXiv:2104.08718, who scale by 2.5 instead.

    The cosine of each pair is cut at 0, as published; torchmetrics cuts the mean. `standard_error` is the mean's over images.
    """

    scores: ClassVar[tuple[str, ...]] = ("clip_score",)
    only_with: ClassVar[str] = "clip"
    instead: ClassVar[str] = "features: {type: clip}"
    needs: ClassVar[frozenset[Need]] = frozenset({"text"})

    def __call__(self, evidence: Evidence) -> Scores:
        check_name(self, evidence.features_name)
        images, prompts = evidence.generated.outputs[FEATURES], evidence.generated.outputs[TEXT]
        check_rows(images, "generated", at_least=2)
        check_rows(prompts, "the prompts'", images.width, at_least=2)
        cosines = torch.cat([
            torch.cosine_similarity(image.double(), prompt.double(), dim=1)
            for image, prompt in zip(images.blocks(), prompts.blocks(), strict=True)
        ])
        values = (100 * cosines).clamp(min=0)
        error = float(values.std()) / len(values) ** 0.5
        return {"clip_score": {"value": float(values.mean()), "standard_error": error, "count": len(values), "features": "clip"}}
