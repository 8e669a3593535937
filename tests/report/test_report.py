"""Reports, read back as a browser would: balanced, self-contained, and right in any state."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from helpers.reports import (
    Page,
    charts,
    curve,
    decoded,
    evaluation,
    grid,
    log_record,
    make_run,
    points_of,
    report,
    write_lines,
)
from PIL import Image

from difftrain.core.errors import InputError
from difftrain.report import write_report
from difftrain.report.records import RunFiles, read_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "digits_p2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A whole run and its report, to be read only."""
    run = make_run(tmp_path_factory.mktemp("finished") / "digits_p2")
    return run, report(run)


# What it shows


def test_headline_names_state_scores_and_their_floor(finished):
    _, page = finished
    top = page.text[: page.text.index("Samples")]
    for expected in ["digits_p2 finished", "2,000 of 2,000", "512,000", "1,234,567", "step 1,500"]:
        assert expected in top
    assert "Fréchet distance 3.733 real against real 1.25 · lower is better" in top


def test_summary_names_what_is_chosen_and_leaves_out_what_everyone_has(finished):
    _, page = finished
    parts = "p2 gamma=1 k=1, input perturbation gamma=0.1, step variation weight=0.01 every=2"
    assert f"unet2d digits, linear schedule, epsilon, {parts}, EMA, 2,000 steps of 256" in page.text


def test_every_section_is_there(finished):
    _, page = finished
    parts = [
        "Terms of the loss",
        "Gradient norm",
        "Learning rate",
        "Weight by noise level",
        "Error by noise level",
        "Images per second",
    ]
    for title in [*parts, "Environment"]:
        assert title in page.text
    assert "num_timesteps: 1000" in page.text
    assert "training 1 min 40 s (85 %)" in page.text
    assert "Images that could not be read: 12. The first 8:" in page.text
    assert "broken_7.png" in page.text
    assert "broken_8.png" not in page.text


def test_pictures_are_embedded_whole_and_the_newest_comes_first(finished):
    run, page = finished
    pictures = [decoded(source) for source in page.pictures]
    assert pictures[0] == (run / "samples" / "step-0002000.png").read_bytes()
    assert pictures[1] == (run / "samples" / "step-0000200.png").read_bytes()
    assert len(pictures) == 7


def test_scatter_plot_of_points_is_a_sample_like_any_other(run):
    """Data sets of points save RGBA plots, which are neither square nor pixelated."""
    plot = run / "samples" / "final.png"
    Image.new("RGBA", (640, 480), (255, 255, 255, 0)).save(plot)
    page = report(run)

    assert decoded(page.pictures[0]) == plot.read_bytes()
    assert f'<img class="smooth" src="{page.pictures[0]}" alt="final">' in page.source


def test_large_grids_are_reduced(run):
    grid(run / "samples" / "final.png", size=1600)
    assert Image.open(io.BytesIO(decoded(report(run).pictures[0]))).size == (1200, 1200)


def test_page_needs_nothing_from_outside(finished):
    _, page = finished
    source = page.source
    assert not re.search(
        r"https?://|<script|<link|@import|src=\"(?!data:)|href=\"(?!#|data:)|url\((?!#)", source
    )


def test_charts_take_their_colours_from_the_page(finished):
    _, page = finished
    assert page.tags["svg"] >= 9
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL))
    assert "var(--c0)" in drawn
    assert not re.search(r"#0[ab]000", drawn)


def test_weight_is_drawn_over_log_snr_on_the_trained_error_and_on_epsilon(finished):
    _, page = finished
    drawn = charts(page)["Weight along log-SNR"]

    weight, on_epsilon = (points_of(drawn, dashed) for dashed in (False, True))

    assert [len(weight), len(on_epsilon)] == [4, 4]  # not where SNR = 0
    assert [x for x, _ in weight] == sorted(x for x, _ in weight)  # noise to the left
    assert weight[1][0] - weight[0][0] == pytest.approx(
        weight[3][0] - weight[2][0], abs=0.01
    )  # log-SNR -4, 0, 4, 8
    decades = (weight[0][1] - weight[2][1]) / (
        weight[3][1] - weight[1][1]
    )  # 0.1 to 0.1 over 0.5 to 0.004, upwards
    assert decades == pytest.approx(0.0, abs=0.01)
    assert (on_epsilon[3][1] - on_epsilon[0][1]) / (weight[3][1] - weight[1][1]) == pytest.approx(
        math.log(5.5 / 0.004) / math.log(0.5 / 0.004), rel=0.01
    )
    assert "on the v error" in page.text
    assert "the same on the epsilon error" in page.text


def test_weight_of_an_epsilon_run_is_one_curve(run):
    (run / "weights.json").write_text(json.dumps(curve("epsilon")))
    page = report(run)

    assert points_of(charts(page)["Weight along log-SNR"], dashed=True) == []
    assert "the same on the epsilon error" not in page.text


def test_weight_is_shown_before_anything_is_logged(run):
    (run / "log.jsonl").unlink()
    assert "Weight along log-SNR" in charts(report(run))


BROKEN_WEIGHTS = [
    '{"trained_error": "v_pre',
    "[]",
    "{}",
    json.dumps({"trained_error": None}),
    json.dumps(curve("other", log_snr=None)),
    json.dumps(curve("sample", weight=[1.0], weight_on_epsilon=["a", {}, None, True, 1e400])),
    json.dumps(curve("sample", log_snr=[None] * 5)),
    json.dumps(curve("v_prediction", weight=[0] * 5, weight_on_epsilon=[0] * 5)),
    json.dumps(curve("epsilon", weight=[1] * 5)),
]


@pytest.mark.parametrize("content", BROKEN_WEIGHTS, ids=range(9))
def test_weights_that_cannot_be_drawn_leave_a_report(run, content):
    (run / "weights.json").write_text(content)
    assert not re.search(r"\b(nan|None|inf)\b", report(run).text)


# Any state


FILES = [
    "recipe.yaml",
    "weights.json",
    "skipped.jsonl",
    "log.jsonl",
    "evaluations.jsonl",
    "evaluation.json",
    "status.json",
    "environment.json",
]


@pytest.mark.parametrize("missing", FILES)
def test_each_file_may_be_missing(run, missing):
    (run / missing).unlink()
    report(run)


def test_empty_folder_has_a_report(tmp_path):
    page = report(tmp_path)
    for expected in [
        tmp_path.name,
        "running",
        "No scores yet.",
        "No samples yet.",
        "Nothing logged yet.",
    ]:
        assert expected in page.text


def test_one_logged_step_is_drawn_as_points(run):
    write_lines(run / "log.jsonl", [log_record(20)])
    assert "20 of 2,000" in report(run).text


def test_line_cut_off_by_a_kill_is_ignored(run):
    whole = [log_record(20), log_record(40)]
    write_lines(run / "log.jsonl", whole, ending='\n{"step": 60, "loss": 0.4')
    assert read_lines(run / "log.jsonl") == (whole, 1)
    report(run)


def test_files_cut_off_by_a_kill_are_ignored(run):
    (run / "status.json").write_text('{"code": ')
    (run / "recipe.yaml").write_text("model: {type: unet2d")
    picture = run / "samples" / "step-0000200.png"
    picture.write_bytes(picture.read_bytes()[:200])
    page = report(run)
    assert "step-0000200.png could not be read." in page.text
    assert "model: {type: unet2d" in page.text


def test_values_that_are_no_numbers_are_left_out(run):
    bands = [
        {"log_snr": [None, -8], "error": 0.4, "count": 3},
        {"log_snr": [8, None], "error": None, "count": 3},
        {"error": 1},
        {},
        None,
    ]
    broken = {
        "loss": math.nan,
        "terms": {"error": None, "extra": math.inf},
        "lr": "x",
        "grad_norm": 1e308,
        "wall": None,
        "bands": bands,
    }
    records = [
        log_record(20),
        log_record(40) | broken,
        {"step": None},
        {"loss": 1},
        log_record(60),
        {"step": 80} | broken,
    ]
    write_lines(run / "log.jsonl", records)
    distance, bare = {"value": math.nan, "floor": None}, 0.25
    scores = {
        "frechet_distance": distance,
        "odd": {"value": "text"},
        "bare": bare,
        "zero": {"value": 1, "floor": 0},
        "null": None,
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation(60) | {"scores": scores}))
    page = report(run)
    assert "bare 0.25" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_all_text_is_escaped(run):
    attack = '<b onclick="x">&$a^b$</b>'
    (run / "recipe.yaml").write_text(json.dumps({"output": attack, "model": {"type": attack}}))
    (run / "status.json").write_text(json.dumps({"code": 1, "message": attack}))
    write_lines(
        run / "log.jsonl",
        [log_record(step) | {"terms": {attack: 1.0, "other": 2.0}} for step in (20, 40)],
    )
    (run / "evaluation.json").write_text(
        json.dumps(evaluation(40) | {"scores": {attack: {"value": 1.0, "features": attack}}})
    )
    write_lines(run / "skipped.jsonl", [{"name": attack, "reason": attack, "step": 1}])
    page = report(run)
    assert "<b onclick" not in page.source
    assert page.text.count(attack) >= 6


@pytest.mark.parametrize(
    ("status", "last", "state"),
    [
        ({"code": 0}, 5, "finished"),
        ({"code": 75}, 5, "stopped"),
        ({"code": 1}, 5, "failed"),
        ({"code": 2}, 5, "failed"),
        ({"code": None}, 5, "running"),
        ({}, 5, "running"),
        ({}, 9, "finished"),
    ],
)
def test_state(tmp_path, status, last, state):
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "recipe.yaml").write_text("training: {steps: 9}")
    write_lines(tmp_path / "log.jsonl", [{"step": last}])

    assert RunFiles.read(tmp_path).state == state


def test_message_is_shown_unless_all_is_well(run):
    assert "Exit code" not in report(run).text
    (run / "status.json").write_text(
        json.dumps({"code": 75, "message": "stopped by SIGTERM after step 2000"})
    )
    page = report(run)
    assert "stopped by SIGTERM after step 2000" in page.text


def test_report_replaces_the_old_one_and_leaves_nothing_beside_it(run):
    write_report(run)
    (run / "evaluation.json").write_text(
        json.dumps(evaluation(2000) | {"scores": {"frechet_distance": {"value": 77.7}}})
    )
    assert "77.7" in report(run).text
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_changes_on_a_resume_are_listed_and_the_curves_skip_them(run):
    records = [log_record(step) for step in range(20, 2001, 20)]
    changed = {"evaluation.num_samples": [100, 200], "ema": [None, {"decay": 0.9}]}
    lines = [*records[:50], {"step": 1000, "changed": changed}, *records[50:]]
    before = report(run)
    write_lines(run / "log.jsonl", lines)
    after = report(run)

    assert "Changes on a resume" not in before.text
    expected = "step key before after 1,000 evaluation.num_samples 100 200 1,000 ema null"
    assert f"Changes on a resume {expected} {{decay: 0.9}}" in after.text
    assert charts(after) == charts(before)  # the record of step 1000 counts, not the change


def test_no_change_is_lost_in_a_long_log(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in range(9000)]
    lines.insert(3001, {"step": 3000, "changed": {"seed": [0, 1]}})
    write_lines(tmp_path / "log.jsonl", lines)
    files = RunFiles.read(tmp_path)

    assert files.changes == [lines[3001]]
    assert files.every == 5
    assert 1800 <= len(files.log) <= 1803


@pytest.mark.parametrize("changed", [None, {}, [], {"seed": 3}, {"seed": [1]}])
def test_change_that_cannot_be_read_leaves_a_report(run, changed):
    write_lines(run / "log.jsonl", [log_record(20), {"step": 20, "changed": changed}])

    assert "Changes on a resume" not in report(run).text


def test_folder_that_does_not_exist_is_an_input_error_and_is_not_made(tmp_path):
    with pytest.raises(
        InputError, match=r"^report: there is no folder '.*typo'\. Write the folder"
    ):
        write_report(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
