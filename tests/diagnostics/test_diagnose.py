"""`difftrain diagnose` of a tiny trained run: what it writes, on one process and two."""

import json
import shutil

import pytest
from helpers.commands import command, pictures, refused
from helpers.runs import tiny, trained
from helpers.several import run_program

from difftrain.core.errors import InputError
from difftrain.diagnostics.base import DIAGNOSTICS
from difftrain.recipe.reading import load
from difftrain.report.diagnostics import cards_of
from difftrain.run.diagnosis import diagnose_run, finite, held_out_data, parsed

HELD_OUT = "{type: digits, part: held_out}"
QUICK = [
    "{type: denoising_error, num: 30, num_timesteps: 4}",
    "{type: prediction_error, num: 110, num_timesteps: 2}",
    "{type: exposure_bias, num: 30, steps: 4}",
    "{type: cumulative_error, num: 30, steps: 5, num_timesteps: 3}",
    "{type: smoothness, num: 3, steps: 3}",
    "{type: inversion, num: 10, steps: 3}",
]
ALL = (
    "denoising_error",
    "prediction_error",
    "exposure_bias",
    "cumulative_error",
    "smoothness",
    "inversion",
)


def read(run):
    return json.loads((run / "diagnostics.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    averaged = {"ema": {"type": "decay", "decay": 0.5}}
    trained(tiny(folder, training__steps=3, sampling__block_size=16, **averaged))
    return folder / "run"


@pytest.fixture(scope="module")
def results(run):
    diagnose_run(str(run), QUICK, data=HELD_OUT)
    return read(run)


@pytest.fixture
def copied(run, results, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_every_diagnostic_gives_a_value_and_its_protocol(results):
    assert set(results) == set(DIAGNOSTICS.constructors) == set(ALL)
    held_out = {"type": "digits", "part": "held_out", "classes": None}
    about = {"step": 3, "weights": "ema", "held_out": held_out}
    for result in results.values():
        assert isinstance(result["value"], float)
        assert isinstance(result["standard_error"], float)
        assert about.items() <= result["protocol"].items()
        assert {"shape", "arguments"} <= set(result["protocol"])
    assert results["prediction_error"]["protocol"]["clipped"] is True  # pixels


def test_a_diagnostic_is_replaced_and_the_others_stay(copied, results):
    which = ["{type: inversion, num: 5, steps: 2}"]
    diagnose_run(str(copied), which, data=HELD_OUT, averaged=False)
    found = read(copied)

    assert found["inversion"]["protocol"]["num_images"] == 5
    assert found["inversion"]["protocol"]["weights"] == "model"
    assert {**found, "inversion": results["inversion"]} == results


def test_the_same_command_gives_the_same_numbers(copied, results):
    which = [text for block in QUICK for text in ("--which", block)]
    command("diagnose", copied, *which, "--data", HELD_OUT)

    assert read(copied) == results


@pytest.mark.distributed
def test_two_processes_give_one_s_numbers_to_the_last_digit(copied, results):
    (copied / "diagnostics.json").unlink()
    which = [text for block in QUICK for text in ("--which", block)]

    run_program("difftrain.diagnose", copied, *which, "--data", HELD_OUT, num=2)

    assert read(copied) == results


def test_each_diagnostic_with_curves_is_drawn(results):
    curves = {name: result for name, result in results.items() if name != "inversion"}

    assert all(cards_of({name: result}) for name, result in curves.items())
    assert cards_of({"inversion": results["inversion"]}) == []
    cards = cards_of(results)
    assert len({card.title for card in cards}) == len(cards) >= 8
    assert all(card.note.endswith(".") for card in cards)


def test_numbers_that_are_not_known_do_not_stop_a_chart(results):
    holes = json.loads(json.dumps(results["denoising_error"]))
    holes["held_out"]["x0_error"] = [None] * 4
    holes["training"]["x0_error"] = [None] * 4

    assert len(cards_of({"denoising_error": holes})) == 2


def test_what_is_not_finite_becomes_null():
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"), {"c": 2})}) == {
        "a": [1.0, None],
        "b": [None, {"c": 2}],
    }


def test_held_out_images_are_the_evaluations_reference(tmp_path):
    reference = {"type": "digits", "part": "held_out"}
    evaluation = {
        "features": "pixels",
        "reference": reference,
        "metrics": ["frechet_distance"],
        "num_samples": 9,
    }
    settings = load(tiny(tmp_path, evaluation=evaluation)).evaluation.build()

    assert held_out_data(settings, None).block.dump() == {**reference, "classes": None}
    given = held_out_data(settings, "{type: digits, part: all}").block.dump()
    assert given == {"type": "digits", "part": "all", "classes": None}


@pytest.mark.parametrize(
    ("which", "data", "message"),
    [
        (["smoothnes"], HELD_OUT, r"unknown diagnostic 'smoothnes' \(did you mean 'smoothness'"),
        (["{type: smoothness, num: 0}"], HELD_OUT, "greater than or equal to 1"),
        (["inversion,{type: inversion}"], HELD_OUT, "--which"),
        (["smoothness,inversion", "inversion"], HELD_OUT, "inversion is named twice"),
        (["inversion"], None, "Give them with --data"),
        (
            ["{type: inversion, steps: 51}"],
            HELD_OUT,
            "diagnostic inversion: 51 steps, but the schedule has 50 timesteps",
        ),
        (["inversion"], "{type: digit_clips, num_frames: 3, size: 16}", "yields clips"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(run, which, data, message):
    with pytest.raises(InputError, match=message):
        diagnose_run(str(run), which, data=data)


def test_names_may_be_given_with_commas_between_them():
    parts = parsed(["smoothness, inversion", "{type: exposure_bias, steps: 3}"])

    assert [part.name for part in parts] == ["smoothness", "inversion", "exposure_bias"]


def test_the_command_line_ends_with_the_code_of_wrong_input(run):
    assert "unknown diagnostic 'nothing'" in refused("diagnose", run, "--which", "nothing")


def test_a_file_that_is_no_json_is_not_overwritten(copied):
    (copied / "diagnostics.json").write_text("{broken")

    with pytest.raises(InputError, match="is not JSON"):
        diagnose_run(str(copied), ["{type: inversion, num: 5, steps: 2}"], data=HELD_OUT)
    assert (copied / "diagnostics.json").read_text() == "{broken"


OF_HELD_OUT = "{type: prediction_error, images: held_out}"


def of_digits(folder):
    """Eight pictures in folders that are called as two classes of the model."""
    pictures(folder, num=8, classes=2)
    for i in range(2):
        (folder / f"class{i}").rename(folder / str(i))
    return folder


def test_eight_pictures_are_measured_as_far_as_they_go(copied, tmp_path, monkeypatch):
    """Of all diagnostics one needs more; it says so, and the others are measured."""
    eight = of_digits(tmp_path / "eight")
    (copied / "diagnostics.json").unlink()
    data = f"{{type: image_folder, path: {eight}, labels: folders}}"
    everything = [text for text in QUICK if "prediction" not in text] + [OF_HELD_OUT]
    monkeypatch.setattr("difftrain.run.diagnosis.parsed", lambda which: parsed(everything))

    told = command("diagnose", copied, "--data", data).out

    found = read(copied)
    reason = "100 images are tested at each pixel, got 8. Write num: 100 or more, or give more"
    assert set(found) == set(ALL) - {"prediction_error"} | {"left_out"}
    assert found["left_out"].keys() == {"prediction_error"}
    assert reason in found["left_out"]["prediction_error"]
    assert f"prediction_error is left out: {reason}" in told


def test_a_result_is_no_longer_left_out(copied):
    reasons = {"inversion": "too few", "smoothness": "no images"}
    file = copied / "diagnostics.json"
    file.write_text(json.dumps({**read(copied), "left_out": reasons}))

    diagnose_run(str(copied), ["{type: inversion, num: 5, steps: 2}"], data=HELD_OUT)
    assert read(copied)["left_out"] == {"smoothness": "no images"}

    diagnose_run(str(copied), ["{type: smoothness, num: 3, steps: 3}"], data=HELD_OUT)
    assert "left_out" not in read(copied)


def test_what_was_asked_for_by_name_is_not_left_out(copied, tmp_path):
    eight = of_digits(tmp_path / "eight")
    data = f"{{type: image_folder, path: {eight}, labels: folders}}"
    before = (copied / "diagnostics.json").read_bytes()

    message = refused("diagnose", copied, "--data", data, "--which", OF_HELD_OUT)

    assert "diagnostic prediction_error: 100 images are tested at each pixel, got 8." in message
    assert (copied / "diagnostics.json").read_bytes() == before


def test_where_nothing_can_be_measured_all_reasons_are_given(copied, tmp_path, monkeypatch):
    eight = of_digits(tmp_path / "eight")
    data = f"{{type: image_folder, path: {eight}, labels: folders}}"
    monkeypatch.setattr("difftrain.run.diagnosis.parsed", lambda which: parsed([OF_HELD_OUT]))

    message = refused("diagnose", copied, "--data", data)

    assert "none of the diagnostics can be measured. prediction_error: 100 images" in message
