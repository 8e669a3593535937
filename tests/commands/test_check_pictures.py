"""`difftrain check` reads pictures: the ends of all, and as many as a minute allows."""

import runpy

import numpy as np
import PIL.Image
import pytest
from helpers.commands import command, pictures, refused
from helpers.places import ROOT
from helpers.runs import tiny

from difftrain.data.endings import ends_well


def recipe(tmp_path, num=6, **changes):
    pictures(tmp_path / "photos", num=num, size=(40, 40))
    data = {"type": "image_folder", "path": str(tmp_path / "photos")}
    transform = {"resolution": 8, "channels": 1}
    model = {"label_dropout": 0.0, "model__config__num_class_embeds": None}
    return tiny(tmp_path, data=data, transform=transform, **model, **changes)


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_a_broken_middle(file):
    """A picture whose end is whole."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :][:40] = bytes(40)
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    file.write_bytes(bytes(content))


@pytest.fixture
def no_time(monkeypatch):
    monkeypatch.setattr("difftrain.run.checking.SECONDS", 0.0)


def test_a_cut_picture_is_found_by_its_end_without_time_to_decode(tmp_path, no_time):
    file = recipe(tmp_path)
    halved(tmp_path / "photos" / "004.png")

    assert r"004.png cannot be read: image file is truncated" in refused("check", file)
    assert "Repair or remove it, or write loader: {on_error: skip}" in refused("check", file)


def test_a_broken_middle_is_found_where_all_is_decoded(tmp_path, no_time):
    file = recipe(tmp_path)
    with_a_broken_middle(tmp_path / "photos" / "004.png")

    told = command("check", file).out
    assert "0 of 6 were decoded; --all decodes every one" in told
    assert "data: " in refused("check", file, "--all")


def test_within_a_minute_few_pictures_are_all_decoded(tmp_path):
    file = recipe(tmp_path)
    with_a_broken_middle(tmp_path / "photos" / "004.png")

    assert "004.png cannot be read" in refused("check", file)
    (tmp_path / "photos" / "004.png").unlink()
    assert "were decoded" not in command("check", file).out


def test_what_is_skipped_is_a_table(tmp_path):
    file = recipe(tmp_path)
    for name in ("001.png", "004.png"):
        halved(tmp_path / "photos" / name)
    (tmp_path / "photos" / "a.heic").write_bytes(b"x")

    told = command("check", file, "loader.on_error=skip").out

    assert "4 items are read, 3 are left out" in told
    assert "  2  cannot be read: image file is truncated (the first: " in told
    assert "  1  ending .heic is not read (the first: a.heic)" in told


def test_references_and_held_out_pictures_are_read_too(tmp_path):
    file = recipe(tmp_path)
    pictures(tmp_path / "unseen", num=30)
    halved(tmp_path / "unseen" / "007.png")
    block = f"{{type: image_folder, path: {tmp_path / 'unseen'}}}"

    message = refused("check", file, f"validation={{data: {block}, every: 1}}")
    assert message.startswith(f"error: validation.data: {tmp_path}/unseen/007.png cannot be read")
    metrics = "features: pixels, metrics: [frechet_distance], num_samples: 9"
    message = refused("check", file, f"evaluation={{reference: {block}, {metrics}}}")
    assert message.startswith("error: evaluation.reference: ")


def test_a_long_strip_is_checked_and_trained_on(tmp_path):
    file = recipe(tmp_path)
    PIL.Image.new("RGB", (30_000, 2)).save(tmp_path / "photos" / "strip.png")

    command("check", file, "transform.resolution=16", "model.config.sample_size=16")
    command(
        "train", file, "training.steps=2", "model.config.sample_size=16", "transform.resolution=16"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_the_end_of_a_format_is_known(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    file = tmp_path / "x"
    PIL.Image.fromarray(noise).save(file, kind)
    content = file.read_bytes()

    assert ends_well(file)
    assert ends_well(content)
    for share in (0.1, 0.5, 0.9):
        assert not ends_well(content[: int(len(content) * share)])
    assert not ends_well(content[:-3])
    assert ends_well(content + bytes(100))  # with something behind its end
    assert not ends_well(b"")
    assert not ends_well(tmp_path / "nothing")


def test_one_table_for_check_train_reference_and_evaluate(tmp_path):
    """The short form of scripts/faults/folders.py, in this process."""
    script = runpy.run_path(str(ROOT / "scripts" / "faults" / "folders.py"), run_name="script")
    script["filled"](tmp_path / "photos", 80)
    script["read_everywhere"].__globals__["done"] = lambda given: command(*given).out

    tables = script["read_everywhere"](tmp_path, tmp_path / "photos", 80)

    assert len(set(tables.values())) == 1, tables
    assert "cannot be read" in tables["check"]
    assert "a link to a folder that is read already" in tables["check"]
