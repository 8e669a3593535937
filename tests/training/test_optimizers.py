"""Optimizers by name and by import path, and which parameters their weight decay changes."""

import pytest
import torch
from helpers.runs import largest_difference, parameters, saved, tiny, trained, trainer
from torch import nn

from difftrain.core.errors import InputError
from difftrain.training.optimizers import Optimizer


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1))


def after_one_step(optimizer, network, gradient=0.0):
    built = optimizer.build(network)
    for p in network.parameters():
        p.grad = torch.full_like(p, gradient)
    built.step()
    return [p.detach() for p in network.parameters()]


class Anything(torch.optim.SGD):
    """An optimizer whose signature says nothing."""

    def __init__(self, params, lr, **others):
        super().__init__(params, lr, **others)


@pytest.mark.parametrize(
    ("name", "found"), [("adamw", "AdamW"), ("SGD", "SGD"), ("torch.optim.RAdam", "RAdam")]
)
def test_a_name_in_any_case_or_an_import_path_finds_the_class(name, found):
    built = Optimizer(name, lr=0.5).build(module())

    assert type(built) is getattr(torch.optim, found)
    assert [group["initial_lr"] for group in built.param_groups] == [0.5]


def test_weight_decay_is_zero_unless_it_is_written_even_where_the_class_has_another_default():
    assert Optimizer("adamw").build(module()).param_groups[0]["weight_decay"] == 0.0
    assert (
        Optimizer("adamw", weight_decay=0.3).build(module()).param_groups[0]["weight_decay"] == 0.3
    )


def test_without_decay_on_norms_and_biases_only_matrices_shrink():
    network = module()
    before = [p.detach().clone() for p in network.parameters()]

    after = after_one_step(
        Optimizer("sgd", lr=0.1, weight_decay=0.5, decay_norms_and_biases=False), network
    )

    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * 0.95 if old.ndim >= 2 else old, rtol=1e-6, atol=0)


def test_by_default_everything_shrinks():
    network = module()
    before = [p.detach().clone() for p in network.parameters()]

    after = after_one_step(Optimizer("sgd", lr=0.1, weight_decay=0.5), network)

    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * 0.95, rtol=1e-6, atol=0)


def test_every_trained_parameter_is_in_exactly_one_group_and_no_frozen_one():
    network = module()
    network[0].weight.requires_grad_(False)

    optimizer = Optimizer("adamw", weight_decay=0.1, decay_norms_and_biases=False)
    groups = optimizer.build(network).param_groups

    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_options_reach_the_class():
    optimizer = Optimizer("adamw", options={"betas": [0.8, 0.95], "eps": 1e-6})

    group = optimizer.build(module()).param_groups[0]

    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_a_class_that_takes_any_argument_gets_them():
    optimizer = Optimizer(
        "test_optimizers.Anything", lr=0.1, weight_decay=0.2, options={"momentum": 0.9}
    )

    group = optimizer.build(module()).param_groups[0]

    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.2)


def test_arguments_that_a_checkpoint_has_overwritten_are_written_again():
    optimizer = Optimizer(
        "adamw",
        lr=0.1,
        weight_decay=0.2,
        decay_norms_and_biases=False,
        options={"betas": [0.8, 0.9]},
    )
    built = optimizer.build(module())
    other = Optimizer("adamw", lr=7.0, weight_decay=7.0, decay_norms_and_biases=False)

    built.load_state_dict(other.build(module()).state_dict())
    optimizer.restate(built.param_groups)

    decayed, others = ((g["initial_lr"], g["weight_decay"], g["betas"]) for g in built.param_groups)
    assert decayed == (0.1, 0.2, (0.8, 0.9))
    assert others == (0.1, 0.0, (0.8, 0.9))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"name": "admw"},
            r"optimizer.name: unknown optimizer 'admw' \(did you mean 'adamw'\?\).*import path",
        ),
        ({"name": "lbfgs"}, "optimizer.name: unknown optimizer 'lbfgs'"),
        (
            {"name": "no_such_package.Optimizer"},
            "optimizer.name: cannot import 'no_such_package.Optimizer'.*Install",
        ),
        ({"name": "torch.optim.NoSuch"}, "optimizer.name: cannot import 'torch.optim.NoSuch'"),
        ({"name": "math.pi"}, "optimizer.name: 'math.pi' is not a class"),
        (
            {"name": "adamw", "options": {"beta": 1}},
            r"optimizer.options.beta: adamw has no such option \(did you mean 'betas'\?\)",
        ),
        ({"name": "adamw", "options": {"lr": 1}}, "optimizer.options.lr: adamw has no such option"),
        (
            {"name": "rprop", "weight_decay": 0.1},
            "optimizer.weight_decay: rprop has none. Leave it out.",
        ),
    ],
)
def test_what_an_optimizer_does_not_take_is_named(arguments, said):
    with pytest.raises(InputError, match=said):
        Optimizer(**arguments)


@pytest.mark.parametrize("options", [{"betas": [2.0, 0.9]}, {"betas": 0.9}, {"eps": "small"}])
def test_values_that_the_class_refuses_are_wrong_input(options):
    with pytest.raises(
        InputError,
        match=r"optimizer: adamw does not take its arguments: .*Correct optimizer\.options",
    ):
        Optimizer("adamw", options=options).build(module())


@pytest.mark.parametrize(
    "name", ["schedulefree.AdamWScheduleFree", "prodigyopt.Prodigy", "bitsandbytes.optim.AdamW8bit"]
)
def test_an_optimizer_of_another_package_trains_and_resumes(name, tmp_path):
    package = name.partition(".")[0]
    pytest.importorskip(package, reason=f"an extra: pip install {package}")
    lr = 1.0 if package == "prodigyopt" else 1e-2
    training = {"training__steps": 4, "training__checkpoint_every": 2}
    file = tiny(tmp_path, optimizer={"name": name, "lr": lr}, **training)
    straight = trained(file, f"output={tmp_path / 'straight'}")
    trained(file, f"output={tmp_path / 'run'}", "training.steps=2")
    resumed = trained(file, f"output={tmp_path / 'run'}")

    untrained = trainer(file, f"output={tmp_path / 'untrained'}")
    assert largest_difference(parameters(straight), parameters(resumed)) < 1e-6
    assert largest_difference(parameters(straight), parameters(untrained)) > 1e-6


def test_a_schedule_free_run_saves_the_averaged_weights(tmp_path):
    pytest.importorskip("schedulefree", reason="an extra: pip install schedulefree")
    optimizer = {"name": "schedulefree.AdamWScheduleFree", "lr": 1e-2}
    made = trained(tiny(tmp_path, optimizer=optimizer, training__steps=3))

    weights = saved(tmp_path / "run")["model"]
    made.optimizer.eval()
    assert largest_difference(parameters(made), weights) < 1e-7
    made.optimizer.train()
    assert largest_difference(parameters(made), weights) > 1e-5
