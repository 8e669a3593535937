"""Wrong input: one message on standard error that names it, code 2, no traceback, nothing written.

Each case goes through `difftrain train`. What the plans can see is an error before the run folder
is made, and so before any weights; everything else leaves earlier checkpoints as they were.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
from helpers.commands import command, noise_frames, pictures, refused, video
from helpers.runs import CLIPS, UNET, tiny
from helpers.tiny_networks import TINY_DIT, vae

FLOW = ["schedule={type: flow}", "parameterization=flow_prediction"]
EVALUATED = {
    "features": "pixels",
    "reference": {"type": "digits", "part": "held_out"},
    "metrics": ["frechet_distance"],
    "num_samples": 4,
    "in_loop": {
        "every": 1,
        "num_samples": 4,
        "reference": {"type": "digits", "part": "classifier"},
        "metrics": ["frechet_distance"],
        "select": "frechet_distance",
    },
}

CASES: list[tuple[list[str], list[str]]] = [
    # schema
    (["trainng.steps=3"], ["trainng: unknown key (did you mean 'training'?)"]),
    (["training.step=3"], ["training.step: unknown key (did you mean 'steps'?)"]),
    (["training.steps=ten"], ["training.steps: expected a valid integer, got 'ten'"]),
    (
        ["training.batch_size=0"],
        ["training.batch_size: expected greater than or equal to 1, got 0"],
    ),
    (["model.type=unet"], ["model.type: unknown model 'unet' (did you mean 'unet2d'?)"]),
    (
        ["data.part=test"],
        ["data.part: expected 'train', 'classifier', 'held_out' or 'all', got 'test'"],
    ),
    (
        ["sampling.sampler.type=dpm"],
        [
            "sampling.sampler.type: unknown sampler 'dpm'",
            "known: ddim, ddpm, diffusers, dpm_solver++",
        ],
    ),
    (
        ["sampling.sampler.type=dpm_solver++", "sampling.sampler.order=4"],
        ["sampling.sampler.order: expected 1, 2 or 3, got 4"],
    ),
    (
        ["objective.weighting={type: p2, gamma: -1}"],
        ["objective.weighting.gamma: expected greater than or equal to 0, got -1"],
    ),
    # schedule, parameterization, sampler
    (
        ["schedule="],
        ["schedule: required, because the model does not state one. Write schedule: {type: "],
    ),
    (
        ["parameterization="],
        [
            (
                "parameterization: required, because the model does not state one. Write "
                "parameterization: epsilon"
            )
        ],
    ),
    (
        ["schedule.zero_terminal_snr=true"],
        [
            "parameterization epsilon says nothing about x0 where SNR = 0",
            "Write parameterization: v_pred",
        ],
    ),
    (["schedule.beta_end=2"], ["schedule: beta_t must lie between 0 and 1"]),
    (
        FLOW,
        [
            (
                "sampling.sampler: ddim does not integrate a flow schedule. Write sampler: "
                "{type: flow_euler}"
            )
        ],
    ),
    (
        ["sampling.sampler=flow_euler"],
        [
            (
                "sampling.sampler: flow_euler does not integrate a diffusion schedule. Write "
                "sampler: {type: ddim}"
            )
        ],
    ),
    (
        ["parameterization=flow_prediction"],
        ["parameterization: no sampler takes flow_prediction on a diffusion schedule"],
    ),
    (
        ["sampling.sampler.steps=51"],
        ["sampling.sampler.steps: 51 steps, but the schedule has 50 timesteps. Write at most 50"],
    ),
    (
        ["objective.timesteps={type: range, last: 50}"],
        ["timesteps range: last = 50, but the schedule has 50 timesteps. Write last: 49"],
    ),
    (
        ["objective.timesteps={type: range, first: 9, last: 3}"],
        ["first = 9 is greater than last = 3"],
    ),
    (
        [
            "schedule.zero_terminal_snr=true",
            "parameterization=sample",
            "objective.weighting=debiased",
            "objective.error=l1",
        ],
        [
            (
                "weighting 'debiased' is stated for the epsilon error. It converts to sample for "
                "the squared error alone"
            )
        ],
    ),
    # guidance and labels
    (["sampling.guidance=2", "label_dropout=0"], ["sampling.guidance: 2.0", "label_dropout"]),
    (
        ["sampling.guidance=2", "label_dropout=0", "model.config.num_class_embeds=10"],
        ["sampling.guidance: 2.0 needs a null label"],
    ),
    (
        ["model.config.num_class_embeds=10"],
        [
            "the data has 10 classes, one more for the dropped label, but the model embeds 10",
            "num_class_embeds: 11",
        ],
    ),
    (
        ["model.config.num_class_embeds="],
        ["label_dropout is set, but the model takes no class labels"],
    ),
    # shapes
    (
        ["transform.resolution=4"],
        ["transform.resolution: 4, but the model takes 8x8 pixels. Write resolution: 8"],
    ),
    (
        ["transform.channels=3"],
        ["transform.channels: 3 channels, but the model takes 1. Write transform: {channels: 1}"],
    ),
    (
        ["model.config.out_channels=2"],
        ["model: out_channels is 2, but variance fixed needs 1", "variance: {type: learned_range}"],
    ),
    (
        ["objective.variance=learned_range"],
        [
            "model: out_channels is 1, but variance learned_range needs 2",
            "{config: {out_channels: 2}}",
        ],
    ),
    (["model.config.out_channels=3"], ["model: out_channels is 3, but variance fixed needs 1"]),
    (
        ["model.config.sample_size=9", "transform.resolution=9", "transform.resize=bicubic"],
        ["UNet2DModel does not take inputs of 1x9x9"],
    ),
    # model
    (
        ["model={type: unet2d, preset: cifar}"],
        ["model.preset: unknown preset 'cifar' (did you mean 'cifar10'?)"],
    ),
    (
        ["model.config.num_class_embed=11"],
        [
            (
                "model.config.num_class_embed: UNet2DModel has no such argument (did you mean "
                "'num_class_embeds'?"
            )
        ],
    ),
    (["model.config.norm_num_groups=3"], ["model.config: UNet2DModel rejects it"]),
    (
        ["model={type: unet2d, path: no/model/here}"],
        ["model.path: there is no folder 'no/model/here'"],
    ),
    (
        ["model={type: unet2d}"],
        ["model: write a preset (digits, cifar10, p2_256), a config, or a path"],
    ),
    (
        ["model.path=no/model/here"],
        ["model: path brings its own config. Leave preset and config out"],
    ),
    (["encoder={type: vae, path: ./no_vae}"], ["encoder.path: there is no folder './no_vae'"]),
    # training
    (
        ["training.micro_batch_size=3"],
        [
            "training.micro_batch_size: 3 samples on each of 1 process(es) do not divide",
            "Write one of 1, 2, 4, 8.",
        ],
    ),
    (
        ["optimizer.name=adamv"],
        ["optimizer.name: unknown optimizer 'adamv' (did you mean 'adam'?)"],
    ),
    (
        ["optimizer.name=no_such_package.AdamW"],
        ["optimizer.name: cannot import 'no_such_package.AdamW'"],
    ),
    (
        ["optimizer.options={beta: 1}"],
        ["optimizer.options.beta: adamw has no such option (did you mean 'betas'?)"],
    ),
    (
        ["optimizer.options={betas: [2, 3]}"],
        ["optimizer: adamw does not take its arguments: Invalid beta parameter at index 0: 2"],
    ),
    (["training.trackers=[tensorbord]"], ["training.trackers", "tensorbord"]),
    # data
    (
        ["data={type: image_folder, path: no/pictures}"],
        ["image_folder: path 'no/pictures' does not exist (seen from", "Write the folder that"],
    ),
    (
        ["data={type: huggingface, path: parquet, data_files: no.parquet}"],
        ["huggingface: path 'parquet'", "'no.parquet'", "cannot be loaded"],
    ),
    (["imports=[no_such_module]"], ["imports.0: cannot import 'no_such_module'"]),
    # evaluation
    (
        ["evaluation.features=inceptionn"],
        ["evaluation.features.type: unknown features 'inceptionn'"],
    ),
    (
        ["evaluation.features={type: inception, path: nowhere.pth}", "evaluation.metrics=[fid]"],
        [
            "features 'inception': no file nowhere.pth. On a machine with network: curl -L",
            "sha256 6726825d",
        ],
    ),
    (["evaluation.features={type: dinov2, model: ./nowhere}"], ["nowhere"]),
    (
        ["evaluation.metrics=[{type: kernel_distance, subsets: 5}]", "evaluation.num_samples=400"],
        ["metric 'kernel_distance' needs at least 1000 generated samples, and there are 400."],
    ),
    (
        [
            "evaluation.metrics=[{type: precision_recall, neighbours: 500}]",
            "evaluation.num_samples=600",
        ],
        ["metric 'precision_recall' needs at least 501 reference samples, and there are 450."],
    ),
    (
        [
            "evaluation.metrics=[{type: frechet_distance, extrapolate: true}]",
            "evaluation.num_samples=200",
        ],
        ["metric 'frechet_distance' needs at least 256 generated samples, and there are 200."],
    ),
    (
        ["evaluation.metrics=[fdd]"],
        ["evaluation.metrics.0.type: unknown metric 'fdd'", "known: class_agreement, "],
    ),
    (
        ["evaluation.metrics=[fid]"],
        [
            (
                "metric 'fid' is defined for features 'inception' alone, but the features are "
                "'pixels'. Write frechet_distance"
            )
        ],
    ),
    (
        ["evaluation.metrics=[class_agreement]"],
        ["metric 'class_agreement' needs classes: use features that come from a classifier"],
    ),
    (["evaluation.metrics=[sfid]"], ["metric 'sfid' is defined for features 'inception'"]),
    (["evaluation.metrics=[clip_score]"], ["metric 'clip_score' "]),
    (
        ["evaluation.in_loop.select=frechet"],
        ["in_loop.select: no metric of in_loop gives 'frechet' (did you mean 'frechet_distance'?)"],
    ),
    (
        [
            "evaluation.in_loop.metrics=[precision_recall]",
            "evaluation.in_loop.select=precision_recall",
        ],
        [
            "in_loop.select: no metric of in_loop gives 'precision_recall'",
            "known: precision, recall",
        ],
    ),
    (
        ["evaluation.in_loop.reference={type: digits, part: held_out}"],
        ["the best checkpoint would be picked on the images of the final score"],
    ),
    (
        ["evaluation.reference={type: image_folder, path: nowhere}"],
        ["image_folder: path 'nowhere' does not exist"],
    ),
    (
        ["evaluation.in_loop.reference={type: image_folder, path: nowhere}"],
        ["image_folder: path 'nowhere' does not exist"],
    ),
    (
        ["evaluation.features={type: classifier, data: {type: image_folder, path: nowhere}}"],
        ["image_folder: path 'nowhere' does not exist"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    CASES,
    ids=lambda value: value[0][:60] if isinstance(value, list) else None,
)
def test_it_is_refused_before_anything_is_made(tmp_path, overrides, expected):
    file = (
        tiny(tmp_path, evaluation=EVALUATED)
        if any(o.startswith("evaluation") for o in overrides)
        else tiny(tmp_path)
    )

    message = refused("train", file, *overrides)

    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_check_refuses_in_the_same_words(tmp_path):
    file = tiny(tmp_path)

    assert refused("check", file, "training.micro_batch_size=3") == refused(
        "train", file, "training.micro_batch_size=3"
    )
    message = refused("check", file, "training.trackers=[tensorbord]")
    assert (
        "training.trackers: unknown tracker 'tensorbord' (did you mean 'tensorboard'?)" in message
    )


def test_a_duplicate_key_is_named_with_its_line(tmp_path):
    file = tiny(tmp_path)
    file.write_text(file.read_text() + "output: elsewhere\n")

    assert (
        f"recipe.yaml, line {len(file.read_text().splitlines())}: the key 'output' is written twice"
        in refused("train", file)
    )


def test_a_missing_recipe_is_named():
    assert "there is no recipe 'no_recipe.yaml'. Write the path of a YAML file" in refused(
        "train", "no_recipe.yaml"
    )


def test_a_pretrained_model_may_be_guided_without_label_dropout_here(tmp_path):
    """It may have been trained with dropped labels elsewhere."""
    command("train", tiny(tmp_path, training__steps=1))
    path = tmp_path / "run" / "pipeline" / "unet"
    again = tiny(
        tmp_path / "again",
        model={"type": "unet2d", "path": str(path)},
        label_dropout=0.0,
        training__steps=1,
    )

    command("train", again, "sampling.guidance=2")


# Images


def of_pictures(folder: Path, changes: dict[str, Any] | None = None, **more: Any) -> Path:
    """A recipe without labels for the images in folder/pictures."""
    config = {**UNET, "in_channels": 3, "out_channels": 3}
    del config["num_class_embeds"]
    model = {"type": "unet2d", "config": config}
    given = {
        "model": model,
        "data": {"type": "image_folder", "path": str(folder / "pictures")},
        "label_dropout": 0.0,
        "transform": {"resolution": 8, "channels": 3},
        "training__steps": 2,
        "training__batch_size": 4,
    }
    return tiny(folder, **{**given, **(changes or {}), **more})


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "pictures").mkdir()

    message = refused("train", of_pictures(tmp_path))

    assert (
        f"image_folder: no image below {tmp_path / 'pictures'}. Expected files ending in" in message
    )
    assert not (tmp_path / "run").exists()


def test_labels_that_the_data_has_not_are_refused(tmp_path):
    pictures(tmp_path / "pictures")

    message = refused("train", of_pictures(tmp_path), "model.config.num_class_embeds=3")

    assert "the model takes class labels (3 of them), but the data has none" in message


def test_an_unreadable_image_stops_the_run_and_leaves_its_checkpoints(tmp_path):
    pictures(tmp_path / "pictures", num=4)
    command("train", of_pictures(tmp_path))
    before = fingerprints(tmp_path / "run" / "checkpoints")
    (tmp_path / "pictures" / "002.png").write_bytes(b"no picture")

    message = refused("train", of_pictures(tmp_path), "training.steps=4")

    assert (
        f"{tmp_path / 'pictures' / '002.png'} cannot be read: not in an image format that "
        f"Pillow knows"
    ) in message
    assert "Repair or remove it, or write loader: {on_error: skip}." in message
    assert fingerprints(tmp_path / "run" / "checkpoints") == before
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 2


def test_an_unreadable_first_image_does_not_hide_whether_there_are_labels(tmp_path):
    """The labels here are integers, so only an item says whether there are any."""
    folder = pictures(tmp_path / "pictures", num=4)
    records = [{"file_name": f"{i:03d}.png", "label": i % 2} for i in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "000.png").write_bytes(b"no picture")
    file = of_pictures(
        tmp_path, data={"type": "image_folder", "path": str(folder), "labels": "metadata"}
    )

    command("train", file, "loader.on_error=skip", "model.config.num_class_embeds=2")

    skipped = [
        json.loads(line)["name"]
        for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    ]
    assert skipped == [str(folder / "000.png")]


def test_a_class_id_out_of_range_is_refused(tmp_path):
    folder = pictures(tmp_path / "pictures", num=4)
    records = [{"file_name": f"{i:03d}.png", "label": i} for i in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = of_pictures(
        tmp_path, data={"type": "image_folder", "path": str(folder), "labels": "metadata"}
    )

    message = refused("train", file, "model.config.num_class_embeds=3")

    assert "the data holds the class id 3, but the model has 3 classes, ids 0 to 2" in message


def test_an_image_smaller_than_the_crop_is_refused(tmp_path):
    pictures(tmp_path / "pictures", num=2)
    PIL.Image.new("RGB", (8, 7)).save(tmp_path / "pictures" / "small.png")

    message = refused("train", of_pictures(tmp_path), "transform.resize=none")

    assert (
        "small.png is 8x7, smaller than resolution 8, and resize is none. Write resize: bicubic"
        in message
    )


def test_a_folder_of_unreadable_images_alone_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")

    message = refused("train", of_pictures(tmp_path), "model.config.num_class_embeds=3")

    assert "data: none of the 1 items can be read. The first:" in message


def fingerprints(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# Latents


def test_a_dit_without_labelled_data_is_refused(tmp_path):
    pictures(tmp_path / "pictures")
    model = {"type": "dit", "config": TINY_DIT}

    message = refused(
        "train",
        of_pictures(
            tmp_path, model=model, encoder={"type": "vae", "path": str(vae(tmp_path / "vae"))}
        ),
    )

    assert "the model takes class labels (11 of them), but the data has none" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["transform.resolution=16"],
            "transform.resolution: 16, but the model takes 4x4 latents. Write resolution: 8",
        ),
        (
            ["transform.channels=1"],
            "transform.channels: 1, but the encoder takes 3. Write transform: {channels: 3}",
        ),
        (
            ["model.config.in_channels=3", "model.config.out_channels=3"],
            "encoder: 4 channels, but the model takes 3",
        ),
        (
            ["model.config.sample_size=3", "transform.resolution=6"],
            "DiTTransformer2DModel does not take inputs of 4x3x3",
        ),
    ],
)
def test_latents_that_do_not_fit_the_model_are_refused(tmp_path, overrides, expected):
    pictures(tmp_path / "pictures", classes=2)
    data = {"type": "image_folder", "path": str(tmp_path / "pictures"), "labels": "folders"}
    file = of_pictures(
        tmp_path,
        model={"type": "dit", "config": TINY_DIT},
        data=data,
        encoder={"type": "vae", "path": str(vae(tmp_path / "vae"))},
    )

    assert expected in refused("train", file, *overrides)
    assert not (tmp_path / "run").exists()


# Videos

VIDEOS = {"type": "video_folder", "num_frames": 3}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.path=no/videos"],
            [
                "video_folder: path 'no/videos' does not exist (seen from",
                "Write the folder that holds the videos",
            ],
        ),
        (
            ["data.path=EMPTY"],
            [
                "video_folder: no video below",
                "Expected files ending in .avi, .gif, .mkv, .mov, .mp4, .webm, in upper or lower",
            ],
        ),
        (
            ["data.num_frames=4", "data.frame_step=3"],
            ["a.mp4 has 10 frames, but a clip of num_frames 4 and frame_step 3 needs 12. Write"],
        ),
        (["data.num_frames=0"], ["data.num_frames: expected greater than or equal to 1, got 0"]),
        (
            ["data.path=BROKEN"],
            ["b.mp4 cannot be read: Invalid data found", "Repair or remove it."],
        ),
        (
            ["model={type: unet2d, preset: cifar10}"],
            ["data: video_folder holds clips, but the model unet2d takes images"],
        ),
        (
            ["data={type: image_folder, path: PICTURES}"],
            ["data: image_folder holds images, but the model unet3d_condition takes clips"],
        ),
        (
            ["model.config.num_class_embeds=3"],
            ["model.config.num_class_embeds: UNet3DConditionModel has no such argument"],
        ),
        (
            ["model.gradient_checkpointing=true"],
            ["model.gradient_checkpointing: UNet3DConditionModel cannot checkpoint gradients"],
        ),
        (
            ["evaluation={features: pixels, reference: digits, metrics: [frechet_distance]}"],
            [
                (
                    "evaluation: the data are clips, and there is no metric for videos yet. "
                    "Leave evaluation out"
                )
            ],
        ),
        (
            ["transform={resolution: 16, channels: 1, resize: none}"],
            ["transform.resolution: 16, but the model takes 12x12 pixels"],
        ),
    ],
    ids=lambda value: value[0][:60] if isinstance(value, list) else None,
)
def test_videos_that_do_not_go_are_refused_before_anything_is_made(tmp_path, overrides, expected):
    pytest.importorskip("av", reason="an extra: pip install .[video]")
    video(tmp_path / "VIDEOS" / "a.mp4", noise_frames(10, (12, 12)))
    pictures(tmp_path / "PICTURES")
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "b.mp4").write_bytes(b"no video")
    file = tiny(tmp_path, **{**CLIPS, "data": {**VIDEOS, "path": str(tmp_path / "VIDEOS")}})

    message = refused(
        "train",
        file,
        *(
            re.sub("EMPTY|BROKEN|PICTURES", lambda name: str(tmp_path / name[0]), o)
            for o in overrides
        ),
    )

    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_videos_without_pyav_are_refused_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"whatever it is")
    monkeypatch.setitem(sys.modules, "av", None)

    message = refused(
        "train", tiny(tmp_path, **{**CLIPS, "data": {**VIDEOS, "path": str(tmp_path)}})
    )

    assert message == (
        "error: videos are read with PyAV, which is not installed. Write: pip install "
        "difftrain[video]\n"
    )


def test_clips_are_no_data_for_image_scores(tmp_path):
    message = refused(
        "reference", "{type: digit_clips}", "--features", "pixels", "--out", tmp_path / "a.npz"
    )

    assert (
        "DATA: the data set yields clips, but images are needed here. Write a data set of images."
        in message
    )


# The run folder


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(tmp_path):
    command("train", tiny(tmp_path, training__steps=1))
    before = fingerprints(tmp_path / "run" / "checkpoints")

    message = refused("train", tiny(tmp_path, training__steps=1), "optimizer.lr=0.5")

    assert "was trained with another recipe:" in message
    assert "-  lr: 0.001\n+  lr: 0.5" in message
    assert (
        "Write --accept-changes to resume with the new one, --fresh to start over in a new "
        "folder, or another output:"
    ) in message
    assert fingerprints(tmp_path / "run" / "checkpoints") == before


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")

    assert "holds other files and no run. Write another output:, or empty it." in refused(
        "train", tiny(tmp_path)
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")

    assert "cannot be written to" in refused(
        "train", tiny(tmp_path), f"output={tmp_path / 'file' / 'run'}"
    )


def test_more_space_than_there_is_is_refused_by_check(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))

    assert "do not fit into the 0.00 GiB free" in refused("check", tiny(tmp_path))
