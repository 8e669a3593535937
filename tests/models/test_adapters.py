"""What an adapter trains, in which precision, and what it refuses before weights are there."""

import math
from typing import Any

import diffusers
import pytest
import torch
from helpers.lora_subjects import (
    FAMILIES,
    IDS,
    denoiser_of,
    difference,
    forward,
    pipeline,
    run,
    trained,
)
from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.models.adapters import (
    Adapter,
    DoRA,
    Full,
    LoRA,
    Named,
    describe,
    lora_layers,
    trainable,
)
from difftrain.models.layers import PRESETS, select
from difftrain.models.slots import ADAPTERS

# The last block of SD 3 makes text that nothing reads: gradients there are 0.
DROPPED = "model.transformer_blocks.1.attn.add_q_proj."


def refusal(adapter: Adapter, denoiser: Any) -> str:
    with pytest.raises(InputError) as caught:
        adapter.check(denoiser)
    return str(caught.value)


def fresh(
    pipelines: Any, family: str = "stable_diffusion", text: bool = False, **options: Any
) -> Any:
    return denoiser_of(pipeline(pipelines(family), **options), text)


def gradients(denoiser: Any) -> dict[str, Tensor]:
    forward(denoiser.model).square().mean().backward()
    return {name: parameter.grad for name, parameter in trainable(denoiser).items()}


@pytest.mark.parametrize("family", [*FAMILIES, "dit"])
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_new_adapter_computes_what_the_base_computes_and_all_of_it_learns(
    pipelines, family, kind
):
    denoiser = fresh(pipelines, family)
    base = run(denoiser.eval().model)

    kind(rank=2, targets="attention_mlp").apply(denoiser)

    assert difference(run(denoiser.model), base) < 1e-5
    assert all("lora_" in name for name in trainable(denoiser))
    grown = {name for name, gradient in gradients(denoiser).items() if gradient.abs().max() > 0}
    hidden = {name for name in trainable(denoiser) if "lora_A" in name}  # B = 0 hides A at first
    assert (
        grown
        == {
            name
            for name in trainable(denoiser)
            if family != "stable_diffusion_3" or not name.startswith(DROPPED)
        }
        - hidden
    )


def test_an_adapter_is_its_formula():
    """One layer against W x + scale B A x, and against DoRA's m (W + scale B A) / norm."""
    for adapter, scale in (
        (LoRA(rank=4, alpha=6.0), 1.5),
        (LoRA(rank=4, alpha=6.0, rank_stabilized=True), 3.0),
        (DoRA(rank=4), 1.0),
    ):
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=8
        )
        layer = next(iter(lora_layers(trained(denoiser_of(Pipe(model)), adapter).model).values()))
        weight, x = layer.get_base_layer().weight, torch.randn(3, layer.in_features)
        matrix = weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if isinstance(adapter, DoRA):
            matrix = (
                layer.lora_magnitude_vector["default"].weight[:, None]
                * matrix
                / matrix.norm(dim=1, keepdim=True)
            )

        torch.testing.assert_close(layer(x), x @ matrix.T, rtol=1e-5, atol=1e-5)


class Pipe:
    """Of a pipeline, its network alone."""

    def __init__(self, unet: nn.Module):
        self.unet = unet


@pytest.mark.parametrize(
    ("family", "preset", "count"),
    [
        ("stable_diffusion", "attention", 4 * 8),
        ("stable_diffusion", "attention_mlp", 4 * 8 + 2 * 4),
        ("stable_diffusion_3", "attention", 8 + 7),
        ("stable_diffusion_3", "attention_mlp", 8 + 7 + 4 + 2),  # the last block drops its text
        ("flux", "attention", 8 + 3),
        ("flux", "attention_mlp", 8 + 3 + 4 + 2),
        ("dit", "attention", 4 * 2),
    ],
)
def test_presets_find_the_attention_and_feed_forward_layers(pipelines, family, preset, count):
    assert len(select(fresh(pipelines, family).model, preset, PRESETS, "adapter.targets")) == count


def test_all_linear_layers_are_all_and_convolutions_come_with_them_but_the_outermost(pipelines):
    model = fresh(pipelines).model
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    inner = {name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)} - {
        "conv_in",
        "conv_out",
    }

    assert set(select(model, "all_linear", PRESETS, "")) == linear
    assert set(select(model, "all_linear_conv", PRESETS, "")) == linear | inner


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_name_trains_that_layer_and_not_others_that_end_like_it(pipelines, kind):
    denoiser = fresh(pipelines, "flux")

    kind(rank=2, targets=["[p]roj_out"]).apply(denoiser)

    assert list(lora_layers(denoiser.model)) == ["proj_out"]


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(rank=2, targets="all_linear_conv"),
        DoRA(rank=2, targets="all_linear_conv"),
        Full(),
        Named(["*.attn2.*", "conv_norm_out.*"]),
        Named(["*.conv1.*"]),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_what_trains_is_float32_in_a_half_precision_model(pipelines, adapter):
    denoiser = fresh(pipelines, dtype=torch.bfloat16)
    base = run(denoiser.eval().model)

    adapter.apply(denoiser)

    assert {parameter.dtype for parameter in trainable(denoiser).values()} == {torch.float32}
    assert difference(run(denoiser.model), base) < 2e-2
    assert all(gradient.isfinite().all() for gradient in gradients(denoiser).values())
    if not isinstance(adapter, Full):
        assert run(denoiser.model).dtype == torch.bfloat16


def test_magnitudes_start_at_the_norms_of_half_precision_weights_without_their_rounding(pipelines):
    denoiser = fresh(pipelines, dtype=torch.bfloat16)

    DoRA(rank=2).apply(denoiser)

    for layer in lora_layers(denoiser).values():
        norms = layer.get_base_layer().weight.float().norm(dim=1)
        torch.testing.assert_close(
            layer.lora_magnitude_vector["default"].weight, norms, rtol=1e-6, atol=0
        )


def test_double_precision_stays(pipelines):
    denoiser = fresh(pipelines).double()

    DoRA(rank=2).apply(denoiser)

    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "adapter",
    [LoRA(rank=2), DoRA(rank=2), Named(["*.to_k.weight"])],
    ids=lambda adapter: type(adapter).__name__,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient_under_a_frozen_base(pipelines, family, adapter):
    plain, checkpointed = (trained(fresh(pipelines, family), adapter).train() for _ in range(2))
    checkpointed.model.enable_gradient_checkpointing()

    for (name, one), other in zip(
        gradients(plain).items(), gradients(checkpointed).values(), strict=True
    ):
        assert one.abs().max() > 0 or name.startswith(DROPPED)
        torch.testing.assert_close(one, other)


def test_the_clip_encoders_train_and_t5_stays_frozen(pipelines):
    denoiser = fresh(pipelines, "stable_diffusion_3", text=True)

    LoRA(rank=2, text_encoders=True, text_targets="attention_mlp").apply(denoiser)

    names = {name.split(".")[2] for name in trainable(denoiser) if name.startswith("text.")}
    assert names == {"text_encoder", "text_encoder_2"}
    denoiser.text.encoders["text_encoder"](IDS)[0].square().mean().backward()
    assert all(
        p.grad is not None
        for name, p in trainable(denoiser).items()
        if name.startswith("text.encoders.text_encoder.encoder")
    )


def test_text_encoders_are_frozen_unless_asked_for(pipelines):
    for adapter in (LoRA(rank=2), Full(), Named(["*.to_q.weight"])):
        denoiser = fresh(pipelines, text=True)

        adapter.apply(denoiser)

        assert not any(name.startswith("text.") for name in trainable(denoiser))


def test_named_weights_are_those_that_match_and_no_others(pipelines):
    denoiser = fresh(pipelines, text=True)

    Named(["mid_block.*.to_k.weight", "text_encoder.*.fc1.bias"], text_encoders=True).apply(
        denoiser
    )

    layers = ["attn1", "attn2"]
    assert set(trainable(denoiser)) == {
        *(
            f"model.mid_block.attentions.0.transformer_blocks.0.{layer}.to_k.weight"
            for layer in layers
        ),
        *(f"text.encoders.text_encoder.encoder.layers.{i}.mlp.fc1.bias" for i in range(2)),
    }


def test_full_training_takes_the_text_encoders_along_when_asked(pipelines):
    denoiser = fresh(pipelines, text=True)

    Full(text_encoders=True).apply(denoiser)

    assert len(trainable(denoiser)) == len(list(denoiser.parameters()))


def test_the_same_seed_makes_the_same_layers(pipelines):
    one, same, other = (trained(fresh(pipelines), LoRA(rank=2), seed) for seed in (0, 0, 1))

    assert all(
        torch.equal(a, b)
        for a, b in zip(trainable(one).values(), trainable(same).values(), strict=True)
    )
    assert difference(run(one.model), run(other.model)) > 1e-3


def test_the_description_counts(pipelines):
    denoiser = fresh(pipelines)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    LoRA(rank=2, targets=["to_q"]).apply(denoiser)
    added = sum(
        2 * (layer.in_features + layer.out_features)
        for layer in lora_layers(denoiser.model).values()
    )

    assert (
        describe(denoiser)
        == f"LoRA of rank 2 on 8 layers: {added:,} of {total + added:,} parameters train"
    )


# Refusals, on models without weights as the plan checks them


def skeleton() -> Any:
    with torch.device("meta"):
        return denoiser_of(
            Pipe(
                diffusers.UNet2DConditionModel(
                    block_out_channels=(8, 16),
                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                    norm_num_groups=4,
                    cross_attention_dim=6,
                    attention_head_dim=2,
                )
            )
        )


def test_a_target_that_matches_nothing_lists_what_would():
    message = refusal(LoRA(targets=["to_q", "to_queries"]), skeleton())

    assert message.startswith(
        "adapter.targets: 'to_queries' matches no layer of this UNet2DConditionModel. Its layers: "
    )
    assert "to_q (12)" in message
    assert "to_out.0 (12)" in message
    assert "matches no layer" in refusal(LoRA(targets=["*.nothing.*"]), skeleton())
    assert "matches no layer" in refusal(LoRA(targets=[]), skeleton())


def test_an_unknown_preset_names_the_known():
    message = refusal(LoRA(targets="attentions"), skeleton())

    assert "unknown preset 'attentions' (did you mean 'attention'?)" in message
    assert "all_linear_conv" in message


def test_a_preset_that_finds_nothing_is_refused():
    with torch.device("meta"):
        model = diffusers.UNet2DModel(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            add_attention=False,
        )

    assert "'attention' matches no layer of this UNet2DModel" in refusal(
        LoRA(), denoiser_of(Pipe(model))
    )


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_rank_above_the_layers_size_says_which_is_the_largest(kind):
    message = refusal(kind(rank=7, targets=["attn2.to_k"]), skeleton())

    assert message.startswith(
        "adapter.rank: 7 is above 6, the largest rank of layer "
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k of the unet"
    )
    assert "Write at most 6" in message
    kind(rank=6, targets=["attn2.to_k"]).check(skeleton())


def test_the_rank_of_a_convolution_counts_its_kernel():
    LoRA(rank=8, targets=["conv_in"]).check(skeleton())  # [8, 4 x 3 x 3]

    assert "Write at most 4" in refusal(LoRA(rank=5, targets=["conv_out"]), skeleton())


def test_a_pattern_that_matches_nothing_lists_what_would():
    message = refusal(Named(["*.to_k.weight", "*.to_key.weight"]), skeleton())

    assert "'*.to_key.weight' matches none of the" in message
    assert "to_k.weight (12)" in message
    assert "text_encoders: true" in refusal(Named(["text_encoder.*"]), skeleton())
    assert "an empty list trains nothing" in refusal(Named([]), skeleton())


@pytest.mark.parametrize(
    "adapter",
    [LoRA(text_encoders=True), Named(["*"], text_encoders=True), Full(text_encoders=True)],
)
def test_text_encoders_that_are_not_there_are_refused(adapter):
    assert "comes without text encoders" in refusal(adapter, skeleton())


def test_a_weight_without_a_layer_of_its_own_is_refused_in_half_precision():
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            num_layers=1,
            cross_attention_dim=8,
            sample_size=8,
            caption_channels=8,
            norm_num_groups=1,
        ).to(torch.bfloat16)

    with pytest.raises(InputError, match="belongs to a block of layers and not to a single layer"):
        Named(["*.scale_shift_table"]).apply(denoiser_of(Pipe(model)))


def test_bounds_and_settings_without_effect_are_refused():
    for block, words in (
        ({"type": "lora", "rank": 0}, "adapter.rank"),
        ({"type": "dora", "dropout": 1.5}, "adapter.dropout"),
        ({"type": "lora", "alpha": 0.0}, "adapter.alpha"),
        ({"type": "named"}, "adapter.patterns"),
    ):
        with pytest.raises(InputError, match=words):
            ADAPTERS.parse(block, "adapter").build()
    with pytest.raises(InputError, match="has no effect without text_encoders"):
        LoRA(text_targets="all_linear")


def test_a_recipe_block_gives_the_adapter_with_its_defaults():
    adapter = ADAPTERS.parse({"type": "dora", "rank": 8, "targets": ["to_q"]}, "adapter").build()

    assert adapter == DoRA(rank=8, targets=["to_q"])
    assert (adapter.makes_lora, adapter.trains_text, adapter.decomposes) == (True, False, True)
    assert math.isclose(LoRA(alpha=8).alpha, 8.0)
