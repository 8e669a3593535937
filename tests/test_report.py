"""Reports, read back as a browser would: balanced, self-contained, and right for a run in any state."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difftrain.report import write_comparison, write_report
from difftrain.report.headline import state_of, summary
from difftrain.report.page import duration, element, number, shown
from difftrain.report.plots import lines, smoothed
from difftrain.report.records import bands_of, by_step, read_lines

VOID = {"meta", "img"}
RECIPE = """\
output: runs/digits_p2
seed: 0
model: {type: unet2d, preset: digits, channels: [32, 64]}
schedule: {type: linear, num_timesteps: 1000}
parameterization: epsilon
objective:
  weighting: {type: p2, gamma: 1.0, k: 1.0}
  timesteps: {type: uniform}
  perturbation: {type: input_perturbation, gamma: 0.1}
  regularizers: [{type: step_variation, weight: 0.01, every: 2}]
data: {type: digits}
training: {steps: 2000, batch_size: 256}
ema: {decay: 0.999}
"""
PROTOCOL = {"sampler": {"type": "ddim", "num_steps": 50}, "seed": 0, "quantized": True}


class Page(HTMLParser):
    """The parsed page: its text, its tags, its pictures. Parsing fails on a tag that closes another."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.open, self.tags, self.pictures, self.words = path.read_text(encoding="utf-8"), [], Counter(), [], []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def decoded(source: str) -> bytes:
    return base64.b64decode(source.removeprefix("data:image/png;base64,"))


def log_record(step: int) -> dict:
    error, variation = 0.9 * math.exp(-step / 400) + 0.1, 0.02 * math.exp(-step / 900)
    band = {low: (0.02 + 0.9 / (1 + math.exp(-0.6 * low))) * (1 + math.exp(-step / 300)) for low in range(-10, 10, 2)}
    return {
        "step": step,
        "loss": error + variation,
        "terms": {"error": error, "step_variation": variation},
        "lr": 1e-3 * min(1, step / 200),
        "grad_norm": 0.8 + 2 * math.exp(-step / 100),
        "images": 256 * step,
        "bands": [{"log_snr": [low, low + 2], "error": error, "count": 25} for low, error in band.items()],
        "wall": {"seconds": step / 20, "images_per_second": 4100 + step % 70},
    }


def evaluation(step: int, **more: object) -> dict:
    distance = 3 + 40 * math.exp(-step / 500)
    scores = {
        "frechet_distance": {"value": distance, "floor": 1.25, "floor_std": 0.11, "features": "digits classifier", "floor_count": 450},
        "class_agreement": {"value": 1 - 0.8 * math.exp(-step / 600)},
        "nearest_neighbour_ratio": {"value": 1.04},
    }
    wall = {"seconds": 3.1, "share": 0.041}
    return {"step": step, "num_samples": 1797, "scores": scores, "protocol": PROTOCOL, "weights": "ema", "wall": wall} | more


def curve(trained: str, **changes: object) -> dict:
    """A weights.json whose schedule ends at SNR = 0: there JSON has null."""
    log_snr = [8.0, 4.0, 0.0, -4.0, None]
    return {
        "trained_error": trained, "t": [0, 1, 2, 3, 4], "log_snr": log_snr, "weight": [0.004, 0.1, 0.5, 0.1, 0.0],
        "weight_on_epsilon": [0.004, 0.12, 1.0, 5.5, None],
    } | changes  # fmt: skip


def charts(page: Page) -> dict[str, str]:
    """Every chart's SVG by its label."""
    return {label: svg for svg, label in re.findall(r'(<svg role="img" aria-label="([^"]*)".*?</svg>)', page.source, flags=re.DOTALL)}


def points_of(svg: str, dashed: bool) -> list[tuple[float, float]]:
    """The corners of the chart's (first) whole or dashed curve, in the SVG's own coordinates."""
    paths = re.findall(r'<path d="([^"]*)"([^>]*)', svg)
    found = [d for d, style in paths if "stroke: var(--c" in style and ("stroke-dasharray" in style) == dashed]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", found[0])] if found else []


def write_lines(path: Path, records: list[dict], ending: str = "\n") -> None:
    path.write_text("\n".join(map(json.dumps, records)) + ending)


def grid(path: Path, seed: int = 0, size: int = 82) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)).save(path)
    return path


def make_run(folder: Path) -> Path:
    for step in range(200, 2001, 200):
        grid(folder / "samples" / f"step-{step:07d}.png", seed=step)
    (folder / "recipe.yaml").write_text(RECIPE)
    write_lines(folder / "log.jsonl", [log_record(step) for step in range(20, 2001, 20)])
    write_lines(folder / "evaluations.jsonl", [evaluation(step, selected_by=abs(step - 1500)) for step in range(500, 2001, 500)])
    (folder / "evaluation.json").write_text(json.dumps(evaluation(2000)))
    (folder / "status.json").write_text(json.dumps({"code": 0, "message": "done"}))
    seconds = {"training": 100.0, "evaluation": 12.0, "sampling": 5.5}
    (folder / "environment.json").write_text(json.dumps({"difftrain": "0.1.0", "device": "cpu", "parameters": 1234567, "seconds": seconds}))
    (folder / "weights.json").write_text(json.dumps(curve("v_prediction")))
    write_lines(folder / "skipped.jsonl", [{"name": f"broken_{i}.png", "reason": "truncated", "step": i} for i in range(12)])
    return folder


def report(run: Path) -> Page:
    return Page(write_report(run))


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


def test_scores_stand_beside_floor_ratio_features_and_number_of_samples(finished):
    _, page = finished
    assert "Fréchet distance 3.733 1.25 ± 0.11 2.99 × lower is better digits classifier 1,797" in page.text


def test_every_section_is_there(finished):
    _, page = finished
    parts = ["Terms of the loss", "Gradient norm", "Learning rate", "Weight by noise level", "Error by noise level", "Images per second"]
    for title in [*parts, "Environment"]:
        assert title in page.text
    assert "num_timesteps: 1000" in page.text
    assert "training 1 min 40 s (85 %)" in page.text
    assert "12 could not be read; the first 8:" in page.text
    assert "broken_7.png" in page.text
    assert "broken_8.png" not in page.text


def test_pictures_are_embedded_whole_and_the_newest_comes_first(finished):
    run, page = finished
    pictures = [decoded(source) for source in page.pictures]
    assert pictures[0] == (run / "samples" / "step-0002000.png").read_bytes()
    assert pictures[1] == (run / "samples" / "step-0000200.png").read_bytes()
    assert len(pictures) == 7


def test_large_grids_are_reduced(run):
    grid(run / "samples" / "final.png", size=1600)
    assert Image.open(io.BytesIO(decoded(report(run).pictures[0]))).size == (1200, 1200)


def test_page_needs_nothing_from_outside(finished):
    _, page = finished
    source = page.source
    assert not re.search(r"https?://|<script|<link|@import|src=\"(?!data:)|href=\"(?!#|data:)|url\((?!#)", source)


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
    assert weight[1][0] - weight[0][0] == pytest.approx(weight[3][0] - weight[2][0], abs=0.01)  # log-SNR -4, 0, 4, 8
    decades = (weight[0][1] - weight[2][1]) / (weight[3][1] - weight[1][1])  # 0.1 to 0.1 over 0.5 to 0.004, upwards
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


@pytest.mark.parametrize("content", [
    '{"trained_error": "v_pre', "[]", "{}", json.dumps({"trained_error": None}), json.dumps(curve("other", log_snr=None)),
    json.dumps(curve("sample", weight=[1.0], weight_on_epsilon=["a", {}, None, True, 1e400])),
    json.dumps(curve("sample", log_snr=[None] * 5)), json.dumps(curve("v_prediction", weight=[0] * 5, weight_on_epsilon=[0] * 5)),
    json.dumps(curve("epsilon", weight=[1] * 5)),
], ids=range(9))  # fmt: skip
def test_weights_that_cannot_be_drawn_leave_a_report(run, content):
    (run / "weights.json").write_text(content)
    assert not re.search(r"\b(nan|None|inf)\b", report(run).text)


# Any state


FILES = ["recipe.yaml", "weights.json", "log.jsonl", "evaluations.jsonl", "evaluation.json", "status.json", "environment.json"]


@pytest.mark.parametrize("missing", FILES)
def test_each_file_may_be_missing(run, missing):
    (run / missing).unlink()
    report(run)


def test_empty_folder_has_a_report(tmp_path):
    page = report(tmp_path)
    for expected in [tmp_path.name, "running", "No evaluation yet.", "No samples yet.", "Nothing logged yet."]:
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
    bands = [{"log_snr": [None, -8], "error": 0.4, "count": 3}, {"log_snr": [8, None], "error": None, "count": 3}, {"error": 1}, {}, None]
    broken = {"loss": math.nan, "terms": {"error": None, "extra": math.inf}, "lr": "x", "grad_norm": 1e308, "wall": None, "bands": bands}
    records = [log_record(20), log_record(40) | broken, {"step": None}, {"loss": 1}, log_record(60), {"step": 80} | broken]
    write_lines(run / "log.jsonl", records)
    distance, bare = {"value": math.nan, "floor": None}, 0.25
    scores = {"frechet_distance": distance, "odd": {"value": "text"}, "bare": bare, "zero": {"value": 1, "floor": 0}, "null": None}
    (run / "evaluation.json").write_text(json.dumps(evaluation(60) | {"scores": scores}))
    page = report(run)
    assert "Bare 0.25" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_all_text_is_escaped(run):
    attack = '<b onclick="x">&$a^b$</b>'
    (run / "recipe.yaml").write_text(json.dumps({"output": attack, "model": {"type": attack}}))
    (run / "status.json").write_text(json.dumps({"code": 1, "message": attack}))
    write_lines(run / "log.jsonl", [log_record(step) | {"terms": {attack: 1.0, "other": 2.0}} for step in (20, 40)])
    (run / "evaluation.json").write_text(json.dumps(evaluation(40) | {"scores": {attack: {"value": 1.0, "features": attack}}}))
    write_lines(run / "skipped.jsonl", [{"name": attack, "reason": attack, "step": 1}])
    page = report(run)
    assert "<b onclick" not in page.source
    assert page.text.count(attack) >= 6


@pytest.mark.parametrize(
    ("status", "last", "state"),
    [({"code": 0}, 5, "finished"), ({"code": 75}, 5, "stopped"), ({"code": 1}, 5, "failed"), ({}, 5, "running"), ({}, 9, "finished")],
)
def test_state(status, last, state):
    assert state_of(status, [{"step": last}], {"training": {"steps": 9}}) == state


def test_message_is_shown_unless_all_is_well(run):
    assert "Exit code" not in report(run).text
    (run / "status.json").write_text(json.dumps({"code": 75, "message": "stopped by SIGTERM after step 2000"}))
    page = report(run)
    assert "stopped by SIGTERM after step 2000" in page.text


def test_scores_of_another_protocol_are_not_drawn(run):
    write_lines(run / "evaluations.jsonl", [evaluation(500, protocol_digest="other"), evaluation(1000), evaluation(1500)])
    assert "1 evaluations under another protocol are not drawn." in report(run).text


# How it reads


def test_long_logs_are_thinned_evenly_and_keep_their_end(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1_000_000)))
    records, every = read_lines(path)
    steps = [record["step"] for record in records]
    assert every == 500
    assert steps[:-2] == list(range(0, 1_000_000, 500))
    assert steps[-2:] == [999_998, 999_999]


def test_step_run_again_after_a_resume_counts_once_as_run_last():
    records = [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 3, "loss": 3}, {"step": 2, "loss": 20}]
    assert by_step(records) == [{"step": 1, "loss": 1}, {"step": 2, "loss": 20}, {"step": 3, "loss": 3}]


def test_bands_average_samples_not_records():
    few, many = ({"step": 1, "bands": [{"log_snr": [0, 1], "error": error, "count": count}]} for error, count in [(1.0, 1), (4.0, 2)])
    bands = bands_of([few, many])
    assert bands.intervals == [(0, 1)]
    assert bands.error(slice(None)) == pytest.approx([3.0])


def test_bands_without_samples_are_nothing():
    assert bands_of([{"step": 1, "bands": [{"log_snr": [0, 1], "error": None, "count": 0}]}, {"step": 2}]) is None


def test_moving_average_keeps_a_constant_to_its_ends():
    assert smoothed(np.full(30, 2.5), 7) == pytest.approx(np.full(30, 2.5))


def test_same_data_give_the_same_chart_and_matplotlib_is_left_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert lines({"a": ([1, 2], [1.0, 3.0])}, "a") == lines({"a": ([1, 2], [1.0, 3.0])}, "a")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.41234567, "0.4123"), (1234567, "1,234,567"), (12345.6, "12,346"), (0, "0"), (None, "–"), (math.nan, "–"), (True, "–"), ("1", "–")],
)
def test_numbers_as_text(value, text):
    assert shown(value) == text


def test_durations_as_text():
    assert [duration(seconds) for seconds in (12.34, 147.8, 7500)] == ["12.3 s", "2 min 28 s", "2 h 5 min"]


def test_attributes_are_escaped():
    assert element("p", "a<b", class_='"x"') == '<p class="&quot;x&quot;">a&lt;b</p>'
    assert math.isnan(number(10**400))


def test_summary_of_no_recipe_is_empty():
    assert summary({}) == ""


def test_report_replaces_the_old_one_and_leaves_nothing_beside_it(run):
    write_report(run)
    (run / "evaluation.json").write_text(json.dumps(evaluation(2000) | {"scores": {"frechet_distance": {"value": 77.7}}}))
    assert "77.7" in report(run).text
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def test_report_imports_neither_torch_nor_pyplot():
    code = "import sys, difftrain.report; sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Comparison


@pytest.fixture
def results(tmp_path: Path) -> dict:
    totals, runs = {}, []
    for name, base in [("digits_unit", 4.0), ("digits_p2", 3.0), ("digits_debiased", 3.5)]:
        values = [base, base + 0.2, base + 0.4]
        agreement = [0.9, 0.92, 0.94]
        totals[name] = {
            "frechet_distance": {"mean": base + 0.2, "std": 0.2, "values": values, "floor": 1.25},
            "class_agreement": {"mean": 0.92, "std": 0.02, "values": agreement},
        }
        for seed, value in enumerate(values):
            scores = {"frechet_distance": {"value": value, "floor": 1.25}, "class_agreement": {"value": agreement[seed]}}
            runs.append({"name": name, "recipe": f"recipes/{name}.yaml", "seed": seed, "run": f"runs/{name}/{seed}", "scores": scores})
            grid(tmp_path / "runs" / name / str(seed) / "samples" / "final.png", seed=int(100 * value))
    p2 = {"type": "p2", "gamma": 1.0}
    differences = {"digits_unit": {}, "digits_p2": {"objective.weighting": p2}, "digits_debiased": {"objective.weighting": "debiased"}}
    return {"runs": runs, "summary": totals, "differences": differences}


def test_comparison_shows_means_spread_floor_and_what_differs(results, tmp_path):
    page = Page(write_comparison(results, tmp_path))
    for expected in [
        "3 recipes compared digits_unit, digits_p2, digits_debiased 9 runs, seeds 0, 1, 2",
        "digits_p2 3.2 ± 0.2 0.92 ± 0.02",
        "real against real 1.25 –",
        "objective.weighting {type: p2, gamma: 1.0} debiased",
    ]:
        assert expected in page.text
    assert not re.search(r"https?://", page.source)


def test_comparison_marks_the_best_mean(results, tmp_path):
    page = Page(write_comparison(results, tmp_path))
    assert "<b>3.2 ± 0.2</b>" in page.source
    assert "<b>4.2 ± 0.2</b>" not in page.source


def test_comparison_shows_the_samples_of_one_seed_side_by_side(results, tmp_path):
    page = Page(write_comparison(results, tmp_path))
    expected = [tmp_path / "runs" / name / "0" / "samples" / "final.png" for name in results["summary"]]
    assert [decoded(source) for source in page.pictures] == [path.read_bytes() for path in expected]


@pytest.mark.parametrize("key", ["runs", "summary", "differences"])
def test_comparison_lacking_a_part_is_written(results, tmp_path, key):
    Page(write_comparison({name: part for name, part in results.items() if name != key}, tmp_path / "new"))


def test_comparison_of_values_that_are_no_numbers_is_written(tmp_path):
    totals = {"a<b": {"frechet_distance": {"mean": None, "std": math.nan, "values": [None, math.inf]}}, "empty": {}}
    page = Page(write_comparison({"summary": totals, "runs": [{"name": "a<b", "seed": 0, "run": "nowhere", "scores": None}]}, tmp_path))
    assert "a<b" in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
