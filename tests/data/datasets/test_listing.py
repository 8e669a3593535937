"""What of a folder is read, what is left out, and why."""

import json
import os
import socket

import PIL.Image
import pytest

from difftrain.core.errors import InputError
from difftrain.data.datasets.columns import encoded
from difftrain.data.datasets.huggingface import huggingface
from difftrain.data.datasets.image_folder import ImageFolder
from difftrain.data.images import open_image
from difftrain.data.opening import UnreadableImage


def put(file, value=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (4, 4), value).save(file, "PNG")
    return file


@pytest.fixture
def three(tmp_path):
    """Three pictures, one of them in a folder."""
    for name in ("a.png", "b.png", "sub/c.png"):
        put(tmp_path / "set" / name)
    return tmp_path / "set"


def left_out(folder):
    return dict(ImageFolder(str(folder)).left_out())


FILES = ["a.png", "b.png", "sub/c.png"]
TWICE = "a link to a folder that is read already"


def test_links_in_circles_are_visited_once(three):
    os.symlink(three, three / "self")
    os.symlink("..", three / "sub" / "up")
    os.symlink(three / "sub", three / "again")

    assert ImageFolder(str(three)).files == FILES
    assert left_out(three) == {"again": TWICE, "self": TWICE, "sub/up": TWICE}


def test_a_real_folder_is_read_before_a_link_to_it(three):
    os.symlink(three / "sub", three / "earlier")

    assert ImageFolder(str(three)).files == FILES


def test_two_links_to_one_folder_elsewhere_count_once(three, tmp_path):
    put(tmp_path / "elsewhere" / "x.png")
    for name in ("p", "q"):
        os.symlink(tmp_path / "elsewhere", three / name)

    assert ImageFolder(str(three)).files == ["a.png", "b.png", "p/x.png", "sub/c.png"]
    assert left_out(three) == {"q": TWICE}


def test_a_link_to_what_holds_the_folder_brings_nothing_in(three):
    put(three.parent / "sibling.png")
    os.symlink(three.parent, three / "above")

    assert ImageFolder(str(three)).files == FILES
    assert left_out(three) == {"above": "a link to a folder that holds this one"}


def test_a_link_that_leads_to_itself_is_no_error(three):
    os.symlink("round.png", three / "round.png")
    os.symlink("nowhere.png", three / "gone.png")
    os.symlink("nowhere", three / "folder")

    found = left_out(three)

    assert ImageFolder(str(three)).files == FILES
    assert found["gone.png"] == found["round.png"] == "a link to nothing"


def test_what_is_no_regular_file_is_left_out_by_name(three):
    os.mkfifo(three / "pipe.png")
    (three / "folder.png").mkdir()
    put(three / "folder.png" / "inside.png")
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(three)
        one.bind("socket.png")
        os.chdir(here)
        os.symlink("/dev/null", three / "null.png")

        assert ImageFolder(str(three)).files == [
            "a.png",
            "b.png",
            "folder.png/inside.png",
            "sub/c.png",
        ]
        assert left_out(three) == {
            "pipe.png": "a named pipe, not a regular file",
            "socket.png": "a socket, not a regular file",
            "null.png": "a device, not a regular file",
        }


@pytest.mark.parametrize("ending", [".heic", ".HEIC", ".jxl", ".tga", ".jp2", ".mp4", ".zip"])
def test_pictures_that_are_not_read_are_named_by_their_ending(three, ending):
    (three / f"photo{ending}").write_bytes(b"x")

    assert left_out(three) == {f"photo{ending}": f"ending {ending.lower()} is not read"}


def test_texts_and_hidden_files_are_left_out_quietly_and_hidden_pictures_are_counted(three):
    for name in ("notes.txt", "a.json", ".DS_Store", "Thumbs.db"):
        (three / name).write_bytes(b"x")
    put(three / "._a.png")
    put(three / ".hidden" / "x.png")

    assert left_out(three) == {"._a.png": "hidden"}


@pytest.mark.parametrize(
    "name", ["a b.png", " x.png", "x\ny.png", "ü.PNG", "x" * 240 + ".png", "-.png"]
)
def test_odd_names_are_read(tmp_path, name):
    put(tmp_path / name)

    assert ImageFolder(str(tmp_path)).files == [name]
    assert ImageFolder(str(tmp_path))[0].image.size == (4, 4)


def test_a_name_that_is_not_utf_8_is_read_and_can_be_shown(tmp_path, capsys):
    put(tmp_path / "a.png")
    bad = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    with open(bad, "wb") as file:
        file.write((tmp_path / "a.png").read_bytes()[:40])
    data = ImageFolder(str(tmp_path))

    assert len(data) == 2
    with pytest.raises(UnreadableImage) as error:
        data[1]
    json.dumps(error.value.name)


def test_our_own_contact_sheet_is_left_out_and_a_grid_of_ones_own_is_not(tmp_path):
    put(tmp_path / "own" / "grid.png")
    put(tmp_path / "ours" / "grid.png")
    put(tmp_path / "ours" / "000000.png")
    (tmp_path / "ours" / "samples.json").write_text("{}")

    assert ImageFolder(str(tmp_path)).files == ["ours/000000.png", "own/grid.png"]
    assert left_out(tmp_path) == {"ours/grid.png": "the contact sheet of difftrain sample"}


def test_a_folder_without_pictures_says_what_is_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")

    with pytest.raises(
        InputError, match=r"no image below .*Left out: 1 \(ending .heic is not read"
    ):
        ImageFolder(str(tmp_path))


# What metadata.jsonl and tables may name


def listed(folder, name):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "label": 0}))
    return ImageFolder(str(folder), labels="metadata")


@pytest.mark.parametrize("name", ["../x.png", "sub/../../x.png", "/{folder}/../x.png"])
def test_files_outside_the_folder_are_refused_unless_allowed(three, name):
    put(three.parent / "x.png")
    name = name.replace("/{folder}", str(three))

    with pytest.raises(InputError, match=r"metadata.jsonl:1: file_name .* allow_outside: true"):
        listed(three, name)
    allowed = ImageFolder(str(three), labels="metadata", allow_outside=True)
    assert allowed[0].image.size == (4, 4)


def test_deeply_nested_json_is_refused(three):
    (three / "metadata.jsonl").write_text("[" * 100_000)

    with pytest.raises(InputError, match=r"metadata.jsonl:1: not JSON"):
        ImageFolder(str(three), labels="metadata")


def test_the_class_of_a_listed_file_is_its_first_folder(tmp_path):
    put(tmp_path / "cats" / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./cats/a.png", "text": "a cat"}')

    data = ImageFolder(str(tmp_path), labels="folders", captions="metadata")

    assert data.class_names == ["cats"]


def test_a_path_that_comes_back_into_the_folder_is_below_it(three):
    assert len(listed(three, "sub/../a.png")) == 1


@pytest.mark.parametrize("name", ["http://x.org/a.png", "https://x.org/a.png", "s3://b/a.png"])
def test_addresses_are_refused_by_name_and_nothing_is_fetched(three, name):
    with pytest.raises(InputError, match=f"{name}.* is an address, and only local files are read"):
        listed(three, name)
    for value in ({"bytes": None, "path": name}, {"path": name}):
        with pytest.raises(InputError, match=f"row 3 names '{name}', and only local files"):
            encoded(value, "row 3")


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")

    with pytest.raises(InputError, match=r"file_name 'x.png' is a named pipe, not a regular file"):
        listed(tmp_path, "x.png")
    with pytest.raises(UnreadableImage, match="it is a named pipe, not a regular file"):
        open_image(tmp_path / "x.png", "x")
    with pytest.raises(UnreadableImage, match="it is a named pipe, not a regular file"):
        encoded({"path": str(tmp_path / "x.png")}, "row 3")


@pytest.mark.parametrize("name", ["x\0.png", "y" * 5000, ""])
def test_names_that_no_file_can_have_are_input_errors(three, name):
    with pytest.raises(InputError, match=r"metadata.jsonl:1: file_name .*not a (regular )?file"):
        listed(three, name)


def table(tmp_path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = pa.Table.from_pylist([{"image": row["image"]} for row in rows])
    labels = [row["label"] for row in rows]
    found = found.append_column("label", pa.array(labels, pa.uint64() if max(labels) > 9 else None))
    pq.write_table(found, tmp_path / "t.parquet")
    return huggingface("parquet", data_files=str(tmp_path / "t.parquet"), label_column="label")


def row(path=None, content=b"png", label=0):
    return {"image": {"bytes": content, "path": path}, "label": label}


def test_a_table_of_addresses_is_refused_when_it_is_opened(tmp_path):
    rows = [row(), row("a.png"), row("http://x.org/a.png"), row("http://x.org/b.png", None)]

    with pytest.raises(InputError, match=r"row 3 names 'http://x.org/b.png', and only local files"):
        table(tmp_path, rows)
    assert len(table(tmp_path, rows[:3])) == 3
    assert len(table(tmp_path, rows[:1])) == 1  # where no row has a path, the column has no type


@pytest.mark.parametrize("label", [-1, 2**31, 2**64 - 1])
def test_a_table_with_a_label_that_is_no_class_id_is_refused_when_it_is_opened(tmp_path, label):
    with pytest.raises(InputError, match=f"row 1: label {label} is no class id"):
        table(tmp_path, [row(), row(label=label)])


def test_a_table_in_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "t.parquet")

    with pytest.raises(InputError, match=r"t.parquet is a named pipe, not a regular file"):
        huggingface("parquet", data_files=str(tmp_path / "t.parquet"))
