"""Reference statistics as files: our own, which say how they were made, and published ones."""

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from difftrain.core.errors import InputError
from difftrain.core.files import write_beside
from difftrain.evaluation.distances.moments import GaussianSummary, Moments
from difftrain.evaluation.evidence import MAIN, SPATIAL
from difftrain.evaluation.protocols import check_comparable
from difftrain.evaluation.slots import FeatureExtractor
from difftrain.evaluation.sources.resizing import Resizing

# ADM's files hold the images too: gigabytes that are not read.
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "num_samples", "protocol")
PAIRS = (("mu_s", "sigma_s"), ("num_samples", "protocol"))  # optional, but only together
# What numpy raises on files that are no archive of arrays, or a damaged one
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    NotImplementedError,
    MemoryError,
    OverflowError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
ROUNDING = 1e-9  # of the largest variance: what another may be negative by
NEGATIVE = 1e-5  # of the trace: what a direction may be negative by, in rounded files
ASYMMETRY = 1e-5  # relative to the largest value: some published files were float32


@dataclass(frozen=True)
class ReferenceStatistics:
    """A reference of which only statistics are known.

    Args:
        by_output: Those of the features, under "features", and perhaps of other outputs.
        protocol: How they were made.
    """

    by_output: Mapping[str, GaussianSummary]
    protocol: dict[str, Any]

    def check_spatial(self, metric: str) -> None:
        """Check that the spatial output's statistics are known.

        Args:
            metric: The name of the metric that needs them.

        Raises:
            InputError: If they are not.
        """
        if SPATIAL not in self.by_output:
            raise InputError(
                f"the statistics hold no spatial features (mu_s, sigma_s), which {metric} "
                f"compares. Make them again with difftrain reference, or leave {metric} out."
            )


def read_statistics(
    path: Path,
    extractor: FeatureExtractor,
    resizing: Resizing | None = None,
    shape: tuple[int, ...] = (),
) -> ReferenceStatistics:
    """Read a statistics file as a reference for an extractor's features.

    A published file states no protocol: its entry says that the extractor's is assumed.

    Args:
        path: An .npz file.
        extractor: What the generated samples go through.
        resizing: How their sizes are brought together before.
        shape: (C, H, W) of a generated sample, if it is known.

    Raises:
        InputError: If the file holds no statistics, or was made with other features.
    """
    statistics = read_statistics_file(path)
    stored, own = statistics.protocol.get("features"), extractor.protocol()
    if stored is not None:
        check_resizing(path, statistics.protocol.get("resized"), resizing, shape)
        check_comparable(stored, own, f"the statistics in {path}", f"features {extractor.name!r}")
    num_features, width = statistics.by_output[MAIN].num_features, extractor.widths[MAIN]
    if num_features != width:
        raise InputError(
            f"{path} holds statistics of {num_features} features, and {extractor.name!r} gives "
            f"{width}. Make it again with difftrain reference, or write other --features."
        )
    if stored is not None:
        return statistics
    protocol = {**statistics.protocol, "assumed_features": own}
    return ReferenceStatistics(statistics.by_output, protocol)


def check_resizing(
    path: Path,
    stored: dict[str, Any] | None,
    resizing: Resizing | None,
    shape: tuple[int, ...],
) -> None:
    """Refuse statistics of pictures that were resized in another way than the samples.

    Samples that have the size already need no resize.

    Args:
        path: The file.
        stored: How its pictures were resized; None: not at all.
        resizing: How the samples are resized.
        shape: (C, H, W) of a sample, if it is known.

    Raises:
        InputError: With what to write instead.
    """
    given = None if resizing is None else resizing.described()
    if stored == given:
        return
    if stored is None:
        raise InputError(
            f"{path} holds statistics of pictures as they are, and the samples would be resized. "
            "Leave --resize out, or make the statistics again with it (difftrain reference)."
        )
    option = f"--resize {stored['side']}{' --crop' if stored['crop'] != 'none' else ''}"
    if given is None and shape[1:] == (stored["side"], stored["side"]):
        return
    raise InputError(
        f"{path} holds statistics of pictures that were resized by {option}. Write {option}, or "
        "make the statistics again."
    )


def read_statistics_file(path: str | Path) -> ReferenceStatistics:
    """Read a statistics file of our own or a published one.

    Own files hold their protocol. Published ones hold mu and sigma (pytorch-fid, EDM), and mu_s
    and sigma_s of the spatial features beside them (ADM). Their number of samples is not known,
    and `protocol` says what is assumed.

    Args:
        path: An .npz file.

    Raises:
        InputError: If it is anything else.
    """
    arrays = read_arrays(path)
    count = checked_count(path, arrays["num_samples"]) if "num_samples" in arrays else None
    by_output = {MAIN: checked_moments(path, arrays["mu"], arrays["sigma"], count)}
    if "mu_s" in arrays:
        by_output[SPATIAL] = checked_moments(path, arrays["mu_s"], arrays["sigma_s"], count)
    if "protocol" in arrays:
        protocol = checked_protocol(path, arrays["protocol"])
    else:
        protocol = {
            "source": "published statistics",
            "keys": "mu, sigma, mu_s, sigma_s" if SPATIAL in by_output else "mu, sigma",
            "num_features": by_output[MAIN].num_features,
            "num_samples": None,
            "assumed": "the same preparation of images and the same network as for the generated "
            "images, and a covariance with ddof 1",
        }
    return ReferenceStatistics(by_output, protocol)


def save_statistics(
    path: str | Path, by_output: Mapping[str, GaussianSummary], protocol: dict[str, Any]
) -> None:
    """Write a statistics file: mu, sigma, num_samples, the protocol, and mu_s and sigma_s if known.

    Args:
        path: An .npz file, which appears whole or not at all.
        by_output: Statistics of the features, under "features", and of the spatial output, if
            known.
        protocol: How they were made, JSON-able.

    Raises:
        InputError: If the name has another ending, or if there are fewer than 2 samples.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(
            f"{path}: statistics are saved as an .npz file. Write a name ending in .npz."
        )
    main = by_output[MAIN]
    arrays: dict[str, Any] = {"mu": main.mean.cpu().numpy(), "sigma": main.cov.cpu().numpy()}
    if SPATIAL in by_output:
        spatial = by_output[SPATIAL]
        arrays |= {"mu_s": spatial.mean.cpu().numpy(), "sigma_s": spatial.cov.cpu().numpy()}
    text = json.dumps(protocol, sort_keys=True)
    with write_beside(path) as beside:
        np.savez(beside, **arrays, num_samples=main.count, protocol=text)


def read_arrays(path: str | Path) -> dict[str, Any]:
    """Read the arrays of an .npz file that belong to statistics.

    Raises:
        InputError: With what the file is instead, if it is not a file of statistics.
    """
    if Path(path).suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path}: a pickle can run any code when it is opened, so it is not read. If you trust "
            "it, write its mean and covariance to an .npz file: numpy.savez('stats.npz', mu=mean, "
            "sigma=cov)."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = list(file)
            arrays = {key: file[key] for key in ARRAYS if key in keys}
    except DAMAGED as error:
        raise InputError(
            f"{path}: cannot be read as an .npz file of feature statistics "
            f"({error or type(error).__name__}). Make or fetch it again."
        ) from error
    needed = ["mu", "sigma"]
    for pair in PAIRS:
        if arrays.keys() & set(pair):
            needed += pair
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise InputError(
            f"{path}: not a file of feature statistics, {' and '.join(missing)} is missing; it has "
            f"{', '.join(keys)}."
        )
    return arrays


def as_numbers(path: str | Path, key: str, values: np.ndarray) -> np.ndarray:
    """Return an array of a file as float64.

    Args:
        path: The file, for messages.
        key: The name of the array.
        values: The array.

    Raises:
        InputError: If it holds no real numbers.
    """
    if values.dtype.kind == "c" and not values.imag.any():
        values = values.real
    if values.dtype.kind not in "fiu":
        kind = "complex numbers" if values.dtype.kind == "c" else f"the type {values.dtype}"
        raise InputError(f"{path}: {key} holds {kind}, expected real numbers.")
    return values.astype(np.float64)


def check_positive(path: str | Path, cov: np.ndarray) -> None:
    """Refuse a symmetric matrix that no features have as their covariance.

    Args:
        path: The file, for messages.
        cov: The matrix [D, D].

    Raises:
        InputError: If it is negative in some direction, beyond rounding.
    """
    diagonal = np.diag(cov)
    if diagonal.min() < -ROUNDING * diagonal.max(initial=0):
        raise InputError(
            f"{path}: the diagonal of sigma holds {diagonal.min():.4g}, but a variance is never "
            "negative. The file is broken; make or fetch it again."
        )
    matrix = torch.from_numpy((cov + cov.T) / 2)
    matrix.diagonal().add_(NEGATIVE * float(diagonal.sum()) + torch.finfo(torch.float64).tiny)
    if torch.linalg.cholesky_ex(matrix).info:
        raise InputError(
            f"{path}: sigma is negative in some directions, so it is not a covariance matrix. The "
            "file is broken; make or fetch it again."
        )


def checked_count(path: str | Path, value: np.ndarray) -> int:
    """Return the number of samples that a file states.

    Raises:
        InputError: If it is no whole number.
    """
    if value.ndim or value.dtype.kind not in "iu":
        raise InputError(f"{path}: num_samples is {value!r}, expected one whole number.")
    return int(value)


def checked_protocol(path: str | Path, value: np.ndarray) -> dict[str, Any]:
    """Return the protocol that a file states.

    Raises:
        InputError: If it is not the JSON object that difftrain writes.
    """
    try:
        found = json.loads(str(value))
    except ValueError:
        found = None
    is_ours = isinstance(found, dict) and all(
        isinstance(found.get(key, {}), dict) for key in ("features", "resized")
    )
    if value.ndim or not is_ours:
        raise InputError(
            f"{path}: protocol is not the JSON object that difftrain reference writes. Make the "
            "file again, or save mu and sigma alone."
        )
    return dict(found)


def checked_moments(
    path: str | Path, mean: np.ndarray, cov: np.ndarray, count: int | None
) -> Moments:
    """Build moments from the arrays of a file.

    Args:
        path: The file, for messages.
        mean: What should be a mean [D].
        cov: What should be a covariance [D, D].
        count: The number of samples, if the file states it.

    Raises:
        InputError: If they are not.
    """
    mean, cov = as_numbers(path, "mu", mean), as_numbers(path, "sigma", cov)
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path}: mu must be [D] and sigma [D, D], got {list(mean.shape)} and "
            f"{list(cov.shape)}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise InputError(
            f"{path}: mu or sigma hold numbers that are not finite. The file is broken; make or "
            "fetch it again."
        )
    if count is not None and count < 2:
        raise InputError(f"{path}: num_samples = {count}, a covariance needs at least 2.")
    if np.abs(cov - cov.T).max(initial=0) > ASYMMETRY * np.abs(cov).max(initial=0):
        raise InputError(f"{path}: sigma is not symmetric, so it is not a covariance matrix.")
    check_positive(path, cov)
    return Moments.known(torch.from_numpy(mean), torch.from_numpy((cov + cov.T) / 2), count)
