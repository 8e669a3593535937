"""difftrain store: what it lists, and what it removes when it is asked."""

import os
import time

import pytest
import torch
from helpers.commands import command, refused

from difftrain.evaluation.store import Column, RowStore
from difftrain.evaluation.stored import KEY, contents

DAY = 86400.0


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of three sets, last used 0, 10 and 40 days ago, and a classifier."""
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(tmp_path))
    for days, num in ((0, 4), (10, 40), (40, 400)):
        rows = filled(tmp_path / "features", f"days{days}", num)
        then = time.time() - days * DAY
        os.utime(rows.folder / KEY, (then, then))
    (tmp_path / "classifiers").mkdir()
    (tmp_path / "classifiers" / "digits.safetensors").write_bytes(bytes(100))
    return tmp_path


def filled(base, name, num) -> RowStore:
    key = {"features": {"type": "pixels"}}
    rows = RowStore(base, name, key, num, num, {"features": Column(10)})
    rows.create()
    rows.write(0, {"features": torch.zeros(num, 10)})
    return rows


def left(store) -> list[str]:
    return sorted(stored.what for stored in contents(store))


def test_it_lists_the_longest_unused_first_and_removes_nothing(store):
    lines = command("store").out.splitlines()

    assert len(lines) == 6
    assert "400  days40 of pixels" in lines[1]
    assert "40  days10 of pixels" in lines[2]
    assert lines[-1].endswith(f"in {store}")
    assert len(contents(store)) == 4


def test_an_empty_store_says_so(tmp_path):
    assert "holds nothing yet" in command("store", "--folder", tmp_path).out


def test_what_was_not_used_for_long_goes(store):
    command("store", "prune", "--older", "30d")
    assert left(store) == ["classifier", "days0", "days10"]

    command("store", "prune", "--older", "12h")
    assert left(store) == ["classifier", "days0"]


def test_the_longest_unused_goes_until_the_rest_is_small_enough(store):
    command("store", "prune", "--keep", "10KB")

    assert left(store) == ["classifier", "days0", "days10"]


@pytest.mark.parametrize("text", ["[]", "null", '{"key": "x", "num": "a"}', "cut"])
def test_a_damaged_key_is_listed_and_can_be_removed(store, text):
    for file in store.glob(f"features/*/{KEY}"):
        file.write_text(text)
        os.utime(file, (0, 0))

    assert left(store) == ["classifier", "rows", "rows", "rows"]
    command("store", "prune", "--older", "30d")
    assert left(store) == ["classifier"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing says what may go. Write --older 30d, --keep 20GB, or both"),
        (["--older", "soon"], "--older soon: expected a number with a unit, such as 30d"),
        (["--keep", "20"], "--keep 20: expected a number with a unit, such as 20GB"),
        (["--keep", "-1GB"], "expected a number with a unit"),
        (["--older", "1d", "--folder", "/no/such"], "there is no such folder"),
    ],
)
def test_what_cannot_be_read_removes_nothing(store, options, message):
    assert message in refused("store", "prune", *options)
    assert len(contents(store)) == 4
