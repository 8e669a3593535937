"""Files that appear whole or not at all, and digests of weights."""

import pytest
import torch
from safetensors.torch import save_file

from difftrain import storage
from difftrain.storage import checksum, weights_digest, write_beside


def interrupted(file):
    with write_beside(file) as beside:
        beside.write_text("half")
        raise InterruptedError


def test_a_file_takes_its_place_when_it_is_whole_and_not_before(tmp_path):
    file = tmp_path / "a" / "file.txt"
    with write_beside(file) as beside:
        beside.write_text("new")
        assert not file.exists()

    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]
    with pytest.raises(InterruptedError):
        interrupted(file)
    assert file.read_text() == "new"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_checksum_is_the_sum_of_bits_by_their_places(dtype, monkeypatch):
    values = (10 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    bits = values.reshape(-1).view(storage.INTEGERS[values.element_size()]).tolist()

    expected = sum(bit * place for place, bit in enumerate(bits, start=1)) % 2**64

    assert checksum(values) == expected
    monkeypatch.setattr(storage, "AT_ONCE", 4)
    assert checksum(values) == expected


def test_what_is_written_is_as_readable_as_other_files(tmp_path):
    (tmp_path / "plain").touch()
    with write_beside(tmp_path / "tensors.safetensors") as beside:
        save_file({"x": torch.zeros(1)}, beside)

    assert (tmp_path / "tensors.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))


def swapped(model):
    model[0].weight.data = model[0].weight.data.flip(0)
    return model


@pytest.mark.parametrize("changed", [
    lambda model: model[0].weight.data[0, 0].mul_(1 + 2**-20) and model, swapped, lambda model: model.double(),
    lambda model: model[1].running_mean.add_(1) is not None and model, lambda model: torch.nn.Sequential(*model, torch.nn.Linear(1, 1)),
])  # fmt: skip
def test_every_change_of_weights_changes_their_digest(changed):
    assert weights_digest(network().state_dict()) == weights_digest(network().state_dict())
    assert weights_digest(changed(network()).state_dict()) != weights_digest(network().state_dict())
