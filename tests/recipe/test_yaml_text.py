"""Strict YAML: numbers are numbers, a key stands once, and written data reads as it was."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difftrain.core.errors import InputError
from difftrain.recipe.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2e+3", -2000.0),
        ("1.e-2", 0.01),
        (".5", 0.5),
        ("1_000", 1000),
        ("3", 3),
        ("3.0", 3.0),
        (".inf", float("inf")),
        ("none", "none"),
        ("null", None),
        ("true", True),
        ("e5", "e5"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ("runs/a", "runs/a"),
        ("v1.2.3", "v1.2.3"),
    ],
)
def test_a_number_is_a_number_and_a_word_a_word(text, value):
    found = read_yaml(f"key: {text}", "here")["key"]

    assert found == value
    assert type(found) is type(value)


def test_a_duplicate_key_is_refused_with_its_line():
    with pytest.raises(
        InputError, match=r"^here, line 3: the key 'a' is written twice\. Keep one\.$"
    ):
        read_yaml("a: 1\nb: 2\na: 3\n", "here")


def test_a_duplicate_key_deep_in_a_list_is_refused_with_its_line():
    with pytest.raises(InputError, match=r"here, line 4: the key 'type' is written twice"):
        read_yaml("a:\n  - b: 1\n    type: x\n    type: y\n", "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3", "here, line 2: not YAML"),
        ("a: 1\n\tb: 2", "here, line 2: not YAML"),
        ("a: *nowhere", "here, line 1: not YAML"),
        ("a: !!python/object:os.system x", "here, line 1: not YAML"),
        ("a: 2024-13-45", "here: not YAML: month must be in 1..12"),
        ("? [a, b]\n: 1", "here, line 1: the key ['a', 'b'] is not a name"),
        ("a: 1\n---\nb: 2", "here, line 2: not YAML"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(text, message):
    with pytest.raises(InputError) as error:
        read_yaml(text, "here")

    assert message in str(error.value)


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(), st.lists(values) | st.dictionaries(st.text(), values) | values))
def test_written_data_reads_as_it_was(data: dict[str, Any]):
    assert read_yaml(write_yaml(data), "here") == data


@pytest.mark.parametrize(
    "text", ["1e-4", "1E5", "12", "true", "null", "~", "2024-01-01", ".5", "a: b", "# c", ""]
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert read_yaml(write_yaml({"output": text}), "here") == {"output": text}
