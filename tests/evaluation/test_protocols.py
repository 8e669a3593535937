"""Protocols: the facts that packages differ in, and when two protocols are the same."""

import dataclasses
import itertools
import json
import runpy
from typing import get_args

import pytest
import torch
from helpers.places import ROOT
from helpers.support import golden

from difftrain.core.errors import InputError
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.protocols import (
    PRESETS,
    ProtocolName,
    check_comparable,
    digest_of,
    protocol_differences,
)

FORMULA = runpy.run_path(str(ROOT / "scripts" / "golden_inception.py"))


def test_every_preset_is_a_protocol_of_its_own():
    assert tuple(PRESETS) == get_args(ProtocolName)
    settled = {
        name: json.dumps(dataclasses.asdict(preset) | {"name": "", "source": ""})
        for name, preset in PRESETS.items()
    }
    assert len(set(settled.values())) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_protocols_are_json_and_hold_every_choice_but_conventions(name):
    protocol = PRESETS[name].protocol()

    assert json.loads(json.dumps(protocol)) == protocol
    fields = {field.name for field in dataclasses.fields(PRESETS[name])}
    conventions = {"name", "source", "weights", "num_samples", "reference"}
    assert fields - protocol.keys() == conventions | {"turned", "transparency", "profiles"}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "torch_fidelity",
            {
                "resize": "tf1_bilinear",
                "scaling": "(x - 128) / 128",
                "is_splits": 10,
                "is_shuffle": True,
            },
        ),
        (
            "pytorch_fid",
            {
                "resize": "torch_bilinear",
                "scaling": "2 x / 255 - 1",
                "antialias": False,
                "kid_subsets": None,
            },
        ),
        (
            "clean",
            {
                "resize": "pil_bicubic",
                "antialias": True,
                "clip": True,
                "kid_subsets": 100,
                "kid_subset_size": 1000,
                "kid_degree": 3,
            },
        ),
        ("edm", {"resize": "tf1_bilinear", "scaling": "(x - 128) / 128", "num_samples": 50_000}),
        (
            "adm",
            {
                "is_split_size": 5000,
                "is_splits": None,
                "is_shuffle": False,
                "logits": "without bias",
                "pr_neighbours": 3,
            },
        ),
    ],
)
def test_presets_say_what_their_packages_do(name, facts):
    preset = dataclasses.asdict(PRESETS[name])

    assert {key: preset[key] for key in facts} == facts
    assert preset["covariance_ddof"] == 1
    assert preset["added_to_diagonal"] == 0


def test_settings_of_metrics_are_those_that_the_package_has():
    assert PRESETS["edm"].metric_settings() == {}
    assert PRESETS["adm"].metric_settings() == {
        "is_split_size": 5000,
        "is_shuffle": False,
        "pr_neighbours": 3,
    }


@pytest.mark.parametrize("case", golden("inception")["frechet"])
def test_the_frechet_distance_is_that_of_the_packages_with_nothing_added_to_the_diagonal(case):
    statistics = []
    for rows in FORMULA["features_of"](case):
        statistics.append(FeatureStatistics(rows.shape[1]))
        statistics[-1].update(rows)
    made = frechet_distance(*statistics)

    for package, expected in golden("inception")["frechet"][case].items():
        assert abs(made - expected) <= 1e-6 * expected, (
            package
        )  # the packages' own spread on singular covariances is 1e-8


def test_digests_do_not_depend_on_the_order_of_keys_and_do_on_every_value():
    protocol = {
        "resize": "pil_bicubic",
        "weights": {"sha256": "ab", "layout": "torch"},
        "sizes": [1, 2],
        "clip": True,
        "none": None,
    }
    shuffled = {key: protocol[key] for key in reversed(protocol)} | {
        "weights": {"layout": "torch", "sha256": "ab"}
    }
    changed = [protocol | {key: "other"} for key in protocol]
    changed += [protocol | {"weights": {"sha256": "ac", "layout": "torch"}}, protocol | {"new": 0}]

    assert digest_of(shuffled) == digest_of(protocol) == digest_of(json.loads(json.dumps(protocol)))
    assert len({digest_of(p) for p in [protocol, *changed]}) == len(changed) + 1
    assert all(c in "0123456789abcdef" for c in digest_of(protocol))
    assert len(digest_of(protocol)) == 16


def test_a_digest_stays_what_it_was():
    """Digests are stored beside scores: sha256 of the text {"a":1,"b":{"c":"x"}}."""
    assert digest_of({"b": {"c": "x"}, "a": 1}) == "c3ae429d9d61242a"


def test_differences_name_the_dotted_key_and_both_values():
    a = {
        "resize": "tf1_bilinear",
        "weights": {"sha256": "ab", "layout": "torch"},
        "same": [1, 2],
        "only_a": 1,
        "splits": [1, 2],
    }
    b = {
        "resize": "pil_bicubic",
        "weights": {"sha256": "cd", "layout": "torch"},
        "same": [1, 2],
        "empty": {},
        "splits": [2, 1],
    }

    assert protocol_differences(a, b) == [
        "empty: absent vs {}",
        "only_a: 1 vs absent",
        'resize: "tf1_bilinear" vs "pil_bicubic"',
        "splits: [1,2] vs [2,1]",
        'weights.sha256: "ab" vs "cd"',
    ]
    assert protocol_differences(a, json.loads(json.dumps(a))) == []


def test_a_number_and_its_text_differ():
    assert protocol_differences({"k": 3}, {"k": "3"}) == ['k: 3 vs "3"']
    assert protocol_differences({"k": None}, {}) == ["k: null vs absent"]


def test_scores_of_two_protocols_are_not_compared():
    protocols = {name: preset.protocol() for name, preset in PRESETS.items()}
    check_comparable(protocols["adm"], dict(protocols["adm"]), "a", "b")

    with pytest.raises(
        InputError,
        match=r'(?s)run a and STATS.npz come from .*resize: "torch_bilinear" vs "pil_bicubic"',
    ):
        check_comparable(protocols["pytorch_fid"], protocols["clean"], "run a", "STATS.npz")
    for a, b in itertools.combinations(protocols, 2):
        assert protocol_differences(protocols[a], protocols[b])


def test_numbers_that_are_not_json_have_no_digest():
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"x": float(torch.tensor(float("nan")))})
