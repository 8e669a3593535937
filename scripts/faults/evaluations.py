"""Evaluations at once, and references that change: is every score the one that is right?

python scripts/faults/evaluations.py [--pairs 20] [--beside 10] [--changes 30]

It trains a tiny model of the digits with checkpoints at two steps, and scores each step alone, with
a store of its own. Then it starts evaluations in pairs, of one step twice or of two steps, with one
run folder and one store, empty each time; and evaluations beside a training that scores itself.
Every score must equal the one made alone, and every training must end well. Last it changes a
reference in ways that a careless key would miss, and counts the pictures that are extracted again.
It prints what was seen, and exits with 1 if anything was wrong.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import yaml

SMALL = (
    "training.steps=20",
    "training.checkpoint_every=10",
    "training.keep_checkpoints=10",
    "training.log_every=10",
    "training.sample_every=20",
    "training.batch_size=32",
    "evaluation.num_samples=600",
    "evaluation.in_loop=null",
    "sampling.sampler.steps=5",
    "sampling.block_size=100",
)
STEPS = (10, 20)


def main() -> None:
    """Run all three parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--beside", type=int, default=10)
    parser.add_argument("--changes", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = folder / "run"
        done(train(run, folder / "cache of training"))
        alone = {step: score_alone(run, step, folder) for step in STEPS}
        wrong = pairs(given.pairs, run, alone, folder)
        wrong += beside(given.beside, folder)
        wrong += changes(given.changes, folder)
    print(f"{wrong} wrong")
    sys.exit(1 if wrong else 0)


# Commands


def start(arguments: list[str], cache: Path) -> subprocess.Popen[str]:
    """Start a command with a store of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "difftrain", *arguments],
        env={**os.environ, "DIFFTRAIN_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def done(process: subprocess.Popen[str]) -> str:
    """Wait for a command, and return what it printed; an error ends the script."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a command ended with {process.returncode}:\n{output}")
    return output


def train(run: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    """Start a tiny training."""
    recipe = Path(__file__).parents[2] / "recipes" / "digits.yaml"
    return start(["train", str(recipe), f"output={run}", *SMALL, *more], cache)


def evaluate(run: Path, step: int, cache: Path, file: Path) -> subprocess.Popen[str]:
    """Start the evaluation of a step."""
    return start(["evaluate", str(run), "--step", str(step), "--json", str(file)], cache)


def values(file: Path) -> dict[str, float]:
    """Read the scores of a file."""
    scores = json.loads(file.read_text())["scores"]
    return {name: score["value"] for name, score in scores.items()}


def score_alone(run: Path, step: int, folder: Path) -> dict[str, float]:
    """Score a step with nothing beside it."""
    file = folder / f"alone-{step}.json"
    done(evaluate(run, step, folder / f"cache of {step}", file))
    return values(file)


# At once


def pairs(count: int, run: Path, alone: dict[int, dict[str, float]], folder: Path) -> int:
    """Start evaluations in pairs, and count the wrong scores."""
    wrong = 0
    for number in range(count):
        cache = folder / f"pair {number}"
        steps = STEPS if number % 2 else (STEPS[1], STEPS[1])
        files = [folder / f"pair-{number}-{side}.json" for side in (0, 1)]
        started = [
            evaluate(run, step, cache, file) for step, file in zip(steps, files, strict=True)
        ]
        for process in started:
            done(process)
        for step, file in zip(steps, files, strict=True):
            if values(file) != alone[step]:
                wrong += 1
                print(f"pair {number}, step {step}: {values(file)}, alone {alone[step]}")
        shutil.rmtree(cache)
    left = list((run / "features").glob("*"))
    print(f"{count} pairs of evaluations: {wrong} scores differ; left in the run folder: {left}")
    return wrong + len(left)


def beside(count: int, folder: Path) -> int:
    """Evaluate a step beside the training that goes on, and count the wrong scores."""
    more = (
        "evaluation.in_loop={every: 5, num_samples: 200, metrics: [frechet_distance], "
        "reference: {type: digits, part: classifier}}",
    )
    wrong = 0
    quiet = folder / "quiet"
    done(train(quiet, folder / "quiet cache", *more))
    expected = values(quiet / "evaluation.json")
    logged = (quiet / "evaluations.jsonl").read_text().splitlines()
    for number in range(count):
        run, cache = folder / f"beside {number}", folder / f"beside cache {number}"
        done(train(run, cache, *more, "training.steps=10"))
        going = train(run, cache, *more)
        file = folder / f"beside-{number}.json"
        other = evaluate(run, 10, cache, file)
        done(other)
        done(going)
        found = values(run / "evaluation.json")
        again = (run / "evaluations.jsonl").read_text().splitlines()
        same = [scores_of(line) for line in again] == [scores_of(line) for line in logged]
        if found != expected or not same:
            wrong += 1
            print(f"beside {number}: {found}, alone {expected}; in the loop the same: {same}")
        shutil.rmtree(cache)
    print(f"{count} evaluations beside a training: {wrong} differ")
    return wrong


def scores_of(line: str) -> Any:
    """Return the scores of a line of evaluations.jsonl."""
    return json.loads(line)["scores"]


# Changes of a reference


def changes(count: int, folder: Path) -> int:
    """Change a reference in many ways, and compare each score with one of an empty store."""
    reference, generated = folder / "reference", folder / "generated"
    draw(reference, 40, seed=0)
    draw(generated, 40, seed=1)
    cache, wrong = folder / "cache of changes", 0
    score_folders(generated, reference, cache, folder / "first.json")
    for number in range(count):
        before = written_blocks(cache)
        name = change(reference, number)
        found = score_folders(generated, reference, cache, folder / "found.json")
        empty = folder / f"empty {number}"
        expected = score_folders(generated, reference, empty, folder / "expected.json")
        shutil.rmtree(empty)
        after = written_blocks(cache)
        kept = {file: time for file, time in after.items() if file in before}
        # The reference is one block; nothing else may have been written.
        if found != expected or kept != before or len(after) > len(before) + 1:
            wrong += 1
            print(f"change {number} ({name}): {found}, with an empty store {expected}")
    print(f"{count} changes of a reference: {wrong} wrong")
    return wrong


def written_blocks(cache: Path) -> dict[Path, int]:
    """Return when each block of feature rows was written."""
    files = (cache / "features").glob("*/*.safetensors")
    return {file: file.stat().st_mtime_ns for file in files}


def draw(folder: Path, num: int, seed: int) -> None:
    """Write random pictures and what metadata.jsonl says of them."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    lines = []
    for i in range(num):
        pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i:03d}.bmp")
        lines.append({"file_name": f"{i:03d}.bmp", "label": i % 2, "caption": f"picture {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def change(folder: Path, number: int) -> str:
    """Change the set in one of several ways, and say in which."""
    random = np.random.default_rng(100 + number)
    files = sorted(folder.glob("*.bmp"))
    one, other = (files[i] for i in random.choice(len(files), 2, replace=False))
    kind = ("bytes", "same size and time", "exchanged", "label", "caption", "removed")[number % 6]
    if kind in ("bytes", "same size and time"):
        stat = one.stat()
        content = bytearray(one.read_bytes())
        content[-1 - number] ^= 255
        one.write_bytes(content)
        if kind != "bytes":
            os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif kind == "exchanged":
        times = [path.stat() for path in (one, other)]
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        for path, stat in zip((one, other), times, strict=True):
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").open()]
        if kind == "label":
            lines[number]["label"] = 1 - lines[number]["label"]
        elif kind == "caption":
            lines[number]["caption"] += "!"
        else:
            lines.pop(0)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return kind


def score_folders(generated: Path, reference: Path, cache: Path, file: Path) -> dict[str, Any]:
    """Score pictures against others, and return the scores and what is said of the reference."""
    blocks = [
        yaml.safe_dump(
            {"type": "image_folder", "path": str(folder), "labels": "metadata", **captions},
            default_flow_style=True,
        )
        for folder, captions in ((generated, {}), (reference, {"captions": "metadata"}))
    ]
    options = ["--generated", blocks[0], "--reference", blocks[1], "--features", "pixels"]
    metrics = ["--metrics", "kernel_distance", "--json", str(file)]
    done(start(["evaluate", *options, *metrics], cache))
    found = json.loads(file.read_text())
    return {"scores": values(file), "reference": found["protocol"]["reference"]}


if __name__ == "__main__":
    main()
