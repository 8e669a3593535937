"""Numbers of torch-fidelity, pytorch-fid and clean-fid for tests/golden/inception.json: weights, images and features given by a formula.

Run once, in an environment of its own (no weights are fetched):
    pip install torch==2.13.0 torchvision==0.28.0 torch-fidelity==0.4.0 pytorch-fid==0.3.0
    clean-fid==0.1.35 scipy==1.17.1 python scripts/golden_inception.py tests/golden/inception.json
The formula below imports torch alone: the tests read it from here.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

POSITIONS = 8
BLOCK_IMAGES = (2, 3, 299, 299)
SMALL = {"32x32": (2, 3, 32, 32), "40x72": (2, 3, 40, 72), "360x330": (1, 3, 360, 330)}
FEATURES = {
    "full rank": (300, 16),
    "fewer rows than features": (10, 16),
    "one constant feature": (60, 16),
}


def uniform(num: int, seed: int) -> Tensor:
    """num numbers in [0, 1), float64, by integer arithmetic alone: the same on every machine."""
    mask = 0xFFFFFFFF
    h = (torch.arange(num, dtype=torch.int64) * 2654435761 + seed) & mask
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 73244475) & mask
    return (h ^ (h >> 16)).double() / 2**32


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict by name, float32: convolutions of variance 2 / fan-in, and batch norms that differ from the identity."""
    state = {}
    for name, shape in shapes.items():
        u = uniform(
            int(torch.tensor(shape).prod()) if shape else 1, zlib.crc32(name.encode())
        ).reshape(shape)
        if len(shape) > 1:
            fan_in = int(torch.tensor(shape[1:]).prod())
            state[name] = (2 * u - 1) * (6 / fan_in) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 0.7 + 0.6 * u
        else:
            state[name] = 0.4 * u - 0.2
    return {name: value.float() for name, value in state.items()}


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """uint8: noise on a slope, so that neither resize nor network sees only one frequency."""
    n, c, h, w = shape
    noise = uniform(n * c * h * w, seed + 1).reshape(shape)
    slope = (
        torch.linspace(0, 1, w, dtype=torch.float64)
        * torch.linspace(1, 0.2, h, dtype=torch.float64)[:, None]
    )
    return (255.99 * (0.5 * noise + 0.5 * slope)).long().to(torch.uint8)


def feature_rows(shape: tuple[int, int], seed: int) -> Tensor:
    """[N, D] float64: correlated, no two features of the same scale."""
    n, d = shape
    rows = (
        uniform(n * d, seed).reshape(n, d) @ (uniform(d * d, 7).reshape(d, d) - 0.3) + 0.05 * seed
    )
    return rows * torch.linspace(0.2, 2, d, dtype=torch.float64)


def features_of(case: str) -> tuple[Tensor, Tensor]:
    a, b = feature_rows(FEATURES[case], 1), feature_rows(FEATURES[case], 2)
    if case == "one constant feature":
        a[:, 3] = b[:, 3] = 0.5
    return a, b


def summary(x: Tensor) -> dict[str, list[float]]:
    """A few values at fixed positions, mean and standard deviation."""
    flat = x.detach().double().flatten()
    at = torch.linspace(0, len(flat) - 1, POSITIONS, dtype=torch.float64).long()
    return {"values": flat[at].tolist(), "mean": [float(flat.mean())], "std": [float(flat.std())]}


def main(out: Path) -> None:
    import cleanfid.fid
    import cleanfid.resize
    import numpy as np
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    import torch_fidelity
    import torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    plain = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    shapes = {
        name: list(value.shape)
        for name, value in plain.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state = weights(shapes)
    counters = {
        name: value
        for name, value in plain.state_dict().items()
        if name.endswith("num_batches_tracked")
    }

    with tempfile.TemporaryDirectory() as folder:
        torch.save(state | counters, Path(folder) / "weights.pth")
        outputs = ["2048", "logits_unbiased"]
        path = str(Path(folder) / "weights.pth")
        double = FeatureExtractorInceptionV3("inception", outputs, path).double()
        double.feature_extractor_internal_dtype = (
            torch.float64
        )  # the argument of this name gives float32 in 0.4.0, whatever it says
        single = FeatureExtractorInceptionV3("inception", outputs, path)
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state | counters
    pytorch_fid_network = pytorch_fid.inception.InceptionV3([3]).eval()

    blocks = {}
    for name, module in double.named_children():
        module.register_forward_hook(
            lambda _, __, x, name=name: blocks.__setitem__(name, summary(x))
        )
    spatial = {}
    double.Mixed_6d.branch1x1.register_forward_hook(
        lambda _, __, x: spatial.__setitem__("x", x.permute(0, 2, 3, 1)[..., :7])
    )

    golden = {
        "source": "torch-fidelity 0.4.0, pytorch-fid 0.3.0, clean-fid 0.1.35, run on weights, images and features of a formula",
        "made": "python scripts/golden_inception.py tests/golden/inception.json",
        "versions": {
            package.__name__: package.__version__
            for package in (torch, torchvision, torch_fidelity)
        },
        "names": shapes,
    }
    with torch.no_grad():
        pool, logits = double(images(BLOCK_IMAGES))
        golden["blocks"] = {name: values for name, values in blocks.items() if name != "fc"}
        golden["outputs"] = {
            "features": summary(pool),
            "logits": summary(logits),
            "spatial": summary(spatial["x"]),
        }
        size = (299, 299)
        golden["resizes"], golden["extracted"] = {}, {}
        for case, shape in SMALL.items():
            x = images(shape)
            bicubic = cleanfid.resize.build_resizer("clean")
            golden["resizes"][case] = {
                "tf1_bilinear": summary(
                    interpolate_bilinear_2d_like_tensorflow1x(x.float(), size, align_corners=False)
                ),
                "torch_bilinear": summary(
                    255
                    * torch.nn.functional.interpolate(
                        x / 255, size, mode="bilinear", align_corners=False
                    )
                ),
                "pil_bicubic": summary(
                    torch.stack(
                        [
                            torch.from_numpy(bicubic(i.permute(1, 2, 0).numpy())).permute(2, 0, 1)
                            for i in x
                        ]
                    )
                ),
            }
            golden["extracted"][case] = {
                "torch_fidelity": {
                    "features": summary(single(x)[0]),
                    "logits": summary(single(x)[1]),
                },
                "pytorch_fid": {"features": summary(pytorch_fid_network(x / 255)[0])},
            }
    golden["frechet"] = {}
    for case in FEATURES:
        a, b = features_of(case)
        mean_and_cov = [
            (np.mean(x.numpy(), axis=0), np.cov(x.numpy(), rowvar=False)) for x in (a, b)
        ]
        golden["frechet"][case] = {
            "torch-fidelity": fid_statistics_to_metric(
                fid_features_to_statistics(a), fid_features_to_statistics(b), False
            )["frechet_inception_distance"],
            "pytorch-fid": float(
                pytorch_fid.fid_score.calculate_frechet_distance(*mean_and_cov[0], *mean_and_cov[1])
            ),
            "clean-fid": float(cleanfid.fid.fid_from_feats(a.numpy(), b.numpy())),
        }
    out.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
