"""The run folder: found or made, refused when it is another's, held by one run at a time."""

import json
import os

import pytest
from helpers.runs import tiny

from difftrain.core.errors import InputError
from difftrain.recipe.reading import load
from difftrain.run import folder as run_folder
from difftrain.run.facts import DataFacts
from difftrain.run.folder import held, next_free, prepare, write_status


def prepared(tmp_path, *overrides, fresh=False, accept_changes=False, **changes):
    """Return the folder of the tiny recipe's run."""
    return found(tmp_path, *overrides, fresh=fresh, accept=accept_changes, **changes).folder


def found(tmp_path, *overrides, fresh=False, accept=False, **changes):
    recipe = load(tiny(tmp_path, **changes), overrides)
    return prepare(recipe, fresh, accept)


def begun(tmp_path, *overrides, **changes):
    """Return a folder in which a run has begun."""
    folder = prepared(tmp_path, *overrides, **changes)
    recipe = load(tmp_path / "recipe.yaml", overrides)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    DataFacts().write(folder)
    return folder


def test_the_folder_is_made_with_those_above_it(tmp_path):
    folder = prepared(tmp_path, f"output={tmp_path}/a/b/run")

    assert folder == tmp_path / "a/b/run"
    assert list(folder.iterdir()) == []


def test_the_home_folder_may_be_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert prepared(tmp_path, "output=~/run") == tmp_path / "run"


def test_the_same_recipe_finds_its_folder_again(tmp_path):
    folder = begun(tmp_path)
    before = sorted(folder.iterdir())

    assert prepared(tmp_path) == folder
    assert sorted(folder.iterdir()) == before


def test_another_recipe_is_refused_and_the_difference_is_shown(tmp_path):
    folder = begun(tmp_path)
    text = (folder / "recipe.yaml").read_text()

    with pytest.raises(InputError) as caught:
        prepared(tmp_path, "optimizer.lr=0.01", "seed=3")

    said = str(caught.value)
    assert f"{folder} was trained with another recipe" in said
    for line in ("-  lr: 0.001", "+  lr: 0.01", "-seed: 0", "+seed: 3"):
        assert f"\n{line}\n" in said
    assert "steps" not in said
    assert all(way in said for way in ("--accept-changes", "--fresh", "another output:"))
    assert (folder / "recipe.yaml").read_text() == text


def test_changes_that_are_accepted_go_on(tmp_path):
    folder = begun(tmp_path)

    assert prepared(tmp_path, "optimizer.lr=0.01", accept_changes=True) == folder


def test_steps_may_be_raised_but_not_lowered(tmp_path):
    folder = begun(tmp_path)

    assert prepared(tmp_path, "training.steps=7") == folder
    with pytest.raises(InputError, match=r"(?s)another recipe.*-  steps: 6\n\+  steps: 5"):
        prepared(tmp_path, "training.steps=5")


def test_a_folder_that_was_moved_is_the_same_run(tmp_path):
    begun(tmp_path).rename(tmp_path / "moved")

    assert prepared(tmp_path, f"output={tmp_path}/moved") == tmp_path / "moved"


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")

    with pytest.raises(
        InputError,
        match=(
            r"output: the folder '.*run' holds other files and no run\. Write another output:, "
            r"or empty it"
        ),
    ):
        prepared(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_fresh_takes_the_first_name_that_is_free(tmp_path):
    first = begun(tmp_path)
    second = prepared(tmp_path, "seed=1", fresh=True)
    third = prepared(tmp_path, fresh=True)

    assert (second, third) == (tmp_path / "run-2", tmp_path / "run-3")
    assert next_free(tmp_path / "other") == tmp_path / "other"
    assert {path.name for path in first.iterdir()} == {"recipe.yaml", "facts.json"}


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")

    with pytest.raises(
        InputError,
        match=r"output: the folder '.*' cannot be written to \(.+\)\. Write another folder",
    ):
        prepared(tmp_path, f"output={tmp_path / place}")


def test_a_folder_without_the_right_to_write_is_refused(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "run").mkdir(mode=0o500)

    with pytest.raises(InputError, match=r"cannot be written to \(Permission denied\)"):
        prepared(tmp_path)


def test_a_held_folder_is_refused_with_the_process_that_holds_it_and_is_free_afterwards(tmp_path):
    with held(tmp_path):
        with (
            pytest.raises(
                InputError,
                match=rf"is held by another run \(process {os.getpid()} on .+\)\. Wait for it",
            ),
            held(tmp_path),
        ):
            pass
        with (
            pytest.raises(InputError, match="is held by another run"),
            held(tmp_path),
        ):  # the refused one has not let go of it
            pass
    with held(tmp_path):
        pass


def test_an_error_within_lets_the_folder_go(tmp_path):
    with pytest.raises(RuntimeError), held(tmp_path):
        raise RuntimeError
    with held(tmp_path):
        pass


def test_the_lock_alone_does_not_make_a_folder_another_s(tmp_path):
    folder = prepared(tmp_path)
    with held(folder):
        pass
    write_status(folder, 2, "wrong")

    assert prepared(tmp_path) == folder


def test_the_status_is_a_code_and_a_message(tmp_path):
    write_status(tmp_path, 75, "stopped")

    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["code"], status["message"]) == (75, "stopped")


def test_a_status_that_cannot_be_written_does_not_hide_why_the_run_ended(tmp_path):
    write_status(tmp_path / "gone", 1, "why")


def test_the_environment_is_plain_data():
    found = run_folder.environment(2, "cpu", 17, {"training": 1.0})

    assert json.loads(json.dumps(found)) == found
    assert (found["processes"], found["device"], found["parameters"]) == (2, "cpu", 17)
    assert found["torch"]
