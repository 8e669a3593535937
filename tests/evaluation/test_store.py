"""Rows on the disk: written in any order and by anybody, found again by their key, never wrong."""

import json
import os
import resource

import numpy as np
import pytest
import torch
from helpers.rows import filed_rows

from difftrain.core.errors import InputError
from difftrain.evaluation import store as module
from difftrain.evaluation.rows import RowsInMemory
from difftrain.evaluation.store import KEY, Column, RowStore

COLUMNS = {"features": Column(3), "label": Column(1, "int64"), "nearest": Column(2, "float64")}
NUM, SIZE = 11, 4


def opened(folder, **changes) -> RowStore:
    given = {"name": "set", "key": {"a": 1}, "num": NUM, "block_size": SIZE, "columns": COLUMNS}
    store = RowStore(folder, **(given | changes))
    store.create()
    return store


def rows_of(store: RowStore, block: int) -> dict[str, torch.Tensor]:
    indices = torch.tensor(store.indices(block))
    return {
        "features": indices[:, None] + torch.tensor([0.0, 0.25, 0.5]),
        "label": indices[:, None] * 7,
        "nearest": torch.stack([indices.double() / 3, -indices.double()], dim=1),
    }


def filled(folder, **changes) -> RowStore:
    store = opened(folder, **changes)
    for block in range(store.num_blocks):
        store.write(block, rows_of(store, block))
    return store


def missing(store: RowStore) -> list[int]:
    return [block for block in range(store.num_blocks) if not store.has(block)]


def test_rows_written_in_any_order_are_read_by_index(tmp_path):
    store = opened(tmp_path)
    assert [store.indices(block) for block in missing(store)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
    ]
    for block in (2, 0, 1):
        store.write(block, rows_of(store, block))

    found = {name: rows.whole() for name, rows in store.rows().items()}
    indices = torch.arange(NUM)
    assert missing(store) == []
    assert torch.equal(found["label"][:, 0], indices * 7)
    assert torch.equal(found["features"], indices[:, None] + torch.tensor([0.0, 0.25, 0.5]))
    assert torch.equal(found["nearest"][:, 0], indices.double() / 3)


def test_a_store_opened_again_misses_only_what_was_not_written(tmp_path):
    store = opened(tmp_path)
    store.write(1, rows_of(store, 1))

    assert missing(opened(tmp_path)) == [0, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"key": {"a": 2}},
        {"num": 12},
        {"block_size": 3},
        {"columns": {**COLUMNS, "features": Column(4)}},
        {"total": 12},
    ],
)
def test_another_key_has_another_folder_and_both_stay(tmp_path, changes):
    filled(tmp_path)

    other = opened(tmp_path, **changes)
    assert len(missing(other)) == other.num_blocks
    assert missing(opened(tmp_path)) == []


def test_the_first_blocks_of_a_set_serve_a_larger_part_of_it(tmp_path):
    small = filled(tmp_path, num=8, total=30)

    large = opened(tmp_path, num=20, total=30)
    assert large.folder == small.folder
    assert missing(large) == [2, 3, 4]


def zeroed(file):
    content = bytearray(file.read_bytes())
    content[-12:] = bytes(12)
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file):
    file.write_bytes(b"")


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [zeroed, cut, emptied, flipped, lambda file: file.unlink()])
def test_what_is_not_what_was_written_is_missing(tmp_path, damage):
    store = filled(tmp_path)
    damage(store.folder / "000001.safetensors")

    assert missing(opened(tmp_path)) == [1]


def test_a_block_in_the_place_of_another_one_is_told_by_its_shape(tmp_path):
    store = filled(tmp_path)
    (store.folder / "000002.safetensors").rename(store.folder / "000001.safetensors")

    assert store.problem(1) == "it holds other rows than its key says"
    assert missing(store) == [1, 2]


def test_a_block_of_another_key_or_place_is_told_by_its_digest(tmp_path):
    store, other = filled(tmp_path), filled(tmp_path, key={"a": 2})
    own = [store.folder / f"{block:06d}.safetensors" for block in range(2)]

    (other.folder / own[0].name).write_bytes(own[0].read_bytes())
    own[1].write_bytes(own[0].read_bytes())

    assert "digest differs" in other.problem(0)
    assert "digest differs" in store.problem(1)
    assert store.has(0)


def test_two_who_write_a_block_write_the_same_bytes(tmp_path):
    store, other = filled(tmp_path / "a"), filled(tmp_path / "b")

    for block in range(store.num_blocks):
        name = f"{block:06d}.safetensors"
        assert (store.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_open_rows_are_read_after_somebody_has_removed_them(tmp_path):
    store = filled(tmp_path)
    rows = store.rows()
    opened(tmp_path).remove()

    assert torch.equal(rows["label"].whole()[:, 0], torch.arange(NUM) * 7)
    with pytest.raises(FileNotFoundError):
        store.rows()
    store.write(1, rows_of(store, 1))  # whoever is still at work makes the folder again
    assert missing(store) == [0, 2]


def test_a_set_may_have_more_blocks_than_a_process_may_have_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/dev/fd")) + 20
    store = filled(tmp_path, num=100, block_size=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        rows = store.rows()
        labels = rows["label"].whole()[:, 0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert torch.equal(labels, torch.arange(100) * 7)


def test_a_block_that_does_not_appear_is_looked_for_until_the_time_is_over(tmp_path, monkeypatch):
    store = filled(tmp_path)
    file, hidden = store.folder / "000001.safetensors", tmp_path / "hidden"
    file.rename(hidden)
    looks = []

    def look_again(folder):
        looks.append(folder)
        if len(looks) == 3:
            hidden.rename(file)

    monkeypatch.setattr(module, "look_again", look_again)
    assert store.absent() == []
    assert looks == [store.folder] * 3

    file.unlink()
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert store.absent() == [1]


def test_a_folder_that_another_process_does_not_see_is_named(tmp_path, monkeypatch):
    store = opened(tmp_path)
    (store.folder / KEY).unlink()
    monkeypatch.setattr(module, "PATIENCE", 0.0)

    with pytest.raises(InputError, match="this process does not see it"):
        store.check_visible()


def test_a_folder_says_what_its_rows_depend_on(tmp_path):
    store = opened(tmp_path)
    described = json.loads((store.folder / KEY).read_text())

    assert described["key"] == {"a": 1}
    assert described["columns"]["label"] == [1, "int64"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="feature rows cannot be written there"):
        opened(tmp_path / "file")


@pytest.mark.parametrize("size", [1, 4, 100])
def test_rows_in_blocks_and_in_memory_are_read_alike(tmp_path, size):
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 3)).astype("float32"))
    filed, held = filed_rows(values, tmp_path / "r", 4), RowsInMemory(values)
    chosen = torch.tensor([7, 0, 7, 3])

    assert len(filed) == len(held) == 10
    found, expected = list(filed.blocks(size)), list(held.blocks(size))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(filed.whole(), held.whole())
    assert torch.equal(filed.take(chosen), held.take(chosen))
    assert torch.equal(filed.take(chosen[:0]), held.take(chosen[:0]))
