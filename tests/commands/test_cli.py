"""The commands, in this process: what they print and write, and their exit codes."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.commands import command, pictures, refused
from helpers.runs import tiny

from difftrain.core.registry import Registry
from difftrain.evaluation.features import classifier
from difftrain.recipe.catalogue import SLOTS, methods
from difftrain.recipe.reading import load
from difftrain.run.facts import DataFacts
from difftrain.run.session import Plans
from difftrain.run.training import Launch

COMMANDS = [
    "train",
    "sample",
    "evaluate",
    "reference",
    "diagnose",
    "compare",
    "merge",
    "report",
    "methods",
    "check",
]
PIXELS = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance", {"type": "precision_recall", "neighbours": 2}],
    "num_samples": 12,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a class-conditional run of three steps with an average and scores.

    Its checkpoints are those of the steps 2 and 3.
    """
    folder = tmp_path_factory.mktemp("run")
    file = tiny(
        folder,
        training__steps=3,
        training__checkpoint_every=2,
        evaluation=PIXELS,
        ema={"type": "decay", "decay": 0.9},
    )
    command("train", file)
    return folder / "run"


@pytest.fixture
def quick_classifier(monkeypatch):
    """Train the digits' classifier for three steps rather than 300."""
    monkeypatch.setattr(classifier, "STEPS", 3)


# Help


def test_help_lists_every_command():
    text = command("--help").out

    assert all(re.search(rf"^\s+{name}\b", text, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name):
    text = command(name, "--help").out

    assert f"difftrain {name}" in text or f"root {name}" in text
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["sample", "run"], ["train", "r.yaml", "--fres"]]
)
def test_a_command_line_that_is_none_ends_with_2(arguments):
    assert command(*arguments, code=2).error


# methods


def test_methods_lists_every_registered_part():
    found = json.loads(command("methods", "--json").out)

    assert {(part["slot"], part["name"]) for part in found} == {
        (slot.slot, name) for slot in SLOTS for name in slot.constructors
    }
    assert len({slot.slot for slot in SLOTS}) == len(SLOTS)


def test_every_registry_of_the_library_is_listed():
    command("methods")  # imports every home of a part
    library = [module for name, module in sys.modules.items() if name.startswith("difftrain")]
    found = set()
    for module in library:
        found |= {id(value) for value in vars(module).values() if isinstance(value, Registry)}

    assert found == {id(slot) for slot in SLOTS}


def test_the_records_of_methods_have_stable_keys():
    for part in json.loads(command("methods", "--json").out):
        assert list(part) == ["slot", "name", "formula", "source", "arguments"]
        assert all(
            set(argument) == {"type", "required", "default"}
            for argument in part["arguments"].values()
        )


def test_an_argument_is_shown_with_its_type_bounds_and_default():
    by_name = {(part["slot"], part["name"]): part["arguments"] for part in methods([])}

    assert by_name["weighting", "p2"]["gamma"] == {
        "type": "float >= 0",
        "required": False,
        "default": 1.0,
    }
    assert by_name["weighting", "debiased"]["max_weight"] == {
        "type": "float > 0 | None",
        "required": False,
        "default": None,
    }
    assert by_name["perturbation", "input_perturbation"]["decay_steps"]["type"] == "int >= 1 | None"
    assert by_name["ema", "decay"]["decay"]["type"] == "float >= 0 and <= 1"
    assert by_name["encoder", "vae"]["path"] == {"type": "str", "required": True, "default": None}
    assert by_name["features", "classifier"]["data"]["type"] == "data"
    assert "transform" not in by_name["features", "classifier"]  # supplied by the program


def library_parts() -> list[tuple[str, str, Any]]:
    found = methods([])
    own = {
        (slot.slot, name)
        for slot in SLOTS
        for name, made in slot.constructors.items()
        if made.__module__.startswith("difftrain")
    }
    return [
        (part["slot"], part["name"], part) for part in found if (part["slot"], part["name"]) in own
    ]


def test_every_part_opens_with_its_formula_or_its_meaning():
    for slot, name, part in library_parts():
        assert len(part["formula"]) > 10, (slot, name)
        assert part["formula"] != "dict() -> new empty dictionary", (slot, name)


PUBLISHED = {"schedule", "weighting", "perturbation", "variance", "sampler", "model", "encoder"}
# The absence of a method, and a sampler that is whichever one of diffusers it names
WITHOUT_PAPER = {("weighting", "unit"), ("variance", "fixed"), ("sampler", "diffusers")}


def test_every_published_method_names_its_source():
    for slot, name, part in library_parts():
        if slot in PUBLISHED and (slot, name) not in WITHOUT_PAPER:
            text = f"{part['source']} {part['formula']}"
            source = r"arXiv:\d{4}\.\d{5}"
            if name.startswith("kohya_"):  # a trainer's own method, without a paper
                source = r"kohya-ss \d{4}, sd-scripts"
            assert re.search(source, text), (slot, name, part["source"])


def test_a_source_ends_with_its_paper():
    sources = {
        part["name"]: part["source"]
        for part in methods([])
        if part["slot"] in ("weighting", "perturbation")
    }

    assert sources["p2"] == (
        'Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", arXiv:2204.00227.'
    )
    assert (
        sources["kohya_scaled_v"]
        == "kohya-ss 2023, sd-scripts, option scale_v_pred_loss_like_noise_pred."
    )
    assert sources["input_perturbation"].endswith(" arXiv:2301.11706.")


def test_methods_as_text_shows_formula_source_and_arguments():
    text = command("methods").out

    assert "weighting: weight of a sample's error by its noise level" in text
    assert "  p2                  Perception-prioritized (P2) weighting: ``w = (k + SNR)^-" in text
    assert "arXiv:2204.00227" in text
    assert "gamma: float >= 0 = 1.0" in text


def test_methods_lists_an_own_module(tmp_path, monkeypatch):
    (tmp_path / "my_noise.py").write_text(
        "from dataclasses import dataclass\nfrom difftrain.objective.slots import NOISES\n\n"
        '@NOISES.register("mine_alone")\n'
        '@dataclass(frozen=True)\nclass Mine:\n    """eps = 0."""\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    assert "mine_alone" in command("methods", "--import", "my_noise").out
    assert "cannot import 'my_other_noise'" in refused("methods", "--import", "my_other_noise")


# check


def test_check_describes_the_run(tmp_path):
    lines = command("check", tiny(tmp_path, evaluation=PIXELS)).out.splitlines()
    found = {line.split()[0]: line[11:] for line in lines}

    assert list(found) == [
        "recipe",
        "data",
        "model",
        "scored",
        "objective",
        "training",
        "hub",
        "memory",
        "disk",
    ]
    assert found["data"] == "898 images of 1x8x8, 10 classes, can be guided"
    assert re.fullmatch(r"unet2d, [\d,]+ parameters, float32", found["model"])
    assert found["objective"].startswith("epsilon on NoiseSchedule(diffusion, 50 timesteps, SNR")
    assert found["training"] == "6 steps of 8 images"
    assert found["hub"] == "nothing"
    assert found["scored"] == "12 samples show classes in the shares of the reference"
    assert not (tmp_path / "run").exists()


def test_check_counts_the_parameters_of_the_model(tmp_path):
    file = tiny(tmp_path)
    plans = Plans(load(file), Launch())
    real = sum(p.numel() for p in plans.model.denoiser().parameters())

    assert f"unet2d, {real:,} parameters" in command("check", file).out


# sample


def test_sample_writes_the_images_and_a_grid(run, tmp_path):
    shown = command("sample", run, "--num", 5, "--out", tmp_path / "new" / "samples").out

    folder = tmp_path / "new" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(5)),
        "grid.png",
        "metadata.jsonl",
        "samples.json",
    ]
    assert PIL.Image.open(folder / "000000.png").size == (8, 8)
    assert PIL.Image.open(folder / "grid.png").size == (5 * 9 + 1, 10)
    assert "5 samples of step 3 (ema weights)" in shown


def test_more_samples_go_on_where_fewer_ended(run, tmp_path):
    command("sample", run, "--num", 4, "--out", tmp_path / "few")
    command("sample", run, "--num", 8, "--out", tmp_path / "many")

    few, many = (
        [np.asarray(PIL.Image.open(tmp_path / name / f"{i:06d}.png")) for i in range(4)]
        for name in ("few", "many")
    )
    assert all(np.array_equal(one, other) for one, other in zip(few, many, strict=True))


def test_sampling_takes_other_settings_weights_labels_and_steps(run, tmp_path):
    def image(name: str, *arguments: str) -> bytes:
        command("sample", run, "--num", 1, "--out", tmp_path / name, *arguments)
        return (tmp_path / name / "000000.png").read_bytes()

    first = image("as trained")

    assert image("again") == first
    for name, arguments in {
        "seed": ["sampling.seed=7"],
        "guidance": ["sampling.guidance=3"],
        "label": ["--label", "7"],
        "weights": ["--weights", "model"],
        "step": ["--step", "2"],
    }.items():
        assert image(name, *arguments) != first, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num 0: expected at least 1"),
        (["--num", "1", "--label", "10"], "--label 10: the run has the classes 0 to 9"),
        (["--num", "1", "--label", "-1"], "--label -1: the run has the classes 0 to 9"),
        (["--num", "1", "--step", "1"], "--step 1: "),
        (["--num", "1", "--weights", "best"], "--weights best: expected ema or model"),
        (
            ["--num", "1", "sampling.guidanc=2"],
            "sampling.guidanc: unknown key (did you mean 'guidance'?)",
        ),
        (
            ["--num", "1", "model.config.block_out_channels=[16, 16]"],
            "do not fit the model of the recipe: ",
        ),
    ],
)
def test_sample_refuses(run, tmp_path, arguments, message):
    assert message in refused("sample", run, "--out", tmp_path / "samples", *arguments)
    assert not (tmp_path / "samples").exists() or not list((tmp_path / "samples").iterdir())


def test_sample_names_the_steps_that_there_are(run, tmp_path):
    assert "holds the checkpoints of the steps 2, 3." in refused(
        "sample", run, "--num", 1, "--out", tmp_path, "--step", 1
    )


def test_sample_refuses_a_folder_that_is_no_run_and_one_without_checkpoints(tmp_path):
    assert "is not the folder of a run: it holds no recipe.yaml" in refused(
        "sample", tmp_path, "--num", 1, "--out", tmp_path
    )
    recipe = load(tiny(tmp_path / "other"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    DataFacts.of(recipe.data.build(), wants_prompts=False).write(tmp_path)
    assert "holds no whole checkpoint yet. Train it first" in refused(
        "sample", tmp_path, "--num", 1, "--out", tmp_path / "out"
    )


def test_sample_refuses_a_place_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("in the way")

    assert "--out: the folder" in refused(
        "sample", run, "--num", 1, "--out", tmp_path / "file" / "samples"
    )


# evaluate


def test_a_folder_is_no_file_for_scores(run, tmp_path):
    assert f"--json {tmp_path}: this is a folder" in refused("evaluate", run, "--json", tmp_path)


def test_evaluate_scores_a_run_as_training_did(run, tmp_path):
    stored = json.loads((run / "evaluation.json").read_text())

    shown = command("evaluate", run, "--json", tmp_path / "deep" / "scores.json").out

    again = json.loads((tmp_path / "deep" / "scores.json").read_text())
    assert list(again) == [
        "step",
        "num_samples",
        "scores",
        "protocol_digest",
        "protocol",
        "generated",
        "weights",
    ]
    assert again == stored == json.loads((run / "evaluation.json").read_text())
    assert set(again["scores"]) == {
        "frechet_distance",
        "precision",
        "recall",
        "nearest_neighbour_ratio",
    }
    assert {"value", "floor", "features"} <= set(again["scores"]["frechet_distance"])
    assert re.search(r"frechet_distance +[\d.e+]+ +real against real [\d.]+ ±", shown)


def test_evaluate_takes_the_models_own_weights_and_the_headline_stays(run, tmp_path):
    headline = (run / "evaluation.json").read_text()
    options = ["evaluation.num_samples=6", "--json", tmp_path / "s.json"]
    command("evaluate", run, "--weights", "model", *options)
    found = json.loads((tmp_path / "s.json").read_text())

    assert (found["step"], found["weights"], found["num_samples"]) == (3, "model", 6)
    assert (run / "evaluation.json").read_text() == headline


def test_scores_of_several_steps_are_kept_and_drawn_and_the_headline_stays(run, tmp_path):
    headline = (run / "evaluation.json").read_text()
    before = len((run / "scores.jsonl").read_text().splitlines())
    options = ["evaluation.num_samples=6", "--json", tmp_path / "s.json"]
    shown = command("evaluate", run, "--steps", "all", *options).out

    found = json.loads((tmp_path / "s.json").read_text())
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found] == [2, 3]
    assert lines[before:] == found
    assert json.loads((run / "evaluation.json").read_text()) == found[1]
    assert f"written to {run / 'scores.jsonl'}; evaluation.json holds the scores of" in shown
    page = (run / "report.html").read_text()
    assert "Scores of several steps" in page

    (run / "evaluation.json").write_text(headline)
    command("evaluate", run, "--step", 2)
    assert (run / "evaluation.json").read_text() == headline
    assert len((run / "scores.jsonl").read_text().splitlines()) == before + 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "2,soon"], "--steps 2,soon: expected all, or steps such as 1000,2000"),
        (["--steps", "2,7"], "--steps 7: "),
        (["--steps", "2", "--step", "3"], "write --step or --steps, not both"),
    ],
)
def test_steps_that_cannot_be_scored_are_refused(run, options, message):
    assert message in refused("evaluate", run, *options)


def test_evaluate_refuses_a_run_without_an_evaluation(tmp_path):
    command("train", tiny(tmp_path, training__steps=1))

    assert "has no evaluation: block. Add one, or sample the run and compare folders" in refused(
        "evaluate", tmp_path / "run"
    )


def test_evaluate_wants_a_run_or_two_folders():
    for arguments in (
        [],
        ["--generated", "a"],
        ["run", "--generated", "a", "--reference", "b", "--features", "pixels"],
    ):
        assert "expected the folder of a run, or --generated DIR --reference" in refused(
            "evaluate", *arguments
        )


def test_a_folder_of_samples_is_scored_without_its_grid(run, tmp_path):
    """Its classes come in turn, as those of a run do with `labels: in_turn`."""
    command("sample", run, "--num", 12, "--out", tmp_path / "samples")
    in_turn = shutil.copytree(run, tmp_path / "in turn")
    command("evaluate", in_turn, "evaluation.labels=in_turn")
    real, metrics = "{type: digits, part: held_out}", "frechet_distance,precision_recall"

    command(
        "evaluate",
        "--generated",
        tmp_path / "samples",
        "--reference",
        real,
        "--features",
        "pixels",
        "--metrics",
        metrics,
        "--json",
        tmp_path / "scores.json",
    )

    found, trained = (
        json.loads(file.read_text())
        for file in (tmp_path / "scores.json", in_turn / "evaluation.json")
    )
    assert (found["num_samples"], found["step"]) == (12, None)
    assert found["scores"]["frechet_distance"]["value"] == pytest.approx(
        trained["scores"]["frechet_distance"]["value"], abs=1e-9
    )


def test_equal_folders_have_no_distance(tmp_path):
    pictures(tmp_path / "a", num=12)

    command(
        "evaluate",
        "--generated",
        tmp_path / "a",
        "--reference",
        tmp_path / "a",
        "--features",
        "pixels",
        "--json",
        tmp_path / "s.json",
    )

    assert (
        abs(json.loads((tmp_path / "s.json").read_text())["scores"]["frechet_distance"]["value"])
        < 1e-6
    )


def test_a_reference_is_made_and_used(tmp_path):
    a, b = pictures(tmp_path / "a", num=12), pictures(tmp_path / "b", num=9)
    shown = command(
        "reference", b, "--features", "pixels", "--out", tmp_path / "deep" / "stats.npz"
    ).out
    with np.load(tmp_path / "deep" / "stats.npz") as stored:
        assert {"mu", "sigma", "num_samples", "protocol"} <= set(stored)
        assert (stored["mu"].shape, int(stored["num_samples"])) == ((192,), 9)
    assert "pixels features of 9 images" in shown

    values = []
    for reference in (tmp_path / "deep" / "stats.npz", b):
        command(
            "evaluate",
            "--generated",
            a,
            "--reference",
            reference,
            "--features",
            "pixels",
            "--json",
            tmp_path / "s.json",
        )
        values.append(
            json.loads((tmp_path / "s.json").read_text())["scores"]["frechet_distance"]["value"]
        )
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_reference_of_other_features_is_refused(tmp_path, quick_classifier):
    command(
        "reference",
        "{type: digits, part: held_out}",
        "--features",
        "digits_classifier",
        "--out",
        tmp_path / "stats.npz",
    )
    data = "{type: digits, part: train}"

    message = refused(
        "evaluate",
        "--generated",
        data,
        "--reference",
        tmp_path / "stats.npz",
        "--features",
        "pixels",
    )

    assert "come from different protocols, so their scores are not comparable:" in message
    assert 'type: "digits_classifier" vs "pixels"' in message
    command(
        "evaluate",
        "--generated",
        data,
        "--reference",
        tmp_path / "stats.npz",
        "--features",
        "digits_classifier",
    )


def test_features_of_ones_own_classifier_serve_folders(tmp_path):
    labelled = pictures(tmp_path / "c", classes=2)
    data = f"{{type: image_folder, path: {labelled}, labels: folders}}"
    block = f"{{type: classifier, steps: 2, data: {data}}}"
    a = pictures(tmp_path / "a", num=9)

    command("evaluate", "--generated", a, "--reference", a, "--features", block)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--reference", "{a}", "--features", "inceptionn"],
            "--features.type: unknown features 'inceptionn'",
        ),
        (
            ["--reference", "{a}", "--features", "pixels", "--metrics", "fidd"],
            "--metrics.type: unknown metric 'fidd'",
        ),
        (
            ["--reference", "{a}", "--features", "pixels", "--metrics", "fid"],
            "'fid' is defined for features 'inception' alone, but the features are",
        ),
        (
            ["--reference", "no_folder", "--features", "pixels"],
            "image_folder: path 'no_folder' does not exist",
        ),
        (
            ["--reference", "no_file.npz", "--features", "pixels"],
            "--reference no_file.npz: there is no such file. Make it with",
        ),
        (
            ["--reference", "{a}", "--features", "pixels", "--metrics", "class_agreement"],
            "metric 'class_agreement' needs",
        ),
        (
            ["--reference", "{a}", "--features", "pixels", "--metrics", "nearest_neighbour_ratio"],
            "ratio' needs nearest: give training",
        ),
        (
            ["--reference", "{s}.npz", "--features", "pixels", "--metrics", "precision_recall"],
            "needs reference images: give the",
        ),
        (["--reference", "{mixed}", "--features", "pixels"], "is 9x8, but"),
        (
            ["--reference", "{broken}", "--features", "pixels"],
            "cannot be read: not in an image format that Pillow knows. Repair",
        ),
        (
            ["--reference", "{other}", "--features", "pixels"],
            "features 'pixels' take uint8 images [N, 3, 8, 8]",
        ),
        (
            ["--reference", "{a}", "--features", "digits_classifier"],
            "features 'digits_classifier' take uint8 images [N, 1, 8, 8]",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, quick_classifier, arguments, message):
    folders = {name: pictures(tmp_path / name, num=4) for name in ("a", "mixed", "broken")}
    folders["other"] = pictures(tmp_path / "other", num=4, size=(4, 4))
    PIL.Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "z.png")
    (tmp_path / "broken" / "z.png").write_bytes(b"no picture")
    folders["s"] = tmp_path / "s"
    np.savez(tmp_path / "s.npz", mu=np.zeros(192), sigma=np.eye(192))
    given = [
        argument.format(**folders) if argument.startswith("{") else argument
        for argument in arguments
    ]

    assert message in refused("evaluate", "--generated", folders["a"], *given)


def test_a_reference_needs_its_ending(tmp_path):
    assert "expected a file name that ends in .npz" in refused(
        "reference", tmp_path, "--features", "pixels", "--out", tmp_path / "stats"
    )


# compare


@pytest.mark.usefixtures("without_report")
def test_compare_trains_and_sets_side_by_side(tmp_path):
    files = []
    for name, gamma in (("plain", 0.0), ("weighted", 1.0)):
        file = tiny(
            tmp_path / name,
            training__steps=1,
            evaluation=PIXELS,
            objective={"weighting": {"type": "p2", "gamma": gamma}},
        )
        files.append(file.rename(tmp_path / f"{name}.yaml"))

    command(
        "compare",
        *files,
        "--seeds",
        "0,1",
        "--out",
        tmp_path / "out",
        "--set",
        "evaluation.num_samples=8",
    )

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found) == ["runs", "summary", "differences", "protocol"]
    assert found["protocol"]["num_samples"] == 8
    assert [(run["name"], run["seed"], run["run"]) for run in found["runs"]] == [
        ("plain", 0, "plain-seed0"),
        ("plain", 1, "plain-seed1"),
        ("weighted", 0, "weighted-seed0"),
        ("weighted", 1, "weighted-seed1"),
    ]
    assert all(list(run) == ["name", "recipe", "seed", "run", "scores"] for run in found["runs"])
    assert found["differences"] == {
        "plain": {"objective.weighting.gamma": 0.0},
        "weighted": {"objective.weighting.gamma": 1.0},
    }
    score = found["summary"]["weighted"]["frechet_distance"]
    assert score["values"] == [
        run["scores"]["frechet_distance"]["value"] for run in found["runs"][2:]
    ]
    assert score["mean"] == pytest.approx(sum(score["values"]) / 2)
    assert score["std"] == pytest.approx(abs(score["values"][0] - score["values"][1]) / 2**0.5)
    assert "weighted" in (tmp_path / "out" / "report.html").read_text()
    assert (
        json.loads((tmp_path / "out" / "plain-seed1" / "evaluation.json").read_text())[
            "num_samples"
        ]
        == 8
    )

    before = (tmp_path / "out" / "results.json").read_text()
    shown = command(
        "compare",
        *files,
        "--seeds",
        "0,1",
        "--out",
        tmp_path / "out",
        "--set",
        "evaluation.num_samples=8",
    ).out
    assert shown.count("is done: 1 steps") == 4
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_compare_refuses_samples_that_show_other_classes(tmp_path):
    files = []
    for name in ("reference", "in_turn"):
        file = tiny(tmp_path / name, evaluation={**PIXELS, "labels": name})
        files.append(file.rename(file.with_name(f"{name}.yaml")))

    message = refused("compare", *files, "--seeds", "0", "--out", tmp_path / "out")

    assert 'labels.choice: "reference" vs "in_turn"' in message
    assert not (tmp_path / "out").exists()


def test_compare_refuses_before_the_first_run_trains(tmp_path):
    good, without = tiny(tmp_path / "good", evaluation=PIXELS), tiny(tmp_path / "without")
    out = ["--out", str(tmp_path / "out")]
    same = good.rename(tmp_path / "good" / "same.yaml")
    bad = tiny(tmp_path / "bad", evaluation=PIXELS, sampling__guidance=2.0, label_dropout=0.0)

    assert "two recipes have one file name (same, same)" in refused("compare", same, same, *out)
    assert "the recipe recipe has no evaluation: block" in refused("compare", same, without, *out)
    assert "--seeds 0,x: expected whole numbers with commas" in refused(
        "compare", same, "--seeds", "0,x", *out
    )
    assert "--seeds 1,1: a seed is written twice" in refused(
        "compare", same, "--seeds", "1,1", *out
    )
    assert "sampling.guidance: 2.0" in refused("compare", same, bad, *out)
    other = tiny(tmp_path / "other", evaluation={**PIXELS, "num_samples": 13, "seed": 5}).rename(
        tmp_path / "other" / "other.yaml"
    )
    message = refused("compare", same, other, *out)
    assert "the scores of same and those of other come from different protocols" in message
    assert "num_samples: 12 vs 13" in message
    assert "seed" not in message
    assert not (tmp_path / "out").exists()


# Draws


def test_a_global_seed_changes_nothing(run, tmp_path):
    """Samples are keyed: the state of torch's own generator does not matter."""
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        command("sample", run, "--num", 1, "--out", tmp_path / name)

    assert (tmp_path / "one" / "000000.png").read_bytes() == (
        tmp_path / "two" / "000000.png"
    ).read_bytes()


def test_metrics_of_folders_may_be_blocks_with_arguments(tmp_path):
    pictures(tmp_path / "a")
    folders = ["--generated", tmp_path / "a", "--reference", tmp_path / "a", "--features", "pixels"]
    blocks = "[{type: kernel_distance, subsets: 2, subset_size: 5}, frechet_distance]"
    file = tmp_path / "scores.json"

    command("evaluate", *folders, "--metrics", blocks, "--json", file)

    scores = json.loads(file.read_text())["scores"]
    assert set(scores) == {"kernel_distance", "frechet_distance"}
    assert scores["kernel_distance"]["subset_size"] == 5
    assert "nonsense" in refused("evaluate", *folders, "--metrics", "{type: nonsense}")


@pytest.mark.parametrize(
    "option", [["--reference", "x"], ["--features", "pixels"], ["--metrics", "fid"]], ids=str
)
def test_options_of_folders_are_refused_for_a_run(run, option):
    message = refused("evaluate", run, *option)

    assert f"evaluate: {option[0]} has no effect on a run, which is scored as its recipe" in message
    assert f"Write an override such as evaluation.{option[0][2:]}=..." in message


@pytest.mark.parametrize(
    "option", [["--step", "3"], ["--lora-scale", "0.5"], ["--weights", "model"]], ids=str
)
def test_options_of_a_run_are_refused_for_folders(tmp_path, option):
    folders = ["--generated", tmp_path, "--reference", tmp_path, "--features", "pixels"]

    message = refused("evaluate", *folders, *option)

    assert f"{' '.join(option)} has no effect on folders" in message
