"""Messages of the library: where they go, and which of them are shown."""

import logging
import warnings

import pytest

from difftrain.core.console import ProgressBar, show_messages, showable, wing_logger


@pytest.fixture
def logger():
    """The library's logger, whose settings are restored afterwards."""
    root = logging.getLogger("difftrain")
    before = root.handlers[:], root.level, root.propagate
    yield root
    root.handlers[:], root.level, root.propagate = before


def test_a_module_logs_under_the_name_of_its_wing():
    assert wing_logger("difftrain.data.cache.building").name == "difftrain.data"


def test_shown_messages_go_to_standard_output_once(logger, capsys):
    show_messages()
    show_messages()
    wing_logger("difftrain.data.loader").info("12 images")
    wing_logger("difftrain.data.loader").debug("detail")

    assert capsys.readouterr().out == "12 images\n"


def test_messages_show_their_wing_on_request(logger, capsys):
    show_messages(logging.WARNING, names=True)
    wing_logger("difftrain.run.plan").info("hidden")
    wing_logger("difftrain.run.plan").warning("seen")

    assert capsys.readouterr().out == "difftrain.run: seen\n"


def test_without_a_command_the_library_is_silent_below_a_warning(logger, capsys):
    logger.handlers[:] = []
    logger.propagate = True
    wing_logger("difftrain.data.loader").info("12 images")

    assert capsys.readouterr().out == ""


def test_progress_without_a_terminal_is_a_line_at_the_end(logger, capsys, monkeypatch):
    monkeypatch.setattr("difftrain.core.console.INTERVAL", float("inf"))
    show_messages()
    bar = ProgressBar(total=3, done=1, shown=True, unit="step", what="training")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar.show(2)
        bar.show(3, "loss 0.5")
        bar.close()

    assert capsys.readouterr().out == "training: step 3/3  loss 0.5  0 s left\n"


def test_progress_that_is_not_shown_says_nothing(logger, capsys):
    show_messages()
    bar = ProgressBar(total=1, done=0, shown=False, unit="step")
    bar.show(1)
    bar.close()

    assert capsys.readouterr().out == ""


def test_a_name_that_is_not_utf_8_is_shown_with_escapes():
    assert showable("photos/ü/\udcff.png") == "photos/ü/\\udcff.png"
