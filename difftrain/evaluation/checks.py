"""What every score asks of feature rows: [N, D], one width, finite, enough of them."""

import torch
from torch import Tensor

from difftrain.evaluation.rows import Rows
from difftrain.registry import InputError

SHOWN = 5


def check_features(features: Tensor, name: str, num_features: int | None = None) -> None:
    """Raise InputError unless `features` is [N, D] (with D = num_features where that is given) and finite."""
    if features.ndim != 2:
        raise InputError(f"{name} must be [N, D], one row per image, got {list(features.shape)}.")
    check_width(features.shape[1], name, num_features)
    refuse_broken(broken_rows(features), len(features), name)


def check_rows(rows: Rows, name: str, num_features: int | None = None, at_least: int = 0) -> None:
    """Raise InputError unless there are `at_least` rows, all finite and of this width. name: whose, as in "generated"."""
    check_width(rows.width, f"{name} features", num_features)
    check_count(len(rows), name, at_least)
    broken, start = [], 0
    for block in rows.blocks():
        broken.append(broken_rows(block) + start)
        start += len(block)
    refuse_broken(torch.cat(broken) if broken else torch.empty(0), len(rows), f"{name} features")


def check_pair(reference: Rows, generated: Rows, at_least: int) -> None:
    """Raise InputError unless both are finite, equally wide, and each has `at_least` rows."""
    check_rows(reference, "reference", at_least=at_least)
    check_rows(generated, "generated", reference.width, at_least)


def check_count(count: int, name: str, at_least: int) -> None:
    if count < at_least:
        raise InputError(f"{count} {name} images are too few: this score needs at least {at_least}.")


def check_width(width: int, name: str, expected: int | None) -> None:
    if expected is not None and width != expected:
        raise InputError(f"{name} have {width} columns, expected {expected}: compare features of one extractor.")


def broken_rows(features: Tensor) -> Tensor:
    """Numbers [n] of the rows of features [N, D] that are not finite."""
    return (~torch.isfinite(features)).any(dim=1).nonzero().flatten()


def refuse_broken(broken: Tensor, total: int, name: str) -> None:
    if len(broken):
        which = ", ".join(map(str, broken[:SHOWN].tolist())) + (", ..." if len(broken) > SHOWN else "")
        raise InputError(
            f"{name}: {len(broken)} of {total} rows are not finite (images {which}). No score of them means anything; look at the images."
        )
