"""Score a diffusers pipeline with difftrain, in a plain script.

python recipes/score_pipeline.py PIPELINE REFERENCE --num 1000
accelerate launch recipes/score_pipeline.py PIPELINE REFERENCE --num 1000

PIPELINE is the folder (or hub name) of an unconditional pipeline, such as google/ddpm-cifar10-32.
REFERENCE is a folder of images of the same size, or a statistics file. The numbers are the same on
any number of processes: each image has noise of its own, seeded by its index.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from difftrain.evaluation import score


def main() -> None:
    """Score the pipeline, and print the scores on the main process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline")
    parser.add_argument("reference")
    parser.add_argument("--num", type=int, default=1000, help="number of images")
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--features", default="inception", help="a feature extractor")
    parser.add_argument("--metrics", default="fid", help="names with commas between them")
    parser.add_argument("--json", help="a file for the scores and their protocol")
    given = parser.parse_args()

    accelerator = Accelerator()  # joins the processes
    pipeline = DiffusionPipeline.from_pretrained(given.pipeline).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)

    def generate(indices: list[int]) -> list:
        noise = [torch.Generator().manual_seed(i) for i in indices]
        made = pipeline(batch_size=len(noise), generator=noise, num_inference_steps=given.steps)
        return made.images

    found = score(
        generate,
        given.reference,
        given.features,
        given.metrics.split(","),
        num_samples=given.num,
        device=accelerator.device,
    )
    if given.json and accelerator.is_main_process:
        Path(given.json).write_text(json.dumps(found.to_json(None), indent=1))
    for name, one in found.scores.items():
        accelerator.print(f"{name}: {one['value']:.6g}")
    for name, failure in found.failures.items():
        accelerator.print(f"{name} failed: {failure.reason}")


if __name__ == "__main__":
    main()
