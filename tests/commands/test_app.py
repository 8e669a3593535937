"""The application: how commands end, one command line at every entry point, and what it shows."""

import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from helpers.commands import command
from helpers.places import ROOT
from helpers.runs import environment, tiny

import difftrain
from difftrain.commands.app import app, run_command
from difftrain.commands.entry import main
from difftrain.core.errors import ExitCode, InputError
from difftrain.core.launch import leave_processes
from difftrain.core.processes import on_all, on_main

ENTRIES = {  # entry points of launchers, and the command of each
    "difftrain.train": "train",
    "difftrain.sample": "sample",
    "difftrain.evaluate": "evaluate",
    "difftrain.diagnose": "diagnose",
    "difftrain.compare": "compare",
}
HANG = 600.0  # seconds after which a process counts as hanging


@pytest.fixture(autouse=True)
def shared_process(monkeypatch):
    """Keep the entry point from taking this process for its own: other tests follow."""
    monkeypatch.setattr("difftrain.commands.entry.take_process", lambda: None)


def fail() -> None:
    raise InputError("seeds: expected numbers, got 'x'.")


def ended(action) -> int:
    """Return the exit code with which a command of this work ends."""
    with pytest.raises(typer.Exit) as caught:
        run_command(action)
    return caught.value.exit_code


def in_a_process(*command_line: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command line of Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *command_line],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=folder,
        timeout=HANG,
    )


def help_of(name: str) -> list[str]:
    """Return the words of a command's help; lines break where the terminal ends."""
    return command(name, "--help").out.replace("Usage: root", "Usage: difftrain").split()


# How a command ends


@pytest.mark.parametrize("where", [on_main, on_all])
def test_work_for_all_processes_is_just_done_in_a_single_one(where):
    assert where(lambda: 3) == 3
    with pytest.raises(InputError, match="expected numbers"):
        where(fail)


def test_wrong_input_is_one_message_and_code_2(capsys):
    assert ended(fail) == 2
    assert capsys.readouterr().err == "error: seeds: expected numbers, got 'x'.\n"


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75), (ExitCode.FAILED, 1)])
def test_work_ends_with_its_own_code(result, code):
    assert ended(lambda: result) == code


def test_other_errors_are_not_caught():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_single_process_has_no_group_to_leave(code):
    assert leave_processes(code) == code


# One command line


@pytest.mark.parametrize("module", ENTRIES)
def test_an_entry_point_of_a_launcher_is_the_command_of_the_application(
    module, monkeypatch, capsys
):
    """The same options, in the same text of help."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["somewhere", "--help"])
        with pytest.raises(SystemExit) as caught:
            main(ENTRIES[module])

    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == help_of(ENTRIES[module])


def test_modules_and_the_package_have_the_same_options_in_processes_of_their_own():
    expected = help_of("sample")

    assert in_a_process("-m", "difftrain.sample", "--help").stdout.split() == expected
    assert in_a_process("-m", "difftrain", "sample", "--help").stdout.split() == expected


def test_the_console_script_is_the_application():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["scripts"] == {"difftrain": f"{main.__module__}:{main.__name__}"}


@pytest.mark.parametrize("module", ENTRIES)
def test_every_entry_point_names_its_command(module):
    text = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text()

    assert f'main("{ENTRIES[module]}")' in text
    assert len(text.splitlines()) < 10


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "RUN", "sampling.seed=3", "--num", "1", "--out", "OUT", "--label", "2"],
        ["sample", "--out", "OUT", "RUN", "--num-samples", "1", "sampling.seed=3", "--label", "2"],
        ["sample", "--label", "2", "--num=1", "--out=OUT", "RUN", "sampling.seed=3"],
    ],
)
def test_options_and_overrides_stand_in_any_order(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr("difftrain.run.sampling.sample_run", lambda *given: seen.append(given))

    command(*arguments)

    (run, num, out, overrides, asked, step, averaged, overwrite), *others = seen
    assert (run, num, out, overrides) == ("RUN", 1, "OUT", ["sampling.seed=3"])
    assert (asked.label, step, averaged, overwrite, others) == (2, None, True, False, [])


def test_the_console_script_ends_with_2_for_wrong_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["difftrain", "check", "no_recipe.yaml"])
    with pytest.raises(SystemExit) as caught:
        main()

    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no recipe")


def test_every_file_of_commands_is_registered():
    files = {file.stem for file in (ROOT / "difftrain" / "commands").glob("*.py")}
    names = {found.name or found.callback.__name__ for found in app.registered_commands}
    names |= {group.name for group in app.registered_groups}

    assert names == files - {"__init__", "app", "entry"} | {"reference"}


# What it shows


def test_the_version_is_shown():
    assert command("--version").out == f"difftrain {difftrain.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", difftrain.__version__)


LINES = ["--quiet train RECIPE", "train --quiet RECIPE", "train RECIPE training.steps=2 --quiet"]


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("line", LINES)
def test_quiet_prints_nothing_wherever_it_stands(tmp_path, line):
    file = str(tiny(tmp_path, training__steps=2))

    outcome = command(*(file if word == "RECIPE" else word for word in line.split()))

    assert (outcome.out, outcome.error) == ("", "")
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_quiet_still_prints_warnings_and_errors(tmp_path, monkeypatch):
    def warn(*given) -> None:
        logging.getLogger("difftrain.data").warning("an image is damaged")
        logging.getLogger("difftrain.data").info("an image is whole")
        raise InputError("the disk is gone")

    monkeypatch.setattr("difftrain.run.checking.check", warn)
    outcome = command("check", "recipe.yaml", "--quiet", code=2)

    assert outcome.out == "an image is damaged\n"
    assert outcome.error == "error: the disk is gone\n"


@pytest.mark.usefixtures("without_report")
def test_verbose_shows_the_names_of_loggers(tmp_path):
    file = tiny(tmp_path, training__steps=1)

    lines = command("train", file, "--verbose").out.splitlines()

    assert lines
    assert all(re.match(r"difftrain\.\w+: ", line) for line in lines), lines
    quiet_again = command("train", file).out
    assert "is done: 1 steps" in quiet_again
    assert "difftrain.run: " not in quiet_again


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from difftrain.commands.entry import main\n"
        "heavy = ['torch', 'diffusers', 'accelerate', 'pydantic', 'numpy', 'transformers']\n"
        "sys.argv = ['difftrain', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, [name for name in heavy if name in sys.modules])\n"
    )
    done = in_a_process("-c", code)
    assert done.returncode == 0, done.stderr

    assert done.stdout.splitlines()[-1] == "0 []"


def test_the_application_leaves_the_librarys_logger_as_other_programs_expect(caplog):
    """A program that calls the library itself sees its messages through its own settings."""
    with caplog.at_level(logging.INFO, "difftrain"):
        logging.getLogger("difftrain.run").info("scored")

    assert caplog.messages == ["scored"]
