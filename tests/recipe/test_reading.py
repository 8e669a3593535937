"""Recipes: what one may say, overrides, own modules; a written recipe is the one that was read."""

import sys
from pathlib import Path

import pytest
import yaml
from helpers.places import ROOT
from helpers.runs import tiny

from difftrain.core.errors import InputError
from difftrain.objective.objective import Objective
from difftrain.recipe.reading import load, parse
from difftrain.recipe.schema import Recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load(file, overrides)
    return str(error.value)


def written(folder: Path, text: str) -> Path:
    """Write the tiny recipe with more text under it."""
    file = tiny(folder)
    file.write_text(file.read_text() + text)
    return file


# What is refused


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path):
    assert "schedul: unknown key (did you mean 'schedule'?)" in refusal(
        tiny(tmp_path), "schedul=linear"
    )


def test_several_problems_are_told_at_once(tmp_path):
    message = refusal(
        tiny(tmp_path),
        "training.steps=0",
        "optimizer.lrr=1",
        "schedule.type=linea",
        "seed=-1",
        "trainig.steps=1",
    )

    for part in (
        "training.steps: expected greater than or equal to 1, got 0",
        "optimizer.lrr: unknown key (did you mean 'lr'?)",
        "schedule.type: unknown schedule 'linea' (did you mean 'linear'?)",
        "seed: expected greater than or equal to 0, got -1",
        "trainig: unknown key (did you mean 'training'?)",
    ):
        assert part in message
    assert len(message.splitlines()) == 5


@pytest.mark.parametrize("key", ["output", "model", "data", "training", "sampling"])
def test_a_missing_block_is_named(tmp_path, key):
    data = yaml.safe_load(tiny(tmp_path).read_text())
    del data[key]
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(data))

    assert f"{key}: required, but not given." in refusal(tmp_path / "without.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=many", "training.steps: expected a valid integer, got 'many'."),
        ("training.steps=1e3", "training.steps: expected a valid integer, got 1000.0."),
        ("transform.flip=1", "transform.flip: expected a valid boolean, got 1."),
        ("output=3", "output: expected a valid string, got 3."),
        ("label_dropout=1.5", "label_dropout: expected less than or equal to 1, got 1.5."),
        (
            "parameterization=eps",
            "parameterization: expected 'epsilon', 'sample', 'v_prediction' or 'flow_prediction', "
            "got 'eps'.",
        ),
        (
            "objective.regularizers=unit",
            "objective.regularizers: expected a list of blocks, got 'unit'.",
        ),
        ("training=3", "training: expected a block with the keys steps, batch_size"),
        ("model=[]", "model: expected a block with a type, such as {type: unet2d}, got []."),
        (
            "imports=a",
            "imports: expected a list of module names, such as [my_lab.my_method], got 'a'.",
        ),
        ("optimizer.lr=.nan", "optimizer.lr: expected"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_path(tmp_path, override, message):
    assert message in refusal(tiny(tmp_path), override)


@pytest.mark.parametrize(
    ("text", "kind"), [("", "empty"), ("- a\n- b\n", "a list"), ("hello", "a str")]
)
def test_a_recipe_must_be_a_mapping(tmp_path, text, kind):
    (tmp_path / "r.yaml").write_text(text)

    said = refusal(tmp_path / "r.yaml")
    assert said == (
        "a recipe is a mapping of keys such as output, model, data and training; "
        f"this one is {kind}."
    )


def test_a_missing_and_an_unreadable_file_are_named(tmp_path):
    assert "there is no recipe" in refusal(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml' cannot be read" in refusal(tmp_path / "binary.yaml")


# Overrides


def test_an_override_reaches_a_number_deep_in_a_block(tmp_path):
    recipe = load(
        tiny(tmp_path),
        ["objective.weighting.type=p2", "objective.weighting.gamma=1e-1", "training.steps=7"],
    )

    assert recipe.training.build().steps == 7
    assert recipe.objective.arguments["weighting"].arguments["gamma"] == 0.1


def test_an_override_opens_a_short_block(tmp_path):
    recipe = load(
        written(tmp_path, "objective: {weighting: p2}\n"), ["objective.weighting.gamma=0.5"]
    )

    assert recipe.objective.arguments["weighting"].dump() == {"type": "p2", "gamma": 0.5, "k": 1.0}


def test_an_override_reaches_into_a_list_and_opens_a_short_block_there(tmp_path):
    metrics = "[{type: kernel_distance}, precision_recall]"
    block = f"evaluation: {{features: pixels, reference: digits, metrics: {metrics}}}\n"
    recipe = load(
        written(tmp_path, block),
        ["evaluation.metrics.0.degree=2", "evaluation.metrics.1.neighbours=5"],
    )

    first, second = (part.dump() for part in recipe.evaluation.arguments["metrics"])
    assert (first["type"], first["degree"], first["subsets"]) == ("kernel_distance", 2, None)
    assert second == {"type": "precision_recall", "neighbours": 5}


def test_an_override_replaces_an_item_of_a_list_and_a_whole_block(tmp_path):
    block = "evaluation: {features: pixels, reference: digits, metrics: [kernel_distance]}\n"
    recipe = load(
        written(tmp_path, block),
        ["evaluation.metrics.0=frechet_distance", "data={type: digits, part: all}"],
    )

    assert recipe.evaluation.arguments["metrics"][0].name == "frechet_distance"
    assert recipe.data.arguments == {"part": "all", "classes": None}


def test_an_override_fills_a_block_that_was_null(tmp_path):
    """As every optional block is in a run's own recipe.yaml."""
    recipe = load(written(tmp_path, "ema: null\n"), ["ema.type=decay", "ema.decay=0.5"])

    assert recipe.ema.dump() == {"type": "decay", "decay": 0.5, "warmup": True}


def test_an_override_may_be_empty_or_hold_an_equals_sign(tmp_path):
    recipe = load(
        tiny(tmp_path), ["label_dropout=0", "model.config.num_class_embeds=", "output=runs/a=b"]
    )

    assert recipe.model.arguments["config"]["num_class_embeds"] is None
    assert recipe.output == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "expected key=value, such as training.steps=200"),
        ("=3", "expected key=value"),
        ("label_dropout.deep=3", "'label_dropout' is 0.2, which has no keys below it"),
        ("training.steps=[1", "line 1: not YAML"),
        ("imports.0=x", "the list has no places, got '0'"),
        ("model.config.block_out_channels.2=8", "the list has the places 0 to 1, got '2'"),
        ("model.config.block_out_channels.first=8", "the list has the places 0 to 1, got 'first'"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(tmp_path, override, message):
    assert message in refusal(written(tmp_path, "imports: []\n"), override)


# Dump


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_resolved_recipe_loads_to_the_same_recipe(file, tmp_path):
    recipe = load(file)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())

    again = load(tmp_path / "recipe.yaml")

    assert again.dump() == recipe.dump()
    assert again.to_yaml() == recipe.to_yaml()


def test_the_resolved_recipe_states_every_default(tmp_path):
    dumped = load(tiny(tmp_path)).dump()

    assert dumped["optimizer"]["weight_decay"] == 0.0
    assert dumped["objective"]["weighting"] == {"type": "unit"}
    assert dumped["lr_schedule"] == {"type": "constant", "warmup": 0}
    assert dumped["ema"] is None
    assert set(dumped) == set(Recipe.__dataclass_fields__)


# Modules of one's own


METHOD = '''
from dataclasses import dataclass
from difftrain.core.registry import Positive
from difftrain.objective.slots import WEIGHTINGS

@WEIGHTINGS.register("{name}")
@dataclass(frozen=True)
class Own:
    """w = c."""
    c: Positive = 2.0
    stated_for = None

    def __call__(self, level):
        return self.c + 0 * level.alpha
'''


def test_a_module_beside_the_recipe_brings_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_recipe.py").write_text(METHOD.format(name="beside"))
    file = written(
        tmp_path, "imports: [beside_the_recipe]\nobjective: {weighting: {type: beside, c: 3}}\n"
    )

    recipe = load(file)

    objective = recipe.objective.build(schedule=recipe.schedule.build(), parameterization="epsilon")
    assert isinstance(objective, Objective)
    assert objective.weights.unique().tolist() == [3.0]
    assert "objective.weighting.c: expected greater than 0" in refusal(
        file, "objective.weighting.c=0"
    )


def test_a_module_that_is_not_there_is_refused(tmp_path):
    message = refusal(written(tmp_path, "imports: [no_such_module_anywhere]\n"))

    assert message.startswith("imports.0: cannot import 'no_such_module_anywhere'")
    assert "put it into the folder of the recipe" in message


def test_parse_takes_plain_data(tmp_path):
    data = yaml.safe_load(tiny(tmp_path).read_text())

    assert parse(data).dump() == load(tmp_path / "recipe.yaml").dump()
