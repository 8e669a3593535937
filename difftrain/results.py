"""What comes of a run: the files that others load, and the scores as they are told."""

from pathlib import Path
from typing import Any, cast

from difftrain import __version__
from difftrain.data.facts import is_captioned, is_labelled
from difftrain.denoisers import DiffusersDenoiser
from difftrain.export import export_fine_tuned, export_lora, export_pipeline
from difftrain.pipelines.text_to_image import TextToImageDenoiser
from difftrain.plan import Plan


def export(plan: Plan, denoiser: DiffusersDenoiser, step: int, folder: Path) -> str:
    """Write what others load, a LoRA file (checked in a fresh pipeline) or a pipeline's folder; returns what is to be told of it."""
    facts = about(plan, step)
    if plan.adapter is not None and plan.adapter.makes_lora:
        return "\n".join(export_lora(plan.pipeline, plan.recipe.model, denoiser, plan.generator, folder, facts))
    if plan.pipeline is not None:
        export_fine_tuned(plan.pipeline, cast(TextToImageDenoiser, denoiser), folder / "pipeline", facts)
    else:
        export_pipeline(denoiser, plan.generator, folder / "pipeline")
    return f"{folder / 'pipeline'}: the model, as diffusers loads it"


def about(plan: Plan, step: int) -> dict[str, str]:
    """What is written into the files of a result."""
    recipe = plan.recipe
    known = {
        "base_model": recipe.model.arguments.get("path"), "license": recipe.license, "step": str(step),
        "images": str(step * plan.training.batch_size), "recipe": recipe.to_yaml(), "software": f"difftrain {__version__}",
    }
    return {key: value for key, value in known.items() if value}


def checks_memorization(plan: Plan) -> bool:
    """Whether there are held-out images to set beside the training images, with what the model is conditioned on."""
    settings = plan.evaluation
    if settings is None or not settings.memorization or plan.streams or settings.reference == plan.recipe.data:
        return False
    is_told = is_labelled if plan.pipeline is None else is_captioned
    return not plan.conditioning.conditions or is_told(settings.reference.build())


def score_lines(scores: dict[str, dict[str, Any]]) -> str:
    """The scores side by side, each with its real-against-real floor where it has one."""
    lines = []
    for name, score in scores.items():
        floor = f"   real against real {score['floor']:.4g}, ratio {score['value'] / score['floor']:.2f}" if score.get("floor") else ""
        lines.append(f"  {name:<26}{score['value']:>10.4g}{floor}")
    return "\n".join(lines)
