"""`difftrain diagnose` of a tiny trained run: what it writes, on one process and two, and what it refuses."""

import json
import shutil

import pytest
from helpers.runs import launched, output_of, tiny, trained

from difftrain.commands.diagnose import diagnose, main, parsed
from difftrain.core.errors import InputError
from difftrain.diagnostics.base import DIAGNOSTICS
from difftrain.report.diagnostics import DRAWN, plots
from difftrain.run.diagnosis import finite, held_out_data
from difftrain.run.trained import TrainedRun

HELD_OUT = "{type: digits, part: held_out}"
QUICK = [
    "{type: denoising_error, num: 30, num_timesteps: 4}", "{type: prediction_error, num: 110, num_timesteps: 2}",
    "{type: exposure_bias, num: 30, steps: 4}", "{type: cumulative_error, num: 30, steps: 5, num_timesteps: 3}",
    "{type: smoothness, num: 3, steps: 3}", "{type: inversion, num: 10, steps: 3}",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    file = tiny(
        folder, training__steps=3, ema={"type": "decay", "decay": 0.5}, sampling__block_size=16
    )
    trained(file)
    return folder / "run"


@pytest.fixture(scope="module")
def results(run):
    assert diagnose(str(run), QUICK, data=HELD_OUT) == DONE
    return json.loads((run / "diagnostics.json").read_text())


def test_every_diagnostic_gives_a_value_and_its_protocol(results):
    assert set(results) == set(DIAGNOSTICS.constructors) == {
        "denoising_error", "prediction_error", "exposure_bias", "cumulative_error", "smoothness", "inversion"
    }  # fmt: skip
    held_out = {"type": "digits", "part": "held_out", "classes": None}
    for result in results.values():
        assert isinstance(result["value"], float)
        assert {"step": 3, "weights": "ema", "held_out": held_out}.items() <= result[
            "protocol"
        ].items()
        assert {"shape", "arguments"} <= set(result["protocol"])
    assert results["prediction_error"]["protocol"]["clipped"] is True  # pixels


def test_a_diagnostic_is_replaced_and_the_others_stay(run, results, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    diagnose(str(copy), ["{type: inversion, num: 5, steps: 2}"], data=HELD_OUT, averaged=False)
    found = json.loads((copy / "diagnostics.json").read_text())

    assert found["inversion"]["protocol"]["num_images"] == 5
    assert found["inversion"]["protocol"]["weights"] == "model"
    assert {name: found[name] for name in found if name != "inversion"} == {
        n: r for n, r in results.items() if n != "inversion"
    }


def test_the_same_command_gives_the_same_numbers(run, results, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    diagnose(str(copy), QUICK, data=HELD_OUT)

    assert json.loads((copy / "diagnostics.json").read_text()) == results


@pytest.mark.distributed
def test_two_processes_give_one_s_numbers_to_the_last_digit(run, results, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "diagnostics.json").unlink()
    which = [text for block in QUICK for text in ("--which", block)]
    process = launched(
        ["-m", "difftrain.commands.diagnose", str(copy), *which, "--data", HELD_OUT], processes=2
    )
    _, problems = output_of(process)

    assert process.returncode == 0, problems
    assert json.loads((copy / "diagnostics.json").read_text()) == results


def test_each_diagnostic_with_curves_is_drawn(results):
    drawn = plots(results)

    assert set(results) - set(DRAWN) == {"inversion"}
    assert len({plot.title for plot in drawn}) == len(drawn) == 9
    for plot in drawn:
        assert plot.figure.startswith("<svg"), plot.title
        assert "NaN" not in plot.figure
        assert plot.caption.endswith(".")
    assert plots({}) == []


def test_numbers_that_are_not_known_are_left_out_of_a_chart(results):
    holes = json.loads(json.dumps(results["denoising_error"]))
    holes["held_out"]["x0_error"] = [None] * 4
    holes["training"]["x0_error"] = [None] * 4

    assert "Nothing finite" in plots({"denoising_error": holes})[0].figure


def test_what_is_not_finite_becomes_null():
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"), {"c": 2})}) == {
        "a": [1.0, None],
        "b": [None, {"c": 2}],
    }


def test_held_out_images_are_the_evaluations_reference(tmp_path):
    (tmp_path / "run").mkdir()
    reference = {"type": "digits", "part": "held_out"}
    evaluation = {
        "features": "pixels",
        "reference": reference,
        "metrics": ["frechet_distance"],
        "num_samples": 9,
    }
    shutil.copy(tiny(tmp_path, evaluation=evaluation), tmp_path / "run" / "recipe.yaml")
    plan = TrainedRun(tmp_path / "run").plan

    assert held_out_data(plan, None).dump() == {
        "type": "digits",
        "part": "held_out",
        "classes": None,
    }
    assert held_out_data(plan, "{type: digits, part: all}").dump() == {
        "type": "digits",
        "part": "all",
        "classes": None,
    }


@pytest.mark.parametrize(("which", "data", "message"), [
    (["smoothnes"], HELD_OUT, r"unknown diagnostic 'smoothnes' \(did you mean 'smoothness'"),
    (["{type: smoothness, num: 0}"], HELD_OUT, "greater than or equal to 1"),
    (["inversion,{type: inversion}"], HELD_OUT, "--which"),
    (["smoothness,inversion", "inversion"], HELD_OUT, "inversion is named twice"),
    (["inversion"], None, "Give them with --data"),
    (["{type: inversion, steps: 51}"], HELD_OUT, "diagnostic inversion: 51 steps, but the schedule has 50 timesteps"),
    (["inversion"], "{type: digit_clips, num_frames: 3, size: 16}", "these are clips"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_remedy(run, which, data, message):
    with pytest.raises(InputError, match=message):
        diagnose(str(run), which, data=data)


def test_names_may_be_given_with_commas_between_them():
    assert [
        part.name for part in parsed(["smoothness, inversion", "{type: exposure_bias, steps: 3}"])
    ] == ["smoothness", "inversion", "exposure_bias"]


def test_the_command_line_ends_with_the_code_of_wrong_input(run, capsys):
    assert main([str(run), "--which", "nothing"]) == WRONG_INPUT
    assert "unknown diagnostic 'nothing'" in capsys.readouterr().err


def test_a_file_that_is_no_json_is_not_overwritten(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "diagnostics.json").write_text("{broken")

    with pytest.raises(InputError, match="is no JSON"):
        diagnose(str(copy), ["{type: inversion, num: 5, steps: 2}"], data=HELD_OUT)
    assert (copy / "diagnostics.json").read_text() == "{broken"
