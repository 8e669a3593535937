"""Rows on the disk: written in any order, continued after a stop, made again for another key."""

import json

import numpy as np
import pytest
import torch

from difftrain.core.errors import InputError
from difftrain.evaluation.rows import RowsInFile, RowsInMemory
from difftrain.evaluation.store import Column, RowStore

COLUMNS = {"features": Column(3), "label": Column(1, "int64"), "nearest": Column(2, "float64")}
NUM, SIZE = 11, 4


def opened(folder, **changes) -> RowStore:
    return RowStore(
        folder / "rows",
        **({"key": {"a": 1}, "num": NUM, "block_size": SIZE, "columns": COLUMNS} | changes),
    )


def rows_of(store: RowStore, block: int) -> dict[str, torch.Tensor]:
    indices = torch.tensor(store.indices(block))
    return {
        "features": indices[:, None] + torch.tensor([0.0, 0.25, 0.5]),
        "label": indices[:, None] * 7,
        "nearest": torch.stack([indices.double() / 3, -indices.double()], dim=1),
    }


def test_rows_written_in_any_order_are_read_by_index(tmp_path):
    store = opened(tmp_path)
    assert [store.indices(block) for block in store.missing()] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
    ]
    for block in (2, 0, 1):
        store.write(block, rows_of(store, block))

    found = {name: rows.whole() for name, rows in store.rows().items()}
    indices = torch.arange(NUM)
    assert store.missing() == []
    assert torch.equal(found["label"][:, 0], indices * 7)
    assert torch.equal(found["features"], indices[:, None] + torch.tensor([0.0, 0.25, 0.5]))
    assert torch.equal(found["nearest"][:, 0], indices.double() / 3)


def test_a_store_opened_again_misses_only_what_was_not_written(tmp_path):
    store = opened(tmp_path)
    store.write(1, rows_of(store, 1))

    again = opened(tmp_path)
    assert again.missing() == [0, 2]
    assert torch.equal(again.rows()["label"].whole()[4:8, 0], torch.arange(4, 8) * 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": {"a": 2}},
        {"num": 12},
        {"block_size": 3},
        {"columns": {**COLUMNS, "features": Column(4)}},
    ],
)
def test_rows_of_another_key_are_thrown_away(tmp_path, changes):
    store = opened(tmp_path)
    store.write(0, rows_of(store, 0))

    other = opened(tmp_path, **changes)
    assert len(other.missing()) == other.num_blocks


@pytest.mark.parametrize("old", [{"a": 1}, {"format": 0}, [], "no JSON"])
def test_rows_of_another_format_are_computed_again_with_one_message(tmp_path, caplog, old):
    caplog.set_level("INFO")
    store = opened(tmp_path)
    store.write(0, rows_of(store, 0))
    key = tmp_path / "rows" / "key.json"
    assert json.loads(key.read_text())["format"] == 1
    key.write_text(old if isinstance(old, str) else json.dumps(old))

    assert opened(tmp_path).missing() == [0, 1, 2]
    assert opened(tmp_path, key={"a": 2}).missing() == [0, 1, 2]  # another key is no other format
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'rows'}: these feature rows have another format and are computed again"
    ]


def test_a_store_that_was_cut_off_while_it_was_made_starts_anew(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "features.rows").write_bytes(b"half")

    assert opened(tmp_path).missing() == [0, 1, 2]


def test_a_problem_is_seen_by_the_others_and_forgotten_by_the_next_run(tmp_path):
    store, other = opened(tmp_path), opened(tmp_path)
    store.report_problem()

    assert other.has_problem()
    assert not opened(tmp_path).has_problem()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="feature rows cannot be written there"):
        RowStore(tmp_path / "file" / "rows", {}, NUM, SIZE, COLUMNS)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_rows_in_a_file_and_in_memory_are_read_alike(tmp_path, size):
    values = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")
    values.tofile(tmp_path / "r")
    filed, held = RowsInFile(tmp_path / "r", 3), RowsInMemory(torch.from_numpy(values))
    chosen = torch.tensor([7, 0, 7, 3])

    assert len(filed) == len(held) == 10
    assert [len(block) for block in filed.blocks(size)] == [
        len(block) for block in held.blocks(size)
    ]
    assert torch.equal(filed.whole(), held.whole())
    assert torch.equal(filed.take(chosen), held.take(chosen))


def test_a_file_of_half_rows_is_refused(tmp_path):
    (tmp_path / "r").write_bytes(bytes(13))

    with pytest.raises(InputError, match="13 bytes are not whole rows of 3 float32"):
        RowsInFile(tmp_path / "r", 3)
