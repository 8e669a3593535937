"""Blocks, signatures and messages: what a user reads when a recipe is wrong."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.core.registry import (
    ALL_DEFAULTS,
    BESIDE_TRAINING,
    GIVEN,
    NonNegative,
    NonNegativeInt,
    Part,
    Positive,
    PositiveInt,
    Registry,
    Section,
    UnitInterval,
    bounded,
    check_arguments,
    dump,
    is_optional,
    is_registered,
    keeps_part,
    parameters,
    registered_name,
    slot_of,
    touches_training,
)
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import WeightedTerm
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import NOISES, PERTURBATIONS, REGULARIZERS, WEIGHTINGS
from difftrain.objective.weightings import P2, MinSNR

WHEELS = Registry("wheel", "what a vehicle rolls on")
VEHICLES = Registry("vehicle", "a slot with slots of its own")


@WHEELS.register("disc")
@dataclass(frozen=True)
class Disc:
    radius: Positive = 1.0
    spokes: PositiveInt = 8


@WHEELS.register("ring")
@dataclass(frozen=True)
class Ring:
    pass


@VEHICLES.register("cart")
class Cart:
    def __init__(
        self,
        owner: str,
        wheel: Annotated[Disc | Ring, WHEELS] = Ring(),
        spares: Annotated[list[Disc | Ring], WHEELS] = [],  # noqa: B006
        trailer: Annotated[Ring | None, WHEELS] = None,
        world: Annotated[Tensor | None, GIVEN] = None,
        colour: Literal["red", "blue"] = "red",
        steep: bool = False,
        gears: NonNegativeInt = 0,
        load: NonNegative = 0.0,
        share: UnitInterval = 0.5,
        tilt: bounded(-1, 1) = 0.0,
        fill: bounded(0, 1, open_low=True) = 1.0,
    ):
        self.owner = owner
        self.wheel = wheel
        self.spares = spares
        self.world = world
        self.load = load


def message_of(block, path="objective.vehicle", registry=VEHICLES):
    with pytest.raises(InputError) as error:
        registry.parse(block, path)
    return str(error.value)


CART_KEYS = "colour, fill, gears, load, owner, share, spares, steep, tilt, trailer, wheel"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"type": "kart"},
            "objective.vehicle.type: unknown vehicle 'kart' (did you mean 'cart'?); known: cart.",
        ),
        ("submarine", "objective.vehicle.type: unknown vehicle 'submarine'; known: cart."),
        (
            {"owner": "me"},
            "objective.vehicle: expected a block with a type, such as {type: cart}, "
            "got {'owner': 'me'}.",
        ),
        (7, "objective.vehicle: expected a block with a type, such as {type: cart}, got 7."),
        (None, "objective.vehicle: expected a block with a type, such as {type: cart}, got None."),
        ({"type": "cart"}, "objective.vehicle.owner: required, but not given."),
        ({"type": "cart", "owner": 3}, "objective.vehicle.owner: expected a valid string, got 3."),
        (
            {"type": "cart", "owner": "me", "lode": 1.0},
            f"objective.vehicle.lode: unknown key (did you mean 'load'?); known: {CART_KEYS}.",
        ),
        (
            {"type": "cart", "owner": "me", "xyz": 1.0},
            f"objective.vehicle.xyz: unknown key; known: {CART_KEYS}.",
        ),
        (
            {"type": "cart", "owner": "me", "load": -0.5},
            "objective.vehicle.load: expected greater than or equal to 0, got -0.5.",
        ),
        (
            {"type": "cart", "owner": "me", "load": "1e-4"},
            "objective.vehicle.load: expected a valid number, got '1e-4'.",
        ),
        (
            {"type": "cart", "owner": "me", "load": True},
            "objective.vehicle.load: expected a valid number, got True.",
        ),
        (
            {"type": "cart", "owner": "me", "load": float("nan")},
            "objective.vehicle.load: expected a finite number, got nan.",
        ),
        (
            {"type": "cart", "owner": "me", "gears": True},
            "objective.vehicle.gears: expected a valid integer, got True.",
        ),
        (
            {"type": "cart", "owner": "me", "gears": 1.5},
            "objective.vehicle.gears: expected a valid integer, got 1.5.",
        ),
        (
            {"type": "cart", "owner": "me", "gears": -1},
            "objective.vehicle.gears: expected greater than or equal to 0, got -1.",
        ),
        (
            {"type": "cart", "owner": "me", "share": 1.5},
            "objective.vehicle.share: expected less than or equal to 1, got 1.5.",
        ),
        (
            {"type": "cart", "owner": "me", "tilt": -2},
            "objective.vehicle.tilt: expected greater than or equal to -1, got -2.",
        ),
        (
            {"type": "cart", "owner": "me", "fill": 0},
            "objective.vehicle.fill: expected greater than 0, got 0.",
        ),
        (
            {"type": "cart", "owner": "me", "steep": 1},
            "objective.vehicle.steep: expected a valid boolean, got 1.",
        ),
        (
            {"type": "cart", "owner": "me", "colour": "green"},
            "objective.vehicle.colour: expected 'red' or 'blue', got 'green'.",
        ),
        (
            {"type": "cart", "owner": "me", "wheel": {"type": "disk"}},
            "objective.vehicle.wheel.type: unknown wheel 'disk' (did you mean 'disc'?); "
            "known: disc, ring.",
        ),
        (
            {"type": "cart", "owner": "me", "wheel": None},
            "objective.vehicle.wheel: expected a block with a type, such as {type: disc}, "
            "got None.",
        ),
        (
            {"type": "cart", "owner": "me", "spares": ["ring", {"type": "disc", "radius": 0}]},
            "objective.vehicle.spares.1.radius: expected greater than 0, got 0.",
        ),
        (
            {"type": "cart", "owner": "me", "spares": {"type": "ring"}},
            "objective.vehicle.spares: expected a list of blocks, got {'type': 'ring'}.",
        ),
        (
            {"type": "cart", "owner": "me", "world": 3},
            f"objective.vehicle.world: unknown key; known: {CART_KEYS}.",
        ),
    ],
)
def test_a_wrong_block_is_rejected_with_its_path(block, message):
    assert message_of(block) == message


def test_one_error_lists_all_problems_of_a_block():
    block = {
        "type": "cart",
        "lode": 1.0,
        "load": -1.0,
        "gears": "two",
        "wheel": {"type": "disc", "spokes": 0},
    }
    assert message_of(block).split("\n") == [
        f"objective.vehicle.lode: unknown key (did you mean 'load'?); known: {CART_KEYS}.",
        "objective.vehicle.wheel.spokes: expected greater than or equal to 1, got 0.",
        "objective.vehicle.owner: required, but not given.",
        "objective.vehicle.gears: expected a valid integer, got 'two'.",
        "objective.vehicle.load: expected greater than or equal to 0, got -1.0.",
    ]


def test_a_wrong_number_deep_in_the_objective_has_the_whole_path():
    objectives = Registry("objective", "")
    objectives.constructors["objective"] = Objective

    @REGULARIZERS.register("registry_test")
    class Nothing(WeightedTerm):
        pass

    try:
        block = {"type": "objective", "regularizers": [{"type": "registry_test", "weight": -1}]}
        assert (
            message_of(block, "objective", objectives)
            == "objective.regularizers.0.weight: expected greater than or equal to 0, got -1."
        )
    finally:
        del REGULARIZERS.constructors["registry_test"]


def test_defaults_fill_in_and_an_integer_serves_as_a_float():
    part = WEIGHTINGS.parse({"type": "p2", "gamma": 2}, "weighting")

    assert part.arguments == {"gamma": 2.0, "k": 1.0}
    assert isinstance(part.arguments["gamma"], float)
    assert part.build() == P2(gamma=2.0, k=1.0)


def test_a_name_alone_is_a_block_without_arguments():
    assert WEIGHTINGS.parse("min_snr", "weighting") == WEIGHTINGS.parse(
        {"type": "min_snr"}, "weighting"
    )
    assert WEIGHTINGS.parse("min_snr", "weighting").build() == MinSNR(gamma=5.0)


def test_nested_blocks_build_and_dump_to_what_was_written():
    block = {
        "type": "cart",
        "owner": "me",
        "wheel": {"type": "disc", "radius": 2.0, "spokes": 3},
        "spares": ["ring", {"type": "disc"}],
    }
    part = VEHICLES.parse(block, "vehicle")
    cart = part.build()

    assert cart.wheel == Disc(radius=2.0, spokes=3)
    assert cart.spares == [Ring(), Disc()]
    dumped = part.dump()
    assert dumped["wheel"] == block["wheel"]
    assert dumped["spares"] == [{"type": "ring"}, {"type": "disc", "radius": 1.0, "spokes": 8}]
    assert dumped["trailer"] is None
    assert "world" not in dumped
    assert VEHICLES.parse(dumped, "vehicle") == part
    assert dump(cart) == dumped
    assert VEHICLES.parse(part, "vehicle") is part


def test_supplied_arguments_reach_the_constructor_that_takes_them_and_no_other():
    world = torch.zeros(2)

    assert (
        VEHICLES.parse({"type": "cart", "owner": "me"}, "vehicle")
        .build(world=world, elsewhere=3)
        .world
        is world
    )
    assert WHEELS.parse("disc", "wheel").build(world=world) == Disc()


def test_supplied_arguments_are_no_keys_of_a_recipe_but_are_given_directly():
    cart = Cart("me", world=torch.zeros(2))

    assert cart.world.shape == (2,)
    assert "world" not in dump(cart)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P2(gamma=-1), "p2.gamma: expected greater than or equal to 0, got -1."),
        (lambda: P2(0.5, 0.0), "p2.k: expected greater than 0, got 0.0."),
        (lambda: P2(gamma=True), "p2.gamma: expected a valid number, got True."),
        (
            lambda: NoiseSchedule.linear(0),
            "linear.num_timesteps: expected greater than or equal to 1, got 0.",
        ),
        (
            lambda: NoiseSchedule.cosine(num_timesteps=10.0),
            "cosine.num_timesteps: expected a valid integer, got 10.0.",
        ),
    ],
)
def test_direct_construction_is_checked_by_the_same_bounds(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message


def test_an_input_error_is_a_value_error():
    with pytest.raises(ValueError, match="gamma"):
        P2(gamma=-1)


def test_a_checked_constructor_keeps_its_documentation_and_converts_integers():
    assert P2.__init__.__wrapped__ is not None
    assert "arXiv:2204.00227" in P2.__doc__
    assert "arXiv:2006.11239" in NoiseSchedule.linear.__doc__
    assert isinstance(P2(gamma=2).gamma, float)


def test_a_subclass_is_not_checked_against_its_parents_signature():
    class Heavy(Disc):
        def __init__(self, mass):
            super().__init__(radius=mass)

    assert Heavy(3.0).radius == 3.0
    assert is_registered(Disc())
    assert not is_registered(Heavy(3.0))


def test_a_name_can_not_be_registered_by_two_constructors():
    def rolling():
        return None

    with pytest.raises(InputError) as error:
        WHEELS.register("disc")(rolling)
    assert str(error.value) == (
        f"wheel 'disc' is already registered by {__name__}.Disc. Choose a different name."
    )
    assert WHEELS.constructors["disc"] is Disc


def test_a_name_can_not_be_registered_by_a_class_of_the_same_name_from_a_different_module():
    elsewhere = type("P2", (), {"__module__": "my_lab.p2", "__init__": lambda self: None})

    message = r"^weighting 'p2' is already registered by difftrain\.objective\.weightings\.P2\. "
    with pytest.raises(InputError, match=message):
        WEIGHTINGS.register("p2")(elsewhere)
    assert WEIGHTINGS.constructors["p2"] is P2


def test_registering_the_same_constructor_again_is_a_reload():
    registry = Registry("thing", "")
    for _ in range(2):

        @registry.register("one")
        def one() -> int:
            return 1

    assert registry.parse("one", "thing").build() == 1


OUTSIDE = '''
from __future__ import annotations
from dataclasses import dataclass
from difftrain.core.registry import Positive
from difftrain.objective.slots import NOISES

@NOISES.register("outside_test")
@dataclass(frozen=True)
class Constant:
    """eps = value."""
    value: Positive = 1.0

    def __call__(self, x0, rng):
        return x0.new_full(x0.shape, self.value)
'''


def test_a_part_of_an_own_module_registers_parses_and_builds(tmp_path: Path, monkeypatch):
    (tmp_path / "my_lab_noise.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        __import__("my_lab_noise")
        part = NOISES.parse({"type": "outside_test", "value": 2}, "objective.noise")

        assert torch.equal(part.build()(torch.zeros(2, 3), None), torch.full((2, 3), 2.0))
        wrong = {"type": "outside_test", "value": 0}
        assert (
            message_of(wrong, "objective.noise", NOISES)
            == "objective.noise.value: expected greater than 0, got 0."
        )
    finally:
        NOISES.constructors.pop("outside_test", None)
        sys.modules.pop("my_lab_noise", None)


def test_a_registered_function_is_checked_like_a_class():
    registry = Registry("thing", "")

    @registry.register("twice")
    def twice(value: PositiveInt, unit: str = "m") -> str:
        return f"{2 * value} {unit}"

    assert twice(3) == "6 m"
    assert registry.parse({"type": "twice", "value": 2, "unit": "s"}, "thing").build() == "4 s"
    with pytest.raises(
        InputError, match=r"^twice\.value: expected greater than or equal to 1, got 0\.$"
    ):
        twice(0)


def test_choices_of_a_literal_are_named():
    assert message_of(
        {"type": "input_perturbation", "target": "noisy"}, "objective.perturbation", PERTURBATIONS
    ) == ("objective.perturbation.target: expected 'clean' or 'implied_eps', got 'noisy'.")


# Keys beside training


class Engine:
    def __init__(
        self,
        power: Positive,
        gauge: Annotated[PositiveInt | None, BESIDE_TRAINING] = None,
        dial: Annotated[PositiveInt, BESIDE_TRAINING] = 3,
        lamp: Annotated[Part | None, WHEELS, BESIDE_TRAINING] = None,
        wheel: Annotated[Disc | Ring, WHEELS] = Ring(),
    ):
        self.power, self.dial, self.lamp = power, dial, lamp


def test_a_parameter_says_whether_its_key_touches_training():
    touching = {name: touches_training(p) for name, p in parameters(Engine).items()}

    assert touching == {"power": True, "gauge": False, "dial": False, "lamp": False, "wheel": True}


def test_the_marker_changes_neither_bounds_nor_slot_nor_optionality():
    takes = parameters(Engine)
    assert slot_of(takes["lamp"]) is WHEELS
    assert keeps_part(takes["lamp"])
    assert is_optional(takes["lamp"])
    assert slot_of(takes["dial"]) is None

    part = Section(Engine).parse({"power": 2, "dial": 4, "lamp": "ring"}, "engine")
    assert part.dump() == {
        "power": 2.0,
        "gauge": None,
        "dial": 4,
        "lamp": {"type": "ring"},
        "wheel": {"type": "ring"},
    }
    assert part.build().lamp == WHEELS.parse("ring", "")
    wrong = {"power": 2, "dial": 0, "gauge": 0}
    assert message_of(wrong, "engine", Section(Engine)).split("\n") == [
        "engine.gauge: expected greater than or equal to 1, got 0.",
        "engine.dial: expected greater than or equal to 1, got 0.",
    ]


# Blocks that stay plain data


class Garage:
    def __init__(
        self,
        name: str,
        vehicle: Annotated[Part | None, VEHICLES] = None,
        engine: Annotated[Part, Section(Engine)] = ALL_DEFAULTS,
        wheels: Annotated[list[Part], WHEELS] = [],  # noqa: B006
    ):
        self.name, self.vehicle, self.engine, self.wheels = name, vehicle, engine, wheels


UNREADABLE = {
    "name": "g",
    "vehicle": {"type": "of a package that is not installed", "size": 3},
    "engine": {"power": -1, "colours": ["red", {"blue": None}]},
    "wheels": [{"type": "square"}, "ring"],
}


def test_a_block_that_is_left_out_of_the_check_stays_plain_data_and_dumps_unchanged():
    leave = frozenset({"vehicle", "engine", "wheels"})
    part = Part(Section(Garage), "", check_arguments(Garage, UNREADABLE, "garage", leave=leave))

    assert part.arguments == UNREADABLE
    assert part.dump() == UNREADABLE
    garage = part.build()
    assert (garage.vehicle, garage.engine) == (UNREADABLE["vehicle"], UNREADABLE["engine"])


def test_only_the_named_blocks_are_left_out_of_the_check():
    with pytest.raises(InputError) as error:
        check_arguments(Garage, UNREADABLE, "garage", leave={"vehicle", "wheels"})
    assert str(error.value).split("\n") == [
        f"garage.engine.colours: unknown key; known: {', '.join(sorted(parameters(Engine)))}.",
        "garage.engine.power: expected greater than 0, got -1.",
    ]


def test_a_default_block_of_a_slot_that_is_left_out_of_the_check_is_plain_too():
    found = check_arguments(Garage, {"name": "g"}, "garage", leave={"engine"})

    assert found == {"name": "g", "vehicle": None, "engine": {}, "wheels": []}


def test_plain_data_dumps_to_itself():
    data = {"a": [1, "b", None, {"c": True}], "d": {"type": "anything", "e": 0.5}}

    assert dump(data) == data


# Names and homes


def test_an_instance_knows_its_registered_name_and_others_have_that_of_their_class():
    class Own:
        pass

    assert registered_name(Disc()) == "disc"
    assert registered_name(P2()) == "p2"
    assert registered_name(Own()) == "Own"


def test_the_parts_of_a_home_and_of_all_modules_in_it_are_imported_at_the_first_look(
    tmp_path: Path, monkeypatch
):
    home = tmp_path / "registry_test_home"
    (home / "deeper").mkdir(parents=True)
    for name, file in (("one", "__init__.py"), ("two", "part.py"), ("three", "deeper/part.py")):
        text = "from shared_registry_test import THINGS\n"
        (home / file).write_text(f"{text}@THINGS.register({name!r})\nclass Part: pass\n")
    (home / "deeper" / "__init__.py").write_text("")
    (tmp_path / "shared_registry_test.py").write_text(
        "from difftrain.core.registry import Registry\n"
        "THINGS = Registry('thing', '', ['registry_test_home'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        things = __import__("shared_registry_test").THINGS
        assert "registry_test_home" not in sys.modules

        assert set(things.constructors) == {"one", "two", "three"}
    finally:
        for module in [name for name in sys.modules if "registry_test" in name]:
            del sys.modules[module]
