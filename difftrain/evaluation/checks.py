"""What every distance between feature sets asks of its input: [N, D], one width, finite, enough rows."""

import torch
from torch import Tensor

from difftrain.registry import InputError


def check_features(features: Tensor, name: str, num_features: int | None = None) -> None:
    """Raise InputError unless `features` is [N, D] (with D = num_features where that is given) and finite."""
    if features.ndim != 2:
        raise InputError(f"{name} must be [N, D], one row per image, got {list(features.shape)}.")
    if num_features is not None and features.shape[1] != num_features:
        raise InputError(f"{name} have {features.shape[1]} columns, expected {num_features}: compare features of one extractor.")
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise InputError(f"{name}: {broken} of {len(features)} rows are not finite. No score of them means anything; look at the images.")


def check_pair(reference: Tensor, generated: Tensor, at_least: int) -> None:
    """Raise InputError unless both are finite, equally wide, and each has `at_least` rows."""
    check_features(reference, "reference features")
    check_features(generated, "generated features", num_features=reference.shape[1])
    for features, name in ((reference, "reference"), (generated, "generated")):
        if len(features) < at_least:
            raise InputError(f"{len(features)} {name} images are too few: this score needs at least {at_least}.")
