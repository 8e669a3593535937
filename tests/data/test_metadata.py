"""What is known of images before they are decoded, against the decoded ones."""

from io import BytesIO

import datasets
import numpy as np
import PIL.Image
import pytest

from difftrain.core.errors import InputError
from difftrain.data.datasets.digits import Digits
from difftrain.data.datasets.huggingface import huggingface
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.images import Original
from difftrain.data.items import Item, MapDataset, StreamDataset
from difftrain.data.metadata import check_captions, some_captions
from difftrain.data.opening import UnreadableImage, upright

NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def turned(orientation, **options):
    image = PIL.Image.fromarray(NOISE)
    exif = image.getexif()
    exif[0x0112] = orientation
    stored = BytesIO()
    image.save(stored, exif=exif.tobytes(), **options)
    return stored.getvalue()


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("in_file", [True, False])
def test_the_size_in_the_header_is_that_of_the_upright_image(
    orientation, format_name, in_file, tmp_path
):
    encoded = turned(orientation, format=format_name)
    path = tmp_path / "photo"
    path.write_bytes(encoded)

    found = Original("photo", None, lambda: None, path if in_file else encoded).size()

    image = upright(PIL.Image.open(BytesIO(encoded)))
    assert found == (image.height, image.width)


def test_an_orientation_behind_the_pixels_of_a_png_counts():
    with_exif, without = turned(6, format="PNG"), BytesIO()
    PIL.Image.fromarray(NOISE).save(without, "PNG")
    start = with_exif.index(b"eXIf") - 4
    chunk = with_exif[start : start + 12 + int.from_bytes(with_exif[start : start + 4], "big")]
    end = without.getvalue().index(b"IEND") - 4
    moved = without.getvalue()[:end] + chunk + without.getvalue()[end:]

    assert upright(PIL.Image.open(BytesIO(moved))).size == (12, 20)
    assert Original("a.png", None, lambda: None, moved).size() == (20, 12)


def test_no_pixels_are_decoded_for_sizes(tmp_path, monkeypatch):
    for name in ("a.png", "b.jpg", "c.webp", "d.tiff"):
        PIL.Image.fromarray(NOISE).save(tmp_path / name)
    folder = ImageFolder(str(tmp_path))

    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", refuse)

    assert [folder.original(i).size() for i in range(4)] == [(12, 20)] * 4


def test_a_file_without_a_header_is_unreadable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")

    with pytest.raises(UnreadableImage, match=r"a.png cannot be read"):
        ImageFolder(str(tmp_path)).original(0).size()


def test_a_folders_originals_are_its_items(save, tmp_path):
    for number, name in enumerate(("cats/a.png", "dogs/b.png")):
        save(name, number)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {number}\n")
    folder = ImageFolder(str(tmp_path), labels="folders", captions="sidecar")

    for i in range(2):
        found, item = folder.original(i), folder[i]
        assert (found.name, found.label, found.caption()) == (item.name, item.label, item.caption)
    assert list(folder.captions()) == [(folder[i].name, f"caption {i}") for i in range(2)]
    assert folder.original(0).digest() != folder.original(1).digest()


def test_the_same_bytes_have_the_same_digest_wherever_they_lie(save, tmp_path):
    one, other = save("a/x.png", 3), save("b/y.png", 3)
    table = table_of([one.read_bytes()], tmp_path)

    digests = {ImageFolder(str(path.parent)).original(0).digest() for path in (one, other)}

    assert digests == {table.original(0).digest()}


def table_of(images, tmp_path, **columns):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": image, "path": None} for image in images], **columns}
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    named = {f"{name}_column": name for name in columns}
    return huggingface("parquet", data_files=str(tmp_path / "rows.parquet"), **named)


def test_a_tables_originals_are_its_rows(tmp_path):
    table = table_of(
        [turned(6, format="JPEG"), turned(1, format="PNG")],
        tmp_path,
        label=["b", "a"],
        caption=["one", "two"],
    )

    for i in range(2):
        found, item = table.original(i), table[i]
        assert (found.name, found.label, found.caption()) == (item.name, item.label, item.caption)
        assert found.size() == upright(item.image).size[::-1]
    assert list(table.captions()) == [("row 0", "one"), ("row 1", "two")]


def test_what_holds_no_files_is_asked_for_its_items():
    digits = Digits("held_out")
    found = digits.original(3)

    assert (found.name, found.label, found.caption(), found.size(), found.stamp) == (
        digits[3].name,
        digits[3].label,
        None,
        (8, 8),
        None,
    )
    assert found.digest() == digits.original(3).digest() != digits.original(4).digest()


class Held(MapDataset):
    """A data set that holds one image, and no file."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return Item(self.image, name="held")


def palette(*colour):
    image = PIL.Image.new("P", (2, 2), 0)
    image.putpalette([*colour] * 256)
    return image


def test_images_that_look_different_have_different_digests():
    plain = PIL.Image.fromarray(NOISE)
    rotated = PIL.Image.open(BytesIO(turned(3, format="PNG")))
    images = [
        plain,
        plain.convert("L"),
        plain.resize((12, 20)),
        rotated,
        palette(1, 2, 3),
        palette(3, 2, 1),
    ]

    assert len({Held(image).original(0).digest() for image in images}) == len(images)
    assert Held(plain).original(0).digest() == Held(plain.copy()).original(0).digest()


def test_missing_and_empty_captions_are_errors_that_name_the_image(save, tmp_path):
    for name in ("a.png", "b.png"):
        save(name)
        (tmp_path / name).with_suffix(".txt").write_text("a cat" if name == "a.png" else "\n")

    with pytest.raises(InputError, match=r"the caption of .*b\.png is empty"):
        check_captions(ImageFolder(str(tmp_path), captions="sidecar"))
    with pytest.raises(InputError, match=r"a\.png has no caption"):
        check_captions(ImageFolder(str(tmp_path)))
    with pytest.raises(InputError, match=r"row 0 has no caption"):
        check_captions(table_of([turned(1, format="PNG")], tmp_path))
    with pytest.raises(InputError, match=r"digit .* has no caption"):
        check_captions(Digits("held_out"))
    with pytest.raises(InputError, match=r"the caption of .*b\.png \(validation\.data\) is empty"):
        check_captions(ImageFolder(str(tmp_path), captions="sidecar"), "validation.data")


class Captioned(MapDataset):
    """Images with captions, of which an empty one is missing."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return Item(PIL.Image.new("L", (2, 2)), caption=self.texts[i] or None, name=f"photo {i}")


def test_some_captions_are_spread_evenly_and_each_comes_once():
    texts = [f"text {i // 2}" for i in range(40)]

    assert some_captions(Captioned(texts), num=5) == [f"text {i}" for i in (0, 4, 8, 12, 16)]
    assert some_captions(Captioned(texts)) == [f"text {i}" for i in range(20)]


def test_an_image_without_a_caption_and_a_stream_have_none_to_show():
    class Stream(StreamDataset):
        def is_labelled(self): ...

        def rows(self, seed, process_index, num_processes): ...

        def item(self, key): ...

    with pytest.raises(InputError, match=r"^photo 1 has no caption, and the model is trained"):
        some_captions(Captioned(["a", "", "b"]))
    with pytest.raises(InputError, match=r"sampling.prompts: required with a stream.*Write some"):
        some_captions(Stream())


def test_a_data_set_says_whether_it_has_captions(save, tmp_path):
    save("a.png").with_suffix(".txt").write_text("")

    assert ImageFolder(str(tmp_path), captions="sidecar").is_captioned()
    assert not ImageFolder(str(tmp_path)).is_captioned()
    assert Captioned(["a"]).is_captioned()
    assert not Captioned([""]).is_captioned()
    assert not table_of([turned(1, format="PNG")], tmp_path).is_captioned()
    (tmp_path / "a.png").write_bytes(b"damaged")
    assert ImageFolder(str(tmp_path), captions="sidecar").is_captioned()


def test_labels_are_those_of_the_first_readable_item(save, tmp_path):
    save("cats/b.png")
    (tmp_path / "cats/a.png").write_bytes(b"damaged")

    assert ImageFolder(str(tmp_path), labels="folders").is_labelled()
    assert not ImageFolder(str(tmp_path)).is_labelled()
    (tmp_path / "cats/b.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"none of the 2 items can be read. The first: .*a\.png"):
        ImageFolder(str(tmp_path), labels="folders").is_labelled()
