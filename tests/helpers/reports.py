"""Made-up run folders for the tests of reports, and reports read back as a browser would."""

import base64
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from difftrain.core.files import write_json
from difftrain.report import write_report

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
    """The parsed page: text, tags, pictures. Parsing fails on a tag that closes a different one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.pictures: list[str] = []
        self.words: list[str] = []
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
    """One line of log.jsonl; all its curves fall with the steps."""
    error, variation = 0.9 * math.exp(-step / 400) + 0.1, 0.02 * math.exp(-step / 900)
    bands = []
    for low in range(-10, 10, 2):
        level = (0.02 + 0.9 / (1 + math.exp(-0.6 * low))) * (1 + math.exp(-step / 300))
        bands.append({"log_snr": [low, low + 2], "error": level, "count": 25})
    return {
        "step": step,
        "loss": error + variation,
        "terms": {"error": error, "step_variation": variation},
        "lr": 1e-3 * min(1, step / 200),
        "grad_norm": 0.8 + 2 * math.exp(-step / 100),
        "images": 256 * step,
        "bands": bands,
        "wall": {"seconds": step / 20, "images_per_second": 4100 + step % 70},
    }


def evaluation(step: int, **more: object) -> dict:
    distance = 3 + 40 * math.exp(-step / 500)
    scores = {
        "frechet_distance": {
            "value": distance,
            "floor": 1.25,
            "floor_std": 0.11,
            "features": "digits classifier",
            "floor_count": 450,
            "floor_reference_count": 450,
            "floor_basis": "same counts",
            "floor_ratio": distance / 1.25,
            "better": "lower",
            "title": "Fréchet distance",
        },
        "class_agreement": {
            "value": 1 - 0.8 * math.exp(-step / 600),
            "better": "higher",
            "title": "Class agreement",
        },
        "nearest_neighbour_ratio": {
            "value": 1.04,
            "generated": 1.3,
            "reference": 1.25,
            "better": "near 1",
            "title": "Nearest neighbour ratio",
        },
    }
    wall = {"seconds": 3.1, "share": 0.041}
    return {
        "step": step,
        "num_samples": 1797,
        "scores": scores,
        "protocol": PROTOCOL,
        "weights": "ema",
        "wall": wall,
    } | more


def curve(trained: str, **changes: object) -> dict:
    """A weights.json whose schedule ends at SNR = 0: there JSON has null."""
    log_snr = [8.0, 4.0, 0.0, -4.0, None]
    weights = {
        "trained_error": trained,
        "t": [0, 1, 2, 3, 4],
        "log_snr": log_snr,
        "weight": [0.004, 0.1, 0.5, 0.1, 0.0],
        "weight_on_epsilon": [0.004, 0.12, 1.0, 5.5, None],
    }
    return weights | changes


def charts(page: Page) -> dict[str, str]:
    """Every chart's SVG by its label."""
    drawn = r'(<svg role="img" aria-label="([^"]*)".*?</svg>)'
    return {label: svg for svg, label in re.findall(drawn, page.source, flags=re.DOTALL)}


def points_of(svg: str, dashed: bool) -> list[tuple[float, float]]:
    """The corners of the chart's first solid or dashed curve, in the SVG's own coordinates."""
    for d, style in re.findall(r'<path d="([^"]*)"([^>]*)', svg):
        if "stroke: var(--c" in style and ("stroke-dasharray" in style) == dashed:
            corners = re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)
            return [(float(x), float(y)) for x, y in corners]
    return []


def write_lines(path: Path, records: list[dict], ending: str = "\n") -> None:
    path.write_text("\n".join(map(json.dumps, records)) + ending)


def grid(path: Path, seed: int = 0, size: int = 82) -> Path:
    """A PNG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_run(folder: Path) -> Path:
    """The folder of a finished run of 2000 steps, with every file that a report reads."""
    for step in range(200, 2001, 200):
        grid(folder / "samples" / f"step-{step:07d}.png", seed=step)
    (folder / "recipe.yaml").write_text(RECIPE)
    write_lines(folder / "log.jsonl", [log_record(step) for step in range(20, 2001, 20)])
    steps = range(500, 2001, 500)
    in_loop = [evaluation(step, selected_by=abs(step - 1500)) for step in steps]
    write_lines(folder / "evaluations.jsonl", in_loop)
    write_json(folder / "evaluation.json", evaluation(2000))
    write_json(folder / "status.json", {"code": 0, "message": "done"})
    facts = {
        "difftrain": "0.1.0",
        "device": "cpu",
        "parameters": 1234567,
        "seconds": {"training": 100.0, "evaluation": 12.0, "sampling": 5.5},
    }
    write_json(folder / "environment.json", facts)
    write_json(folder / "weights.json", curve("v_prediction"))
    names = [f"broken_{i}.png" for i in range(12)]
    skipped = [{"data": "data", "name": name, "reason": "cut", "step": 1} for name in names]
    write_lines(folder / "skipped.jsonl", skipped)
    return folder


def report(run: Path) -> Page:
    """Writes the report of a run folder and reads it back."""
    return Page(write_report(run))
