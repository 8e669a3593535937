"""What the entry points share, in one process; in two it is tested with the runs."""

import pytest

from difftrain.distributed import on_all, on_main
from difftrain.entry import guarded, leave, say
from difftrain.registry import InputError


def refuse():
    raise InputError("seeds: expected numbers, got 'x'.")


@pytest.mark.parametrize("where", [on_main, on_all])
def test_alone_work_for_all_is_just_done(where):
    assert where(lambda: 3) == 3
    with pytest.raises(InputError, match="expected numbers"):
        where(refuse)


def test_wrong_input_is_one_message_and_code_2(capsys):
    assert guarded(refuse) == 2
    assert capsys.readouterr().err == "error: seeds: expected numbers, got 'x'.\n"


def test_what_is_guarded_gives_its_own_code_and_other_errors_pass():
    assert guarded(lambda: 75) == 75
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_alone_there_is_nothing_to_leave(code):
    assert leave(code) == code


def test_say_prints(capsys):
    say("scored")
    assert capsys.readouterr().out == "scored\n"
