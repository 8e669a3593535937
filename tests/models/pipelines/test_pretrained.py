"""Files of pretrained pipelines: what a folder, a hub id and a single file give, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from helpers.single_files import write_single_file
from helpers.tiny_pipelines import FAMILIES
from safetensors.torch import load_file, save_file

from difftrain.core.errors import InputError
from difftrain.models.files import PIECE, mark
from difftrain.models.model import models
from difftrain.models.pipelines.pretrained import PretrainedPipeline, types_by_pipeline
from difftrain.models.pipelines.text_to_image import TextToImageModel

ABSENT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
PREFIXES: dict[str, tuple[str, ...]] = {}  # of all families together
for model in models().values():
    if issubclass(model, TextToImageModel):
        for name, prefixes in model.key_prefixes.items():
            PREFIXES[name] = (*PREFIXES.get(name, ()), *prefixes)


def opened(path: Path | str, config: Path | str | None = None) -> PretrainedPipeline:
    return PretrainedPipeline(str(path), config and str(config), PREFIXES)


@pytest.fixture
def sd(pipelines) -> Path:
    return pipelines("stable_diffusion")


@pytest.fixture
def copied(sd, tmp_path) -> Path:
    """A pipeline that a test may break."""
    return shutil.copytree(sd, tmp_path / "copied")


@pytest.fixture
def offline_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached_as(repository: str, folder: Path, cache: Path, commit: str = "a" * 40) -> Path:
    """Lays a folder into a cache of the hub as a snapshot of the repository."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, place / "snapshots" / commit)


def loaded(folder: Path, **absent: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, **absent)


def networks(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }


def assert_equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    expected = b.state_dict()
    assert a.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in a.state_dict().items())


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_weights(folder: Path, place: Path) -> Path:
    """Only the configs and tokenizers of a pipeline."""
    return shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))


def refused(path: Path | str, config: Path | str | None = None) -> str:
    with pytest.raises(InputError) as error:
        opened(path, config)
    return str(error.value)


# Folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_what_diffusers_own_pipeline_loads(family, pipelines):
    folder = pipelines(family)
    pipeline, expected = PretrainedPipeline(str(folder)), loaded(folder)

    assert types_by_pipeline()[pipeline.pipeline_class] == family
    assert pipeline.pipeline_class == type(expected).__name__
    assert networks(expected)
    for name, network in networks(expected).items():
        part = pipeline.load(name)
        assert type(part) is type(network)
        assert not part.training
        assert_equal_weights(part, network)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert pipeline.has(name) == (getattr(expected, name, None) is not None)
        if pipeline.has(name):
            assert (
                pipeline.tokenizer(name)("a cat").input_ids
                == getattr(expected, name)("a cat").input_ids
            )


def test_configs_are_read_without_weights(sd, tmp_path):
    pipeline = PretrainedPipeline(str(without_weights(sd, tmp_path / "configs")))

    assert pipeline.config("unet")["cross_attention_dim"] == 16
    assert pipeline.config("vae")["latent_channels"] == 4
    assert pipeline.config("text_encoder")["hidden_size"] == 16
    assert pipeline.config("scheduler")["beta_end"] == 0.012


def test_a_pipeline_has_what_its_index_names_and_is_not_null(pipelines):
    without_t5 = PretrainedPipeline(str(pipelines("stable_diffusion_3", t5=False)))
    dit, sd = (PretrainedPipeline(str(pipelines(family))) for family in ("dit", "stable_diffusion"))

    assert without_t5.has("text_encoder_2")
    assert not without_t5.has("text_encoder_3")
    assert sd.index["safety_checker"] == [None, None]
    assert not sd.has("safety_checker")
    assert not dit.has("id2label")  # data, not a component
    assert_equal_weights(
        without_t5.load("text_encoder_2"),
        loaded(pipelines("stable_diffusion_3", t5=False), **ABSENT_T5).text_encoder_2,
    )


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for_whatever_the_files_hold(component, dtype, copied):
    PretrainedPipeline(str(copied)).load(component, dtype=torch.float16).save_pretrained(
        copied / component
    )

    part = PretrainedPipeline(str(copied)).load(component, dtype=dtype)

    assert {p.dtype for p in part.parameters()} == {dtype}


def test_overrides_go_over_the_config_and_another_class_may_be_asked_for(sd):
    pipeline = PretrainedPipeline(str(sd))

    assert pipeline.load("unet", sample_size=4).config.sample_size == 4
    with pytest.raises(InputError, match=r"lacks 1 weight.*text_projection"):
        pipeline.load("text_encoder", "CLIPTextModelWithProjection")


# The hub


def test_a_hub_id_is_read_from_the_cache(sd, offline_cache):
    cached_as("someone/tiny", sd, offline_cache, commit="c" * 40)
    pipeline = PretrainedPipeline("someone/tiny")

    assert pipeline.config("unet") == PretrainedPipeline(str(sd)).config("unet")
    assert_equal_weights(pipeline.load("unet"), loaded(sd).unet)
    assert_equal_weights(pipeline.load("text_encoder"), loaded(sd).text_encoder)
    assert (
        pipeline.tokenizer("tokenizer")("a cat").input_ids
        == loaded(sd).tokenizer("a cat").input_ids
    )
    assert pipeline.identity() == {"path": "someone/tiny", "commit": "c" * 40}


def test_a_hub_id_that_cannot_be_fetched_says_where_it_was_looked_for(offline_cache):
    message = refused("nobody/nothing")

    assert "'nobody/nothing'" in message
    assert str(offline_cache) in message
    assert "local folder" in message


# Single files


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
@pytest.mark.parametrize("vae_levels", [2, 4])
def test_a_single_file_gives_the_same_weights_as_its_folder(
    family, vae_levels, pipelines, tmp_path
):
    folder = pipelines(family, vae_levels=vae_levels)
    write_single_file(folder, tmp_path / "all.safetensors")
    configs = without_weights(folder, tmp_path / "configs")
    pipeline = opened(tmp_path / "all.safetensors", configs)

    assert pipeline.pipeline_class == PretrainedPipeline(str(folder)).pipeline_class
    for name, network in networks(loaded(folder)).items():
        part = pipeline.load(name)
        assert not part.training
        assert_equal_weights(part, network)
    assert pipeline.tokenizer("tokenizer").model_max_length == 77
    assert pipeline.config("scheduler")["beta_end"] == 0.012
    for name in ("unet", "text_encoder"):
        assert {p.dtype for p in pipeline.load(name, dtype=torch.bfloat16).parameters()} == {
            torch.bfloat16
        }


@pytest.mark.parametrize(
    ("family", "component"),
    [("stable_diffusion", "unet"), ("flux", "transformer"), ("stable_diffusion_3", "transformer")],
)
def test_what_a_single_file_lacks_comes_from_the_folder_of_its_configs(
    family, component, pipelines, tmp_path
):
    """A denoiser alone, in diffusers' own keys, from other weights than the folder's."""
    folder, other = pipelines(family), pipelines(family, seed=1)
    shutil.copy(
        other / component / "diffusion_pytorch_model.safetensors", tmp_path / "denoiser.safetensors"
    )
    pipeline = opened(tmp_path / "denoiser.safetensors", folder)

    assert_equal_weights(pipeline.load(component), getattr(loaded(other), component))
    assert_equal_weights(pipeline.load("vae"), loaded(folder).vae)
    assert_equal_weights(pipeline.load("text_encoder"), loaded(folder).text_encoder)


def test_text_encoders_in_a_single_flux_file_are_read(pipelines, tmp_path):
    folder, other = pipelines("flux"), pipelines("flux", seed=1)
    names = {"text_encoder": "clip_l.transformer.text_model", "text_encoder_2": "t5xxl.transformer"}
    state = {
        f"text_encoders.{prefix}.{key.removeprefix('text_model.')}": value
        for component, prefix in names.items()
        for key, value in load_file(other / component / "model.safetensors").items()
    }
    save_file(state, tmp_path / "all.safetensors")
    pipeline = opened(tmp_path / "all.safetensors", folder)

    assert_equal_weights(pipeline.load("text_encoder"), loaded(other).text_encoder)
    assert_equal_weights(pipeline.load("text_encoder_2"), loaded(other).text_encoder_2)


def test_a_single_file_without_config_uses_the_local_cache_and_never_downloads(
    sd, tmp_path, offline_cache
):
    file = tmp_path / "all.safetensors"
    write_single_file(sd, file)

    message = refused(file)
    cached_as(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        without_weights(sd, tmp_path / "configs"),
        offline_cache,
    )

    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in message
    assert "config: FOLDER" in message
    assert_equal_weights(opened(file).load("unet"), loaded(sd).unet)
    # The root is the cache's folder, not an id that could be fetched.
    assert "commit" not in opened(file).identity()
    by_id = opened(file, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert_equal_weights(by_id.load("vae"), loaded(sd).vae)
    assert "'someone/else' is not in the local cache" in refused(file, "someone/else")


def test_a_component_in_neither_the_file_nor_the_folder_is_refused(sd, tmp_path):
    shutil.copy(sd / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "unet.safetensors")
    configs = without_weights(sd, tmp_path / "configs")
    pipeline = opened(tmp_path / "unet.safetensors", configs)

    for name in ("vae", "text_encoder"):
        with pytest.raises(InputError, match=rf"model.path \({name}\): nothing can be loaded"):
            pipeline.load(name)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("unet", "model.diffusion_model.out.2.weight"),
        ("vae", "first_stage_model.quant_conv.bias"),
        ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    ],
)
def test_a_single_file_that_lacks_a_weight_is_refused(component, key, sd, tmp_path):
    file = tmp_path / "all.safetensors"
    write_single_file(sd, file)
    state = load_file(file)
    del state[key]
    save_file(state, file)

    with pytest.raises(InputError, match=rf"lacks .*weight.* {component}"):
        opened(file, sd).load(component)


def test_a_single_file_of_another_family_than_its_config_is_refused(sd, pipelines, tmp_path):
    write_single_file(sd, tmp_path / "all.safetensors")

    message = (
        r"lacks weights that a StableDiffusionXLPipeline's unet has.*folder of a pipeline of its "
        "family"
    )
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "all.safetensors", pipelines("stable_diffusion_xl")).load("unet")


def test_a_single_file_of_other_sizes_than_its_config_is_refused(sd, copied, tmp_path):
    write_single_file(sd, tmp_path / "all.safetensors")
    edit(copied / "unet" / "config.json", block_out_channels=[16, 32])

    with pytest.raises(
        InputError,
        match=r"^model\.config: the unet in .* differs from that of the StableDiffusionPipeline in",
    ):
        opened(tmp_path / "all.safetensors", copied).load("unet")


def test_files_that_are_no_checkpoint_are_refused(sd, tmp_path):
    pickle, lora, cut = (
        tmp_path / name for name in ("model.ckpt", "lora.safetensors", "cut.safetensors")
    )
    pickle.write_bytes(b"pickle")
    save_file({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(1)}, lora)
    cut.write_bytes((sd / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:-100])

    assert "run code" in refused(pickle, sd)
    assert "lora_A" in refused(lora, sd)
    assert "cut short" in refused(cut, sd)
    assert "there is no file" in refused(tmp_path / "absent.safetensors", sd)


def test_a_config_beside_a_folder_would_have_no_effect(sd):
    assert "model.config" in refused(sd, sd)


# Identity


def test_the_identity_tells_weights_of_the_same_shapes_apart(pipelines, tmp_path):
    folder, other = pipelines("stable_diffusion"), pipelines("stable_diffusion", seed=1)
    moved = shutil.copytree(folder, tmp_path / "moved")
    first, second, third = (
        PretrainedPipeline(str(place)).identity() for place in (folder, other, moved)
    )

    assert json.loads(json.dumps(first)) == first
    assert (
        first["files"].keys()
        == second["files"].keys()
        == {
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
        }
    )
    assert all(first["files"][name] != second["files"][name] for name in first["files"])
    assert first["files"] == third["files"]


def test_the_identity_of_a_single_file_names_it_and_what_the_folder_adds(pipelines, tmp_path):
    sd = pipelines("stable_diffusion")
    shutil.copy(sd / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "unet.safetensors")

    files = opened(tmp_path / "unet.safetensors", sd).identity()["files"]

    assert set(files) == {
        "unet.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


def test_a_mark_sees_size_start_and_end(tmp_path):
    file, content = tmp_path / "weights.bin", bytearray(100 * PIECE)
    marks = []
    for change in (None, 0, -1):
        if change is not None:
            content[change] ^= 1
        file.write_bytes(content)
        marks.append(mark(file))
    file.write_bytes(content + b"0")

    assert len({*marks, mark(file)}) == 4


# Refusals


def test_a_wrong_pipeline_class_names_the_type_that_fits(pipelines):
    pipeline = PretrainedPipeline(str(pipelines("stable_diffusion_xl")))

    pipeline.expect("StableDiffusionXLPipeline", "stable_diffusion_xl")
    with pytest.raises(
        InputError,
        match=r"is a StableDiffusionXLPipeline, and model.type stable_diffusion trains a "
        r"StableDiffusionPipeline.*Write model: \{type: stable_diffusion_xl\}",
    ):
        pipeline.expect("StableDiffusionPipeline", "stable_diffusion")


def test_a_pipeline_class_that_nothing_trains_lists_those_that_can_be(copied):
    edit(copied / "model_index.json", _class_name="WuerstchenPriorPipeline")

    with pytest.raises(InputError, match=r"is a WuerstchenPriorPipeline.*StableDiffusion3Pipeline"):
        PretrainedPipeline(str(copied)).expect("FluxPipeline", "flux")


def test_folders_that_are_no_pipeline_say_what_they_are(sd, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()

    assert "there is no folder" in refused(tmp_path / "absent")
    assert "single model" in refused(sd / "unet")
    assert "it holds: a.png" in refused(tmp_path / "photos")
    assert "model.config: there is no folder" in refused(
        *single_and(sd, tmp_path, tmp_path / "absent")
    )
    assert "model.config" in refused(*single_and(sd, tmp_path, sd / "unet"))


def single_and(sd: Path, tmp_path: Path, config: Path) -> tuple[Path, Path]:
    write_single_file(sd, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors", config


def test_an_index_that_cannot_be_read_is_named(copied):
    index = copied / "model_index.json"
    index.write_text("{}")
    nameless = refused(copied)
    index.write_text("{")

    assert "_class_name" in nameless
    assert "is not JSON" in refused(copied)
    assert "model_index.json" in refused(copied)


def test_a_component_that_the_pipeline_lacks_lists_those_it_has(sd):
    pipeline = PretrainedPipeline(str(sd))

    for call in (pipeline.config, pipeline.load, pipeline.tokenizer):
        with pytest.raises(
            InputError,
            match=r"has no transformer; it has: scheduler, text_encoder, tokenizer, unet, vae",
        ):
            call("transformer")


def test_a_component_folder_that_is_missing_or_empty_is_named(copied):
    shutil.rmtree(copied / "unet")
    (copied / "vae" / "config.json").unlink()
    (copied / "text_encoder" / "model.safetensors").unlink()
    pipeline = PretrainedPipeline(str(copied))

    with pytest.raises(InputError, match="lists a unet, but there is no folder unet"):
        pipeline.config("unet")
    with pytest.raises(InputError, match="lists a unet, but there is no folder unet"):
        pipeline.load("unet")
    with pytest.raises(InputError, match=r"vae' holds no config.json"):
        pipeline.config("vae")
    with pytest.raises(InputError, match=r"model.path \(text_encoder\): nothing can be loaded"):
        pipeline.load("text_encoder")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_there_in_half_precision_alone_are_loaded(family, pipelines, tmp_path):
    """As a folder is that was fetched without the plain files."""
    folder = tmp_path / family
    loaded(pipelines(family)).to(torch.float16).save_pretrained(folder, variant="fp16")
    pipeline = PretrainedPipeline(str(folder))
    expected = networks(diffusers.DiffusionPipeline.from_pretrained(folder, variant="fp16"))

    whole = networks(pipeline.assembled())

    assert whole.keys() == expected.keys()
    for name, network in expected.items():
        assert_equal_weights(pipeline.load(name), network)
        assert_equal_weights(whole[name], network)


def test_plain_weights_come_before_those_of_half_precision(copied):
    unet = PretrainedPipeline(str(copied)).load("unet")
    for part in ("unet", "vae"):
        getattr(loaded(copied), part).to(torch.float16).save_pretrained(
            copied / part, variant="fp16"
        )
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline = PretrainedPipeline(str(copied))

    assert_equal_weights(pipeline.load("unet"), unet)
    assert_equal_weights(pipeline.assembled().unet, unet)
    assert torch.equal(
        next(pipeline.assembled().vae.parameters()),
        next(pipeline.load("vae").half().parameters()).float(),
    )


@pytest.mark.parametrize(
    ("component", "file"),
    [("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")],
)
def test_weights_cut_short_or_left_as_a_pointer_are_named(component, file, copied):
    weights = copied / component / file
    for content in (
        weights.read_bytes()[:-100],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=f"{file}' is cut short or no .safetensors file"):
            PretrainedPipeline(str(copied)).load(component)


@pytest.mark.parametrize(
    ("component", "file"),
    [("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")],
)
def test_weights_that_would_stay_random_are_refused(component, file, copied):
    state = load_file(copied / component / file)
    name = min(state)
    del state[name]
    save_file(state, copied / component / file, metadata={"format": "pt"})

    with pytest.raises(InputError, match=rf"lacks 1 weight\(s\) of the {component}"):
        PretrainedPipeline(str(copied)).load(component)


def test_weights_of_another_config_are_refused(copied):
    edit(copied / "unet" / "config.json", cross_attention_dim=24)

    with pytest.raises(InputError, match=r"model.path \(unet\): nothing can be loaded"):
        PretrainedPipeline(str(copied)).load("unet")


def test_a_tokenizer_without_its_vocabulary_is_refused(copied):
    """transformers would make one that knows its marks and no word."""
    (copied / "tokenizer" / "tokenizer.json").unlink()

    with pytest.raises(InputError, match="holds no vocabulary"):
        PretrainedPipeline(str(copied)).tokenizer("tokenizer")


def test_classes_that_are_not_there_are_named(copied):
    edit(copied / "model_index.json", unet=["diffusers", "UNet9DModel"], vae=["my_module", "MyVAE"])
    pipeline = PretrainedPipeline(str(copied))

    with pytest.raises(
        InputError, match=f"UNet9DModel, which diffusers {diffusers.__version__} does not have"
    ):
        pipeline.load("unet")
    with pytest.raises(InputError, match=r"is a my_module\.MyVAE"):
        pipeline.load("vae")


def test_a_family_without_single_files_is_refused(pipelines, tmp_path):
    dit = pipelines("dit")
    shutil.copy(
        dit / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "dit.safetensors"
    )

    with pytest.raises(InputError, match="reads no DiTTransformer2DModel from a single file"):
        opened(tmp_path / "dit.safetensors", dit).load("transformer")
