"""The log's window against sums done by hand, and its file: appended to, torn, cut."""

import json

import pytest
import torch
from helpers.runs import assert_identical

from difftrain.core import files
from difftrain.core.files import append, cut_after, records, write_text
from difftrain.objective.types import Losses
from difftrain.training.log import Window


def losses(total, errors, log_snr, measured=None, **terms):
    measures = {"own.size": torch.tensor(measured)} if measured is not None else {}
    terms = {name: torch.tensor(value) for name, value in terms.items()}
    return Losses(torch.tensor(total), terms, torch.tensor(errors), torch.tensor(log_snr), measures)


FIRST = losses(1.5, [1.0, 2.0], [-0.5, 3.0], measured=4.0, error=1.0, own=0.5)
SECOND = losses(2.5, [3.0, 6.0], [-1.9, -700.0], error=2.0)


def window(*seen):
    made = Window(torch.device("cpu"))
    for one in seen:
        made.add(one)
    return made


def test_terms_are_means_over_all_micro_batches_also_of_those_that_had_none():
    terms, _, _ = window(FIRST, SECOND).means()

    assert terms == {"loss": 2.0, "error": 1.5, "own": 0.25}


def test_a_measure_is_its_mean_over_the_micro_batches_that_took_it():
    _, measures, _ = window(
        FIRST, SECOND, losses(1.0, [1.0], [0.0], measured=7.0, error=1.0)
    ).means()

    assert measures == {"own.size": 5.5}


def test_errors_are_means_by_band_of_noise_level_and_what_lies_beyond_counts_in_the_outermost():
    *_, bands = window(FIRST, SECOND).means()

    assert bands == [
        {"log_snr": [-20.0, -18.0], "error": 6.0, "count": 1},
        {"log_snr": [-2.0, 0.0], "error": 2.0, "count": 2},
        {"log_snr": [2.0, 4.0], "error": 2.0, "count": 1},
    ]


def test_a_reset_window_has_forgotten_everything():
    made = window(FIRST)
    made.reset()
    made.add(SECOND)

    assert made.means() == window(SECOND).means()


def test_a_saved_window_continues_as_if_it_had_never_stopped(tmp_path):
    torch.save(window(FIRST).state_dict(), tmp_path / "window.pt")
    resumed = window()
    resumed.load_state_dict(torch.load(tmp_path / "window.pt", weights_only=True))
    resumed.add(SECOND)

    assert resumed.means() == window(FIRST, SECOND).means()
    assert_identical(resumed.state_dict(), window(FIRST, SECOND).state_dict())


def test_a_window_saved_before_anything_was_seen_is_empty():
    resumed = window(FIRST)
    resumed.load_state_dict(window().state_dict())
    resumed.add(SECOND)

    assert resumed.means() == window(SECOND).means()


def test_a_window_of_two_processes_goes_on_in_one_with_the_sums_of_both():
    third = losses(3.0, [1.0], [5.0], measured=1.0, error=1.0, own=2.0)
    one, other = window(FIRST).state_dict(), window(third).state_dict()
    resumed = window()

    resumed.load_state_dict({**one, "rows": torch.cat([one["rows"], other["rows"]])})

    assert resumed.means()[:2] == ({"loss": 2.25, "error": 1.0, "own": 1.25}, {"own.size": 2.5})


def test_records_come_back_as_they_were_appended(tmp_path):
    file = tmp_path / "log.jsonl"
    written = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": float("inf"), "text": "a\nb  c"}]
    for record in written:
        append(file, record)

    assert records(file) == written
    assert records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}'])
def test_a_last_line_that_was_cut_off_does_not_hide_the_others(tmp_path, torn):
    file = tmp_path / "log.jsonl"
    append(file, {"step": 1})
    file.write_text(file.read_text() + torn)

    cut_after(file, 2)
    append(file, {"step": 2})

    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')

    with pytest.raises(json.JSONDecodeError):
        records(file)


@pytest.mark.parametrize(("step", "left"), [(0, []), (2, [1, 2]), (9, [1, 2, 4])])
def test_lines_after_the_step_are_cut(tmp_path, step, left):
    file = tmp_path / "log.jsonl"
    for logged in (1, 2, 4):
        append(file, {"step": logged, "loss": 1 / 3})

    cut_after(file, step)

    assert records(file) == [{"step": logged, "loss": 1 / 3} for logged in left]


def test_cutting_a_file_that_is_not_there_makes_none(tmp_path):
    cut_after(tmp_path / "log.jsonl", 3)

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_could_not_be_written_keeps_its_old_text_and_leaves_nothing_beside_it(
    tmp_path, monkeypatch
):
    file = tmp_path / "status.json"
    write_text(file, "old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new")

    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
