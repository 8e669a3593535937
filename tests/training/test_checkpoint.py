"""Checkpoints: complete or absent, whatever happens while one is written; restored bit for bit."""

import contextlib
import resource
import shutil
import subprocess

import pytest
import torch
from helpers.runs import assert_identical
from torch import nn

from difftrain.core.errors import InputError
from difftrain.training import checkpoint
from difftrain.training.checkpoint import (
    MARKER,
    Snapshot,
    latest,
    load_weights,
    rotate,
    step_of,
    trainer_state,
    whole,
    write,
)
from difftrain.training.ema import ConstantDecay, WeightAverage


def fill_with(text):
    return lambda folder: (folder / "weights").write_text(text)


def steps(checkpoints):
    return [step_of(path) for path in whole(checkpoints)]


def everything_in(folder):
    return sorted(path.name for path in folder.iterdir())


def parts(seed=0, dtype=torch.float32):
    """Return a network after two steps of AdamW, with its average and another part with state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 3)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = WeightAverage(model, ConstantDecay(0.5))
    for step in range(2):
        model(torch.randn(5, 30, dtype=dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(step, 5)
    other = nn.BatchNorm1d(2)
    other(torch.randn(4, 2))
    return model, optimizer, average, {"objective": other}


def state(model, optimizer, average, others):
    found = [
        model.state_dict(),
        optimizer.state_dict(),
        average.state_dict(),
        {name: other.state_dict() for name, other in others.items()},
    ]
    return [{**part} for part in found]


def save(place, built, step=7):
    Snapshot(*built).save(place, step, {"best_step": 3, "best_value": 0.25}, "output: here\n")


@contextlib.contextmanager
def files_limited_to(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a disk here; another test limits the size of files instead")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_checkpoint_stands_when_it_is_whole_and_not_before(tmp_path):
    write(tmp_path, 3, fill_with("three"))

    def fill(folder):
        fill_with("five")(folder)
        assert not (folder / MARKER).exists()
        assert steps(tmp_path) == [3]

    assert write(tmp_path, 5, fill) == latest(tmp_path)
    assert steps(tmp_path) == [3, 5]
    assert everything_in(tmp_path) == ["step-0000003", "step-0000005"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), TypeError("cannot pickle"), KeyboardInterrupt()],
)
@pytest.mark.parametrize("step", [3, 5])
def test_whatever_ends_the_writing_leaves_the_earlier_ones_and_nothing_else(tmp_path, error, step):
    write(tmp_path, 3, fill_with("three"))

    def fill(folder):
        fill_with("half")(folder)
        raise error

    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        write(tmp_path, step, fill)

    assert everything_in(tmp_path) == ["step-0000003"]
    assert (latest(tmp_path) / "weights").read_text() == "three"


def test_a_full_disk_is_one_message_with_the_step_the_reason_and_what_is_left(tmp_path):
    write(tmp_path, 3, fill_with("three"))

    def fill(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError) as caught:
        write(tmp_path, 5, fill)

    said = str(caught.value)
    assert "checkpoint of step 5 could not be written" in said
    assert "No space left on device" in said
    assert f"The latest whole one is {tmp_path / 'step-0000003'}" in said
    assert "Make room" in said


def test_the_same_step_written_again_replaces_the_first(tmp_path):
    write(tmp_path, 3, fill_with("first"))
    write(tmp_path, 3, fill_with("second"))

    assert (latest(tmp_path) / "weights").read_text() == "second"
    assert everything_in(tmp_path) == ["step-0000003"]


def test_a_crash_while_one_is_replaced_never_leaves_a_half_of_it(tmp_path, monkeypatch):
    """The crash comes while the old one is removed, which must then no longer look complete."""
    write(tmp_path, 2, fill_with("two"))
    write(tmp_path, 3, fill_with("first"))

    def crash(path, *rest, **options):
        if path.exists():
            (path / "weights").unlink(missing_ok=True)
            raise SystemExit("killed")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", crash)
    with pytest.raises(SystemExit):
        write(tmp_path, 3, fill_with("second"))

    for path in whole(tmp_path):
        assert (path / "weights").exists()
    assert steps(tmp_path)[0] == 2


def test_a_crash_while_old_ones_are_removed_never_leaves_a_half_of_one(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step, fill_with("text"))

    def crash(path, *rest, **options):
        if path.exists():
            (path / "weights").unlink()
            raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(SystemExit):
            rotate(tmp_path, 1, set())
    assert steps(tmp_path) == [2]

    rotate(tmp_path, 1, set())
    assert everything_in(tmp_path) == ["step-0000002"]


def test_a_folder_without_the_marker_or_with_another_name_is_no_checkpoint(tmp_path):
    write(tmp_path, 3, fill_with("three"))
    for name in ("step-0000009", "step-0000009-copy", ".step-0000008.partial"):
        shutil.copytree(tmp_path / "step-0000003", tmp_path / name)
    (tmp_path / "step-0000009" / MARKER).unlink()

    assert steps(tmp_path) == [3]


def test_the_latest_is_the_one_of_the_largest_step(tmp_path):
    for step in (9_999_999, 10_000_000, 5):
        write(tmp_path, step, fill_with("text"))

    assert steps(tmp_path) == [5, 9_999_999, 10_000_000]


def test_without_a_folder_there_is_no_checkpoint(tmp_path):
    assert latest(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("keep", "protected", "left"),
    [
        (1, set(), [5]),
        (2, set(), [4, 5]),
        (2, {2}, [2, 4, 5]),
        (2, {5}, [4, 5]),
        (9, set(), [1, 2, 3, 4, 5]),
    ],
)
def test_rotation_keeps_the_newest_and_the_protected(tmp_path, keep, protected, left):
    for step in range(1, 6):
        write(tmp_path, step, fill_with("text"))

    rotate(tmp_path, keep, protected)

    assert steps(tmp_path) == left


def test_rotation_clears_what_a_killed_run_left_half_written(tmp_path):
    write(tmp_path, 1, fill_with("text"))
    (tmp_path / ".step-0000002.partial").mkdir()

    rotate(tmp_path, 2, set())

    assert everything_in(tmp_path) == ["step-0000001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_everything_comes_back_bit_for_bit(tmp_path, dtype):
    built = parts(dtype=dtype)
    save(tmp_path, built)
    others = parts(seed=1, dtype=dtype)

    found = Snapshot(*others).load(latest(tmp_path))

    assert_identical(state(*others), state(*built))
    assert (
        found == {"step": 7, "best_step": 3, "best_value": 0.25} == trainer_state(latest(tmp_path))
    )
    assert (latest(tmp_path) / "recipe.yaml").read_text() == "output: here\n"


def test_a_saved_state_does_not_change_with_what_is_trained_afterwards(tmp_path):
    built = parts()
    before = [
        {name: value.clone() for name, value in part.items()}
        for part in (built[0].state_dict(), built[2].state_dict())
    ]
    save(tmp_path, built)
    for p in built[0].parameters():
        p.data.zero_()
    built[2].update(0, 1)

    loaded = parts(seed=1)
    Snapshot(*loaded).load(latest(tmp_path))

    assert_identical([{**loaded[0].state_dict()}, loaded[2].state_dict()], before)


@pytest.mark.parametrize(("averaged", "name"), [(True, "ema"), (False, "model")])
def test_weights_load_as_the_average_or_as_they_are(tmp_path, averaged, name):
    model, optimizer, average, others = parts()
    save(tmp_path, (model, optimizer, average, others))
    loaded = parts(seed=1)[0]

    assert load_weights(loaded, latest(tmp_path), averaged) == name

    expected = {**model.state_dict(), **(average.state_dict() if averaged else {})}
    assert_identical({**loaded.state_dict()}, expected)  # buffers come from the model


def test_without_an_average_the_weights_are_the_model_s(tmp_path):
    model, optimizer, _, others = parts()
    save(tmp_path, (model, optimizer, None, others))

    assert load_weights(model, latest(tmp_path), averaged=True) == "model"


@pytest.mark.parametrize(
    ("size", "reason"), [(2_000, "File too large"), (8_000, "state.pt is not whole")]
)
def test_a_file_that_cannot_grow_leaves_the_earlier_checkpoint_which_loads(tmp_path, size, reason):
    built = parts()
    save(tmp_path, built, step=3)

    with (
        files_limited_to(size),
        pytest.raises(InputError, match="checkpoint of step 5 could not be written") as caught,
    ):
        save(tmp_path, built, step=5)

    assert reason in str(caught.value)
    assert everything_in(tmp_path) == ["step-0000003"]
    assert Snapshot(*parts(seed=1)).load(latest(tmp_path))["step"] == 3


def test_a_disk_that_is_really_full_leaves_the_earlier_checkpoints_which_load(small_disk):
    built = parts()

    def save_many():
        for step in range(100):
            save(small_disk, built, step)

    with pytest.raises(InputError, match=r"could not be written.*(No space left|MiB free)"):
        save_many()

    left = steps(small_disk)
    assert left == list(range(len(left)))
    assert len(left) > 0
    assert everything_in(small_disk) == [f"step-{step:07d}" for step in left]
    for path in whole(small_disk):
        Snapshot(*parts(seed=1)).load(path)


def damage(place):
    file = place / "state.pt"
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    "change",
    [
        lambda place, built: damage(place),
        lambda place, built: (place / "model.safetensors").write_bytes(b"short"),
        lambda place, built: (place / "ema.safetensors").unlink(),
        lambda place, built: built[3].update(added=nn.BatchNorm1d(3)),
        lambda place, built: built[3].update(objective=nn.BatchNorm1d(3)),
        lambda place, built: built[1].add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
        lambda place, built: built[0].append(nn.Linear(3, 3)),
    ],
    ids=[
        "damaged",
        "damaged model",
        "no average",
        "another part",
        "another state",
        "another optimizer",
        "another model",
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_refused(tmp_path, change):
    save(tmp_path, parts())
    place, built = latest(tmp_path), parts(seed=1)
    change(place, built)

    with pytest.raises(InputError, match=r"step-0000007 cannot be resumed: .*--fresh"):
        Snapshot(*built).load(place)
