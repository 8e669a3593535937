"""Images by index: through a transform or as they are, read ahead; and what does not belong together is refused at once."""

import pytest
import torch
from images import random_images, written

from difftrain.data.digits import Digits
from difftrain.data.image_folder import ImageFolder
from difftrain.data.items import load_images
from difftrain.data.transform import Transform
from difftrain.evaluation.sources import DatasetImages, all_images
from difftrain.registry import InputError
from difftrain.sampling import to_pil

IMAGES = random_images(11, 0, (3, 9, 7))


def test_a_folder_is_read_as_it_is_in_the_order_of_its_files(tmp_path):
    source = DatasetImages(ImageFolder(str(written(IMAGES, tmp_path / "a"))))

    blocks = list(source.blocks([[3, 4, 5], [0], [9, 10]]))

    assert (len(source), source.shape, source.has_labels) == (11, (3, 9, 7), False)
    assert [torch.equal(block.images, IMAGES[own]) for block, own in zip(blocks, [[3, 4, 5], [0], [9, 10]], strict=True)] == [True] * 3
    assert torch.equal(all_images(source), IMAGES)
    assert source.name_of(4) == "0004.png"


def test_a_data_set_goes_through_the_transform_with_its_labels():
    expected = load_images(Digits("held_out"), Transform(8, channels=1, resize="none"))
    source = DatasetImages(Digits("held_out"), Transform(8, channels=1, resize="none", flip=True))

    (block,) = source.blocks([list(range(200))])

    assert torch.equal(block.images, expected.pixels[:200])
    assert torch.equal(block.labels, expected.labels[:200])


def test_a_limit_takes_images_evenly_and_left_out_names_do_not_count(tmp_path):
    written(IMAGES, tmp_path / "a")
    to_pil(IMAGES[0].flip(0)).save(tmp_path / "a" / "grid.png")
    source = DatasetImages(ImageFolder(str(tmp_path / "a")), leave_out=("grid.png",), limit=4)

    assert [source.name_of(i) for i in range(len(source))] == ["0000.png", "0002.png", "0005.png", "0008.png"]


def test_images_of_another_size_or_mode_are_refused_before_any_is_read(tmp_path):
    folder = written(IMAGES, tmp_path / "a")
    to_pil(IMAGES[0, :, :5]).save(folder / "0007.png")
    with pytest.raises(InputError, match=r"0007.png is 7x5 RGB, but .*0000.png is 7x9 RGB: expected images of one size and mode"):
        DatasetImages(ImageFolder(str(folder)))
    to_pil(IMAGES[0, :1]).save(folder / "0007.png")
    with pytest.raises(InputError, match=r"0007.png is 7x9 L, but"):
        DatasetImages(ImageFolder(str(folder)))


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


def test_nothing_but_a_grid_is_refused(tmp_path):
    to_pil(IMAGES[0]).save(tmp_path / "grid.png")

    with pytest.raises(InputError, match=r"no images but grid.png. Write the folder that holds the images"):
        DatasetImages(ImageFolder(str(tmp_path)), leave_out=("grid.png",))
