"""LoRA files: diffusers' own pipelines that read them compute what the trained denoiser does."""

import json
import re
from typing import Any

import pytest
import torch
from helpers.lora_subjects import FAMILIES, IDS, denoiser_of, difference, pipeline, run, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain.core.errors import InputError
from difftrain.models.adapters import DoRA, LoRA, lora_layers, trainable
from difftrain.models.lora.files import FILE, load_lora, merge, save_kohya, save_lora, set_scales
from difftrain.models.lora.kohya import Factors
from difftrain.models.pipelines.flux import FluxLora
from difftrain.models.slots import MODELS

TEXTS = ["text_encoder", "text_encoder_2"]


def header(file: Any) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(rank=2, alpha=5.0),
        LoRA(rank=2, alpha=5.0, rank_stabilized=True, targets="attention_mlp"),
        DoRA(rank=2, alpha=5.0),
        LoRA(rank=3, alpha=1.0, targets=["*.attn*.to_q"]),
    ],
    ids=["lora", "rank_stabilized", "dora", "pattern"],
)
def test_a_pipeline_that_loads_the_file_computes_what_was_trained(
    pipelines, tmp_path, family, adapter
):
    folder = pipelines(family)
    denoiser = trained(denoiser_of(pipeline(folder)), adapter)

    save_lora(denoiser, tmp_path, {"recipe": "model: ...", "step": "7"})
    fresh = pipeline(folder)
    base = run(denoiser_of(fresh).model)
    fresh.load_lora_weights(tmp_path)

    ours = run(denoiser.model)
    assert difference(run(denoiser_of(fresh).model), ours) < 1e-5
    assert difference(base, ours) > 1e-2
    assert header(tmp_path / FILE)["recipe"] == "model: ..."


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "targets", ["attention", "attention_mlp", ["encoder.layers.1.mlp.fc1"]], ids=str
)
def test_text_encoders_come_back_too(pipelines, tmp_path, family, targets):
    folder = pipelines(family)
    denoiser = trained(
        denoiser_of(pipeline(folder), text=True),
        LoRA(rank=2, alpha=5.0, text_encoders=True, text_targets=targets),
    )

    keys = load_file(save_lora(denoiser, tmp_path, {}))
    fresh = pipeline(folder)
    fresh.load_lora_weights(tmp_path)

    assert all(
        ".text_model." in key and ".lora_linear_layer." in key
        for key in keys
        if key.startswith("text")
    )  # what ComfyUI looks for
    for name in (
        name
        for name in TEXTS
        if name in denoiser.text.encoders and lora_layers(denoiser.text.encoders[name])
    ):
        ours, theirs, base = (
            model(IDS)[0]
            for model in (
                denoiser.text.encoders[name],
                getattr(fresh, name),
                getattr(pipeline(folder), name),
            )
        )
        assert difference(theirs, ours) < 1e-5
        assert difference(base, ours) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_loads_into_a_bare_denoiser_frozen(pipelines, tmp_path, family):
    folder = pipelines(family)
    denoiser = trained(denoiser_of(pipeline(folder)), LoRA(rank=2, alpha=5.0))
    save_lora(denoiser, tmp_path, {})

    other = denoiser_of(pipeline(folder)).requires_grad_(False)
    load_lora(other, tmp_path / FILE)

    assert difference(run(other.model), run(denoiser.model)) < 1e-5
    assert trainable(other) == {}


def test_a_lora_that_is_loaded_leaves_the_one_that_trains_training(pipelines, tmp_path):
    denoiser = trained(denoiser_of(pipeline(pipelines("stable_diffusion"))), LoRA(rank=2))
    save_lora(denoiser, tmp_path, {})
    names = set(trainable(denoiser))

    load_lora(denoiser, tmp_path, 0.5, "another")

    assert set(trainable(denoiser)) == names
    assert len(lora_layers(denoiser, "another")) == len(lora_layers(denoiser))


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_half_precision_model_keeps_the_file_in_float32_and_its_pipeline_agrees(
    pipelines, tmp_path, kind
):
    folder = pipelines("stable_diffusion")
    denoiser = denoiser_of(pipeline(folder, dtype=torch.bfloat16))
    before = {
        name: value.clone()
        for name, value in trained(denoiser, kind(rank=2, alpha=5.0)).model.state_dict().items()
    }

    save_lora(denoiser, tmp_path, {})

    assert {value.dtype for value in load_file(tmp_path / FILE).values()} == {torch.float32}
    assert denoiser.dtype == torch.bfloat16
    after = denoiser.model.state_dict()
    assert all(
        torch.equal(value, after[name]) and value.dtype == after[name].dtype
        for name, value in before.items()
    )


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        (
            "unet2d",
            {
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "attention_head_dim": 4,
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "norm_num_groups": 4,
                "in_channels": 4,
                "out_channels": 4,
                "num_class_embeds": 4,
                "sample_size": 8,
            },
        ),
        ("dit", None),
    ],
)
def test_models_without_a_lora_loader_in_diffusers_have_ours(pipelines, tmp_path, preset, model):
    def fresh() -> Any:
        torch.manual_seed(0)
        if model is None:
            return denoiser_of(pipeline(pipelines("dit")))
        return MODELS.parse({"type": preset, "config": model}, "model").build().denoiser()

    denoiser = trained(fresh(), LoRA(rank=2, alpha=5.0))
    save_lora(denoiser, tmp_path, {})
    other = fresh().eval()
    load_lora(other, tmp_path)

    assert difference(run(other.model), run(denoiser.model)) < 1e-6


@pytest.mark.parametrize(
    "family", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"]
)
@pytest.mark.parametrize("targets", ["attention", "all_linear_conv", "all_linear"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_kohya_file_loads_in_diffusers_with_its_scale(
    pipelines, tmp_path, family, targets, rank_stabilized
):
    folder = pipelines(family)
    denoiser = trained(
        denoiser_of(pipeline(folder), text=True),
        LoRA(
            rank=2, alpha=5.0, targets=targets, text_encoders=True, rank_stabilized=rank_stabilized
        ),
    )

    file = save_kohya(denoiser, tmp_path / "kohya.safetensors", {"licence": "CC0"})
    fresh = pipeline(folder)
    fresh.load_lora_weights(file)

    assert difference(run(denoiser_of(fresh).model), run(denoiser.model)) < 1e-5
    for name in (name for name in TEXTS if getattr(fresh, name, None) is not None):
        assert difference(getattr(fresh, name)(IDS)[0], denoiser.text.encoders[name](IDS)[0]) < 1e-5
    assert header(file)["licence"] == "CC0"
    assert (header(file)["ss_network_dim"], header(file)["ss_network_alpha"]) == (
        "2",
        "7.07107" if rank_stabilized else "5",
    )


@pytest.mark.parametrize(
    "names", [["*attn.*_q*", "*attn.to_out.0"], ["transformer_blocks.0.attn.*"]], ids=str
)
def test_flux_goes_to_kohya_with_its_fused_layers_side_by_side(pipelines, tmp_path, names):
    """Blocks of both streams; diffusers knows those of one stream in the real sizes alone."""
    folder = pipelines("flux")
    targets = [
        name if name.startswith("transformer") else f"transformer_blocks.0.{name.lstrip('*')}"
        for name in names
    ]
    denoiser = trained(
        denoiser_of(pipeline(folder), text=True),
        LoRA(rank=2, alpha=5.0, targets=targets, text_encoders=True),
    )

    file = save_kohya(denoiser, tmp_path / "kohya.safetensors", {})
    fresh = pipeline(folder)
    fresh.load_lora_weights(file)

    assert difference(run(fresh.transformer), run(denoiser.model)) < 1e-5
    assert (
        difference(fresh.text_encoder(IDS)[0], denoiser.text.encoders["text_encoder"](IDS)[0])
        < 1e-5
    )


def test_a_flux_block_of_one_stream_is_split_by_diffusers_into_the_layers_it_came_from(tmp_path):
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=0, num_single_layers=1)
    generator = torch.Generator().manual_seed(0)
    sizes = {"attn.to_q": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    layers = {
        f"single_transformer_blocks.0.{name}": Factors(
            torch.randn(2, 3072, generator=generator),
            torch.randn(size, 2, generator=generator),
            2.5,
        )
        for name, size in sizes.items()
    }

    state = FluxLora().kohya_state(model, {"transformer": layers})
    save_file(state, tmp_path / "kohya.safetensors")
    read = FluxLoraLoaderMixin.lora_state_dict(tmp_path / "kohya.safetensors")

    x = torch.randn(3072, generator=generator)
    for name, (down, up, scale) in layers.items():
        theirs = read[f"transformer.{name}.lora_B.weight"] @ (
            read[f"transformer.{name}.lora_A.weight"] @ x
        )
        assert difference(theirs, scale * up @ (down @ x)) < 1e-5
    assert not read["transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"].any()


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_merging_leaves_the_same_function_and_no_lora(pipelines, kind):
    denoiser = trained(
        denoiser_of(pipeline(pipelines("stable_diffusion")), text=True),
        kind(rank=2, alpha=5.0, targets="all_linear_conv", text_encoders=True),
    )
    keys = set(pipeline(pipelines("stable_diffusion")).unet.state_dict())
    encoder = denoiser.text.encoders["text_encoder"]
    before, text_before = run(denoiser.model), encoder(IDS)[0]

    merge(denoiser)

    assert difference(run(denoiser.model), before) < 1e-5
    assert difference(encoder(IDS)[0], text_before) < 1e-5
    assert set(denoiser.model.state_dict()) == keys
    assert not any("lora" in name for name in denoiser.state_dict())
    assert not hasattr(denoiser.model, "peft_config")


def two_loras(pipelines: Any, folder: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """Return a fresh denoiser, and two LoRAs for it, whose files are in first/ and second/."""
    source, files = pipelines("stable_diffusion"), []
    for name, seed, targets in (("first", 1, "attention"), ("second", 2, "attention_mlp")):
        file = save_lora(
            trained(denoiser_of(pipeline(source)), LoRA(rank=2, alpha=6.0, targets=targets), seed),
            folder / name,
            {},
        )
        files.append(load_file(file))
    return denoiser_of(pipeline(source)).eval(), files


def test_several_loras_add_up_at_their_scales(pipelines, tmp_path):
    denoiser, files = two_loras(pipelines, tmp_path)
    weights = {name: value.clone() for name, value in denoiser.model.state_dict().items()}

    load_lora(denoiser, tmp_path / "first", 0.5, "first")
    load_lora(denoiser, tmp_path / "second", -2.0, "second")
    denoiser.double()  # the changes are large, and so is what float32 would round
    both = run(denoiser.model)
    set_scales(denoiser, {"second": 1.0})
    one = run(denoiser.model)

    expected = denoiser_of(pipeline(pipelines("stable_diffusion"))).model.eval().double()
    for scales, output in (((0.5, -2.0), both), ((0.0, 1.0), one)):
        for name, value in weights.items():
            changes = [
                scale * change(file, name) for scale, file in zip(scales, files, strict=True)
            ]
            expected.state_dict()[name].copy_(value + sum(changes))
        assert difference(output, run(expected)) < 1e-12


def change(file: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return alpha / rank = 3 times B A of a weight in float64; 0 for a weight without a LoRA."""
    layer = f"unet.{name.removesuffix('.weight')}"
    if f"{layer}.lora_A.weight" not in file:
        return torch.zeros(())
    return 3.0 * file[f"{layer}.lora_B.weight"].double() @ file[f"{layer}.lora_A.weight"].double()


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_at_scale_zero_not_a_bit_of_the_base_changes(pipelines, tmp_path, kind):
    folder = pipelines("stable_diffusion")
    base = run(pipeline(folder).unet)
    denoiser = trained(denoiser_of(pipeline(folder)), kind(rank=2))
    save_lora(denoiser, tmp_path, {})
    other = denoiser_of(pipeline(folder))

    set_scales(denoiser, {"default": 0.0})
    load_lora(other, tmp_path, 0.0)

    for output in (run(denoiser.model), run(other.model)):
        assert torch.equal(output.view(torch.int32), base.view(torch.int32))


def test_the_file_states_only_what_older_versions_of_peft_read_too(pipelines, tmp_path):
    denoiser = trained(
        denoiser_of(pipeline(pipelines("flux"))),
        LoRA(rank=2, alpha=5.0, targets=["x_embedder", "*.proj_mlp"]),
    )

    stated = json.loads(header(save_lora(denoiser, tmp_path, {}))["lora_adapter_metadata"])

    assert stated == {
        "transformer.r": 2,
        "transformer.lora_alpha": 5.0,
        "transformer.use_dora": False,
        "transformer.use_rslora": False,
        "transformer.target_modules": ["single_transformer_blocks.0.proj_mlp", "x_embedder"],
    }


def refusal(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **more)
    return str(caught.value)


def test_files_that_are_not_there_or_hold_no_lora_are_refused(pipelines, tmp_path):
    denoiser = denoiser_of(pipeline(pipelines("stable_diffusion")))
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")

    assert "there is no LoRA file at" in refusal(
        load_lora, denoiser, tmp_path / "absent.safetensors"
    )
    assert "is not a safetensors file" in refusal(
        load_lora, denoiser, tmp_path / "text.safetensors"
    )
    message = refusal(load_lora, denoiser, tmp_path / "other.safetensors")
    assert "holds weight, but this UNet2DConditionModel comes with unet alone" in message


def test_a_lora_of_another_model_is_refused_and_leaves_the_denoiser_as_it_was(pipelines, tmp_path):
    base = pipeline(pipelines("stable_diffusion")).unet
    sizes = (
        "lora_A.weight is [2, 40], but the layer's weight in the model is [16, 16]. It was made "
        "for another model."
    )
    for other, words in (("flux", "holds transformer."), ("stable_diffusion_xl", sizes)):
        save_lora(
            trained(denoiser_of(pipeline(pipelines(other))), LoRA(rank=2)), tmp_path / other, {}
        )
        denoiser = denoiser_of(pipeline(pipelines("stable_diffusion")))

        assert words in refusal(load_lora, denoiser, tmp_path / other)
        assert torch.equal(run(denoiser.model), run(base))
        assert not lora_layers(denoiser)


@pytest.mark.parametrize("family", ["stable_diffusion", "dit"])
def test_a_lora_of_which_a_part_has_no_place_is_refused(pipelines, tmp_path, family):
    file = save_lora(trained(denoiser_of(pipeline(pipelines(family))), LoRA(rank=2)), tmp_path, {})
    tensors, prefix = load_file(file), "transformer" if family == "dit" else "unet"
    more = {f"{prefix}.more_blocks.0.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file({**tensors, **more}, file, header(file))

    message = refusal(load_lora, denoiser_of(pipeline(pipelines(family))), file)

    assert (
        f"{len(tensors)} of its {len(tensors) + 2} tensors have a place there, "
        "more_blocks.0.to_q.lora_A.weight has none" in message
    )


def test_a_lora_of_text_encoders_needs_them(pipelines, tmp_path):
    pipe = pipeline(pipelines("stable_diffusion"))
    save_lora(trained(denoiser_of(pipe, text=True), LoRA(rank=2, text_encoders=True)), tmp_path, {})
    expected, other = pipe.text_encoder(IDS)[0], pipeline(pipelines("stable_diffusion"))

    assert "or give its text encoders" in refusal(load_lora, denoiser_of(other), tmp_path)
    load_lora(denoiser_of(other), tmp_path, encoders={"text_encoder": other.text_encoder})
    assert difference(other.text_encoder(IDS)[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "part"),
    [
        *(
            ("stable_diffusion", part)
            for part in (
                "lora_A.weight",
                "lora_B.weight",
                "lora_magnitude_vector",
                "down.weight",
                "up.weight",
            )
        ),
        ("dit", "lora_A.weight"),
        ("dit", "lora_magnitude_vector"),
    ],
)
def test_a_file_that_lacks_a_part_of_a_layer_is_refused(pipelines, tmp_path, family, part):
    """Of the denoiser or (down and up) of its text encoder."""
    text = family == "stable_diffusion"
    file = save_lora(
        trained(
            denoiser_of(pipeline(pipelines(family)), text=text), DoRA(rank=2, text_encoders=text)
        ),
        tmp_path,
        {},
    )
    tensors = load_file(file)
    lacking = next(key for key in tensors if key.endswith(part))
    save_file({key: value for key, value in tensors.items() if key != lacking}, file, header(file))

    message = refusal(load_lora, denoiser_of(pipeline(pipelines(family)), text=text), file)

    assert "it lacks 1 tensor(s), such as " in message
    assert "which would stay at random values" in message


@pytest.mark.parametrize("text", [False, True])
def test_layers_of_another_width_are_named_with_both_sizes(pipelines, tmp_path, text):
    pipe = pipeline(pipelines("stable_diffusion"))
    file = save_lora(
        trained(denoiser_of(pipe, text=True), LoRA(rank=2, text_encoders=True)), tmp_path, {}
    )
    tensors = load_file(file)
    wide = next(key for key in tensors if key.endswith("up.weight" if text else "lora_B.weight"))
    save_file({**tensors, wide: torch.zeros(17, 2)}, file, header(file))

    message = refusal(
        load_lora, denoiser_of(pipeline(pipelines("stable_diffusion")), text=True), file
    )

    assert "lora_B.weight is [17, 2], but the layer's weight in the model is [" in message


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_their_name(pipelines, tmp_path, value):
    denoiser = trained(denoiser_of(pipeline(pipelines("stable_diffusion"))), LoRA(rank=2))
    file, kohya = (
        save_lora(denoiser, tmp_path, {}),
        save_kohya(denoiser, tmp_path / "kohya.safetensors", {}),
    )
    name = list(load_file(file))[5]
    tensors = load_file(file)
    tensors[name][0, 0] = value
    save_file(tensors, file, header(file))
    alpha = next(key for key in load_file(kohya) if key.endswith(".alpha"))
    save_file({**load_file(kohya), alpha: torch.tensor(value)}, kohya)

    other = denoiser_of(pipeline(pipelines("stable_diffusion")))

    assert f"{str(file)!r} holds values that are not finite, first in {name}." in refusal(
        load_lora, other, file
    )
    assert "holds values that are not finite, first in unet." in refusal(load_lora, other, kohya)
    assert not lora_layers(other)


@pytest.mark.parametrize(
    ("part", "kind"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("oft_blocks", "OFT")]
)
@pytest.mark.parametrize(
    "prefix", ["unet.mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"]
)
def test_other_adapters_than_lora_and_dora_are_refused_by_their_kind(
    pipelines, tmp_path, part, kind, prefix
):
    file = tmp_path / "other.safetensors"
    save_file({f"{prefix}.{part}": torch.ones(2, 2), f"{prefix}.alpha": torch.ones(())}, file)

    message = refusal(load_lora, denoiser_of(pipeline(pipelines("stable_diffusion"))), file)

    assert f"is a {kind} (it holds {prefix}.{part}), and only LoRA and DoRA are read." in message


def test_keys_that_diffusers_cannot_convert_are_told_in_one_line(pipelines, tmp_path):
    flux = trained(denoiser_of(pipeline(pipelines("flux"))), LoRA(rank=2))
    wide = save_kohya(flux, tmp_path / "flux.safetensors", {})
    half = save_kohya(
        trained(denoiser_of(pipeline(pipelines("stable_diffusion"))), LoRA(rank=2)),
        tmp_path / "half.safetensors",
        {},
    )
    tensors = load_file(half)
    names = [
        next(key for key in tensors if key.endswith(side))
        for side in ("lora_down.weight", "lora_up.weight")
    ]

    assert "in kohya's it knows the widths of FLUX.1 alone" in refusal(
        load_lora, denoiser_of(pipeline(pipelines("flux"))), wide
    )
    for name, words in zip(
        names,
        ("have not been correctly renamed: lora_unet_", f"it lacks {names[1]!r}"),
        strict=True,
    ):
        save_file({key: value for key, value in tensors.items() if key != name}, half)
        message = refusal(load_lora, denoiser_of(pipeline(pipelines("stable_diffusion"))), half)
        assert words in message
        assert "\n" not in message


def test_a_run_and_a_folder_of_one_file_are_loras_and_a_folder_of_several_is_not(
    pipelines, tmp_path
):
    denoiser = trained(denoiser_of(pipeline(pipelines("stable_diffusion"))), LoRA(rank=2))
    file = save_lora(denoiser, tmp_path / "run" / "lora", {})
    save_kohya(denoiser, tmp_path / "run" / "kohya" / "one.safetensors", {})

    for source in ("run", "run/lora", "run/kohya"):
        other = denoiser_of(pipeline(pipelines("stable_diffusion")))
        load_lora(other, tmp_path / source)
        assert difference(run(other.model), run(denoiser.model)) < 1e-5
    (tmp_path / "run" / "kohya" / "two.safetensors").write_bytes(file.read_bytes())
    message = refusal(load_lora, denoiser, tmp_path / "run" / "kohya", name="other")
    assert "holds 2 .safetensors files. Write the path of one, such as" in message


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_file_of_diffusers_with_ranks_by_layer_and_what_peft_offers_is_complete(
    pipelines, tmp_path, family, options
):
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = pipeline(pipelines(family))
    name = "unet" if family == "stable_diffusion" else "transformer"
    model = getattr(pipe, name)
    model.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["to_q", "to_v"],
            rank_pattern={"to_q": 2},
            init_lora_weights=False,
            **options,
        )
    )
    text = LoraConfig(
        r=4, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 2}, init_lora_weights=False
    )
    pipe.text_encoder.add_adapter(text)
    layers = {
        "text_encoder_lora_layers": get_peft_model_state_dict(pipe.text_encoder),
        f"{name}_lora_layers": get_peft_model_state_dict(model),
    }
    pipe.save_lora_weights(
        tmp_path,
        **layers,
        **_collate_lora_metadata({name: model, "text_encoder": pipe.text_encoder}),
    )

    other = denoiser_of(pipeline(pipelines(family)), text=True)
    load_lora(other, tmp_path)

    assert difference(run(other.model), run(model)) < 1e-6
    assert difference(other.text.encoders["text_encoder"](IDS)[0], pipe.text_encoder(IDS)[0]) < 1e-6


@pytest.mark.parametrize("old", [False, True])
def test_older_keys_of_diffusers_are_read(pipelines, tmp_path, old):
    """Those with .lora.down and .lora.up, and those of attention processors (old)."""
    file = save_lora(
        trained(denoiser := denoiser_of(pipeline(pipelines("stable_diffusion"))), LoRA(rank=2)),
        tmp_path,
        {},
    )
    tensors = {
        key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value
        for key, value in load_file(file).items()
    }
    if old:
        tensors = {
            re.sub(r"\.(to_[qkv]|to_out)(\.0)?\.lora\.", r".processor.\1_lora.", key): value
            for key, value in tensors.items()
        }
    save_file(tensors, file, header(file))

    other = denoiser_of(pipeline(pipelines("stable_diffusion")))
    load_lora(other, file)

    assert difference(run(other.model), run(denoiser.model)) < 1e-6


def test_a_name_is_given_once(pipelines, tmp_path):
    denoiser = trained(denoiser_of(pipeline(pipelines("stable_diffusion"))), LoRA(rank=2))
    save_lora(denoiser, tmp_path, {})

    assert "the name 'default' is taken" in refusal(load_lora, denoiser, tmp_path)


def test_what_kohya_has_no_names_for_is_refused(pipelines, tmp_path):
    file = tmp_path / "kohya.safetensors"
    cases = {
        "stable_diffusion": (DoRA(rank=2), "a DoRA"),
        "dit": (LoRA(rank=2), "DiTTransformer2DModel"),
        "flux": (LoRA(rank=2, targets=["x_embedder"]), "the Flux layer x_embedder"),
    }
    for family, (adapter, words) in cases.items():
        denoiser = trained(denoiser_of(pipeline(pipelines(family))), adapter)

        assert words in refusal(save_kohya, denoiser, file, {})
        assert not file.exists()


def test_magnitudes_under_kohyas_keys_are_refused_where_diffusers_would_drop_them(
    pipelines, tmp_path
):
    save_file({"lora_unet_mid_block.dora_scale": torch.ones(2)}, tmp_path / "dora.safetensors")

    message = refusal(
        load_lora,
        denoiser_of(pipeline(pipelines("stable_diffusion"))),
        tmp_path / "dora.safetensors",
    )

    assert "whose magnitudes (dora_scale) diffusers does not read" in message
