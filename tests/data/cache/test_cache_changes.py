"""A cache encodes what changed, what an interruption lost, what a disk damaged, and no more."""

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import PIL.Image
import pytest
import torch
from helpers.cached import FIXED, Encoder, Made, Words, captioned
from helpers.support import assert_close

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.cache import shards
from difftrain.data.captions import Captions
from difftrain.data.transform import Transform, to_unit_range

RANDOM = Transform(8, crop="random", flip=True)


@pytest.fixture(autouse=True)
def old_files(monkeypatch):
    """Files count as old enough for their digests to be remembered."""
    monkeypatch.setattr("difftrain.core.file_digests.YOUNG", -1e9)


# What is encoded again


def test_a_second_run_encodes_nothing(folder, place, messages):
    Made(folder, place)
    messages.clear()

    assert Made(folder, place).encoded == (0, 0)
    assert messages == []


@pytest.mark.parametrize(
    ("change", "expected", "message"),
    [
        (
            {"encoder": lambda: Encoder(seed=1)},
            (10, 0),
            "latents: encoding 10 of 10 images (the cached ones were made with a different VAE)",
        ),
        (
            {"encoder": lambda: Encoder(dtype="bfloat16")},
            (10, 0),
            "(the cached ones were made with a different VAE and precision of the VAE)",
        ),
        ({"encoder": lambda: Encoder(scale=3.0, sample=False)}, (0, 0), ""),
        (
            {"transform": lambda: Transform(6)},
            (10, 0),
            "(the cached ones are of other images or sizes)",
        ),
        (
            {"transform": lambda: Transform(8, resize="lanczos")},
            (10, 0),
            "(the cached ones were made with a different resize)",
        ),
        (
            {"text": lambda: Words(seed=1)},
            (0, 11),
            "text: encoding 11 of 11 prompts (the cached ones were made with a different text "
            "encoder)",
        ),
        (
            {"text": lambda: Words(length=9)},
            (0, 11),
            "(the cached ones were made with a different tokenizer)",
        ),
        (
            {"captions": lambda: Captions(templates=["a {}"])},
            (0, 10),
            "text: encoding 10 of 11 prompts (1 are cached)",
        ),
        ({"captions": lambda: Captions(dropout=0.5)}, (0, 0), ""),
    ],
)
def test_a_change_encodes_what_it_changes_and_says_why(
    folder, place, change, expected, message, messages
):
    Made(folder, place)
    messages.clear()

    made = Made(folder, place, **{name: value() for name, value in change.items()})

    assert made.encoded == expected
    assert message in "\n".join(messages)
    assert Made(folder, place).encoded == (0, 0)  # the first ones are still there


def test_a_changed_image_a_changed_caption_and_a_new_one_are_encoded_alone(folder, place):
    Made(folder, place)
    PIL.Image.new("RGB", (14, 10), "red").save(folder / "004.png")
    (folder / "007.txt").write_text("another")
    PIL.Image.new("RGB", (14, 10), "blue").save(folder / "new.png")
    (folder / "new.txt").write_text("photo, no 3")

    made = Made(folder, place)

    assert made.encoded == (2, 1)
    assert_close(
        made.table.sample(4, Rng(0)).moments,
        Encoder().moments(to_unit_range(FIXED(PIL.Image.open(folder / "004.png")))[None])[0],
        absolute=1e-5,
    )


def test_more_variants_encode_those_that_are_new(folder, place):
    Made(folder, place, transform=RANDOM, variants=2)

    assert Made(folder, place, transform=RANDOM, variants=3).encoded == (10, 0)


def test_files_are_known_by_their_content(folder, place, tmp_path):
    """Another folder, other names: the same latents."""
    Made(folder, place)
    (tmp_path / "moved").mkdir()
    for i in range(10):
        (folder / f"{i:03d}.png").rename(tmp_path / "moved" / f"x{i}.png")
        (tmp_path / "moved" / f"x{i}.txt").write_text(f"photo, no {i}")

    assert Made(tmp_path / "moved", place).encoded == (0, 0)


def test_the_same_image_twice_is_encoded_once(folder, place):
    (folder / "copy.png").write_bytes((folder / "003.png").read_bytes())
    (folder / "copy.txt").write_text("photo, no 3")

    assert Made(folder, place).encoded == (10, 11)


def test_unchanged_files_are_not_read_again_for_their_content(folder, place, monkeypatch):
    Made(folder, place)

    def refuse(self):
        raise AssertionError("read")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)

    assert Made(folder, place).encoded == (0, 0)


def test_damaged_notes_on_files_are_written_again(folder, place):
    made = Made(folder, place)
    notes = next((Path(place) / "contents").glob("*.json"))
    content = notes.read_text()
    notes.write_text(content[:50])

    assert Made(folder, place).encoded == (0, 0)
    assert notes.read_text() == content
    assert made.encoded == (10, 11)


# Another format


def test_everything_in_a_cache_states_its_format(folder, place):
    Made(folder, place)
    files = [*Path(place).rglob("*.json")]

    assert len(files) == 3
    assert [json.loads(file.read_text())["format"] for file in files] == [1] * 3


@pytest.mark.parametrize("other", [None, 0, 2])
def test_entries_of_another_format_are_not_used_and_one_message_says_so(
    folder, place, other, messages
):
    """Without a format: those of versions that stated none."""
    made = Made(folder, place)
    shards_of_other = list(Path(place).rglob("*.safetensors"))
    for file in Path(place).rglob("key.json"):
        key = json.loads(file.read_text())
        del key["format"]
        file.write_text(json.dumps(key if other is None else {**key, "format": other}))
    for shard in shards_of_other:
        shard.rename(shard.with_name("written-by-another.safetensors"))
    messages.clear()

    again = Made(folder, place)

    assert again.encoded == (10, 11)
    why = "(the cached ones have the format of another version of difftrain)"
    assert messages == [
        f"latents: encoding 10 of 10 images {why}",
        f"text: encoding 11 of 11 prompts {why}",
    ]
    assert not [*Path(place).rglob("written-by-another*")]
    assert torch.equal(again.table.sample(3, Rng(0)).moments, made.table.sample(3, Rng(0)).moments)
    messages.clear()
    assert Made(folder, place).encoded == (0, 0)
    assert messages == []


@pytest.mark.parametrize("other", [None, 2])
def test_remembered_digests_of_another_format_are_not_used(folder, place, other, messages):
    """They name files whose content is known by another digest."""
    Made(folder, place)
    notes = next((Path(place) / "contents").glob("*.json"))
    digests = dict.fromkeys(json.loads(notes.read_text())["digests"], "0" * 32)
    notes.write_text(json.dumps(digests if other is None else {"format": 2, "digests": digests}))
    messages.clear()

    assert Made(folder, place).encoded == (0, 0)
    assert len(messages) == 1
    assert (
        "digests in the format of another version of difftrain; the files are read" in messages[0]
    )
    messages.clear()
    assert Made(folder, place).encoded == (0, 0)
    assert messages == []


# Interrupted, damaged, shared


class Interrupted(Encoder):
    def moments(self, pixels, names=None):
        if self.images >= 6:
            raise KeyboardInterrupt
        return super().moments(pixels, names)


def test_an_interrupted_run_is_gone_on_with(folder, place, monkeypatch):
    monkeypatch.setattr("difftrain.data.cache.encoding.PIXELS_AT_ONCE", 128)  # two images at once
    with pytest.raises(KeyboardInterrupt):
        Made(folder, place, encoder=Interrupted())

    assert Made(folder, place).encoded == (4, 11)


class Killed(Encoder):
    def moments(self, pixels, names=None):
        if self.images >= 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().moments(pixels, names)


def test_a_killed_run_is_gone_on_with(folder, place, monkeypatch):
    monkeypatch.setattr("difftrain.data.cache.encoding.PIXELS_AT_ONCE", 128)  # two images at once
    monkeypatch.setattr(shards, "MOST_ENTRIES", 2)
    process = multiprocessing.get_context("fork").Process(
        target=Made, args=(folder, place), kwargs={"encoder": Killed()}
    )
    process.start()
    process.join()

    assert process.exitcode == -signal.SIGKILL
    assert Made(folder, place).encoded == (4, 11)


def test_what_is_half_written_is_neither_read_nor_removed(folder, place, messages):
    made = Made(folder, place)
    shard = made.table.latents.reader.files[0]
    half = shard.parent / f".{shard.stem}.77.safetensors"
    half.write_bytes(shard.read_bytes()[:100])
    messages.clear()

    assert Made(folder, place).encoded == (0, 0)
    assert messages == []
    assert half.exists()  # another run may be writing it


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_shard_is_named_and_encoded_again(folder, place, damage, messages):
    made = Made(folder, place)
    shard = made.table.latents.reader.files[0]
    content = shard.read_bytes()
    shard.write_bytes(damage(content))
    messages.clear()

    assert Made(folder, place).encoded == (10, 0)
    assert f"{shard} is damaged" in "\n".join(messages)
    assert shard.read_bytes() == content


def test_a_damaged_shard_is_named_once(folder, place, messages):
    made = Made(folder, place)
    shard = made.table.latents.reader.files[0]
    (shard.parent / "other.safetensors").write_bytes(shard.read_bytes()[:-7])
    Made(folder, place)
    messages.clear()

    Made(folder, place)

    assert messages == []


def test_a_shard_that_is_gone_in_training_is_named(folder, place):
    made = Made(folder, place)
    for shard in made.table.latents.reader.files:
        shard.unlink()

    with pytest.raises(
        InputError, match=r"safetensors cannot be read any more.*Run the same command again"
    ):
        made.table.sample(0, Rng(0))


def test_entries_are_spread_over_shards_and_found_again(folder, place, monkeypatch):
    monkeypatch.setattr(shards, "MOST_ENTRIES", 3)
    made = Made(folder, place)

    assert len(made.table.latents.reader.files) == 4
    expected = Encoder().moments(
        to_unit_range(torch.stack([FIXED(captioned(folder)[i].image) for i in range(10)]))
    )
    for i in range(10):
        assert_close(made.table.sample(i, Rng(0)).moments, expected[i], absolute=1e-5)


def test_a_cached_data_set_goes_to_another_process(folder, place):
    made = Made(folder, place)
    unread = len(pickle.dumps(made.table.latents))
    made.table.sample(0, Rng(0))
    copy = pickle.loads(pickle.dumps(made.table))

    assert len(pickle.dumps(made.table.latents)) == unread  # what is opened does not go along

    assert torch.equal(copy.sample(3, Rng(0)).moments, made.table.sample(3, Rng(0)).moments)
