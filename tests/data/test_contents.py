"""The digest of a set: what its files hold, its labels and captions, in their order."""

import json
import os
import shutil

import pytest
import torch
from helpers.commands import pictures
from helpers.several import in_group, on_processes

from difftrain.core.errors import InputError
from difftrain.data.contents import content_digest
from difftrain.data.datasets.digits import Digits
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.datasets.mixed import Mixed
from difftrain.data.items import MapDataset, TensorItem

NUM = 7


class Points(MapDataset):
    """Rows of a tensor."""

    item_shape = (2,)

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> TensorItem:
        return TensorItem(self.rows[i])


@pytest.fixture
def folder(tmp_path):
    """Pictures with labels and captions."""
    pictures(tmp_path / "set", num=NUM)
    write_lines(tmp_path / "set", lines())
    return tmp_path / "set"


def lines() -> list[dict]:
    return [{"file_name": f"{i:03d}.png", "label": i % 2, "caption": f"{i}"} for i in range(NUM)]


def write_lines(folder, records) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metadata.jsonl").write_text(text)


def opened(folder) -> ImageFolder:
    return ImageFolder(str(folder), labels="metadata", captions="metadata")


def found(dataset, memory, chosen=None) -> str:
    return content_digest(dataset, chosen or range(len(dataset)), memory)


def exchanged(folder):
    one, other = folder / "000.png", folder / "001.png"
    first, second = one.read_bytes(), other.read_bytes()
    for file, content in ((one, second), (other, first)):
        stat = file.stat()
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def changed_bytes(folder):
    content = bytearray((folder / "003.png").read_bytes())
    content[-1] ^= 1
    stat = (folder / "003.png").stat()
    (folder / "003.png").write_bytes(content)
    os.utime(folder / "003.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def changed_label(folder):
    write_lines(folder, [{**record, "label": 1} for record in lines()])


def changed_caption(folder):
    write_lines(folder, [{**record, "caption": "the same"} for record in lines()])


def one_fewer(folder):
    write_lines(folder, lines()[:-1])


CHANGES = [exchanged, changed_bytes, changed_label, changed_caption, one_fewer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_although_size_and_time_stay(folder, tmp_path, change, monkeypatch):
    monkeypatch.setattr("difftrain.core.file_digests.YOUNG", -1e9)
    before = found(opened(folder), tmp_path / "memory")
    assert found(opened(folder), tmp_path / "memory") == before

    change(folder)
    after = found(opened(folder), tmp_path / "memory")
    assert after != before
    assert after == found(opened(folder), tmp_path / "another memory")


def test_names_places_and_times_do_not_count(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    for i in range(NUM):
        file = tmp_path / "copy" / f"{i:03d}.png"
        os.utime(file, (i, i))
        file.rename(file.with_name(f"picture-{i}.png"))
    renamed = [{**record, "file_name": f"picture-{i}.png"} for i, record in enumerate(lines())]
    write_lines(tmp_path / "copy", renamed)

    assert found(opened(tmp_path / "copy"), tmp_path / "m") == found(opened(folder), tmp_path / "m")


def test_the_order_and_the_choice_count(folder, tmp_path):
    dataset = opened(folder)
    orders = (range(NUM), range(NUM - 1), reversed(range(NUM)), [0] * NUM)

    assert len({found(dataset, tmp_path, list(order)) for order in orders}) == len(orders)


def test_sets_without_files_have_a_digest_too(tmp_path):
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    other = points.clone()
    other[17, 1] += 1e-6
    sets = [Digits("held_out"), Digits("train"), Mixed([Digits("train")]), Points(points)]
    sets += [Points(other), Mixed([Digits("train")], repeats=[2])]
    digests = [found(dataset, tmp_path) for dataset in sets]

    assert digests[1] == digests[2]
    assert len(set(digests)) == 5
    assert digests == [found(dataset, tmp_path) for dataset in sets]


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    dataset = opened(folder)
    (folder / "002.png").unlink()

    with pytest.raises(InputError, match=r"002\.png cannot be read: .* Repair or remove it"):
        found(dataset, tmp_path)


def shared_digest(rank, folder, memory, file):
    with in_group(rank, 2, file.parent):
        (file.parent / f"{file.name}-{rank}").write_text(found(opened(folder), memory))


def test_two_processes_find_what_one_does(folder, tmp_path):
    on_processes(shared_digest, 2, folder, tmp_path / "memory", tmp_path / "digest")

    expected = found(opened(folder), tmp_path / "memory")
    assert [(tmp_path / f"digest-{rank}").read_text() for rank in (0, 1)] == [expected] * 2
