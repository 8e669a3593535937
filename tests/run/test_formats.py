"""A run folder states its format; folders of no format, or of a different one, are not opened."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import command, refused
from helpers.runs import tiny

from difftrain.run.facts import FORMAT

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a recipe and of its finished run."""
    folder = tmp_path_factory.mktemp("formats")
    evaluation = {
        "features": "pixels",
        "reference": {"type": "digits", "part": "held_out"},
        "metrics": ["frechet_distance"],
        "num_samples": 4,
    }
    command("train", tiny(folder, training__steps=1, evaluation=evaluation))
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run."""
    return shutil.copytree(finished / "run", tmp_path / "run")


def spoil(run: Path, kind: str) -> str:
    """Change the facts of a run; returns what a message says about them."""
    file = run / "facts.json"
    facts = json.loads(file.read_text())
    if kind == "absent":
        file.unlink()
        return "has no format number"
    if kind == "damaged":
        file.write_text(file.read_text()[:20])
        return "facts.json is not JSON"
    if kind == "without format":
        del facts["format"]
        found = "has no format number"
    else:
        facts["format"] = FORMAT + 1
        found = f"has format {FORMAT + 1}"
    file.write_text(json.dumps(facts))
    return found


KINDS = ["absent", "damaged", "without format", "newer"]


def arguments_of(command_name: str, finished: Path, run: Path) -> list[str]:
    out = str(run.parent / "out")
    return {
        "sample": ["sample", str(run), "--num", "1", "--out", out],
        "evaluate": ["evaluate", str(run)],
        "merge": ["merge", str(run), "--out", out],
        "diagnose": ["diagnose", str(run)],
        "train": ["train", str(finished / "recipe.yaml"), f"output={run}", "training.steps=2"],
    }[command_name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sample", "evaluate", "merge", "diagnose", "train"])
def test_a_folder_of_another_format_is_named_and_left_alone(finished, run, name, kind):
    expected = spoil(run, kind)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}

    message = refused(*arguments_of(name, finished, run))

    assert expected in message
    assert str(run) in message
    after = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    assert after == before
    assert not (run.parent / "out").exists()


def test_the_message_says_what_to_do(run):
    spoil(run, "newer")

    message = refused("sample", run, "--num", 1, "--out", run.parent / "out")

    assert f"this version of difftrain reads format {FORMAT}" in message
    assert "Use the version that wrote it, or write another output: (or --fresh)" in message


def test_a_fresh_start_beside_a_folder_of_another_format_is_possible(finished, run):
    spoil(run, "absent")

    command("train", finished / "recipe.yaml", f"output={run}", "--fresh")

    facts = json.loads((run.with_name("run-2") / "facts.json").read_text())
    assert facts["format"] == FORMAT
    assert not (run / "facts.json").exists()
