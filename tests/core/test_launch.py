"""Strategies of a launcher that do not work here are refused before anything is built."""

import pytest
from accelerate import Accelerator
from helpers.commands import refused
from helpers.runs import tiny

from difftrain.core.errors import InputError
from difftrain.core.launch import check_strategy
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.run.training import Launch, check_launch

REFUSED = {
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "Megatron-LM": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "tensor parallelism": {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_TP_SIZE": "2",
    },
    "context parallelism": {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_CP_SIZE": "4",
    },
    "sequence parallelism": {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_SP_SIZE": "2",
    },
    "FSDP 1": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
}


@pytest.fixture(params=REFUSED.items(), ids=lambda item: item[0])
def strategy(request, monkeypatch):
    """The name of a strategy that the environment asks for."""
    name, variables = request.param
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    return name


def test_what_does_not_work_is_refused_with_what_does(strategy):
    expected = f"launch: {strategy} does not work here. Use FSDP 2 .*fsdp_version: 2.*MULTI_GPU"

    with pytest.raises(InputError, match=expected):
        check_strategy()
    with pytest.raises(InputError, match=expected):
        check_launch(Objective(NoiseSchedule.linear(), "epsilon"), Launch())


def test_a_run_is_not_started(strategy, tmp_path):
    assert f"launch: {strategy} does not work here" in refused("train", tiny(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
    ],
    ids=["none", "FSDP 2", "data parallelism"],
)
def test_what_works_is_accepted(variables, monkeypatch):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)

    check_strategy()


def test_a_plugin_of_fsdp_1_is_refused_too(monkeypatch):
    accelerator = Accelerator()
    plugin = type("Plugin", (), {"fsdp_version": 1})()
    monkeypatch.setitem(accelerator.state.__dict__, "fsdp_plugin", plugin)

    with pytest.raises(InputError, match="launch: FSDP 1 does not work here"):
        check_strategy(accelerator)
