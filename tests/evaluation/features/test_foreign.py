"""TorchScript files and imported callables: the network's own rows, and messages for others."""

import json
import re

import pytest
import torch
from helpers.support import assert_close
from torch import nn

from difftrain.core.errors import InputError
from difftrain.evaluation.features.foreign import Imported, TorchScript
from difftrain.evaluation.slots import FEATURES

# The tests write TorchScript files, whose making torch calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def images(num: int = 5, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (num, channels, size, size),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )


class Means(nn.Module):
    """[N, 6]: mean and largest value of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.float().mean(dim=(2, 3)), x.float().amax(dim=(2, 3))], dim=1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "means.pt"
    torch.jit.trace(Means(), torch.zeros(2, 3, 8, 8)).save(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("given", "low", "high"), [("0..255", 0, 255), ("0..1", 0, 1), ("-1..1", -1, 1)]
)
def test_a_torchscript_file_sees_the_stated_range(file, given, low, high):
    x = images()
    x[0], x[1] = 0, 255
    made = TorchScript(file, given, batch_size=2).extract(x)["features"]

    assert_close(made, Means()(low + x.double() / 255 * (high - low)), absolute=1e-4)
    assert_close(made[0], torch.full((6,), float(low)))
    assert_close(made[1], torch.full((6,), float(high)), absolute=1e-6)


@pytest.mark.filterwarnings("error")
def test_reading_a_torchscript_file_warns_of_nothing(file):
    assert TorchScript(file, "0..1").extract(images())["features"].shape == (5, 6)


def test_grey_images_are_repeated(file):
    made = TorchScript(file, "0..255").extract(images(channels=1))["features"]

    assert torch.equal(made[:, 0], made[:, 2])


def test_the_width_is_asked_of_the_network_with_the_shape_of_the_images(tmp_path):
    path = tmp_path / "flat.pt"
    torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))).save(str(path))

    assert TorchScript(str(path), "0..1", shape=(1, 8, 8)).widths == {"features": 5}
    assert TorchScript(str(path), "0..1", shape=(3, 8, 8)).extract(images(0))["features"].shape == (
        0,
        5,
    )


def test_the_protocol_tells_files_and_ranges_apart(file, tmp_path):
    other = tmp_path / "other.pt"
    torch.jit.trace(nn.Flatten(), torch.zeros(2, 3, 8, 8)).save(str(other))
    protocols = [
        TorchScript(file, "0..1").protocol(),
        TorchScript(file, "-1..1").protocol(),
        TorchScript(str(other), "0..1").protocol(),
    ]

    assert len({json.dumps(p) for p in protocols}) == 3
    assert file not in json.dumps(protocols)
    assert TorchScript(file, "0..1").protocol() == protocols[0]


def test_a_recipe_must_state_the_range(file):
    with pytest.raises(InputError, match=r"features.range: required"):
        FEATURES.parse({"type": "torchscript", "path": file}, "features")


def test_missing_and_other_files_are_named(tmp_path):
    with pytest.raises(InputError, match=f"no file {re.escape(str(tmp_path / 'none.pt'))}"):
        TorchScript(str(tmp_path / "none.pt"), "0..1")
    torch.save({"x": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(
        InputError, match=r"state.pt is not a TorchScript file. Make one with torch.jit.trace"
    ):
        TorchScript(str(tmp_path / "state.pt"), "0..1")


OWN = """
import torch

class Mean:
    def protocol(self):
        return {"mean": "of channels"}
    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return images.double().mean(dim=(2, 3))

def mean(images):
    return images.float().mean(dim=(2, 3))

def whole(images):
    return images.sum(dim=(2, 3))

def a_list(images):
    return [0.0] * len(images)

def spatial(images):
    return images.float()

def too_few(images):
    return mean(images)[1:]

def not_finite(images):
    return mean(images) / 0

def changing(images):
    return images.float().mean(dim=(2, 3))[:, : len(images)]

def fails(images):
    raise KeyError("weights")

number = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_features_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def own(name: str, **arguments) -> Imported:
    return Imported(f"own_features_of_a_test:{name}", **arguments)


def test_a_class_and_a_function_of_ones_own_give_their_rows():
    expected = images().double().mean(dim=(2, 3))

    for extractor in (own("Mean", batch_size=2), own("mean", version="1")):
        made = extractor.extract(images())["features"]
        assert made.dtype == torch.float32
        assert_close(made, expected, absolute=1e-4)
        assert extractor.widths == {"features": 3}


def test_the_protocol_is_the_codes_own_or_has_the_recipes_version():
    assert own("Mean").protocol()["own"] == {"mean": "of channels"}
    assert own("mean", version="1").protocol() != own("mean", version="2").protocol()
    with pytest.raises(InputError, match=r":mean has no version, .* Write version:"):
        own("mean")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole", r"returned torch.int64 \[5, 3\], expected a floating-point tensor \[5, D\]"),
        ("a_list", r"returned a list, expected a floating-point tensor \[5, D\]"),
        ("spatial", r"returned torch.float32 \[5, 3, 8, 8\], expected"),
        ("too_few", r"returned torch.float32 \[4, 3\], expected"),
        ("not_finite", r"values that are not finite for 5 of 5 images"),
        (
            "fails",
            r"own_features_of_a_test:fails failed on torch.uint8 images \[5, 3, 8, 8\]: 'weights'",
        ),
    ],
)
def test_what_is_no_feature_row_is_named(name, message):
    with pytest.raises(InputError, match=message):
        own(name, version="1").extract(images())


def test_a_width_that_changes_is_named():
    with pytest.raises(
        InputError,
        match=r"returned torch.float32 \[1, 1\], expected a floating-point tensor \[1, 2\]",
    ):
        own("changing", version="1", batch_size=2).extract(images(3))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_features_of_a_test", "path must be module:name"),
        ("own_features_of_a_test:", "path must be module:name"),
        ("no_such_module_here:x", "cannot import 'no_such_module_here'"),
        ("own_features_of_a_test:nothing", "own_features_of_a_test has no 'nothing'"),
        ("own_features_of_a_test:number", "is a int, expected a callable"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(path, message):
    with pytest.raises(InputError, match=message):
        Imported(path, version="1")


def test_other_outputs_and_images_are_refused(file):
    with pytest.raises(InputError, match="'torchscript' have no output 'logits'; known: features"):
        TorchScript(file, "0..1").extract(images(), ["logits"])
    with pytest.raises(InputError, match="'torchscript' take uint8 images"):
        TorchScript(file, "0..1").extract(images().float())
    assert TorchScript(file, "0..1").extract(images(), []) == {}
