"""Networks of a user's own: opened, checked, called, trained, saved."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import own_networks  # registers them
from helpers.places import TESTS
from helpers.tiny_networks import UNET, vae
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.data.batch import MicroBatch
from difftrain.models import own
from difftrain.models.adapters import Full, LoRA, Named, adapt, trainable
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.models.denoisers import UNet2D
from difftrain.models.lora.files import load_lora, save_kohya
from difftrain.models.model import ConditioningRequest, ExportParts, Model
from difftrain.models.own import OwnModel, open_model
from difftrain.models.slots import MODELS
from difftrain.objective.objective import Objective
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.objective.variance import FixedVariance, LearnedRange

FIXED = FixedVariance()
NOTHING = ClassConditioning(None, None)


def opened(kind: str, **arguments: Any) -> Model:
    return open_model(MODELS.parse({"type": kind, **arguments}, "model"))


def check(model: Model, shape: tuple[int, ...] = (2,), variance: Any = FIXED, **more: Any) -> None:
    conditioning = model.conditioning(ConditioningRequest(**more))
    model.check_forward(model.skeleton(), shape, conditioning, variance)


def refusal(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **more)
    return str(caught.value)


# Opening


@pytest.mark.parametrize("kind", ["own_points", "own_function", "own_unannotated"])
def test_a_module_and_a_function_that_returns_one_are_models(kind):
    model = opened(kind, width=6)
    denoiser = model.denoiser()

    assert isinstance(model, OwnModel)
    assert (model.name, model.path, model.dtype) == (kind, None, "float32")
    assert model.items == {"images", "clips", "tensors"}
    assert denoiser.model.first.out_features == 6
    assert denoiser(torch.zeros(3, 2), torch.zeros(3), {}).shape == (3, 2)


def test_a_registered_model_is_itself():
    assert isinstance(opened("unet2d", config=UNET), UNet2D)


def test_what_is_no_network_is_refused():
    message = refusal(opened, "own_no_network")

    assert message == (
        "model.type: 'own_no_network' gives a NoNetwork, which is not a network. Derive it from "
        "torch.nn.Module."
    )


def test_opening_draws_nothing_from_the_global_generator():
    before = torch.random.get_rng_state()
    for kind in ("own_points", "own_unannotated", "own_picky"):
        opened(kind).skeleton()

    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_come_from_the_global_generator():
    model, found = opened("own_points"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.denoiser().model.first.weight)

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_skeleton_takes_no_memory_where_the_constructor_allows_it():
    assert opened("own_points").skeleton().device.type == "meta"
    assert opened("own_picky").skeleton().device.type == "cpu"


def test_the_networks_precision_is_that_of_its_weights():
    model = opened("own_half")
    x = torch.zeros(3, 2)

    assert model.dtype == "bfloat16"
    assert model.denoiser()(x, torch.zeros(3), {"shift": torch.ones(3)}).dtype == torch.bfloat16


# Shapes and conditioning


def test_x_t_has_the_shape_of_the_item_or_of_its_latents(tmp_path):
    model, encoder = opened("own_points"), LatentEncoder(str(vae(tmp_path)))

    for shape in ((2,), (3, 8, 8), (3, 5, 8, 8)):
        assert model.input_shape(shape, None) == shape
    assert model.input_shape((3, 8, 8), encoder) == (4, 4, 4)
    assert model.input_shape((3, 5, 8, 8), encoder) == (4, 5, 4, 4)


def test_labels_of_the_data_are_the_conditioning():
    model = opened("own_points")

    def of(*given: Any) -> ClassConditioning:
        return model.conditioning(ConditioningRequest(*given))

    assert of(False) == NOTHING
    assert of(True, 3) == ClassConditioning(3, 3)
    assert of(True, 3, 0.1) == ClassConditioning(3, 4, 0.1)
    assert of(True, 3, 0.1).null_label == 3
    assert "does not name its classes" in refusal(of, True)
    assert "label_dropout is set" in refusal(of, False, None, 0.1)


def test_items_bring_conditioning_of_their_own():
    """In training each item's; in sampling that of the item in the request."""
    shift = torch.tensor(0.5)
    request = ConditioningRequest(is_labelled=True, num_classes=3, item_cond={"shift": shift})
    made = opened("own_points").conditioning(request)
    own = {"shift": torch.tensor([1.0, 2.0])}
    micro = MicroBatch(0, [0, 1], None, torch.tensor([2, 0]), None, [], cond=own)

    found = made.of(micro, Rng(0, 0, range(2)))
    generated = made(made.labels_of([0, 1, 2, 3]))

    assert {name: value.tolist() for name, value in found.items()} == {
        "shift": [1.0, 2.0],
        "class_labels": [2, 0],
    }
    assert generated["shift"].tolist() == [0.5] * 4
    assert generated["class_labels"].tolist() == [0, 1, 2, 0]


def test_unlabelled_items_bring_conditioning_of_their_own_too():
    request = ConditioningRequest(item_cond={"shift": torch.tensor([1.0, 2.0])})
    made = opened("own_points").conditioning(request)

    assert not made.conditions
    assert made(made.labels_of([5, 6]))["shift"].tolist() == [[1.0, 2.0]] * 2


# The first call


def test_a_network_that_fits_is_taken():
    check(opened("own_points"))
    check(opened("own_points", classes=4), is_labelled=True, num_classes=3, label_dropout=0.1)
    check(opened("own_points"), item_cond={"shift": torch.tensor(0.5)})


@pytest.mark.parametrize(("kind", "shape"), [("own_picky", (1, 4, 4)), ("own_values", (2,))])
def test_a_network_that_needs_values_is_called_with_values(kind, shape):
    before = torch.random.get_rng_state()

    check(opened(kind), shape)

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "call",
            "called with x_t [2, 2], time [2] and no cond, says: RuntimeError: mat1 and mat2 "
            "shapes cannot be multiplied (2x4 and 2x2) (line ",
        ),
        ("key", "says: KeyError: 'context' (line "),
        ("shape", "and no cond, returns [2, 1]. Expected [2, 2]."),
        ("tuple", "and no cond, returns a tuple. Expected a tensor of the shape of x_t."),
    ],
)
def test_what_the_network_says_of_a_wrong_call_is_one_error(how, words):
    message = refusal(check, opened("own_broken", how=how))

    assert message.startswith("model: 'own_broken', called with x_t [2, 2]")
    assert words in message
    assert "\n" not in message


def test_the_error_names_the_users_own_line():
    message = refusal(check, opened("own_broken", how="call"))

    file, line = own_networks.__file__, message.rpartition("(line ")[2].partition(" ")[0]
    assert message.endswith(f" of {file})")
    assert "torch.cat" in Path(file).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize(("rows", "dropout"), [(2, 0.0), (3, 0.1)])
def test_labels_beyond_the_label_table_are_refused(rows, dropout):
    """A dropped label is the number of classes, and needs a row too."""
    labelled = {"is_labelled": True, "num_classes": 3, "label_dropout": dropout}

    message = refusal(check, opened("own_points", classes=rows), **labelled)
    check(opened("own_points", classes=rows + 1), **labelled)

    assert "class_labels [2], says: IndexError: index out of range" in message


def test_a_large_network_is_called_without_weights_unless_it_needs_values(monkeypatch):
    monkeypatch.setattr(own, "LARGE", 1)
    monkeypatch.setattr(OwnModel, "_on_cpu", lambda self: pytest.fail("weights were made"))
    check(opened("own_points"))
    monkeypatch.undo()
    monkeypatch.setattr(own, "LARGE", 1)

    check(opened("own_values"))
    check(opened("own_picky"), (1, 4, 4))
    assert "returns [2, 1]. Expected [2, 2]" in refusal(check, opened("own_broken", how="shape"))


def test_the_channels_of_a_learned_variance_are_expected():
    message = refusal(check, opened("own_picky"), (1, 4, 4), LearnedRange())

    assert message.endswith("returns [2, 1, 4, 4]. Expected [2, 2, 4, 4].")


def test_a_constructor_that_fails_is_one_error():
    message = refusal(opened, "own_broken", how="construct")

    assert message.startswith("model: 'own_broken' cannot be built: ValueError: no such width (li")


def test_a_network_without_parameters_is_refused():
    assert refusal(opened, "own_broken", how="parameters") == (
        "model: 'own_broken' makes a Broken without parameters. Expected a torch.nn.Module with "
        "parameters that can train."
    )


# Adapters and LoRA


def test_adapters_without_lora_fit_any_network():
    named, full = (opened("own_points").denoiser() for _ in range(2))

    adapt(named, Named(["first.*"]))
    adapt(full, Full())

    assert set(trainable(named)) == {"model.first.weight", "model.first.bias"}
    assert len(trainable(full)) == len(list(full.parameters()))
    with pytest.raises(InputError, match="comes without text encoders to train"):
        adapt(full, Full(text_encoders=True))


def test_a_frozen_network_is_refused():
    denoiser = opened("own_points").denoiser().requires_grad_(False)

    assert "no parameter of this Points requires a gradient" in refusal(adapt, denoiser, None)


def test_a_lora_is_refused(tmp_path):
    model = opened("own_points")
    save_file({"unet.first.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "lora.safetensors")

    assert "this model is randomly initialized" in refusal(model.check_lora)
    message = refusal(load_lora, model.denoiser(), tmp_path / "lora.safetensors")
    assert "cannot be loaded into a Points" in message
    assert "no pretrained base" in refusal(model.with_lora, model.denoiser(), tmp_path)
    denoiser = model.denoiser()
    adapt(denoiser, LoRA(rank=1, targets=["first"]))
    assert "have names for the layers of a Points" in refusal(
        save_kohya, denoiser, tmp_path / "k.safetensors", {}
    )


# Training and files


def trained(model: Model) -> nn.Module:
    """Return the denoiser after some steps on two points."""
    denoiser = model.denoiser()
    objective = Objective(NoiseSchedule.linear(100), "epsilon")
    batch = Batch(torch.tensor([[1.0, -1.0], [0.5, 0.5]]))
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    losses = []
    for step in range(100):
        loss = objective(denoiser, batch, Rng(0, step, range(2))).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < sum(losses[:20])
    return denoiser


def parts() -> ExportParts:
    schedule = NoiseSchedule.linear(100)
    return ExportParts(None, schedule, False, lambda name: None, {"step": "100"}, "model: own\n")


@pytest.mark.parametrize("kind", ["own_points", "own_function"])
def test_a_saved_network_is_loaded_by_the_lines_beside_it(tmp_path, monkeypatch, kind):
    model = opened(kind, width=5)
    denoiser = trained(model)
    model.save(denoiser, tmp_path, parts())

    program = (tmp_path / "load.py").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)

    x, t = torch.randn(3, 2), torch.tensor([1, 50, 99])
    with torch.no_grad():
        assert torch.equal(names["net"](x, t, {}), denoiser(x, t, {}))
    assert not names["net"].training
    assert (tmp_path / "recipe.yaml").read_text() == "model: own\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "load.py",
        "model.safetensors",
        "recipe.yaml",
    ]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "100"


def test_the_lines_are_few_and_need_no_difftrain_themselves(tmp_path):
    model = opened("own_points", width=5, classes=2)
    model.save(model.denoiser(), tmp_path, parts())

    assert (tmp_path / "load.py").read_text() == (
        "from safetensors.torch import load_model\n"
        "from helpers.own_networks import Points\n"
        "\n"
        "net = Points(**{'width': 5, 'classes': 2})\n"
        'load_model(net, "model.safetensors")\n'
        "net.eval()\n"
    )
    paths = os.pathsep.join([str(TESTS), *sys.path])
    subprocess.run([sys.executable, "load.py"], cwd=tmp_path, env={"PYTHONPATH": paths}, check=True)


def test_arguments_that_are_parts_are_built_by_the_registry(tmp_path, monkeypatch):
    model = opened("own_stack", inner={"type": "own_points", "width": 3})
    denoiser = model.denoiser()
    assert isinstance(denoiser.model, own_networks.Stack)
    model.save(denoiser, tmp_path, parts())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec((tmp_path / "load.py").read_text(), names)

    assert torch.equal(names["net"].inner.first.weight, denoiser.model.inner.first.weight)
