"""Rules between regularizers, model and launch; trackers; messages also from `difftrain check`."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from diffusers import UNet2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor
from helpers.commands import command, refused
from helpers.runs import CLIPS, UNET, tiny
from torch import nn

from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import (
    ErrorPropagation,
    NoiseConstraint,
    StepVariation,
    WeightedTerm,
)
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.run.training import (
    Launch,
    attention_without_math,
    check_launch,
    check_regularizers,
    check_trackers,
)

LINEAR = NoiseSchedule.linear()
IMAGES, VIDEOS = (4, 1, 8, 8), (4, 1, 3, 8, 8)
TWICE = {"method": "double_backward"}


def objective(*regularizers):
    return Objective(LINEAR, "epsilon", regularizers=list(regularizers))


@pytest.fixture(scope="module")
def unet():
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        attention_head_dim=4,
    )


class XFormersLike:
    """Its own kernel: no scaled dot product attention of torch's in its text."""

    def __call__(self, attn, hidden_states, **more):
        return hidden_states


class Dispatched:
    """Attention as in newer diffusers models, whose backend names the kernel."""

    def __init__(self, backend=None):
        self._attention_backend = backend

    def __call__(self, attn, hidden_states, **more):
        return dispatch_attention_fn(hidden_states, backend=self._attention_backend)  # noqa: F821


class Attending(nn.Module):
    def __init__(self, *processors):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity() for _ in processors])
        for layer, processor in zip(self.layers, processors, strict=True):
            layer.processor = processor


def planned(network=None, dtype="float32"):
    """Return what the rules look at of a `ModelPlan`: its schedule, network and precision."""
    return SimpleNamespace(
        schedule=LINEAR,
        model=SimpleNamespace(dtype=dtype),
        skeleton=SimpleNamespace(model=network or Attending()),
    )


def check(*regularizers, shape=IMAGES, network=None, dtype="float32"):
    check_regularizers(objective(*regularizers), planned(network, dtype), shape)


def refusal(*regularizers, **given):
    with pytest.raises(InputError) as error:
        check(*regularizers, **given)
    return str(error.value)


# The model


def test_attention_of_diffusers_has_the_math_kernel(unet):
    assert attention_without_math(unet) is None
    assert attention_without_math(nn.Conv2d(1, 1, 1)) is None


@pytest.mark.parametrize(
    ("processors", "found"),
    [
        ([XFormersLike()], "XFormersLike"),
        ([AttnProcessor()], "AttnProcessor"),
        ([Dispatched()], None),
        ([Dispatched(AttentionBackendName.NATIVE)], None),
        ([Dispatched(AttentionBackendName._NATIVE_MATH)], None),
        (
            [Dispatched(), Dispatched(AttentionBackendName.FLASH)],
            "Dispatched with the backend flash",
        ),
        (
            [Dispatched(AttentionBackendName.XFORMERS), XFormersLike()],
            "Dispatched with the backend xformers",
        ),
        (["no processor at all"], None),
    ],
    ids=lambda v: str(v) if v is None or isinstance(v, str) else "",
)
def test_attention_without_the_math_kernel_is_found(processors, found):
    assert attention_without_math(Attending(*processors)) == found


def test_a_processor_that_was_set_on_a_diffusers_model_is_found(unet):
    attention = next(module for module in unet.modules() if hasattr(module, "set_processor"))
    before = attention.processor
    attention.set_processor(XFormersLike())
    try:
        assert attention_without_math(unet) == "XFormersLike"
    finally:
        attention.set_processor(before)


def test_a_double_backward_is_refused_without_the_math_kernel():
    assert refusal(StepVariation(**TWICE), network=Attending(XFormersLike())) == (
        "regularizer step_variation goes back through the network twice, which needs "
        "PyTorch's own attention (its math kernel), but the "
        "model's attention is XFormersLike. Write method: finite_difference where the "
        "regularizer has one, or give the model diffusers' "
        "default attention processor."
    )
    check(StepVariation(), network=Attending(XFormersLike()))


def test_differences_are_refused_in_half_precision():
    assert refusal(StepVariation(), dtype="bfloat16") == (
        "regularizer step_variation subtracts outputs of the network, and in bfloat16 the "
        "difference is lost to rounding. Write model: {dtype: float32} (accelerate's mixed "
        "precision may stay on: these passes run without it)."
    )
    for dtype in ("float32", "float64"):
        check(StepVariation(), dtype=dtype)
    check(StepVariation(**TWICE), ErrorPropagation(), dtype="bfloat16")


def test_what_a_regularizer_refuses_is_refused_by_its_own_words():
    assert "needs at least 3 frames, but the videos have 2" in refusal(
        NoiseConstraint(), shape=(4, 1, 2, 8, 8)
    )
    assert "but the micro-batch has 3" in refusal(
        StepVariation(), ErrorPropagation(), shape=(3, 1, 8, 8)
    )
    assert "step: flow_euler needs a flow schedule" in refusal(ErrorPropagation(step="flow_euler"))
    check(NoiseConstraint(), ErrorPropagation(), StepVariation(), shape=VIDEOS)


def test_one_of_weight_zero_is_refused_nothing():
    absent = [
        StepVariation(weight=0.0),
        StepVariation(weight=0.0, **TWICE),
        NoiseConstraint(weight=0.0),
        ErrorPropagation(weight=0.0),
    ]

    network = Attending(XFormersLike())
    check(*absent, shape=(1, 1, 8, 8), network=network, dtype="bfloat16")
    check_launch(objective(*absent), Launch(sharded=True, compiled=True, precision="fp16"))


def test_a_regularizer_that_says_nothing_of_its_needs_is_accepted():
    class Bare(WeightedTerm):
        """Only the defaults of the base class."""

    check(Bare(), network=Attending(XFormersLike()), dtype="bfloat16")
    check_launch(objective(Bare()), Launch(sharded=True, compiled=True, precision="fp16"))


# The launch


def launch_refusal(regularizer, **launch):
    with pytest.raises(InputError) as error:
        check_launch(objective(regularizer), Launch(**launch))
    return str(error.value)


@pytest.mark.parametrize(
    ("launch", "reason", "remedy"),
    [
        ({"sharded": True}, "FSDP does not support", "without FSDP"),
        ({"compiled": True}, "a compiled network does not support", "without dynamo_backend"),
        (
            {"sharded": True, "compiled": True, "precision": "bf16"},
            "FSDP does not support",
            "without FSDP",
        ),
    ],
    ids=["FSDP", "compiled", "both"],
)
def test_a_double_backward_is_refused_where_the_launch_cannot(launch, reason, remedy):
    assert launch_refusal(StepVariation(**TWICE), **launch) == (
        f"regularizer step_variation goes back through the network twice, which {reason}. "
        f"Write method: finite_difference where the "
        f"regularizer has one, or launch {remedy}."
    )


def test_a_double_backward_is_refused_in_fp16():
    assert launch_refusal(StepVariation(**TWICE), precision="fp16") == (
        "regularizer step_variation takes a gradient inside the loss. The loss scaling of fp16 "
        "does not cover it, so it underflows to 0. Launch with mixed_precision bf16 or no."
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_differences_are_refused_in_mixed_precision_under_fsdp(precision):
    assert launch_refusal(StepVariation(), sharded=True, precision=precision) == (
        f"regularizer step_variation subtracts outputs of the network. In {precision} the "
        "difference is lost to rounding, and FSDP cannot run single passes without mixed "
        "precision. Launch with mixed_precision no, or without FSDP."
    )


@pytest.mark.parametrize(
    ("regularizer", "launch"),
    [
        (StepVariation(**TWICE), {}),
        (StepVariation(**TWICE), {"precision": "bf16"}),
        (StepVariation(), {"compiled": True}),
        (StepVariation(), {"sharded": True}),
        (StepVariation(), {"precision": "bf16"}),
        (StepVariation(), {"precision": "fp16"}),
        (ErrorPropagation(), {"sharded": True, "compiled": True, "precision": "fp16"}),
        (NoiseConstraint(), {"sharded": True, "compiled": True, "precision": "fp16"}),
    ],
)
def test_every_other_launch_is_taken(regularizer, launch):
    check_launch(objective(regularizer), Launch(**launch))


def test_the_launch_is_read_from_accelerate():
    def of(distributed, backend, precision):
        state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
        return Launch.of(
            SimpleNamespace(
                state=state,
                distributed_type=distributed,
                mixed_precision=precision,
                num_processes=1,
            )
        )

    assert of(DistributedType.NO, DynamoBackend.NO, "no") == Launch()
    assert of(DistributedType.FSDP, DynamoBackend.NO, "bf16") == Launch(
        sharded=True, precision="bf16"
    )
    assert of(DistributedType.MULTI_CPU, DynamoBackend.INDUCTOR, "fp16") == Launch(
        compiled=True, precision="fp16"
    )
    assert Launch.of(Accelerator(cpu=True)) == Launch()


# A recipe's


def regularized(*blocks, **changes):
    return {**changes, "objective__regularizers": list(blocks)}


ATTENDING = {
    **UNET,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
OF_CLIPS = {**CLIPS, "data": {**CLIPS["data"], "num_frames": 2}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            regularized({"type": "error_propagation"}, training__micro_batch_size=2),
            "Write training: {micro_batch_size: 4} or more.",
        ),
        (
            regularized({"type": "noise_constraint"}),
            "x0 has the shape [8, 1, 8, 8]. Write video data, or leave the regularizer out.",
        ),
        (
            regularized({"type": "noise_constraint"}, **OF_CLIPS),
            "the videos have 2. Write num_frames: 3 or more.",
        ),
        (
            regularized({"type": "step_variation"}, model__dtype="bfloat16"),
            "the difference is lost to rounding. Write model: {dtype: float32}",
        ),
        (
            regularized({"type": "error_propagation", "step": "flow_euler"}),
            "step: flow_euler needs a flow schedule. Write step: ancestral",
        ),
        (
            regularized({"type": "step_variation", **TWICE, "central": True}),
            "central and step_size are options of method: finite_difference",
        ),
        (
            regularized({"type": "error_propagation", "truncate": 5}),
            "truncate 5 keeps all of the at most 5 steps",
        ),
        (
            regularized({"type": "step_variation", "weight": -1}),
            "regularizers.0.weight: expected greater than or equal to 0, got -1",
        ),
        (
            regularized({"type": "step_variations"}),
            "unknown regularizer 'step_variations' (did you mean 'step_variation'?)",
        ),
    ],
    ids=lambda v: v[-40:] if isinstance(v, str) else "",
)
def test_a_recipe_that_breaks_a_rule_is_refused_before_anything_is_made(tmp_path, changes, said):
    file = tiny(tmp_path, **changes)

    assert said in refused("check", file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        regularized(
            {"type": "error_propagation"},
            {"type": "step_variation", **TWICE},
            model__config=ATTENDING,
        ),
        regularized({"type": "noise_constraint"}, {"type": "step_variation"}, **CLIPS),
        regularized({"type": "noise_constraint", "weight": 0.0}),
    ],
    ids=["images", "clips", "weight 0"],
)
def test_a_recipe_that_keeps_them_is_found_in_order(tmp_path, changes):
    command("check", tiny(tmp_path, **changes))


def test_the_launch_is_checked_before_a_run_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "difftrain.run.session.Launch.of", lambda accelerator: Launch(compiled=True)
    )

    assert "launch without dynamo_backend" in refused(
        "train", tiny(tmp_path, **regularized({"type": "step_variation", **TWICE}))
    )
    assert not (tmp_path / "run").exists()


def test_processes_share_the_batch_before_the_micro_batch_is_checked(tmp_path, monkeypatch):
    """Eight samples are two for each of four processes."""
    monkeypatch.setattr("difftrain.run.checking.num_processes", lambda: 4)

    assert "but the micro-batch has 2" in refused(
        "check", tiny(tmp_path, **regularized({"type": "error_propagation"}))
    )


def test_float32_is_what_differences_leave_autocast_for():
    """With autocast on and float32 weights, as the message advises, both passes are float32."""
    seen = []

    class Seeing(nn.Linear):
        def forward(self, x, *more):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    network = Seeing(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        objective(StepVariation(step_size=0.1))(
            network, Batch(torch.ones(2, 1, 2, 8)), Rng(0, 0, range(2))
        )

    assert seen == [torch.bfloat16, torch.float32, torch.float32]


# Trackers


def test_a_tracker_without_its_package_is_refused(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])

    with pytest.raises(
        InputError,
        match=r"the package of 'wandb' is not installed. Install it, or leave the tracker out",
    ):
        check_trackers(["wandb"])
    check_trackers([])
    check_trackers(["all"])
