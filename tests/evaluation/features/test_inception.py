"""The Inception against torch-fidelity's and pytorch-fid's, on weights of a formula."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch
from helpers.places import ROOT
from helpers.support import assert_close, float64, golden
from torch import nn

from difftrain.core.errors import InputError
from difftrain.evaluation.features import inception, inception_weights
from difftrain.evaluation.features.inception import Inception
from difftrain.evaluation.features.inception_network import (
    WIDTHS,
    InceptionNetwork,
    stylegan_names,
)
from difftrain.evaluation.features.inception_weights import digest_of_file
from difftrain.evaluation.protocols import PRESETS
from difftrain.evaluation.slots import FEATURES

FORMULA = runpy.run_path(str(ROOT / "scripts" / "golden_inception.py"))
GOLDEN = golden("inception")
DOUBLE = 1e-9  # of values of about 1, after 94 convolutions in float64, summed in other orders
SINGLE = 2e-4  # the same in float32, where a resize differs by 1e-5 grey levels


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return FORMULA["weights"](GOLDEN["names"])


@pytest.fixture(scope="module")
def network(state) -> InceptionNetwork:
    network = InceptionNetwork()
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def digest(file) -> str:
    return digest_of_file(file)


@pytest.fixture(scope="module")
def extractor(file, digest):
    return lambda protocol="torch_fidelity", **arguments: Inception(
        protocol, str(file), digest, **arguments
    )


def assert_summary(made: torch.Tensor, stored: dict[str, list[float]], tolerance: float) -> None:
    for part, values in FORMULA["summary"](made).items():
        assert_close(float64(values), float64(stored[part]), absolute=tolerance)


def test_names_and_shapes_are_those_of_the_published_file():
    ours = {
        name: list(value.shape)
        for name, value in InceptionNetwork().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }

    assert ours == GOLDEN["names"]


def test_every_block_and_output_equals_torch_fidelitys(network):
    double = InceptionNetwork().eval().double()
    double.load_state_dict(network.state_dict())
    blocks = {}
    for name, block in double.named_children():
        block.register_forward_hook(
            lambda _, __, x, name=name: blocks.__setitem__(name, FORMULA["summary"](x))
        )
    images = FORMULA["images"](FORMULA["BLOCK_IMAGES"]).double()
    with torch.no_grad():
        outputs = double((images - 128) / 128, WIDTHS)

    assert blocks.keys() == GOLDEN["blocks"].keys() - {"MaxPool_1", "MaxPool_2", "AvgPool"}
    for name, stored in blocks.items():
        for part, values in stored.items():
            assert_close(float64(values), float64(GOLDEN["blocks"][name][part]), absolute=DOUBLE)
    for name, values in outputs.items():
        # torch-fidelity hands its outputs out as float32; their logits sum 2048 products
        assert_summary(values, GOLDEN["outputs"][name], DOUBLE if name == "spatial" else 1e-6)


@pytest.mark.parametrize(
    ("case", "package"),
    [(case, package) for case in GOLDEN["extracted"] for package in GOLDEN["extracted"][case]],
)
def test_the_way_from_images_to_features_equals_the_packages(extractor, case, package):
    stored = GOLDEN["extracted"][case][package]
    made = extractor(package).extract(FORMULA["images"](FORMULA["SMALL"][case]), stored)

    for output, values in made.items():
        assert_summary(values, stored[output], SINGLE)


@pytest.mark.parametrize("protocol", PRESETS)
def test_protocols_prepare_images_as_they_say(extractor, protocol):
    chosen = PRESETS[protocol]
    images = FORMULA["images"]((1, 3, 24, 20))
    levels = inception.resize(images, chosen.resize)
    levels = levels.clamp(0, 255) if chosen.clip else levels
    zero, one = (
        (128, 256) if chosen.scaling == "(x - 128) / 128" else (127.5, 255)
    )  # the grey levels that become 0 and 1

    assert_close(
        extractor(protocol).prepared(images), (levels - zero) / (one - zero), absolute=1e-6
    )


def test_grey_images_are_their_own_three_channels(extractor):
    grey = FORMULA["images"]((2, 1, 32, 32))
    features = extractor()

    assert_close(
        features.extract(grey)["features"],
        features.extract(grey.repeat(1, 3, 1, 1))["features"],
        absolute=SINGLE,
    )


def test_rows_depend_on_their_image_alone_and_not_on_the_batch_size(extractor):
    images = FORMULA["images"]((5, 3, 16, 16))
    together = extractor(batch_size=8).extract(images, WIDTHS)
    apart = extractor(batch_size=2).extract(images.flip(0), WIDTHS)

    for output, width in WIDTHS.items():
        assert together[output].shape == (5, width)
        assert together[output].dtype == torch.float32
        assert_close(apart[output].flip(0), together[output], absolute=SINGLE)


def test_no_more_than_a_batch_is_resized_at_once_and_nothing_after_the_last_wanted_output_runs(
    extractor, monkeypatch
):
    sizes, ran = [], []
    original = inception.resize
    monkeypatch.setattr(
        inception,
        "resize",
        lambda images, *rest: sizes.append(len(images)) or original(images, *rest),
    )
    features = extractor(batch_size=2)
    features.network.Mixed_6e.register_forward_hook(lambda *_: ran.append("Mixed_6e"))
    made = features.extract(FORMULA["images"]((3, 3, 16, 16)), ["spatial"])

    assert sizes == [2, 1]
    assert made.keys() == {"spatial"}
    assert ran == []


def test_no_images_give_no_rows(extractor):
    assert extractor().extract(torch.empty(0, 3, 8, 8, dtype=torch.uint8), ["logits"])[
        "logits"
    ].shape == (0, 1008)


def test_logits_are_linear_in_the_features_without_bias(extractor, state):
    made = extractor().extract(FORMULA["images"]((1, 3, 16, 16)), ["features", "logits"])

    assert_close(
        made["logits"].double(),
        made["features"].double() @ state["fc.weight"].double().T,
        absolute=SINGLE,
    )


def test_the_protocol_is_json_and_tells_protocols_and_weights_apart(extractor, digest):
    made = [extractor(protocol).protocol() for protocol in PRESETS]

    assert json.loads(json.dumps(made)) == made
    assert made[0]["weights"] == {"sha256": digest, "layout": "torch", "published": False}
    # edm prepares as torch_fidelity does; what differs is what else the packages compute
    assert len({json.dumps(protocol) for protocol in made}) == len(PRESETS)
    assert extractor("adm").preset == {
        "is_split_size": 5000,
        "is_shuffle": False,
        "pr_neighbours": 3,
    }


def test_a_recipe_builds_it(file, digest):
    part = FEATURES.parse(
        {"type": "inception", "protocol": "clean", "path": str(file), "sha256": digest[:8]},
        "features",
    )
    built = part.build(device=torch.device("cpu"), shape=(3, 8, 8))

    assert built.chosen is PRESETS["clean"]
    assert built.gives == WIDTHS.keys() - {"features"}


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)]
)
def test_other_images_are_refused(extractor, images):
    with pytest.raises(InputError, match=r"'inception' take uint8 images \[N, 1 or 3, H, W\]"):
        extractor().extract(images)


def test_an_unknown_output_is_refused(extractor):
    with pytest.raises(
        InputError, match="'inception' have no output 'pool'; known: features, logits, spatial"
    ):
        extractor().extract(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["pool"])


class Parameters(nn.Module):
    """A module that has a state dict with these dotted names, and can be scripted."""

    def __init__(self, named: dict[str, torch.Tensor]):
        super().__init__()
        heads = {name.partition(".")[0] for name in named}
        for head in heads:
            below = {
                name.partition(".")[2]: value
                for name, value in named.items()
                if name.partition(".")[0] == head
            }
            if "" in below:
                self.register_buffer(head, below[""])
            else:
                self.add_module(head, Parameters(below))

    def forward(self) -> int:
        return 0


# TensorFlow's scopes as openai/consistency_models, evaluations/inception_v3.py has them for
# StyleGAN's file: one block of each kind.
SCOPES = {
    "layers": ["conv", "conv_1", "conv_2", "conv_3", "conv_4"],
    "layers.mixed": [
        "conv",
        "tower.conv",
        "tower.conv_1",
        "tower_1.conv",
        "tower_1.conv_1",
        "tower_1.conv_2",
        "tower_2.conv",
    ],
    "layers.mixed_3": ["conv", "tower.conv", "tower.conv_1", "tower.conv_2"],
    "layers.mixed_4": [
        "conv",
        "tower.conv",
        "tower.conv_1",
        "tower.conv_2",
        "tower_1.conv",
        "tower_1.conv_1",
        "tower_1.conv_2",
        "tower_1.conv_3",
        "tower_1.conv_4",
        "tower_2.conv",
    ],
    "layers.mixed_8": [
        "tower.conv",
        "tower.conv_1",
        "tower_1.conv",
        "tower_1.conv_1",
        "tower_1.conv_2",
        "tower_1.conv_3",
    ],
    "layers.mixed_9": [
        "conv",
        "tower_conv",
        "tower_mixed_conv",
        "tower_mixed_conv_1",
        "tower_1_conv",
        "tower_1_conv_1",
        "tower_1_mixed_conv",
        "tower_1_mixed_conv_1",
        "tower_2_conv",
    ],
}
SAME_KIND = {
    "layers.mixed": [1, 2],
    "layers.mixed_3": [],
    "layers.mixed_4": [5, 6, 7],
    "layers.mixed_8": [],
    "layers.mixed_9": [10],
}


def scoped_names() -> list[str]:
    """StyleGAN's names in the order of the network."""
    names = {0: [f"layers.{conv}" for conv in SCOPES["layers"]]}
    for scope, others in SAME_KIND.items():
        first = int(scope.removeprefix("layers.mixed").strip("_") or 0)
        for number in [first, *others]:
            block = "layers.mixed" + (f"_{number}" if number else "")
            names[number + 1] = [f"{block}.{conv}" for conv in SCOPES[scope]]
    return [name for number in sorted(names) for name in names[number]]


def stylegan_state(state):
    parts = {
        "weight": "conv.weight",
        "beta": "bn.bias",
        "mean": "bn.running_mean",
        "var": "bn.running_var",
    }
    ours = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    made = {
        f"{theirs}.{part}": state[f"{own}.{o}"]
        for own, theirs in zip(ours, scoped_names(), strict=True)
        for part, o in parts.items()
    }
    return made | {"output.weight": state["fc.weight"], "output.bias": state["fc.bias"]}


def test_the_names_of_stylegans_file_are_tensorflows_scopes():
    assert list(stylegan_names().values()) == scoped_names()
    assert len(set(scoped_names())) == 94


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_stylegans_file_gives_the_same_network(state, tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Parameters(stylegan_state(state))).save(str(path))
    made = Inception("edm", str(path))
    expected = state | {
        name: torch.ones_like(value) for name, value in state.items() if name.endswith("bn.weight")
    }

    assert made.protocol()["weights"] == {
        "sha256": digest_of_file(path),
        "layout": "stylegan",
        "published": False,
    }
    for name, value in made.network.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, expected[name]), name


def test_a_preset_is_not_changed_by_use(extractor):
    before = {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()}
    extractor("clean").protocol()["resize"] = "other"

    assert {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()} == before
    assert inception_weights.PUBLISHED == "6726825d"
