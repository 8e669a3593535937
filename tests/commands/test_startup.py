"""What a command imports: a small run without text and LoRA waits for no library of those."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import command
from helpers.places import ROOT
from helpers.runs import HANG, environment, tiny
from helpers.tiny_networks import UNLABELLED

pytestmark = pytest.mark.usefixtures("without_report")

# Libraries of features, of text encoders, of tables, of LoRA, of charts, and of the digits alone
UNNEEDED = ["torchmetrics", "transformers", "datasets", "peft", "matplotlib", "sklearn"]
PROGRAM = """
import json, sys
from difftrain.commands.entry import main
try:
    main()
except SystemExit as ended:
    code = ended.code
names = json.loads(sys.stdin.read())
print(json.dumps({"code": code, "found": [name for name in names if name in sys.modules]}))
"""


def imported(*arguments: str | Path) -> list[str]:
    """Run a command in a process of its own; returns which of `UNNEEDED` it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        input=json.dumps(UNNEEDED),
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    return found["found"]


CHANGES = {
    "unconditional": {
        "model": {"type": "unet2d", "config": UNLABELLED},
        "label_dropout": 0.0,
    },
    "class-conditional": {},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_samples_of_digits_need_none_of_the_large_libraries(kind, tmp_path):
    command("train", tiny(tmp_path, training__steps=1, **CHANGES[kind]))
    samples = tmp_path / "samples"

    found = imported(
        "sample", tmp_path / "run", "--num", "2", "--out", samples, "sampling.sampler.steps=3"
    )

    assert found == []
    assert (samples / "000001.png").exists()


def test_training_on_digits_without_scores_needs_no_libraries_of_scores_and_tables(tmp_path):
    file = tiny(tmp_path, training__steps=1)

    assert not {"torchmetrics", "datasets"} & set(imported("train", file))


def test_the_python_names_import_nothing_before_they_are_used():
    code = "import sys, difftrain; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(ROOT)),
        timeout=HANG,
    )

    assert done.stdout == "[]\n", done.stderr
