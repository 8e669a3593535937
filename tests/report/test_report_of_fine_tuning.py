"""The report of a fine-tuning run: what trains, its prompts, and the held-out loss."""

import json

import pytest
from helpers.reports import Page, charts, make_run, points_of, report, write_lines

from difftrain.report.fine_tuning import gathered, mean_within


def record(step, **changes):
    """Bands of two units from -10 to 14; the noisy half falls with the steps."""
    bands = [
        {
            "log_snr": [low, low + 2.0],
            "timesteps": 1 + low % 3,
            "loss": (2.0 if low < 0 else 0.5) / (1 + step / 1000 * (low < 0)),
        }
        for low in range(-10, 14, 2)
    ]
    return {
        "step": step,
        "value": 1 / (1 + step / 1000),
        "bands": bands,
        "held_out": {"loss": [1.0]},
        **changes,
    }


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "lora")
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        recipe + 'sampling: {prompts: [a <b>cat</b>, "", a dog]}\nadapter: {type: lora, rank: 8}\n'
    )
    environment = json.loads((folder / "environment.json").read_text())
    trains = "LoRA of rank 8 on 32 layers: 123,456 of 1,234,567 parameters train"
    (folder / "environment.json").write_text(json.dumps({**environment, "trains": trains}))
    write_lines(folder / "validation.jsonl", [record(step) for step in (0, 500, 1000)])
    return folder


def test_what_trains_and_the_prompts_are_shown(run):
    page = report(run)

    assert "adapter LoRA of rank 8 on 32 layers: 123,456 of 1,234,567 parameters train" in page.text
    assert "Prompts, in turn, row by row: a <b>cat</b> · (no prompt) · a dog" in page.text
    assert "lora rank=8" in page.text


def test_many_prompts_are_cut_short(run):
    (run / "recipe.yaml").write_text(
        json.dumps({"output": "x", "sampling": {"prompts": [f"no {i}." for i in range(20)]}})
    )

    assert "no 15. · and 4 more" in report(run).text


def test_the_held_out_loss_is_drawn_beside_the_loss_and_by_noise_level(run):
    page = report(run)
    drawn = charts(page)

    mean, bands = drawn["Held-out loss over steps"], drawn["Held-out loss by noise level"]
    heights = [y for _, y in points_of(mean, dashed=False)]
    assert heights == sorted(heights)  # an SVG's y grows downwards
    assert len(heights) == 3
    curves = ["log-SNR -10 to -4", "log-SNR -4 to 2", "log-SNR 2 to 8", "log-SNR 8 to 14"]
    assert [curve for curve in curves if curve in bands] == curves
    assert page.text.index("Held-out loss") < page.text.index("Terms of the loss")


def test_a_run_without_validation_has_no_such_charts(tmp_path):
    page = report(make_run(tmp_path / "plain"))

    assert "Held-out" not in page.text
    assert "Prompts" not in page.text
    assert "adapter" not in page.text


@pytest.mark.parametrize(
    "change",
    [{"bands": None}, {"bands": [3, {"log_snr": None}, {}]}, {"value": None}, {"bands": []}],
)
def test_records_that_are_no_numbers_leave_a_report(run, change):
    write_lines(run / "validation.jsonl", [record(0, **change)], ending='\n{"step": 5')

    assert isinstance(report(run), Page)


def test_bands_are_gathered_evenly_and_averaged_by_their_timesteps():
    intervals = [(float(low), low + 2.0) for low in range(-10, 14, 2)]

    assert gathered(intervals) == [(-10, -4), (-4, 2), (2, 8), (8, 14)]
    assert gathered(intervals[:2]) == [(-10, -8), (-8, -6)]
    assert gathered([]) == []
    assert (
        mean_within({(0.0, 2.0): (1.0, 3), (2.0, 4.0): (5.0, 1), (4.0, 6.0): (9.0, 9)}, (0.0, 4.0))
        == 2.0
    )
