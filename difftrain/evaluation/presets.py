"""Protocols of published Inception scores, and whether two protocols are the same.

A preset fixes every choice that moves a score and that packages make differently; scores of different protocols are not compared.
The facts stand here once, each group with the source file that says so.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

from difftrain.evaluation.resize import Resize
from difftrain.registry import InputError

Scaling = Literal["(x - 128) / 128", "2 x / 255 - 1"]
Protocol = Literal["torch_fidelity", "pytorch_fid", "clean", "edm", "adm"]

ABSENT = "absent"


@dataclasses.dataclass(frozen=True)
class Preset:
    """One package's way from uint8 images to scores. None: the package does not compute that score.

    All five use the Inception of 2015-12-05, start from uint8 images, do not round after the resize, take logits without the last
    layer's bias and covariances with ddof 1. None adds to a covariance's diagonal as a rule: pytorch-fid, clean-fid and ADM add 1e-6
    where scipy's sqrtm of the product is not finite, torch-fidelity and EDM never. An eigenvalue form, as ours, has no such case.
    """

    name: str
    source: str  # the package and version or commit whose files were read
    weights: Literal["torch", "stylegan"]  # the layout of the file that the package downloads: one network, two ports
    resize: Resize
    scaling: Scaling
    clip: bool = False  # to 0 .. 255 after the resize
    antialias: bool = False
    quantised: Literal["before the resize"] = "before the resize"
    grey: Literal["repeated three times"] = "repeated three times"
    logits: Literal["without bias"] = "without bias"
    covariance_ddof: int = 1
    added_to_diagonal: float = 0.0
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    kid_degree: int | None = None
    is_splits: int | None = None
    is_split_size: int | None = None
    is_shuffle: bool | None = None
    pr_neighbours: int | None = None
    num_samples: int = 50_000  # by convention, as is the reference: recorded where images are counted, not enforced here
    reference: str = "training images"

    def metric_settings(self) -> dict[str, Any]:
        """The settings of metrics, those that the package does not compute left out."""
        names = ("kid_subsets", "kid_subset_size", "kid_degree", "is_splits", "is_split_size", "is_shuffle", "pr_neighbours")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def protocol(self) -> dict[str, Any]:
        """JSON-able: what fixes the numbers. Left out: the name, where it was read, the weights' layout and the conventions."""
        left_out = ("name", "source", "weights", "num_samples", "reference")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # feature_extractor_inceptionv3.py (resize, scaling, logits_unbiased), metric_fid.py, metric_isc.py (shuffle),
        # defaults.py (isc_*, kid_*, prc_*).
        Preset(
            "torch_fidelity", "torch-fidelity 0.4.0", "torch", "tf1_bilinear", "(x - 128) / 128",
            kid_subsets=100, kid_subset_size=1000, kid_degree=3, is_splits=10, is_shuffle=True, pr_neighbours=3,
        ),
        # inception.py (resize after ToTensor's x / 255, then 2 x - 1), fid_score.py (np.cov; the 1e-6). FID alone.
        Preset("pytorch_fid", "pytorch-fid 0.3.0", "torch", "torch_bilinear", "2 x / 255 - 1"),
        # resize.py (build_resizer "clean"; older versions do not clip), inception_torchscript.py (scaling), fid.py (kernel_distance).
        Preset(
            "clean", "clean-fid 0.1.35", "stylegan", "pil_bicubic", "(x - 128) / 128", clip=True, antialias=True,
            kid_subsets=100, kid_subset_size=1000, kid_degree=3, reference="statistics of the named data set, split and resolution",
        ),
        # fid.py (grey, ddof 1, 50,000 images), its pickled network resizes by a grid that emulates TensorFlow 1. FID alone.
        Preset("edm", "NVlabs/edm 0a2ff34", "stylegan", "tf1_bilinear", "(x - 128) / 128"),
        # evaluations/evaluator.py: the original graph, which resizes itself; compute_inception_score (split_size),
        # ManifoldEstimator (nhood_sizes).
        Preset(
            "adm", "openai/guided-diffusion 1b61a43", "torch", "tf1_bilinear", "(x - 128) / 128",
            is_split_size=5000, is_shuffle=False, pr_neighbours=3,
            reference="statistics of all training images, 10,000 of them for precision and recall",
        ),
    )
}  # fmt: skip


def digest_of(protocol: dict[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of the protocol as canonical JSON: the same for any order of keys."""
    return hashlib.sha256(canonical(protocol).encode()).hexdigest()[:16]


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A line for each dotted key whose values differ, by key: `resize: "tf1_bilinear" vs "pil_bicubic"`; [] for equal protocols."""
    flat_a, flat_b = flat(a), flat(b)
    pairs = [(key, flat_a.get(key, ABSENT), flat_b.get(key, ABSENT)) for key in sorted(flat_a.keys() | flat_b.keys())]
    return [f"{key}: {left} vs {right}" for key, left, right in pairs if left != right]


def flat(protocol: dict[str, Any], above: str = "") -> dict[str, str]:
    """Values as canonical JSON by dotted key; an empty dict is a value."""
    found: dict[str, str] = {}
    for key, value in protocol.items():
        dotted = f"{above}.{key}" if above else str(key)
        found |= flat(value, dotted) if isinstance(value, dict) and value else {dotted: canonical(value)}
    return found


def check_comparable(a: dict[str, Any], b: dict[str, Any], what_a: str, what_b: str) -> None:
    """Raise InputError, listing the differences, unless both protocols are the same."""
    if lines := differences(a, b):
        listed = "\n".join(f"  {line}" for line in lines)
        raise InputError(
            f"{what_a} and {what_b} come from different protocols, so their scores are not comparable:\n{listed}\n"
            "Evaluate both with the same features and settings."
        )
