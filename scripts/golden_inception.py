"""Writes the numbers of torch-fidelity, pytorch-fid and clean-fid to tests/golden/inception.json.

Weights, images and features are given by formulas. Run it once, in its own environment. It
downloads no weights:

    pip install torch==2.13.0 torchvision==0.28.0 torch-fidelity==0.4.0 pytorch-fid==0.3.0 \
        clean-fid==0.1.35 scipy==1.17.1
    python scripts/golden_inception.py tests/golden/inception.json

The formulas need only torch. The tests load them from this file.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POSITIONS = 8  # values of a tensor that are kept
SIZE = (299, 299)
BLOCK_IMAGES = (2, 3, 299, 299)
SMALL = {"32x32": (2, 3, 32, 32), "40x72": (2, 3, 40, 72), "360x330": (1, 3, 360, 330)}
FEATURES = {
    "full rank": (300, 16),
    "fewer rows than features": (10, 16),
    "one constant feature": (60, 16),
}


# The formulas


def uniform(num: int, seed: int) -> Tensor:
    """Return numbers [num] in [0, 1), float64.

    They come from integer arithmetic alone, so they are the same on every machine.
    """
    mask = 0xFFFFFFFF
    h = (torch.arange(num, dtype=torch.int64) * 2654435761 + seed) & mask
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 73244475) & mask
    return (h ^ (h >> 16)).double() / 2**32


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return a state dict, float32.

    Convolutions have the variance 2 / fan-in. Batch norms differ from the identity.

    Args:
        shapes: Shape of each tensor by its name.
    """
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        count = 1
        for length in shape:
            count *= length
        u = uniform(count, zlib.crc32(name.encode())).reshape(shape)
        if len(shape) > 1:
            fan_in = count // shape[0]
            value = (2 * u - 1) * (6 / fan_in) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            value = 0.7 + 0.6 * u
        else:
            value = 0.4 * u - 0.2
        state[name] = value.float()
    return state


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return images [N, C, H, W] uint8: noise on a slope.

    The resize and the network then see more than one frequency.
    """
    n, c, h, w = shape
    noise = uniform(n * c * h * w, seed + 1).reshape(shape)
    horizontal = torch.linspace(0, 1, w, dtype=torch.float64)
    vertical = torch.linspace(1, 0.2, h, dtype=torch.float64)
    slope = horizontal * vertical[:, None]
    return (255.99 * (0.5 * noise + 0.5 * slope)).long().to(torch.uint8)


def feature_rows(shape: tuple[int, int], seed: int) -> Tensor:
    """Return correlated features [N, D] float64, each of a different scale."""
    n, d = shape
    independent = uniform(n * d, seed).reshape(n, d)
    mixing = uniform(d * d, 7).reshape(d, d) - 0.3
    rows = independent @ mixing + 0.05 * seed
    return rows * torch.linspace(0.2, 2, d, dtype=torch.float64)


def features_of(case: str) -> tuple[Tensor, Tensor]:
    """Return the two sets of features of a case, each [N, D]."""
    a = feature_rows(FEATURES[case], 1)
    b = feature_rows(FEATURES[case], 2)
    if case == "one constant feature":
        a[:, 3] = 0.5
        b[:, 3] = 0.5
    return a, b


def summary(x: Tensor) -> dict[str, list[float]]:
    """Return a few values at fixed positions, the mean and the standard deviation."""
    flat = x.detach().double().flatten()
    positions = torch.linspace(0, len(flat) - 1, POSITIONS, dtype=torch.float64).long()
    return {
        "values": flat[positions].tolist(),
        "mean": [float(flat.mean())],
        "std": [float(flat.std())],
    }


# The numbers of the packages


def fidelity_networks(state: dict[str, Tensor]) -> tuple[Any, Any]:
    """Return torch-fidelity's network in float64 and in float32."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    outputs = ["2048", "logits_unbiased"]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.pth")
        torch.save(state, file)
        double = FeatureExtractorInceptionV3("inception", outputs, file).double()
        single = FeatureExtractorInceptionV3("inception", outputs, file)
    # In version 0.4.0 the argument of this name always gives float32.
    double.feature_extractor_internal_dtype = torch.float64
    return double, single


def block_numbers(network: Any) -> dict[str, Any]:
    """Return summaries of each block and of the outputs of torch-fidelity's network."""
    blocks: dict[str, Any] = {}
    spatial: list[Tensor] = []

    def keep_block(name: str) -> Any:
        def keep(module: Any, arguments: Any, output: Tensor) -> None:
            blocks[name] = summary(output)

        return keep

    def keep_spatial(module: Any, arguments: Any, output: Tensor) -> None:
        spatial.append(output.permute(0, 2, 3, 1)[..., :7])

    for name, module in network.named_children():
        if name != "fc":
            module.register_forward_hook(keep_block(name))
    network.Mixed_6d.branch1x1.register_forward_hook(keep_spatial)
    pool, logits = network(images(BLOCK_IMAGES))
    outputs = {
        "features": summary(pool),
        "logits": summary(logits),
        "spatial": summary(spatial[-1]),
    }
    return {"blocks": blocks, "outputs": outputs}


def resize_numbers(x: Tensor) -> dict[str, Any]:
    """Return summaries of the packages' resizes of images [N, 3, H, W] uint8."""
    import cleanfid.resize
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    tensorflow = interpolate_bilinear_2d_like_tensorflow1x(x.float(), SIZE, align_corners=False)
    bilinear = torch.nn.functional.interpolate(x / 255, SIZE, mode="bilinear", align_corners=False)
    resize_bicubic = cleanfid.resize.build_resizer("clean")
    bicubic: list[Tensor] = []
    for image in x:
        resized = resize_bicubic(image.permute(1, 2, 0).numpy())
        bicubic.append(torch.from_numpy(resized).permute(2, 0, 1))
    return {
        "tf1_bilinear": summary(tensorflow),
        "torch_bilinear": summary(255 * bilinear),
        "pil_bicubic": summary(torch.stack(bicubic)),
    }


def frechet_numbers(a: Tensor, b: Tensor) -> dict[str, float]:
    """Return the packages' Frechet distances of two sets of features, each [N, D]."""
    import cleanfid.fid
    import numpy as np
    import pytorch_fid.fid_score
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics_a, statistics_b = fid_features_to_statistics(a), fid_features_to_statistics(b)
    fidelity = fid_statistics_to_metric(statistics_a, statistics_b, False)
    rows_a, rows_b = a.numpy(), b.numpy()
    pytorch_distance = pytorch_fid.fid_score.calculate_frechet_distance(
        np.mean(rows_a, axis=0),
        np.cov(rows_a, rowvar=False),
        np.mean(rows_b, axis=0),
        np.cov(rows_b, rowvar=False),
    )
    return {
        "torch-fidelity": fidelity["frechet_inception_distance"],
        "pytorch-fid": float(pytorch_distance),
        "clean-fid": float(cleanfid.fid.fid_from_feats(rows_a, rows_b)),
    }


@torch.no_grad()
def main(out: Path) -> None:
    """Write the file.

    Args:
        out: Where it goes.
    """
    import pytorch_fid.inception
    import torch_fidelity
    import torchvision

    # Weights
    reference = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    shapes: dict[str, list[int]] = {}
    counters: dict[str, Tensor] = {}
    for name, value in reference.state_dict().items():
        if name.endswith("num_batches_tracked"):
            counters[name] = value
        else:
            shapes[name] = list(value.shape)
    state = weights(shapes) | counters

    # Networks
    double, single = fidelity_networks(state)
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    pytorch_fid_network = pytorch_fid.inception.InceptionV3([3]).eval()

    # Numbers
    packages = (torch, torchvision, torch_fidelity)
    golden: dict[str, Any] = {
        "source": "torch-fidelity 0.4.0, pytorch-fid 0.3.0, clean-fid 0.1.35, run on weights, "
        "images and features of a formula",
        "made": "python scripts/golden_inception.py tests/golden/inception.json",
        "versions": {package.__name__: package.__version__ for package in packages},
        "names": shapes,
    }
    golden |= block_numbers(double)
    golden["resizes"] = {}
    golden["extracted"] = {}
    for case, shape in SMALL.items():
        x = images(shape)
        golden["resizes"][case] = resize_numbers(x)
        features, logits = single(x)
        golden["extracted"][case] = {
            "torch_fidelity": {"features": summary(features), "logits": summary(logits)},
            "pytorch_fid": {"features": summary(pytorch_fid_network(x / 255)[0])},
        }
    golden["frechet"] = {}
    for case in FEATURES:
        a, b = features_of(case)
        golden["frechet"][case] = frechet_numbers(a, b)
    out.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
