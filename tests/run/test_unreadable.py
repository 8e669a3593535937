"""Runs on folders in which one of twenty pictures is broken, with `loader.on_error: skip`."""

import json
from pathlib import Path

import pytest
from helpers.commands import command, pictures, refused
from helpers.fine_tuning import photos, recipe
from helpers.runs import lines, tiny
from helpers.several import run_program

from difftrain.data.unreadable import ReadErrors

SCORES = {"frechet_distance", "kernel_distance", "class_agreement", "nearest_neighbour_ratio"}


def broken(file: Path) -> Path:
    """Cut a picture in half."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return file


@pytest.fixture
def folders(tmp_path):
    """Four folders of twenty pictures, each with a broken one, and one of them twice."""
    for name, place in {"photos": 3, "unseen": 0, "loop": 11, "judge": 7}.items():
        folder = pictures(tmp_path / name, num=20, size=(8, 8), classes=2)
        for file in sorted(folder.rglob("*.png")):
            file.write_bytes(file.read_bytes() + name.encode())  # other contents behind the end
        broken(sorted(folder.rglob("*.png"))[place])
    return tmp_path


def broken_in(folder: Path) -> str:
    files = sorted(folder.rglob("*.png"))
    return str(min(files, key=lambda file: file.stat().st_size))


def scored(tmp_path: Path, **changes) -> Path:
    """A recipe that reads its folders in every way there is."""
    of = {
        name: {"type": "image_folder", "path": str(tmp_path / name), "labels": "folders"}
        for name in ("photos", "unseen", "loop", "judge")
    }
    blocks = {
        "data": of["photos"],
        "transform": {"resolution": 8, "channels": 1, "resize": "none", "crop": "center"},
        "training__steps": 4,
        "validation": {"data": of["unseen"], "every": 2, "num": 20},
        "evaluation": {
            "features": {"type": "classifier", "data": of["judge"], "steps": 3},
            "reference": of["unseen"],
            "metrics": sorted(SCORES),
            "num_samples": 20,
            "in_loop": {
                "every": 2,
                "num_samples": 20,
                "reference": of["loop"],
                "metrics": ["frechet_distance"],
                "select": "frechet_distance",
            },
        },
        "loader": {"on_error": "skip"},
        **changes,
    }
    return tiny(tmp_path, **blocks)


def listed(run: Path) -> set[tuple[str, str]]:
    found = [(line["data"], line["name"]) for line in lines(run / "skipped.jsonl")]
    assert len(set(found)) == len(found)
    return set(found)


def expected(tmp_path: Path) -> set[tuple[str, str]]:
    keys = {
        "data": "photos",
        "validation.data": "unseen",
        "evaluation.reference": "unseen",
        "evaluation.in_loop.reference": "loop",
        "evaluation.features.data": "judge",
    }
    return {(key, broken_in(tmp_path / name)) for key, name in keys.items()}


def test_every_reader_leaves_out_what_cannot_be_read(folders):
    file = scored(folders)

    command("train", file)

    run = folders / "run"
    assert set(json.loads((run / "evaluation.json").read_text())["scores"]) == SCORES
    assert listed(run) == expected(folders)
    before = (run / "skipped.jsonl").read_text()
    command("evaluate", run)
    command("diagnose", run, "--which", "denoising_error")
    assert (run / "skipped.jsonl").read_text() == before
    # What is repaired is read again
    for name in ("unseen", "loop"):
        repaired = Path(broken_in(folders / name))
        whole = next(file for file in sorted(repaired.parent.iterdir()) if file != repaired)
        repaired.write_bytes(whole.read_bytes())
    assert "cannot be read" not in command("evaluate", run).out
    left = ReadErrors("skip", run / "skipped.jsonl").left_out("data")
    assert [one.name for one in left] == [broken_in(folders / "photos")]
    Path(broken_in(folders / "photos")).write_bytes(whole.read_bytes())
    assert not ReadErrors("skip", run / "skipped.jsonl").left_out("data")


@pytest.mark.distributed
def test_two_processes_leave_out_the_same(folders):
    file = scored(folders, training__batch_size=8, training__steps=8)

    run_program("difftrain.train", file, num=2)

    run = folders / "run"
    assert set(json.loads((run / "evaluation.json").read_text())["scores"]) == SCORES
    assert {(key, name) for key, name in listed(run)} == expected(folders)


def test_without_skip_a_broken_reference_ends_the_run_before_its_first_step(folders):
    broken(sorted((folders / "unseen").rglob("*.png"))[9])
    Path(broken_in(folders / "photos")).unlink()

    message = refused("train", scored(folders, loader={}, validation=None))

    assert "2 of 20 items cannot be read. The first: " in message
    assert "write loader: {on_error: skip}" in message
    assert not (folders / "run" / "log.jsonl").exists()
    assert not list((folders / "run").glob("checkpoints/*"))


def test_when_nothing_can_be_read_the_reference_is_named(folders):
    for file in (folders / "unseen").rglob("*.png"):
        file.write_bytes(b"no picture")

    message = refused("train", scored(folders, validation=None))

    assert "evaluation.reference: none of the 20 items that were tried can be read" in message


def test_a_lora_with_cache_prior_and_prompts_from_captions_skips(tmp_path, pipelines):
    folder = photos(tmp_path / "photos", num=20)
    broken(folder / "0.png")
    held_out = photos(tmp_path / "held_out", num=20)
    broken(held_out / "0.png")
    file = recipe(
        tmp_path,
        "stable_diffusion",
        pipelines("stable_diffusion"),
        training={"steps": 6, "batch_size": 8, "num_sampled": 2, "log_every": 1},
        sampling={"sampler": {"type": "ddim", "steps": 2, "spacing": "leading"}},
        cache={"folder": str(tmp_path / "cache")},
        prior={"prompts": ["a photo of a thing"], "num": 4},
        validation={
            "data": {"type": "image_folder", "path": str(held_out), "captions": "sidecar"},
            "every": 3,
            "num": 20,
        },
        loader={"on_error": "skip"},
    )

    command("train", file)

    assert listed(tmp_path / "run") == {
        ("data", str(folder / "0.png")),
        ("validation.data", str(held_out / "0.png")),
    }
