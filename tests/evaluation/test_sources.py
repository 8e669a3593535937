"""Samples by index: images through a transform or as they are, and what a network generates."""

import pytest
import torch
from helpers.images import all_samples, random_images, written
from PIL import Image

from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import Digits
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.items import load_images
from difftrain.data.transform import Transform
from difftrain.evaluation.sources import DatasetImages, GeneratedSamples
from difftrain.evaluation.sources.dataset_images import OPENED
from difftrain.evaluation.sources.resizing import Resizing
from difftrain.generation.generator import SampleGenerator, Sampling
from difftrain.generation.pictures import to_pil
from difftrain.generation.samplers import DDIM
from difftrain.models.conditioning.classes import ClassConditioning
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.variance import FixedVariance

IMAGES = random_images(11, 0, (3, 9, 7))
UNCONDITIONAL = ClassConditioning(None, None)
CPU = torch.device("cpu")


def test_a_folder_is_read_as_it_is_in_the_order_of_its_files(tmp_path):
    source = DatasetImages(ImageFolder(str(written(IMAGES, tmp_path / "a"))))

    blocks = list(source.blocks([[3, 4, 5], [0], [9, 10]]))

    assert (len(source), source.shape, source.has_labels) == (11, (3, 9, 7), False)
    assert [
        torch.equal(block.samples, IMAGES[own])
        for block, own in zip(blocks, [[3, 4, 5], [0], [9, 10]], strict=True)
    ] == [True] * 3
    assert torch.equal(all_samples(source), IMAGES)
    assert source.name_of(4) == "0004.png"


def test_a_data_set_goes_through_the_transform_with_its_labels():
    expected = load_images(Digits("held_out"), Transform(8, channels=1, resize="none"))
    source = DatasetImages(Digits("held_out"), Transform(8, channels=1, resize="none", flip=True))

    (block,) = source.blocks([list(range(200))])

    assert torch.equal(block.samples, expected.pixels[:200])
    assert torch.equal(block.labels, expected.labels[:200])


def test_grey_images_among_coloured_ones_are_three_equal_channels(tmp_path):
    folder = written(IMAGES, tmp_path / "a")
    to_pil(IMAGES[0, :1]).save(folder / "0000.png")
    source = DatasetImages(ImageFolder(str(folder)))

    (block,) = source.blocks([[0, 1]])

    assert source.shape == (3, 9, 7)
    assert torch.equal(block.samples[0], IMAGES[0, :1].expand(3, 9, 7))
    assert torch.equal(block.samples[1], IMAGES[1])


def test_grey_images_alone_stay_grey(tmp_path):
    source = DatasetImages(ImageFolder(str(written(IMAGES[:, :1], tmp_path / "a"))))

    assert source.shape == (1, 9, 7)


def test_images_of_several_sizes_come_one_by_one(tmp_path):
    folder = written(IMAGES, tmp_path / "a")
    for number in (7, 9):
        to_pil(IMAGES[number, :, :5]).save(folder / f"{number:04d}.png")
    source = DatasetImages(ImageFolder(str(folder)))

    blocks = list(source.blocks(source.consecutive()))

    assert "0007.png is 7x5, but" in source.sizes_differ
    assert len(blocks) == 11
    for number, block in enumerate(blocks):
        expected = IMAGES[number, :, :5] if number in (7, 9) else IMAGES[number]
        assert torch.equal(block.samples, expected[None])


def test_files_are_opened_as_a_transform_does(tmp_path):
    picture = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).convert("RGBA")
    picture.putpixel((2, 1), (9, 8, 7, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.rotate(-90, expand=True).save(tmp_path / "upright.png")
    source = DatasetImages(ImageFolder(str(tmp_path)))

    (block,) = source.blocks([[0, 1]])

    assert (source.sizes_differ, source.shape) == ("", (3, 7, 9))
    assert torch.equal(block.samples[0], block.samples[1])
    assert block.samples[0, :, 2, 7].tolist() == [255, 255, 255]
    expected = Transform(7, resize="none")(Image.open(tmp_path / "turned.png"))
    assert torch.equal(block.samples[0, :, :, 1:8], expected)
    assert source.described() == {"opened": OPENED}


def test_a_damaged_file_is_named_when_it_is_read(tmp_path):
    folder = written(IMAGES, tmp_path / "a")
    whole = (folder / "0005.png").read_bytes()
    (folder / "0005.png").write_bytes(whole[: len(whole) // 2])
    source = DatasetImages(ImageFolder(str(folder)))

    next(iter(source.blocks([[0, 1, 2]])))
    with pytest.raises(InputError, match=r"0005.png cannot be read: .* Repair or remove it"):
        list(source.blocks([[3, 4, 5]]))


def test_a_folder_is_another_set_once_a_file_has_changed(tmp_path):
    folder = written(IMAGES, tmp_path / "a")
    before = DatasetImages(ImageFolder(str(folder))).identity()
    assert DatasetImages(ImageFolder(str(folder))).identity() == before

    to_pil(IMAGES[3].flip(0)).save(folder / "0003.png")
    assert DatasetImages(ImageFolder(str(folder))).identity() != before


@pytest.mark.parametrize("crop", [True, False])
def test_pictures_are_resized_as_a_transform_does_it(tmp_path, crop):
    for i, size in enumerate([(40, 30), (30, 40), (31, 47)]):
        noise = random_images(1, i, (3, *size))[0]
        to_pil(noise).save(tmp_path / f"{i}.png")
    source = DatasetImages(ImageFolder(str(tmp_path)), resizing=Resizing(16, crop))

    blocks = list(source.blocks(source.consecutive()))

    files = sorted(tmp_path.iterdir())
    if crop:
        expected = torch.stack([Transform(16)(Image.open(file)) for file in files])
        assert torch.equal(blocks[0].samples, expected)
        assert not source.sizes_differ
    else:
        assert [tuple(block.samples.shape[2:]) for block in blocks] == [
            (21, 16),
            (16, 21),
            (16, 24),
        ]
        assert "1.png is 21x16 after the resize, but" in source.sizes_differ
    assert source.described()["resized"] == {
        "side": 16,
        "filter": "bicubic",
        "crop": "center" if crop else "none",
    }


def test_a_strip_that_would_become_gigabytes_is_refused(tmp_path):
    Image.new("L", (30_000, 2)).save(tmp_path / "strip.png")

    with pytest.raises(InputError, match=r"strip.png is 30000x2.*Write --crop too"):
        DatasetImages(ImageFolder(str(tmp_path)), resizing=Resizing(256))


class Denoiser(torch.nn.Linear):
    """A network that looks at labels, if there are any."""

    def forward(self, x, time, cond):
        shift = cond["class_labels"].to(x)[:, None] if cond else 0
        return super().forward(x) + shift


def generator(classes: ClassConditioning, **more) -> SampleGenerator:
    sampling = Sampling(DDIM(steps=3), block_size=4, **more)
    return SampleGenerator(
        sampling,
        NoiseSchedule.linear(20),
        "epsilon",
        FixedVariance(),
        classes,
        (2,),
        items="tensors",
    )


def generated(classes=UNCONDITIONAL, network=None, **more) -> GeneratedSamples:
    torch.manual_seed(0)
    return GeneratedSamples(generator(classes, **more), network or Denoiser(2, 2), (2,), 6, CPU)


def test_generated_tensors_are_the_generators_float32_samples():
    source = generated(ClassConditioning(2, 2))
    first, second = source.blocks(source.consecutive())

    assert (len(source), source.shape, source.items_are) == (6, (2,), "tensors")
    assert (source.has_labels, source.has_captions, source.block_size) == (True, False, 4)
    assert first.samples.dtype == torch.float32
    assert torch.equal(second.samples, source.generator(source.denoiser, [4, 5], CPU))
    assert first.labels.tolist() == [0, 1, 0, 1]
    assert generated().has_labels is False
    assert source.name_of(5) == "sample 5"


def test_other_weights_or_another_sampler_are_other_samples():
    network = Denoiser(2, 2)
    before = generated(network=network).identity()

    assert generated(network=network).identity() == before
    assert generated(network=network, seed=5).identity() != before
    with torch.no_grad():
        network.weight[0, 0] += 1e-6
    assert generated(network=network).identity() != before
