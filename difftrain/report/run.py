"""The report of one run: state and scores first, then samples, curves, recipe and environment."""

import json
import math
from pathlib import Path

import numpy as np

from difftrain.report.diagnostics import plots
from difftrain.report.fine_tuning import held_out_cards, prompts_of
from difftrain.report.headline import facts, score_tiles, state_of, summary
from difftrain.report.page import (
    MISSING,
    Html,
    card,
    details,
    duration,
    element,
    flat,
    joined,
    number,
    picture,
    quiet,
    section,
    shown,
    table,
    write_page,
)  # fmt: skip
from difftrain.report.plots import SERIES, along_log_snr, heat_map, lines, profiles
from difftrain.report.records import (
    Record,
    bands_of,
    best_step,
    better_of,
    by_step,
    dig,
    grids_of,
    label_of,
    mapping,
    read_json,
    read_lines,
    read_recipe,
    scores_of,
    seconds_of,
    title_of,
)  # fmt: skip

ERRORS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}  # as a chart's key names them


def write_report(run: Path) -> Path:
    """Writes run/report.html, self-contained, from whatever the folder holds by now; returns its path."""
    recipe, environment, status = read_recipe(run / "recipe.yaml"), read_json(run / "environment.json"), read_json(run / "status.json")
    records, every = read_lines(run / "log.jsonl")
    log, in_loop, validation = by_step(records), *(by_step(read_lines(run / f"{kind}.jsonl")[0]) for kind in ("evaluations", "validation"))
    evaluation = read_json(run / "evaluation.json") or (in_loop[-1] if in_loop else {})
    state = state_of(status, log, recipe)
    name = Path(str(recipe.get("output") or run.resolve())).name
    return write_page(
        run / "report.html",
        f"{name}: {state}",
        element("header", element("h1", name), element("span", state, class_=f"badge {state}")),
        element("p", summary(recipe)),
        facts(log, recipe, environment, in_loop, run),
        element("p", f"Exit code {status['code']}: {status.get('message', '')}", class_="message") if status.get("code") else "",
        score_tiles(evaluation),
        section("Samples", samples(run, state), prompts_of(recipe)),
        section("Scores", score_table(evaluation), score_curves(in_loop or [evaluation]), protocol(evaluation)),
        section("Memorization", memorization(evaluation, run)),
        section("Diagnostics", diagnostics(read_json(run / "diagnostics.json"))),
        section("Training", training_curves(log, held_out_cards(validation)), thinned(every)),
        section("Noise levels", noise_levels(log, read_json(run / "weights.json"))),
        section("Time", timing(log, environment, in_loop)),
        section("Recipe", recipe_text(run / "recipe.yaml")),
        section("Environment", details("What it ran on", leaves(environment)) if environment else ""),
        section("Skipped images", skipped(run / "skipped.jsonl")),
    )


def samples(run: Path, state: str) -> Html:
    """The newest grid large, and up to six earlier ones as a strip. A final grid is an old one where the run has gone on since."""
    grids = grids_of(run, with_final=state == "finished")
    if not grids:
        return quiet("No samples yet.")
    *earlier, newest = grids
    chosen = [earlier[i] for i in sorted({round(i) for i in np.linspace(0, len(earlier) - 1, 6)})] if earlier else []
    strip = element("div", *(picture(path, label_of(path), largest=320) for path in chosen), class_="film")
    return element("div", picture(newest, label_of(newest), largest=1200), strip, class_="samples")


def score_table(evaluation: Record) -> Html:
    scores = scores_of(evaluation)
    if not scores:
        return Html()
    head = ["score", "value", "real against real", "ratio", "", "features", "samples"]
    note = f"Step {shown(evaluation.get('step'))}, weights: {evaluation.get('weights', 'not stated')}."
    return joined(table(head, [score_row(name, score, evaluation.get("num_samples")) for name, score in scores.items()]), quiet(note))


def score_row(name: str, score: Record, num_samples: object) -> list[object]:
    value, floor, spread = (number(score.get(key)) for key in ("value", "floor", "floor_std"))
    real = shown(floor) + (f" ± {shown(spread, 2)}" if math.isfinite(spread) else "")
    ratio = f"{value / floor:.3g} \N{MULTIPLICATION SIGN}" if floor and math.isfinite(value / floor) else MISSING
    return [title_of(name), shown(value), real, ratio, better_of(name), score.get("features", ""), shown(num_samples)]


def score_curves(evaluations: list[Record]) -> Html:
    """Each score over training with its floor. Scores of another protocol than the latest are not comparable and not drawn."""
    comparable = [record for record in evaluations if conditions(record) == conditions(evaluations[-1])]
    steps = [number(record.get("step")) for record in comparable]
    best = best_step(comparable)
    cards = []
    for name, score in scores_of(comparable[-1]).items():
        values = [number(dig(record, "scores", name, "value")) for record in comparable]
        level = ("real against real", number(score.get("floor")))
        drawn = lines({"generated": (steps, values)}, f"{name} over training", level=level, mark=best)
        cards.append(card(title_of(name), drawn, better_of(name)))
    others = len(evaluations) - len(comparable)
    note = quiet(f"{others} evaluations under another protocol are not drawn.") if others else ""
    return joined(element("div", *cards, class_="cards"), note) if cards else Html()


def memorization(evaluation: Record, run: Path) -> Html:
    """How near the generated images lie to training images, and the nearest ones above their neighbours."""
    score, file = mapping(scores_of(evaluation).get("nearest_neighbour_ratio")), run / "samples" / "nearest.png"
    if not score:
        return Html()
    said = (f"Generated images lie {shown(score.get('value'))} times as far from their nearest training image as held-out images do "
            f"({shown(score.get('generated'))} against {shown(score.get('reference'))}, pixels in [0, 1]). Far below 1 they are copies.")
    caption = "the generated images nearest to the training set, each above its neighbour"
    return joined(element("p", said), picture(file, caption, largest=1200) if file.exists() else "")


def diagnostics(results: Record) -> Html:
    """The charts of what `difftrain diagnose`, and the end of a training, have written."""
    cards = [card(plot.title, Html(plot.figure), plot.caption) for plot in plots(results)]
    return element("div", *cards, class_="pairs") if cards else Html()


def conditions(record: Record) -> tuple[object, ...]:
    return record.get("protocol_digest"), record.get("protocol"), record.get("weights")


def protocol(evaluation: Record) -> Html:
    return details("Protocol", leaves(evaluation["protocol"])) if mapping(evaluation.get("protocol")) else Html()


def training_curves(log: list[Record], held_out: list[Html]) -> Html:
    if not log:
        return quiet("Nothing logged yet.")

    def curve(title: str, key: str, note: str = "", smooth: bool = True, log_axis: bool = True) -> Html:
        return card(title, lines({title: over(log, key)}, f"{title} over steps", smooth=smooth, log=log_axis), note)

    terms = dict.fromkeys(term for record in log for term in mapping(record.get("terms")))
    every_term = {term: over(log, "terms", term) for term in terms}
    cards = [
        curve("Loss", "loss", note="faint: raw"),
        *held_out,
        card("Terms of the loss", lines(every_term, "Terms over steps", smooth=True), "weighted; they sum to the loss") if terms else "",
        curve("Gradient norm", "grad_norm"),
        curve("Learning rate", "lr", smooth=False, log_axis=False),
        *(card(measure, lines({measure: over(log, "measures", measure)}, f"{measure} over steps", smooth=True), "of a regularizer, no part "
               "of the loss") for measure in dict.fromkeys(name for record in log for name in mapping(record.get("measures")))),
    ]
    return element("div", *cards, class_="pairs")


def thinned(every: int) -> Html:
    return quiet(f"Long log: one in {every:,} logged steps is drawn.") if every > 1 else Html()


def over(log: list[Record], *keys: str) -> tuple[list[float], list[float]]:
    return [record["step"] for record in log], [number(dig(record, *keys)) for record in log]


def noise_levels(log: list[Record], weights: Record) -> Html:
    cards = [weight_card(weights)] if weights else []
    if bands := bands_of(log):
        note = "mean error of a sample, not weighted"
        cards += [card("Error by noise level", profiles(bands), note), card("Error over training", heat_map(bands), note)]
    return element("div", *cards, class_="pairs") if cards else Html()


def weight_card(weights: Record) -> Html:
    """The run's weights.json: the weight on the trained error, and the weight on the epsilon error that comes to the same."""
    trained = ERRORS.get(str(weights.get("trained_error")), "trained")
    named = {f"on the {trained} error": "weight", "the same on the epsilon error": "weight_on_epsilon"}
    if trained == "epsilon":
        del named["the same on the epsilon error"]
    log_snr = numbers(weights.get("log_snr"))
    curves = {name: (log_snr, values) for name, key in named.items() if len(values := numbers(weights.get(key))) == len(log_snr)}
    return card("Weight by noise level", along_log_snr(curves, "Weight along log-SNR"), "how often a timestep is drawn is not in it")


def numbers(values: object) -> list[float]:
    """NaN for what is no number; empty for what is no list."""
    return [number(value) for value in values] if isinstance(values, list) else []


def timing(log: list[Record], environment: Record, in_loop: list[Record]) -> Html:
    seconds, cards = seconds_of(environment), []
    if log:
        speed = lines({"images/s": over(log, "wall", "images_per_second")}, "Images per second over steps", smooth=True, log=False)
        cards.append(card("Images per second", speed))
    if seconds:
        share = number(dig(in_loop[-1], "wall", "share")) if in_loop else math.nan
        note = quiet(f"Evaluation within training took {100 * share:.1f} % of the time.") if math.isfinite(share) else ""
        cards.append(card("Where the time went", joined(split(seconds), note)))
    return element("div", *cards, class_="pairs") if cards else Html()


def split(seconds: dict[str, float]) -> Html:
    """One bar, divided as the time was, and its key."""
    total, bar, key = sum(seconds.values()), [], []
    for i, (name, part) in enumerate(seconds.items()):
        color, share = f"background:var(--c{i % len(SERIES)})", 100 * part / total
        bar.append(element("span", style=f"{color};width:{share:.2f}%"))
        key.append(element("p", element("span", style=color, class_="key"), f"{name} {duration(part)} ({share:.0f} %)"))
    return joined(element("div", *bar, class_="split"), *key)


def recipe_text(path: Path) -> Html:
    return details(path.name, element("pre", path.read_text(encoding="utf-8", errors="replace"))) if path.exists() else Html()


def leaves(nested: Record) -> Html:
    return table(["", ""], [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in flat(nested).items()])


def skipped(path: Path, most: int = 8) -> Html:
    records, _ = read_lines(path, limit=10**6)
    if not records:
        return Html()
    rows = [[record.get("name", ""), record.get("reason", ""), shown(record.get("step"))] for record in records[:most]]
    ending = f"; the first {most}:" if len(records) > most else ":"
    return joined(element("p", f"{shown(len(records))} could not be read{ending}"), table(["image", "reason", "step"], rows))
