"""The scores in a report: their titles and directions, and why some are missing."""

import json
import math
from pathlib import Path

import pytest
from helpers.reports import RECIPE, Page, charts, evaluation, make_run, report, write_lines

from difftrain.report import write_report
from difftrain.report.records import RunFiles
from difftrain.report.score_section import score_curves

TRY_AGAIN = "To compute just them, without training again, run the same command again."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "digits_p2")


def write_evaluation(run: Path, **changes: object) -> None:
    (run / "evaluation.json").write_text(json.dumps(evaluation(2000, **changes)))


def without_scores(run: Path) -> None:
    (run / "evaluation.json").unlink()
    (run / "evaluations.jsonl").unlink()


def test_scores_stand_beside_floor_ratio_features_and_number_of_samples(run):
    expected = "3.733 1.25 ± 0.11 2.99 × lower is better digits classifier 1,797"

    assert f"Fréchet distance {expected}" in report(run).text


FLOOR = {"floor": 10.11, "floor_std": 0.3, "floor_count": 75, "floor_reference_count": 70}
MARK = '<div class="meter">'


@pytest.mark.parametrize(
    ("stated", "in_table", "in_head", "has_level"),
    [
        (
            {"floor_basis": "same counts", "floor_ratio": 0.28},
            "10.11 ± 0.3 0.28 ×",
            "real against real 10.11",
            True,
        ),
        (
            {"floor_basis": "extrapolated", "floor_ratio": 0.28},
            "10.11 ± 0.3 (extrapolated from 75 against 70) 0.28 ×",
            "real against real 10.11 (extrapolated from 75 against 70)",
            True,
        ),
        (
            {"floor_basis": "fewer samples"},
            "10.11 ± 0.3 (75 against 70) –",
            "real against real 10.11 (75 against 70)",
            False,
        ),
        ({}, "10.11 ± 0.3 (75 against 70) –", "real against real 10.11 (75 against 70)", False),
    ],
    ids=lambda value: value.get("floor_basis", "not stated") if isinstance(value, dict) else "",
)
def test_a_floor_of_other_counts_says_them_and_is_no_level(
    run, stated, in_table, in_head, has_level
):
    (run / "evaluations.jsonl").unlink()
    score = {"value": 2.85, "title": "FID", **FLOOR, **stated}
    write_evaluation(run, scores={"fid": score})
    page = report(run)

    assert f"FID 2.85 {in_table}" in page.text
    assert f"FID 2.85 {in_head} " in page.text
    assert (MARK in page.source) == has_level
    (card,) = score_curves([{"step": 1, "scores": {"fid": score}}])
    assert math.isfinite(card.chart.level.value) == has_level


def test_scores_of_another_protocol_are_not_drawn(run):
    write_lines(
        run / "evaluations.jsonl",
        [evaluation(500, protocol_digest="other"), evaluation(1000), evaluation(1500)],
    )
    assert "1 of 3 evaluations used a different protocol and are not drawn." in report(run).text


def test_title_and_direction_are_those_that_the_file_states(run):
    own = {"value": 0.3, "title": "My score", "better": "near 1"}
    write_evaluation(run, scores={"my_score": own})
    page = report(run)

    assert "My score 0.3 near 1 is best" in page.text
    assert "my_score" not in page.text


@pytest.mark.parametrize("better", [{}, {"better": None}, {"better": "sideways"}])
def test_score_without_title_and_direction_shows_its_name_and_claims_none(run, better):
    (run / "evaluations.jsonl").unlink()
    write_evaluation(run, scores={"fid": {"value": 12.5, "floor": 2.5, **better}})
    page = report(run)

    assert "fid 12.5 real against real 2.5 Samples" in page.text
    assert " best" not in page.text
    assert "better" not in page.text


def test_score_that_the_latest_evaluation_lacks_is_still_drawn(run):
    first = evaluation(500)
    last = evaluation(1000)
    del last["scores"]["class_agreement"]
    write_lines(run / "evaluations.jsonl", [first, last])

    assert "Class agreement over training" in charts(report(run))


def test_failed_scores_say_why_and_what_to_do(run):
    failed = {"fid": "out of memory <gpu>", "class_agreement": "no classes"}
    write_evaluation(run, failed=failed, scores={"kid": {"value": 1.5, "title": "KID"}})
    page = report(run)

    head = page.text[: page.text.index("Samples")]
    assert "Could not be computed: fid, Class agreement. The section “Scores” says why." in head
    assert f"These scores failed. {TRY_AGAIN}" in page.text
    assert "fid final, step 2,000 out of memory <gpu>" in page.text
    assert "Class agreement final, step 2,000 no classes" in page.text
    assert "KID 1.5" in head


def test_evaluation_with_failures_only_shows_them(run):
    (run / "evaluations.jsonl").unlink()
    write_evaluation(run, scores={}, failed={"fid": "the weights of Inception are missing."})
    page = report(run)

    assert "No scores yet." in page.text
    assert "fid final, step 2,000 the weights of Inception are missing." in page.text
    assert TRY_AGAIN in page.text


def test_failures_in_training_are_counted_with_the_latest_reason(run):
    records = [evaluation(500, failed={"fid": "first"}), evaluation(1000, failed={"fid": "second"})]
    write_lines(run / "evaluations.jsonl", [*records, evaluation(1500)])
    page = report(run)

    assert "fid in training, 2 of 3 second" in page.text
    assert "Could not be computed" not in page.text  # the final scores are complete


def test_left_out_scores_say_why(run):
    write_evaluation(run, left_out={"nearest_neighbour_ratio": "there are no held-out images."})
    page = report(run)

    assert "These scores were left out." in page.text
    assert "Nearest neighbour ratio there are no held-out images." in page.text
    assert TRY_AGAIN not in page.text


def test_finished_run_says_nothing_of_missing_scores(run):
    text = report(run).text

    for absent in ["failed", "left out", "Could not be computed", "no scores yet"]:
        assert absent not in text


def test_trained_run_without_scores_says_what_comes_next(run):
    without_scores(run)
    (run / "status.json").unlink()
    (run / "recipe.yaml").write_text(RECIPE + "evaluation: {num_samples: 100}\n")
    page = report(run)

    assert "digits_p2 trained" in page.text
    assert "The final weights have no scores yet." in page.text
    assert "it computes just the scores and does not train again." in page.text


def test_final_samples_of_a_trained_run_are_shown(run):
    without_scores(run)
    (run / "status.json").write_text('{"code": null}')
    (run / "recipe.yaml").write_text(RECIPE + "evaluation: {num_samples: 100}\n")
    final = run / "samples" / "final.png"
    final.write_bytes((run / "samples" / "step-0000200.png").read_bytes())
    page = Page(write_report(run))

    assert "final step 200" in page.text


def test_run_without_evaluation_in_its_recipe_awaits_no_scores(run):
    without_scores(run)
    (run / "status.json").unlink()

    assert RunFiles.read(run).state == "finished"
    assert "The final weights have no scores yet." not in report(run).text


def test_memorization_reads_as_a_sentence(run):
    text = report(run).text

    assert "Generated samples are 1.04 times as far from their nearest training sample" in text
    assert "(mean distance 1.3 against 1.25)" in text


@pytest.mark.parametrize("missing", ["failed", "left_out"])
@pytest.mark.parametrize("content", [None, [], "text", {"fid": None}])
def test_reasons_that_cannot_be_read_leave_a_report(run, missing, content):
    write_evaluation(run, **{missing: content})

    assert isinstance(report(run), Page)
