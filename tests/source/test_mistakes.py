"""Every mistake in a data source is answered with what to mend."""

import os

import datasets
import pytest

from asymflow_ft.data.source import UnreadableImage, open_source, open_sources
from asymflow_ft.recipe import Data, Part
from tests.source.conftest import CAPTIONS, COLORS, check_rows, fill, png, shards, table, write_tar


def test_unreadable_rows_are_told_apart(tmp_path):
    fill(tmp_path / "folder")
    source = open_source(str(tmp_path / "folder"))
    (tmp_path / "folder/a/2.png").write_bytes(png(COLORS[2])[:40])
    (tmp_path / "folder/a/4.png").unlink()
    assert source.image(0).size == (4, 4)
    with pytest.raises(UnreadableImage, match=r"a/2\.png: "):
        source.image(1)
    for read in (source.content, source.stamp, source.image):
        with pytest.raises(UnreadableImage, match=r"a/4\.png: No such file"):
            read(2)
    columns = {"image": [str(tmp_path / "folder/a/0.png"), None, "/nowhere.png"], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    assert source.image(0).size == (4, 4)
    with pytest.raises(UnreadableImage, match="saved, row 1: the row holds no image"):
        source.image(1)
    with pytest.raises(UnreadableImage, match=r"/nowhere\.png: No such file"):
        source.image(2)
    tar = shards(tmp_path / "set") / "00000.tar"
    source = open_source(str(tar))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 4])
    with pytest.raises(UnreadableImage, match=r"2\.png: the tar file was cut short"):
        source.content(2)


def test_missing_captions(tmp_path):
    fill(tmp_path, 3)
    (tmp_path / "a/2.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images .* have no \.txt caption, such as 2\.png"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"no column 'title'; it has text \(the \.txt files\)"):
        open_sources(Data(source=str(tmp_path), caption_column="title", limit=1))
    members = [("0.png", png(COLORS[0])), ("0.txt", "a"), ("1.png", png(COLORS[1]))]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=r"1 of 2 images in .*x\.tar have no \.txt or \.json caption, such as 1\.png"):
        open_source(str(tmp_path / "x.tar"))
    with pytest.raises(ValueError, match=r"2 of 2 images .* no \.json caption, .* \(data.caption_column is 'title'\)"):
        open_source(str(tmp_path / "x.tar"), caption_column="title")


def test_metadata_mistakes(tmp_path):
    fill(tmp_path, 2, text=False)
    good = '{"file_name": "a/0.png", "text": "x"}\n'
    for text, message in {
        good + '{"file_name": "b/1.png"': "metadata.jsonl, line 2 is not JSON",
        good + "[1]": "line 2 is not a JSON object",
        good + '{"file_name": "b/1.png"}': "row 2 has no column 'text'; it has file_name",
        good + '{"file": "b/1.png", "text": "x"}': "row 2: no file_name; it has file, text",
        '{"file_name": "a/0.png", "text": 5}': "row 1 is 5, not text",
        '{"file_name": "a/0.png", "text": ["x", {}]}': "row 1 is {}, not text",
        '{"file_name": "0.png", "text": "x"}': r"none of the 1 images .* exists, first: .*/0\.png; file_name must",
        "\n": "the table is empty",
        '{"file_name": "a/0.png", "text": "\\ud800"}': "row 1 is .*, which UTF-8 cannot hold",
    }.items():
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text(good + '{"file_name": "b/9.png", "text": "x"}')
    with pytest.warns(UserWarning, match=r"1 of 2 images that .* names do not exist, first: .*/b/9\.png"):
        source = open_source(str(tmp_path))
    with pytest.raises(UnreadableImage, match=r"9\.png"):
        source.image(1)
    (tmp_path / "metadata.csv").write_text("file_name,text\na/0.png,x\n")
    with pytest.raises(ValueError, match=r"several metadata files; name one .*metadata\.jsonl, .*metadata\.csv"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path / "metadata.csv"))) == 1


def test_text_that_is_not_utf8(tmp_path):
    fill(tmp_path, 2)
    latin = "café".encode("latin-1")
    (tmp_path / "a/0.txt").write_bytes(latin)
    with pytest.raises(ValueError, match=r"a/0\.txt is not UTF-8 text \(.* at byte 3\)"):
        open_source(str(tmp_path))
    (tmp_path / "a/0.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert open_source(str(tmp_path)).captions(0) == ("marked",)
    for name in ("list.jsonl", "list.csv"):
        (tmp_path / name).write_bytes(b"file_name,text\na/0.png," + latin)
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8"):
            open_source(str(tmp_path / name))
    write_tar(tmp_path / "x.tar", [("0.png", png(COLORS[0])), ("0.txt", latin)])
    with pytest.raises(ValueError, match=r"x\.tar: 0\.txt is not UTF-8"):
        open_source(str(tmp_path / "x.tar"))


def test_file_names_that_are_not_utf8(tmp_path):
    write_tar(tmp_path / "x.tar", [("\udce9.png", png(COLORS[3])), ("\udce9.txt", CAPTIONS[3])])
    check_rows(open_source(str(tmp_path / "x.tar")), [3])
    (tmp_path / "images").mkdir()
    try:
        (tmp_path / "images/\udce9.png").write_bytes(png(COLORS[0]))
    except OSError:  # macOS refuses such names
        return
    with pytest.raises(ValueError, match=r"images/\\udce9\.png' is not UTF-8; rename the file"):
        open_source(str(tmp_path / "images"), caption_column=None)


def test_broken_tar_files(tmp_path):
    picture, caption = ("0.png", png(COLORS[0])), ("0.txt", "a")
    for name, members, message in (
        ("two.tar", [picture, caption, ("0.jpg", picture[1])], "two images of one name, 0.png and 0.jpg"),
        ("same.tar", [picture, caption, picture], "two images of one name, 0.png and 0.png"),
        ("none.tar", [caption], "holds no images"),
        ("half.tar", [picture, ("0.json", '{"text": "\\ud800"}')], r"half\.tar: 0\.json is .*, which UTF-8"),
        ("json.tar", [picture, ("0.json", "{")], r"json\.tar: 0\.json is not JSON"),
    ):
        write_tar(tmp_path / name, members)
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path / name))
    whole = (tmp_path / "two.tar").read_bytes()
    for name, content in (("cut.tar", whole[:600]), ("noise.tar", b"x" * 2000), ("empty.tar", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read .*{name}"):
            open_source(str(tmp_path / name))


def test_wrong_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.parquet").write_text("x")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{")
    for given, message in {
        "empty": r"holds no images \(\.avif",
        "./nothing": r"there is no file or folder \./nothing",
        "a/b/c": "there is no file or folder a/b/c",
        "shards/{000..010}.tar": r"patterns such as shards/\*\.tar are possible",
        "shards/*.tar": r"no file matches shards/\*\.tar",
        "note.pdf": "note.pdf is none of: a folder",
        "no/such": "cannot open no/such, which is no folder here, as a Hub dataset: ",
        "bad": "cannot open bad: ",
        "bad/x.parquet": "cannot open bad/x.parquet: ",
        "saved": "cannot open saved: ",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(given)
    if os.getuid():  # root can read everything
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(ValueError, match="cannot read the folder"):
            open_source("closed")


def test_unclear_folders_and_keys_without_meaning(tmp_path):
    fill(tmp_path)
    with pytest.raises(ValueError, match=r"data.split is 'test', but .* is read as files"):
        open_source(str(tmp_path), split="test")
    with pytest.raises(ValueError, match=r"data.image_column is 'jpg', but .* is read as files"):
        open_source(str(tmp_path), image_column="jpg")
    table().to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"holds \.parquet, \.png files, .* such as .*/\*\.parquet"):
        open_source(str(tmp_path))
    check_rows(open_source(str(tmp_path / "*.parquet")))
    shards(tmp_path)
    with pytest.raises(ValueError, match=r"is none of"):
        open_source(str(tmp_path / "*[0t]*"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(), "lacks data.source"),
        (
            Data(source="a", mix=(Part("b"),)),
            r"data.source is 'a' and data.mix is given too; remove one \(data.mix=\[\]\)",
        ),
        (Data(mix=(Part("b"),), limit=3), "data.limit is 3; with data.mix it belongs into each entry"),
        (Data(mix=(Part("b", weight=0),)), "the weight of b is 0; it must be positive"),
        (Data(mix=(Part("b", weight=float("nan")),)), "the weight of b is nan"),
        (Data(source="a", limit=0), "data.limit of a is 0"),
        (Data(source="a", streaming=True), "data.streaming of a needs data.limit"),
    ],
)
def test_recipes_that_cannot_be(data, message):
    with pytest.raises(ValueError, match=message):
        open_sources(data)
