"""The catalogue of parts: formula, source and arguments are read from constructors."""

from dataclasses import dataclass
from typing import Annotated

import pytest

from difftrain.core.registry import GIVEN, PositiveInt, UnitInterval
from difftrain.objective.slots import WEIGHTINGS
from difftrain.recipe.catalogue import SLOTS, as_text, methods, record, source


@dataclass
class Constant:
    """w = c on the error
    that is trained.

    A limit that a reader can check, of 1998.

    Args:
        c: The weight, in [0, 1].

    Reference:
        Doe and Roe 2024, "On Constants", a title that goes on in
        the next line, arXiv:2401.00001.

    Note:
        More text.
    """

    c: UnitInterval = 0.5
    num: PositiveInt | None = None
    given: Annotated[int, GIVEN] = 0
    stated_for = None

    def __call__(self, level):
        return self.c + 0 * level.alpha


@pytest.fixture
def constant():
    WEIGHTINGS.register("constant_of_tests")(Constant)
    yield record(WEIGHTINGS, "constant_of_tests")
    del WEIGHTINGS.constructors["constant_of_tests"]


def test_the_formula_is_the_first_paragraph(constant):
    assert constant["formula"] == "w = c on the error that is trained."


def test_the_source_is_the_reference_section(constant):
    assert constant["source"] == (
        'Doe and Roe 2024, "On Constants", a title that goes on in the next line, arXiv:2401.00001.'
    )


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("w = 1. Doe 2024, arXiv:2401.00001. More.", "Doe 2024, arXiv:2401.00001."),
        ("w = 1. Doe 1998 wrote it (in a book). More.", "Doe 1998 wrote it (in a book)."),
        ("w = 1, for 64 x 64 images.", None),
    ],
)
def test_without_a_section_the_source_is_the_sentence_with_a_year(docstring, expected):
    assert source(docstring) == expected


def test_arguments_have_types_with_bounds_and_defaults(constant):
    assert constant["arguments"] == {
        "c": {"type": "float >= 0 and <= 1", "required": False, "default": 0.5},
        "num": {"type": "int >= 1 | None", "required": False, "default": None},
    }


def test_every_part_of_every_slot_is_listed_once():
    found = [(part["slot"], part["name"]) for part in methods([])]

    assert len(set(found)) == len(found)
    for slot in SLOTS:
        names = [name for kind, name in found if kind == slot.slot]
        assert names == list(slot.constructors)


def test_the_text_shows_slots_parts_sources_and_arguments(constant):
    lines = as_text([constant]).splitlines()

    assert lines[0] == f"weighting: {WEIGHTINGS.purpose}"
    assert lines[1] == "  constant_of_tests   w = c on the error that is trained."
    assert lines[2].strip() == constant["source"]
    assert [line.strip() for line in lines[3:]] == [
        "c: float >= 0 and <= 1 = 0.5",
        "num: int >= 1 | None = None",
    ]
