"""The evaluation command on several processes: the same score as on one.

A process that crashes or is killed does not let the others hang.
"""

import json
import signal
import subprocess
import time

import pytest
from helpers.commands import command, pictures
from helpers.runs import HANG, launched, output_of, tiny

pytestmark = pytest.mark.distributed

OWN = """
import os, time
import torch

seen = []

def rows(images):
    # In the second block it hangs, if asked, until the process is killed.
    seen.append(len(images))
    if os.environ.get("HANGS") and sum(seen) > 150:
        time.sleep(600)
    if os.environ.get("CRASHES") and os.environ["RANK"] == "1":
        os._exit(9)
    if os.environ.get("REFUSES") and os.environ["RANK"] == "1":
        raise RuntimeError("this process is broken")
    return images.float().flatten(1)[:, :20] / 255
"""


def evaluation(folder) -> list[str]:
    features = "{type: imported, path: 'own_rows:rows', version: '1'}"
    return [
        "--generated",
        str(folder / "a"),
        "--reference",
        str(folder / "b"),
        "--features",
        features,
        "--metrics",
        "frechet_distance,precision_recall",
        "--json",
        str(folder / "scores.json"),
    ]


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path / "a", num=700)
    pictures(tmp_path / "b", num=300)
    (tmp_path / "own_rows.py").write_text(OWN)
    return tmp_path


def environment(folder, **more: str) -> dict[str, str]:
    return {"PYTHONPATH": str(folder), "DIFFTRAIN_CACHE": str(folder / "cache"), **more}


def evaluating(folder, processes: int | None = None, **more: str) -> subprocess.Popen:
    return launched(
        ["-m", "difftrain.evaluate", *evaluation(folder)],
        processes,
        **environment(folder, **more),
    )


def test_two_processes_score_folders_as_one_does(folder, monkeypatch):
    out, err = output_of(process := evaluating(folder, 2))
    assert process.returncode == 0, err
    assert out.count("frechet_distance") == 1
    two = json.loads((folder / "scores.json").read_text())
    monkeypatch.setenv("DIFFTRAIN_CACHE", str(folder / "cache of one"))
    monkeypatch.syspath_prepend(folder)
    assert command("evaluate", *evaluation(folder)).out.count("frechet_distance") == 1
    one = json.loads((folder / "scores.json").read_text())

    assert two["generated"] == one["generated"]
    assert two["protocol"] == one["protocol"]
    for name, score in one["scores"].items():
        assert two["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-9)
    assert len(list((folder / "cache" / "features").iterdir())) == 2  # of both folders


@pytest.mark.parametrize("broken", ["CRASHES", "REFUSES"])
def test_what_ends_one_process_ends_the_other(folder, broken):
    process = evaluating(folder, 2, **{broken: "1"})
    _, err = output_of(process)

    assert process.returncode == 1
    if broken == "REFUSES":
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [
            (
                "error: features 'imported': own_rows:rows failed on torch.uint8 images [1, 3, "
                "8, 8]: this process is broken"
            )
        ]


def test_three_processes_make_the_images_of_one_and_find_their_scores(tmp_path):
    settings = {
        "features": "pixels",
        "reference": {"type": "digits", "part": "held_out"},
        "num_samples": 30,
        "metrics": ["frechet_distance", "precision_recall", "kernel_distance"],
    }
    file = tiny(tmp_path, training__steps=1, evaluation=settings, sampling__block_size=4)
    command("train", file)
    alone = json.loads((tmp_path / "run" / "evaluation.json").read_text())

    process = launched(
        ["-m", "difftrain.evaluate", str(tmp_path / "run")], 3, **environment(tmp_path)
    )
    _, err = output_of(process)

    assert process.returncode == 0, err
    three = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert three["generated"] == alone["generated"]
    assert three["protocol_digest"] == alone["protocol_digest"]
    for name, score in alone["scores"].items():
        assert three["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-9), name


def test_what_was_killed_goes_on(folder):
    process = evaluating(folder, HANGS="1")
    deadline = time.monotonic() + HANG
    while not any((folder / "cache" / "features").glob("*/[!.]*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, err = output_of(again := evaluating(folder))

    assert again.returncode == 0, err
    assert "reference images: " in out
    assert "of 3 blocks are there already" in out
