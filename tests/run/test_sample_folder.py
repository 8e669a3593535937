"""Samples of two models, or samples and other pictures, never come to lie in one folder."""

import json

import PIL.Image
import pytest
from helpers.commands import command, refused
from helpers.runs import tiny, trained

from difftrain.core.errors import InputError
from difftrain.data.datasets.folder import MADE_FILE
from difftrain.data.datasets.image_folder import METADATA, ImageFolder
from difftrain.run.evaluating import Reading
from difftrain.run.sample_folder import SampleFolder

pytestmark = pytest.mark.usefixtures("without_report")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two trained runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "other"):
        seed = len(name)
        trained(tiny(folder / name, seed=seed, training={"steps": 1, "batch_size": 4}))
    return folder / "one" / "run", folder / "other" / "run"


def sample(run, out, num, *more):
    return ["sample", run, "--num", str(num), "--out", out, *more]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_folder_says_what_made_its_samples(runs, tmp_path):
    out = tmp_path / "smp"

    command(*sample(runs[0], out, 3, "sampling.seed=5", "--label", "2"))

    made = json.loads((out / MADE_FILE).read_text())
    assert made["format"] == 1
    assert (made["is_complete"], made["num"], made["step"]) == (True, 3, 1)
    assert made["run"] == str(runs[0])
    assert made["sampling"]["seed"] == 5
    assert made["asked"]["label"] == 2
    images = ["000000.png", "000001.png", "000002.png"]
    assert names(out) == [*images, "grid.png", METADATA, MADE_FILE]


def test_the_class_of_each_sample_stands_beside_it(runs, tmp_path):
    """For `image_folder`, and for the imagefolder of `datasets`."""
    import datasets

    out = tmp_path / "smp"
    command(*sample(runs[0], out, 12))

    read = ImageFolder(str(out), labels="metadata")
    rows = datasets.load_dataset("imagefolder", data_dir=str(out), split="train")

    assert read.labels == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert read.files == [f"{i:06d}.png" for i in range(12)]
    assert read.left_out() == [("grid.png", "the contact sheet of difftrain sample")]
    assert rows["label"][:12] == read.labels
    scored = Reading(None, "stop").images(str(out), "--generated")
    assert (len(scored), scored.has_labels, scored.has_captions) == (12, True, False)


def test_samples_of_one_class_are_listed_as_such(runs, tmp_path):
    out = tmp_path / "smp"
    command(*sample(runs[0], out, 2, "--label", "7"))

    assert ImageFolder(str(out), labels="metadata").labels == [7, 7]


def test_samples_of_another_model_do_not_come_beside_older_ones(runs, tmp_path):
    """30 older samples and 10 new ones would be scored as one set."""
    out = tmp_path / "smp"
    command(*sample(runs[0], out, 30))
    before = (out / "000003.png").read_bytes()

    message = refused(*sample(runs[1], out, 10))

    assert f"--out {out}: the folder holds 30 samples of {runs[0]}, step 1." in message
    assert "Write --overwrite to replace them, or the path of another folder." in message
    assert (out / "000003.png").read_bytes() == before
    assert len(names(out)) == 33

    command(*sample(runs[1], out, 10, "--overwrite"))
    assert len(names(out)) == 13
    assert json.loads((out / MADE_FILE).read_text())["run"] == str(runs[1])


def test_a_persons_pictures_are_left_alone(runs, tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    PIL.Image.new("L", (8, 8)).save(out / "000000.png")

    for more in ([], ["--overwrite"]):
        message = refused(*sample(runs[0], out, 2, *more))
        assert "holds files that difftrain sample did not write, such as 000000.png" in message
    assert names(out) == ["000000.png"]


def test_a_file_among_samples_is_not_removed(runs, tmp_path):
    out = tmp_path / "smp"
    command(*sample(runs[0], out, 2))
    (out / "notes.txt").write_text("mine")

    message = refused(*sample(runs[0], out, 2, "--overwrite"))

    assert "beside the samples that would be replaced, the folder holds notes.txt" in message
    assert (out / "notes.txt").read_text() == "mine"


def test_an_empty_folder_and_hidden_files_are_no_hindrance(runs, tmp_path):
    out = tmp_path / "smp"
    out.mkdir()
    (out / ".DS_Store").write_bytes(b"\0")

    command(*sample(runs[0], out, 1))

    assert (out / "000000.png").exists()


def test_samples_that_were_stopped_are_not_scored(runs, tmp_path):
    out = tmp_path / "smp"
    command(*sample(runs[0], out, 4))
    made = json.loads((out / MADE_FILE).read_text())
    (out / "000003.png").unlink()
    (out / MADE_FILE).write_text(json.dumps({**made, "is_complete": False}))
    scored = ["--generated", out, "--reference", out, "--features", "pixels"]

    message = refused("evaluate", *scored)

    assert f"--generated {out}: sampling was stopped before all 4 samples" in message
    command(*sample(runs[0], out, 4, "--overwrite"))
    command("evaluate", *scored)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1}', "is damaged: it lacks run, step, num, is_complete"),
        ('{"format": 2}', "has format 2, and this version reads format 1"),
    ],
)
def test_another_format_and_a_damaged_file_are_named(runs, tmp_path, text, message):
    out = tmp_path / "smp"
    out.mkdir()
    (out / MADE_FILE).write_text(text)

    assert message in refused(*sample(runs[0], out, 1, "--overwrite"))
    assert SampleFolder(out).file.read_text() == text


@pytest.mark.parametrize("content", ["", "no JSON\n", "[1]\n"])
def test_a_damaged_list_of_samples_is_named(runs, tmp_path, content):
    command(*sample(runs[0], tmp_path / "smp", 2))
    (tmp_path / "smp" / METADATA).write_text(content)

    with pytest.raises(InputError, match=r"metadata.jsonl is damaged .* with --overwrite"):
        Reading(None, "stop").images(str(tmp_path / "smp"), "--generated")
