"""Files and folders that appear whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import save_file

from difftrain.core.errors import InputError
from difftrain.core.files import (
    writable_folder,
    write_beside,
    write_folder_beside,
    write_json,
    write_text,
)


def interrupted(file):
    with write_beside(file) as beside:
        beside.write_text("half")
        raise InterruptedError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_it_is_whole_and_not_before(tmp_path):
    file = tmp_path / "a" / "file.txt"
    with write_beside(file) as beside:
        beside.write_text("new")
        assert not file.exists()

    assert names(file.parent) == ["file.txt"]
    with pytest.raises(InterruptedError):
        interrupted(file)
    assert file.read_text() == "new"
    assert names(file.parent) == ["file.txt"]


def test_a_written_file_is_as_readable_as_other_files(tmp_path):
    (tmp_path / "plain").touch()
    with write_beside(tmp_path / "tensors.safetensors") as beside:
        save_file({"x": torch.zeros(1)}, beside)

    assert (tmp_path / "tensors.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_text_is_written_in_utf_8_and_json_reads_back(tmp_path):
    write_text(tmp_path / "a.txt", "σ ≥ 0\n")
    write_json(tmp_path / "b.json", {"fid": 1.5, "failed": None})

    assert (tmp_path / "a.txt").read_bytes() == "σ ≥ 0\n".encode()
    assert json.loads((tmp_path / "b.json").read_text()) == {"fid": 1.5, "failed": None}


def filled(folder, error=None):
    with write_folder_beside(folder) as partial:
        (partial / "new").touch()
        if error is not None:
            raise error


def test_a_folder_replaces_the_one_in_its_place_when_it_is_whole(tmp_path):
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "old").touch()

    with pytest.raises(InterruptedError):
        filled(folder, InterruptedError())
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["pipeline"]

    filled(folder)
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["pipeline"]


def test_what_an_earlier_process_left_of_a_folder_does_not_come_in(tmp_path):
    left = tmp_path / ".pipeline.partial"
    left.mkdir()
    (left / "half").touch()

    filled(tmp_path / "pipeline")

    assert names(tmp_path / "pipeline") == ["new"]


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b", "--out")

    assert folder == tmp_path / "a" / "b"
    assert names(folder) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_the_name_of_the_option(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(
        InputError, match=r"^--out: the folder '.*file/below' cannot be written to "
    ):
        writable_folder(tmp_path / "file" / "below", "--out")
