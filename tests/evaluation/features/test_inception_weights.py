"""The weights' file: where it is looked for, which hash is accepted, and what an error says."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from difftrain.core.errors import InputError
from difftrain.evaluation.features.inception import Inception
from difftrain.evaluation.features.inception_network import Convolution
from difftrain.evaluation.features.inception_weights import (
    PUBLISHED,
    STYLEGAN_FILE,
    TORCH_FILES,
    read_weights,
)

STYLEGAN = {"Conv2d_1a_3x3": "layers.conv"}


class OneLayer(nn.Module):
    """A small network: the first convolution and a last layer, under the names of the large one."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 2, 3)
        self.fc = nn.Linear(2, 4)


def state_of(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.rand_like(value.float()) for name, value in OneLayer().state_dict().items()}


def saved(path: Path, state) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path=None, sha256=None, layout="torch", network=None):
    return read_weights(network or OneLayer(), STYLEGAN, path and str(path), sha256, layout)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


def test_a_file_with_a_given_hash_fills_the_network_and_is_recorded(tmp_path):
    network, state = OneLayer(), state_of()
    whole = saved(tmp_path / "w.pth", state)

    assert read(tmp_path / "w.pth", whole[:8].upper(), network=network) == {
        "sha256": whole,
        "layout": "torch",
        "published": False,
    }
    for name, value in state.items():
        assert name.endswith("num_batches_tracked") or torch.equal(
            network.state_dict()[name], value
        )


def test_a_file_of_another_hash_is_refused_and_the_error_says_all(tmp_path):
    whole = saved(tmp_path / "w.pth", state_of())

    with pytest.raises(InputError) as error:
        read(tmp_path / "w.pth")
    for part in (
        str(tmp_path / "w.pth"),
        whole,
        PUBLISHED,
        "curl -L",
        TORCH_FILES[1],
        "path: FILE",
        f"sha256: {whole}",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("sha256", ["0" * 64, "", "6726825d"])
def test_a_hash_that_the_file_has_not_is_refused(tmp_path, sha256):
    whole = saved(tmp_path / "w.pth", state_of())

    with pytest.raises(
        InputError, match=f"has sha256 {whole}, but the recipe says sha256: '{sha256}'"
    ):
        read(tmp_path / "w.pth", sha256)


def test_too_few_digits_of_the_right_hash_are_refused(tmp_path):
    whole = saved(tmp_path / "w.pth", state_of())

    with pytest.raises(InputError, match="at least 8 digits"):
        read(tmp_path / "w.pth", whole[:7])


def test_the_published_hash_needs_no_word_in_the_recipe(tmp_path, monkeypatch):
    whole = saved(tmp_path / "w.pth", state_of())
    monkeypatch.setattr("difftrain.evaluation.features.inception_weights.PUBLISHED", whole[:8])

    assert read(tmp_path / "w.pth") == {"sha256": whole, "layout": "torch", "published": True}


@pytest.mark.parametrize(
    ("layout", "first"), [("torch", TORCH_FILES[0]), ("stylegan", STYLEGAN_FILE)]
)
def test_the_cache_of_torch_hub_is_searched_for_the_protocols_own_file_first(
    checkpoints, monkeypatch, layout, first
):
    digests = {
        name: saved(checkpoints / name, state_of(i))
        for i, name in enumerate((*TORCH_FILES, STYLEGAN_FILE))
    }

    assert read(sha256=digests[first], layout=layout)["sha256"] == digests[first]
    (checkpoints / first).unlink()
    other = TORCH_FILES[1] if layout == "torch" else TORCH_FILES[0]
    assert read(sha256=digests[other], layout=layout)["sha256"] == digests[other]


def test_without_a_file_the_error_says_where_it_was_looked_for_and_how_to_get_it(checkpoints):
    with pytest.raises(InputError) as error:
        Inception()
    for part in (str(checkpoints), *TORCH_FILES, STYLEGAN_FILE, "curl -L", PUBLISHED, "path: FILE"):
        assert part in str(error.value)


def test_a_path_without_a_file_is_named(tmp_path):
    with pytest.raises(InputError, match=f"no file {re.escape(str(tmp_path / 'none.pth'))}.*curl"):
        read(tmp_path / "none.pth")


def test_a_damaged_file_is_named(tmp_path):
    whole = saved(tmp_path / "w.pth", state_of())
    content = (tmp_path / "w.pth").read_bytes()
    for damaged in (b"", b"not weights", content[: len(content) // 2], content[:-10]):
        (tmp_path / "w.pth").write_bytes(damaged)
        with pytest.raises(
            InputError, match=rf"{re.escape(str(tmp_path / 'w.pth'))} cannot be read as weights"
        ):
            read(tmp_path / "w.pth", hashlib.sha256(damaged).hexdigest())
    assert whole


class Code:
    """What an unpickler would run."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = saved(tmp_path / "w.pth", {"x": Code()})

    with pytest.raises(InputError, match="cannot be read as weights"):
        read(tmp_path / "w.pth", whole)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], {"state": {"x": torch.zeros(1)}}, torch.zeros(3)]
)
def test_something_else_than_a_state_dict_is_named(tmp_path, content):
    whole = saved(tmp_path / "w.pth", content)

    with pytest.raises(
        InputError, match=r"holds a (list|dict|Tensor), not a state dict of tensors"
    ):
        read(tmp_path / "w.pth", whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("fc.weight"),
        lambda state: state.update({"AuxLogits.fc.weight": torch.zeros(1)}),
        lambda state: state.update({"fc.weight": torch.zeros(1000, 2)}),
        lambda state: state.pop("Conv2d_1a_3x3.bn.running_var"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change):
    state = state_of()
    change(state)
    whole = saved(tmp_path / "w.pth", state)

    with pytest.raises(
        InputError,
        match=r"not hold the Inception.*: 1 of its tensors do not fit \(\w+.*torchvision's own",
    ):
        read(tmp_path / "w.pth", whole)


def test_files_without_the_counters_of_training_fit(tmp_path):
    state = {
        name: value
        for name, value in state_of().items()
        if not name.endswith("num_batches_tracked")
    }

    assert read(tmp_path / "w.pth", saved(tmp_path / "w.pth", state))["layout"] == "torch"


def test_an_incomplete_stylegan_file_is_named(tmp_path):
    state = {"layers.conv.weight": torch.zeros(2, 3, 3, 3), "output.weight": torch.zeros(4, 2)}

    with pytest.raises(
        InputError, match=r"does not hold the Inception.*Conv2d_1a_3x3.bn.bias missing"
    ):
        read(tmp_path / "w.pth", saved(tmp_path / "w.pth", state))
