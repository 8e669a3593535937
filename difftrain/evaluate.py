"""Scores: of a trained run, or of a folder of images against a folder or a statistics file.

`difftrain evaluate RUN`, or `accelerate launch -m difftrain.evaluate RUN`; `difftrain evaluate --generated DIR --reference DIR
--features NAME`; and `difftrain reference DATA --features NAME --out STATS.npz` makes the statistics.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from difftrain.data.items import ImageDataset, ImageStream, refuse_clips
from difftrain.data.transform import Transform
from difftrain.distributed import barrier, is_main, on_all
from difftrain.entry import DONE, guarded, join_processes, leave, say
from difftrain.evaluation.evaluator import Evaluator, Statistics
from difftrain.evaluation.extraction import Extraction
from difftrain.evaluation.extractor import FEATURES as PLAIN
from difftrain.evaluation.extractor import FeatureExtractor
from difftrain.evaluation.reference import read_statistics, save_statistics
from difftrain.evaluation.sources import DatasetImages
from difftrain.recipe import read_yaml, register_everything
from difftrain.registry import DATASETS, FEATURES, METRICS, InputError
from difftrain.report import write_report
from difftrain.results import score_lines
from difftrain.runlog import write_atomically
from difftrain.sample import GRID_FILE, made
from difftrain.storage import digest
from difftrain.visits import NEAREST_FILE, save_worst
from difftrain.weights import TrainedRun


def evaluate_run(
    run: str, overrides: Sequence[str] = (), step: int | None = None, averaged: bool = True, json_file: str | None = None
) -> int:
    """Score a trained run as its recipe's evaluation block says, and write its evaluation.json."""
    device = join_processes()
    place_for(json_file)
    trained = TrainedRun(run, list(overrides))
    plan, settings = trained.plan, trained.plan.evaluation
    if settings is None:
        raise InputError(f"the recipe of {run} has no evaluation: block. Add one, or sample the run and compare folders "
                         "with --generated, --reference and --features.")
    chosen = trained.chosen_step(step)
    scorer = plan.scorer(settings.reference, settings.metrics, settings.num_samples, trained.folder / "features", device)
    denoiser, weights = trained.denoiser(chosen, averaged, device)
    say(f"scoring {settings.num_samples} samples of step {chosen} ({weights} weights)")
    evaluation = scorer(denoiser)
    save_worst(evaluation, trained.folder / "samples" / NEAREST_FILE)
    found = {**evaluation.to_json(chosen), "weights": weights}
    if is_main():
        write_atomically(trained.folder / "evaluation.json", json.dumps(found, indent=1) + "\n")
        write_report(trained.folder)
    return tell_scores(found, json_file)


def evaluate_folders(
    generated: str, reference: str, features: str, metrics: Sequence[str], json_file: str | None = None, training: str | None = None
) -> int:
    """Score a folder of images (at any depth) against another, or against statistics made by `difftrain reference`."""
    device = join_processes()
    register_everything()
    place_for(json_file)
    parts = [METRICS.parse(name.strip(), "--metrics").build() for name in metrics]
    images = on_all(lambda: open_images(generated, "--generated"))
    extractor = open_features(features, images, device)
    real = on_all(lambda: open_reference(reference, extractor))
    if isinstance(real, Statistics) and "assumed" in real.protocol:
        say(f"{reference} does not say how it was made; assumed: {real.protocol['assumed']}")
    seen = on_all(lambda: open_images(training, "--training")) if training is not None else None
    mark = json.dumps([images.identity(), reference, extractor.protocol(), list(metrics), training], sort_keys=True)
    evaluator = Evaluator(real, seen, extractor, parts, rows_folder(mark), seed=0)
    found = evaluator(images, {"generated": generated})
    remove(evaluator.folder)
    return tell_scores(found.to_json(None), json_file)


def open_reference(reference: str, extractor: FeatureExtractor) -> DatasetImages | Statistics:
    """Images, or what a statistics file holds; one that was made with other features is refused."""
    if not reference.endswith(".npz"):
        return open_images(reference, "--reference")
    if not Path(reference).is_file():
        raise InputError(f"--reference {reference}: there is no such file. Make it with difftrain reference.")
    return read_statistics(Path(reference), extractor)


def make_reference(data: str, features: str, out: str) -> int:
    """Feature statistics of a data set as STATS.npz: mu, sigma, num_samples and the protocol."""
    device = join_processes()
    register_everything()
    if not out.endswith(".npz"):
        raise InputError(f"--out {out}: expected a file name that ends in .npz.")
    place_for(out, "--out")
    images = on_all(lambda: open_images(data, "DATA"))
    extractor = open_features(features, images, device)
    outputs = [output for output in (PLAIN, "spatial") if output in extractor.widths]
    folder = rows_folder(json.dumps([images.identity(), extractor.protocol(), outputs], sort_keys=True))
    extraction = Extraction(images, extractor, outputs, folder / "reference", "reference")
    found = extraction()
    statistics = {output: found.statistics(output) for output in outputs}
    if is_main():
        protocol = {"features": extractor.protocol(), "data": data, **extraction.content()}
        save_statistics(Path(out), statistics, protocol)
    remove(folder)
    say(f"{out}: {extractor.name} features of {len(images)} images")
    return DONE


def rows_folder(mark: str) -> Path:
    """Where rows lie until the scores are there; a stopped evaluation finds them again by its mark."""
    base = os.environ.get("DIFFTRAIN_CACHE", "~/.cache/difftrain")
    return Path(base).expanduser() / "evaluation" / digest(mark)


def remove(folder: Path) -> None:
    barrier()
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)


def open_images(text: str, option: str) -> DatasetImages:
    """The images of a folder or a data block, as they are; they must be of one size and mode. `sample`'s grid is left out."""
    return DatasetImages(open_data(text, option), leave_out=(GRID_FILE,))


def open_data(text: str, option: str) -> ImageDataset:
    """A folder of images, or a data block such as '{type: digits, part: held_out}'."""
    block = read_yaml(text, option) if text.lstrip().startswith("{") else {"type": "image_folder", "path": text}
    dataset = DATASETS.parse(block, option).build()
    refuse_clips(dataset, option)
    if isinstance(dataset, ImageStream):
        raise InputError(f"{option}: a stream has no end, and here all images are read. Write streaming: false.")
    return dataset


def open_features(text: str, images: DatasetImages, device: torch.device) -> Any:
    """The feature extractor that --features names, for images of this shape."""
    channels, height, width = images.shape
    own = Transform(min(height, width), channels=1 if channels == 1 else 3, resize="none")
    part = FEATURES.parse(read_yaml(text, "--features"), "--features")
    return part.build(shape=images.shape, transform=own, device=device)


def place_for(file: str | None, option: str = "--json") -> None:
    """Make the folder of a file that is to be written, before any work is done for it."""
    if file is not None:
        made(Path(file).expanduser().parent, option)


def tell_scores(found: dict[str, Any], json_file: str | None) -> int:
    say(score_lines(found["scores"]))
    if json_file is not None and is_main():
        write_atomically(Path(json_file).expanduser(), json.dumps(found, indent=1) + "\n")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m difftrain.evaluate`, as accelerate and torchrun start it."""
    import argparse

    parser = argparse.ArgumentParser(prog="difftrain.evaluate", description="Score a trained run on all processes.")
    parser.add_argument("run", nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--step", type=int)
    parser.add_argument("--weights", choices=["ema", "model"], default="ema")
    parser.add_argument("--generated", help="a folder of images, in place of a run")
    parser.add_argument("--reference", help="a folder of images, or STATS.npz")
    parser.add_argument("--training", help="a folder of the images that a model was trained on, for the memorization check")
    parser.add_argument("--features")
    parser.add_argument("--metrics", default="frechet_distance")
    parser.add_argument("--out", help="STATS.npz: make the statistics of --reference, and score nothing")
    parser.add_argument("--json")
    given = parser.parse_intermixed_args(arguments)
    return leave(guarded(lambda: dispatched(given)))


def dispatched(given: Any) -> int:
    """A run, two folders, or the statistics of one."""
    if given.run is not None:
        return evaluate_run(given.run, given.overrides, given.step, given.weights == "ema", given.json)
    if given.features is None or given.reference is None or (given.generated is None) == (given.out is None):
        raise InputError("expected RUN, or --generated DIR --reference DIR --features NAME, or --reference DATA --features NAME --out "
                         "STATS.npz.")
    if given.out is not None:
        return make_reference(given.reference, given.features, given.out)
    return evaluate_folders(given.generated, given.reference, given.features, given.metrics.split(","), given.json, given.training)


if __name__ == "__main__":
    sys.exit(main())
