"""Digests of files are remembered as long as the file system says that nothing has changed."""

import os

import pytest

from difftrain.core.file_digests import RememberedDigests, file_stamp


@pytest.fixture
def old_files(monkeypatch):
    monkeypatch.setattr("difftrain.core.file_digests.YOUNG", -1e9)


def stamp(file) -> str | None:
    return file_stamp(file, file.stat())


def times_of(file) -> tuple[int, int]:
    return file.stat().st_atime_ns, file.stat().st_mtime_ns


def test_a_file_that_was_written_just_now_has_no_stamp(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"content")
    assert stamp(file) is None

    os.utime(file, (0, 0))  # the time of change is that of this call
    assert stamp(file) is None


@pytest.mark.usefixtures("old_files")
def test_a_stamp_changes_with_the_file_whatever_its_size_and_time(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"first!")
    b.write_bytes(b"second")
    os.utime(b, ns=times_of(a))
    before = {file: stamp(file) for file in (a, b)}
    assert stamp(a) == before[a]

    # New content of the same size with the old time
    times = times_of(a)
    a.write_bytes(b"third!")
    os.utime(a, ns=times)
    assert stamp(a) != before[a]
    # Two files in each other's place
    before = {file: stamp(file) for file in (a, b)}
    a.rename(tmp_path / "c")
    b.rename(a)
    (tmp_path / "c").rename(b)
    assert times_of(a) == times_of(b)
    assert stamp(a) != before[a]
    assert stamp(b) != before[b]


def test_what_was_found_once_is_not_computed_again(tmp_path):
    first = RememberedDigests(tmp_path)
    assert first("stamp", lambda: b"abc") == b"abc"
    assert first(None, lambda: b"new") == b"new"
    first.save()
    first.save()
    other = RememberedDigests(tmp_path)
    other("another stamp", lambda: b"def")
    other.save()

    again = RememberedDigests(tmp_path)
    assert again("stamp", lambda: b"") == b"abc"
    assert again("another stamp", lambda: b"") == b"def"
    assert again(None, lambda: b"new") == b"new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no JSON",
        "[]",
        '{"format": 0, "digests": {"a": "00"}}',
        '{"format": 1, "digests": ["a"]}',
        '{"format": 1, "digests": {"a": "zz"}}',
        '{"format": 1, "digests": {"a": 5}}',
    ],
)
def test_notes_that_cannot_be_read_are_passed_over(tmp_path, content):
    (tmp_path / "notes.json").write_text(content)

    assert RememberedDigests(tmp_path).known == {}
