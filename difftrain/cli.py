"""The command `difftrain`. Everything heavy is imported by the command that needs it, so that --help answers at once."""

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="Train and evaluate diffusion models; a training method is one formula in its own slot.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe: training.steps=200")]
Json = Annotated[bool, typer.Option("--json", help="Print for machines.")]
Weights = Annotated[str, typer.Option(help="ema: the running average, if the run has one; model: the trained weights.")]
Step = Annotated[int | None, typer.Option(help="The checkpoint of this step rather than the best or the latest.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, such as recipes/digits.yaml.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Start over in a new folder.")] = False,
    accept_changes: Annotated[bool, typer.Option(help="Resume with another recipe than the run's.")] = False,
) -> None:
    """Train a recipe, then score, export and report. Run the same command again to resume.

    On several processes: accelerate launch -m difftrain.train RECIPE [KEY=VALUE]...
    """
    from difftrain.train import train as run

    raise typer.Exit(run(recipe, overrides or [], fresh, accept_changes))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    num: Annotated[int, typer.Option(help="How many images or clips.")],
    out: Annotated[str, typer.Option(help="The folder for the PNGs (clips: MP4 or GIF) and grid.png.")],
    overrides: Overrides = None,
    label: Annotated[int | None, typer.Option(help="One class for all images; without it the classes in turn.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Of text-to-image runs; several are taken in turn.")] = None,
    lora_scale: Annotated[float | None, typer.Option(help="Of the run's own LoRA; 0: the base model.")] = None,
    lora: Annotated[list[str] | None, typer.Option(
        metavar="FILE[:SCALE]", help="Another LoRA on top, a file or the folder of a run; several are added up.")] = None,
    step: Step = None,
    weights: Weights = "ema",
) -> None:
    """Generate images or clips of a trained run; overrides such as sampling.guidance=2 or sampling.seed=1 change how."""
    from difftrain.entry import guarded
    from difftrain.sample import Asked
    from difftrain.sample import sample as generate

    asked = Asked(label, prompt or (), lora_scale, lora or ())
    raise typer.Exit(guarded(lambda: generate(run, num, out, overrides or [], asked, step, averaged(weights))))


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="The folder of a run that trained a LoRA.")],
    out: Annotated[str, typer.Option(help="The folder for the pipeline.")],
    overrides: Overrides = None,
    lora_scale: Annotated[float | None, typer.Option(help="Of the run's own LoRA.")] = None,
    lora: Annotated[list[str] | None, typer.Option(
        metavar="FILE[:SCALE]", help="Another LoRA to fold in too, a file or the folder of a run.")] = None,
    step: Step = None,
    weights: Weights = "ema",
) -> None:
    """Fold a run's LoRA into its base model: a pipeline of its own, for programs without LoRA."""
    from difftrain.entry import guarded
    from difftrain.merge import merge_run
    from difftrain.sample import Asked

    asked = Asked(lora_scale=lora_scale, loras=lora or ())
    raise typer.Exit(guarded(lambda: merge_run(run, out, overrides or [], asked, step, averaged(weights))))


@app.command()
def evaluate(
    run: Annotated[str | None, typer.Argument(help="The folder of a run, scored as its recipe says.")] = None,
    overrides: Overrides = None,
    generated: Annotated[str | None, typer.Option(help="Instead of a run: a folder of images.")] = None,
    reference: Annotated[str | None, typer.Option(help="With --generated: a folder of images, or STATS.npz.")] = None,
    features: Annotated[str | None, typer.Option(help="With --generated: a feature extractor, such as digits_classifier.")] = None,
    metrics: Annotated[str, typer.Option(help="With --generated: metrics, with commas.")] = "frechet_distance",
    step: Step = None,
    weights: Weights = "ema",
    training: Annotated[str | None, typer.Option(help="The images that the model was trained on, for nearest_neighbour_ratio.")] = None,
    json: Annotated[str | None, typer.Option(help="Also write the scores to this file.")] = None,
) -> None:
    """Score a run, or a folder of images against another."""
    from difftrain.entry import guarded
    from difftrain.evaluate import evaluate_folders, evaluate_run
    from difftrain.registry import InputError

    def action() -> int:
        if run is not None and generated is None:
            return evaluate_run(run, overrides or [], step, averaged(weights), json)
        if run is None and generated and reference and features:
            return evaluate_folders(generated, reference, features, metrics.split(","), json, training)
        raise InputError("evaluate: expected the folder of a run, or --generated DIR --reference DIR|STATS.npz --features NAME.")

    raise typer.Exit(guarded(action))


@app.command()
def diagnose(
    run: Annotated[str, typer.Argument(help="The folder of a run.")],
    overrides: Overrides = None,
    which: Annotated[list[str] | None, typer.Option(help="Names with commas, or a block such as '{type: smoothness}'; else all.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out images, a folder or a data block, in place of the reference.")] = None,
    step: Step = None,
    weights: Weights = "ema",
) -> None:
    """Errors by noise level, exposure bias, smoothness and inversion of a trained run, into its diagnostics.json and report."""
    from difftrain.diagnose import diagnose as look
    from difftrain.entry import guarded

    raise typer.Exit(guarded(lambda: look(run, which or [], overrides or [], step, averaged(weights), data)))


@app.command()
def reference(
    data: Annotated[str, typer.Argument(help="A folder of images, or a data block: '{type: digits, part: held_out}'.")],
    features: Annotated[str, typer.Option(help="A feature extractor, such as digits_classifier.")],
    out: Annotated[str, typer.Option(help="The statistics file, STATS.npz.")],
) -> None:
    """Feature statistics of a data set, as a reference for evaluate."""
    from difftrain.entry import guarded
    from difftrain.evaluate import make_reference

    raise typer.Exit(guarded(lambda: make_reference(data, features, out)))


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files.")],
    out: Annotated[str, typer.Option(help="The folder for the runs, results.json and report.html.")],
    seeds: Annotated[str, typer.Option(help="Seeds with commas.")] = "0",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to every recipe.")] = None,
) -> None:
    """Train and score several recipes over several seeds, side by side."""
    from difftrain.compare import compare as run
    from difftrain.compare import seeds_of
    from difftrain.entry import guarded

    raise typer.Exit(guarded(lambda: run(recipes, seeds_of(seeds), out, set_ or [])))


@app.command()
def methods(
    json: Json = False,
    imports: Annotated[list[str] | None, typer.Option("--import", help="A module of your own whose parts are listed too.")] = None,
) -> None:
    """List every registered part: slot, name, arguments with defaults, formula, source."""
    from json import dumps

    from difftrain.entry import DONE, guarded, say
    from difftrain.methods import as_text
    from difftrain.methods import methods as listed

    def action() -> int:
        found = listed(imports or [])
        say(dumps(found, indent=1) if json else as_text(found))
        return DONE

    raise typer.Exit(guarded(action))


@app.command()
def check(recipe: Annotated[str, typer.Argument(help="A YAML file.")], overrides: Overrides = None) -> None:
    """Preflight: schema, data, files that would be fetched, disk, memory. Trains nothing."""
    from difftrain.check import check as preflight
    from difftrain.entry import DONE, guarded, say

    def action() -> int:
        say(preflight(recipe, overrides or []))
        return DONE

    raise typer.Exit(guarded(action))


def averaged(weights: str) -> bool:
    from difftrain.registry import InputError

    if weights not in ("ema", "model"):
        raise InputError(f"--weights {weights}: expected ema or model.")
    return weights == "ema"


def main() -> None:
    """The console script."""
    sys.exit(app())


if __name__ == "__main__":
    main()
