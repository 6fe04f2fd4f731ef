"""Every kind of data source gives the same rows; every mistake in one is answered with what to mend."""

import csv
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time

import datasets
import pytest
from PIL import Image

from asymflow_ft.data import tables
from asymflow_ft.data.source import UnreadableImage, open_source, open_sources
from asymflow_ft.recipe import Data, Part
from tests.conftest import REPOSITORY

COLORS = [(10 * i, 255 - 10 * i, 7) for i in range(6)]
CAPTIONS = [f"caption {i}" for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, "PNG")
    return file.getvalue()


def fill(folder, count=6, text=True):
    """a/0.png, b/1.png, a/2.png, ... as files; sorted they are not in the order of their numbers."""
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count)]
    for name, color, caption in zip(names, COLORS, CAPTIONS, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(color))
        if text:
            (folder / name).with_suffix(".txt").write_text(f"{caption}\n")
    return names


def table(rows=range(6), text=None, paths=False):
    images = [{"bytes": png(COLORS[i]), "path": f"{i}.png" if paths else None} for i in rows]
    columns = {"image": images, "text": text or [CAPTIONS[i] for i in rows], "label": list(rows)}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def shards(folder):
    """Two shards of three images with .txt captions."""
    folder.mkdir(exist_ok=True)
    for s in (0, 1):
        rows = range(3 * s, 3 * s + 3)
        write_tar(
            folder / f"{s:05d}.tar",
            [m for i in rows for m in ((f"{i}.txt", f"caption {i}\n"), (f"{i}.png", png(COLORS[i])))],
        )
    return folder


def check_rows(source, rows=range(6)):
    """The rows are the numbered images with their captions, read in any order and by another process."""
    rows = list(rows)
    assert len(source) == len(rows)
    source = pickle.loads(pickle.dumps(source))
    for at in (*reversed(range(len(rows))), 0):
        assert source.content(at) == png(COLORS[rows[at]])
        assert source.image(at).getpixel((0, 0)) == COLORS[rows[at]]
        assert source.captions(at) == (CAPTIONS[rows[at]],)
    assert (
        len({source.stamp(at) for at in range(len(rows))})
        == len({source.name(at) for at in range(len(rows))})
        == len(rows)
    )
    with pytest.raises(IndexError):
        source.content(len(rows))


# Kinds


def test_folder_with_text_files(tmp_path):
    fill(tmp_path)
    for hidden in (".x.png", "._0.png", ".ipynb_checkpoints/x.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"")
    check_rows(open_source(str(tmp_path)), [0, 2, 4, 1, 3, 5])
    check_rows(open_sources(Data(source=str(tmp_path), limit=4)), [0, 2, 4, 1])
    alone = open_source(str(tmp_path), caption_column=None)
    assert len(alone) == 6 and alone.captions(2) == ()
    assert alone.name(2) == str(tmp_path / "a/4.png")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_metadata(kind, given, tmp_path):
    rows = [
        {"file_name": n, "text": c, "title": "T"} for n, c in zip(fill(tmp_path, text=False), CAPTIONS, strict=True)
    ]
    file = tmp_path / ("metadata" if given == "folder" else "list")
    file = file.with_suffix(f".{kind}")
    if kind == "jsonl":
        file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "csv":
        with open(file, "w", newline="", encoding="utf-8-sig") as opened:  # as Excel writes it
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    source = str(tmp_path if given == "folder" else file)
    check_rows(open_source(source))
    check_rows(open_sources(Data(source=source, limit=2)), [0, 1])
    assert open_source(source, caption_column="title").captions(1) == ("T",)
    with pytest.raises(
        ValueError, match=r"no column 'x'; it has file_name, text, title \(recipe key data.caption_column"
    ):
        open_source(source, caption_column="x")
    assert open_source(source, caption_column=None).captions(0) == ()


def test_captions_that_look_like_other_types_stay_text(tmp_path):
    fill(tmp_path, 3, text=False)
    (tmp_path / "metadata.csv").write_text('file_name,text\na/0.png,1999\nb/1.png,NA\na/2.png,"two\nlines, a comma"\n')
    source = open_source(str(tmp_path))
    assert [source.captions(i) for i in range(3)] == [("1999",), ("NA",), ("two\nlines, a comma",)]
    separated = {"file_name": "a/0.png", "text": "2020-01-01\u2028two"}
    (tmp_path / "list.jsonl").write_text(json.dumps(separated, ensure_ascii=False), encoding="utf-8")
    assert open_source(str(tmp_path / "list.jsonl")).captions(0) == ("2020-01-01\u2028two",)


@pytest.mark.parametrize(
    "kind", ["parquet folder", "parquet file", "parquet pattern", "arrow", "saved", "saved shards", "saved splits"]
)
def test_tables(kind, tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    given = str(folder)
    if kind.startswith("parquet"):
        for s in (0, 1):
            table(range(3 * s, 3 * s + 3)).to_parquet(folder / f"data/train-{s:05d}-of-00002.parquet")
        table([0]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    if kind == "parquet file":
        given = str(folder / "data/train-00001-of-00002.parquet")
        check_rows(open_source(given), [3, 4, 5])
        return
    if kind == "parquet pattern":
        given = str(folder / "data/train-*.parquet")
    elif kind == "arrow":
        table().save_to_disk(tmp_path / "saved")
        (tmp_path / "saved/data-00000-of-00001.arrow").rename(folder / "x.arrow")
    elif kind == "saved":
        table([5, 4, 3, 2, 1, 0]).select(range(5, -1, -1)).save_to_disk(folder)
    elif kind == "saved shards":
        table().save_to_disk(folder, num_shards=3)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": table(), "test": table([0])}).save_to_disk(folder)
    check_rows(open_source(given))
    check_rows(open_sources(Data(source=given, limit=2)), [0, 1])
    if kind in ("parquet folder", "saved splits"):
        check_rows(open_source(given, split="test"), [0])
        with pytest.raises(ValueError, match=r"split .*val.*train"):
            open_source(given, split="val")


def test_dataset_id_with_other_columns(tmp_path, monkeypatch):
    other = table(paths=True).rename_columns({"image": "jpg", "text": "alt"})
    captions = [{"caption": CAPTIONS[i], "n": i} for i in range(6)]
    (tmp_path / "user/set").mkdir(parents=True)
    other.add_column("json", captions).to_parquet(tmp_path / "user/set/train.parquet")
    monkeypatch.chdir(tmp_path)
    source = open_source("user/set", image_column="jpg", caption_column="alt")
    check_rows(source)
    assert source.name(2) == "user/set, row 2 (2.png)"
    check_rows(open_source("user/set", image_column="jpg", caption_column="json.caption"))
    for options, message in {
        (("image_column", "jpg"),): "no column 'text'; it has jpg, alt, label, json .*data.caption_column",
        (("caption_column", "alt"),): "no column 'image'; it has jpg, alt, label, json .*data.image_column",
        (("image_column", "jpg"), ("caption_column", "json.x")): "no column 'json.x'",
        (
            ("image_column", "jpg"),
            ("caption_column", "label"),
        ): r"'label' of user/set holds Value\('int64'\), not text",
        (("image_column", "jpg"), ("caption_column", "json")): "'json' of user/set holds .*, not text",
        (
            ("image_column", "label"),
            ("caption_column", "alt"),
        ): r"'label' of user/set holds Value\('int64'\), not images",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source("user/set", **dict(options))


def test_tables_of_bytes_and_of_paths(tmp_path):
    names = fill(tmp_path / "images", text=False)
    paths = [str(tmp_path / "images" / name) for name in names]
    for kind, values in (("paths", paths), ("bytes", [png(color) for color in COLORS])):
        datasets.Dataset.from_dict({"image": values, "text": CAPTIONS}).save_to_disk(tmp_path / kind)
        source = open_source(str(tmp_path / kind))
        check_rows(source)
    source = open_source(str(tmp_path / "paths"))
    before = source.stamp(3), source.stamp(4)
    os.utime(paths[3], (1, 1))
    assert source.stamp(3) != before[0] and source.stamp(4) == before[1]


@pytest.mark.parametrize("given", ["", "/*.tar", "/0000[01].tar"])
def test_tar_shards(given, tmp_path):
    check_rows(open_source(f"{shards(tmp_path / 'set')}{given}"))
    check_rows(open_source(str(tmp_path / "set/00001.tar")), [3, 4, 5])
    check_rows(open_sources(Data(source=str(tmp_path / "set"), limit=4)), range(4))
    assert open_source(str(tmp_path / "set"), caption_column=None).captions(0) == ()
    assert open_source(str(tmp_path / "set")).name(4) == f"{tmp_path / 'set/00001.tar'}: 4.png"


def test_tar_captions_in_json(tmp_path):
    file = tmp_path / "x.tar"
    members = [("d/0.PNG", png(COLORS[0])), ("d/0.json", '{"caption": ["long", "short"], "text": "json", "n": 5}')]
    write_tar(file, members)
    assert open_source(str(file), caption_column="caption").captions(0) == ("long", "short")
    assert open_source(str(file)).captions(0) == ("json",)
    write_tar(file, [*members, ("d/0.txt", "txt")])
    assert open_source(str(file)).captions(0) == ("txt",)
    assert open_source(str(file), caption_column="caption").captions(0) == ("long", "short")
    with pytest.raises(ValueError, match="no column 'x'; it has caption, text, n"):
        open_source(str(file), caption_column="x")
    with pytest.raises(ValueError, match=r"x\.tar: d/0\.json is 5, not text"):
        open_source(str(file), caption_column="n")


def test_an_index_of_a_tar_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    file = shards(tmp_path) / "00000.tar"
    before = open_source(str(file)).stamp(1)
    opened = []
    monkeypatch.setattr(tarfile, "open", lambda *a, original=tarfile.open, **k: opened.append(a) or original(*a, **k))
    assert open_source(str(file)).stamp(1) == before and not opened
    write_tar(file, [("5.txt", CAPTIONS[5]), ("5.png", png(COLORS[5]))])
    opened.clear()
    check_rows(open_source(str(file)), [5])
    assert opened


def test_mix_and_weights(tmp_path):
    fill(tmp_path / "folder", 2)
    table([2, 3, 4]).to_parquet(tmp_path / "x.parquet")
    shards(tmp_path / "shards")
    data = Data(
        mix=(
            Part(str(tmp_path / "folder")),
            Part(str(tmp_path / "x.parquet"), weight=0.5),
            Part(str(tmp_path / "shards/00001.tar"), weight=2, limit=1),
        )
    )
    source = open_sources(data)
    check_rows(source, [0, 1, 2, 3, 4, 3])
    assert [source.weight(row) for row in range(6)] == [1, 1, 0.5, 0.5, 0.5, 2]
    for row in (-1, 6):
        with pytest.raises(IndexError):
            source.weight(row)


def test_several_captions_and_none(tmp_path):
    table(range(3), text=[["a", "b"], ["", None], []]).save_to_disk(tmp_path / "lists")
    source = open_source(str(tmp_path / "lists"))
    assert [source.captions(i) for i in range(3)] == [("a", "b"), ("", ""), ("",)]
    table(range(2), text=["a", None]).save_to_disk(tmp_path / "nulls")
    assert open_source(str(tmp_path / "nulls")).captions(1) == ("",)
    names = fill(tmp_path / "files", 2, text=False)
    rows = [{"file_name": names[0], "text": ["a", "b"]}, {"file_name": names[1], "text": None}]
    (tmp_path / "files/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "files"))
    assert [source.captions(i) for i in range(2)] == [("a", "b"), ("",)]


# Stamps


def test_stamps_change_with_the_content_alone(tmp_path):
    names = fill(tmp_path / "folder")
    table().to_parquet(tmp_path / "x.parquet")
    table().save_to_disk(tmp_path / "saved")
    for given in ("folder", "x.parquet", "saved"):
        first, again = (open_source(str(tmp_path / given)) for _ in range(2))
        assert [first.stamp(i) for i in range(6)] == [again.stamp(i) for i in range(6)]
        some = open_sources(Data(source=str(tmp_path / given), limit=3))
        assert [some.stamp(i) for i in range(3)] == [first.stamp(i) for i in range(3)]
    source = open_source(str(tmp_path / "x.parquet"))
    table(text=["x"] * 6).to_parquet(tmp_path / "x.parquet")
    assert open_source(str(tmp_path / "x.parquet")).stamp(0) != source.stamp(0)
    source = open_source(str(tmp_path / "folder"))
    before = [source.stamp(i) for i in range(6)]
    (tmp_path / "folder" / names[2]).write_bytes(png((1, 2, 3)) + b" ")
    assert [source.stamp(i) == before[i] for i in range(6)] == [True, False, True, True, True, True]


# Mistakes


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
    picture = png(COLORS[0])
    for name, members, message in (
        (
            "two.tar",
            [("0.png", picture), ("0.txt", "a"), ("0.jpg", picture)],
            "two images of one name, 0.png and 0.jpg",
        ),
        (
            "same.tar",
            [("0.png", picture), ("0.txt", "a"), ("0.png", picture)],
            "two images of one name, 0.png and 0.png",
        ),
        ("none.tar", [("0.txt", "a")], "holds no images"),
        (
            "half.tar",
            [("0.png", picture), ("0.json", '{"text": "\\ud800"}')],
            r"half\.tar: 0\.json is .*, which UTF-8",
        ),
        ("json.tar", [("0.png", picture), ("0.json", "{")], r"json\.tar: 0\.json is not JSON"),
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


# Streams


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A local folder that stands for a Hub dataset of two files; each shard of the kept stream holds two images."""
    monkeypatch.setattr(tables, "SHARD_BYTES", 2 * len(png(COLORS[0])) - 20)
    for s in (0, 1):
        (tmp_path / "remote").mkdir(exist_ok=True)
        table(range(3 * s, 3 * s + 3)).to_parquet(tmp_path / f"remote/train-{s}.parquet")
    return str(tmp_path / "remote")


def streamed(remote, tmp_path, limit, **options):
    data = Data(source=remote, streaming=True, limit=limit, **options)
    return open_sources(data, stream_folder=tmp_path / "kept")


def test_streams_are_read_once(remote, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        tables, "_encoded", lambda stored, original=tables._encoded: read.append(1) or original(stored)
    )
    check_rows(streamed(remote, tmp_path, 3), range(3))
    assert len(read) == 3
    check_rows(streamed(remote, tmp_path, 5), range(5))
    assert len(read) == 5
    check_rows(streamed(remote, tmp_path, 9))
    assert len(read) == 6
    monkeypatch.setattr(datasets, "load_dataset", None)
    check_rows(streamed(remote, tmp_path, 9))
    assert streamed(remote, tmp_path, 9).stamp(5) == streamed(remote, tmp_path, 9).stamp(5)
    check_rows(streamed(remote, tmp_path, 2), range(2))
    assert len(open_sources(Data(source=remote, streaming=True, limit=4), False, tmp_path / "kept")) == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("instant", range(6))
def test_killed_streams_go_on(instant, remote, tmp_path, monkeypatch):
    """Killed at image number `instant`, and again before and after that shard is written."""

    def at_image(stored, original=tables._encoded, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == instant + 1:
            raise Killed
        return original(stored)

    def before_shard(rows, folder, progress, state, original=tables._keep):
        raise Killed

    def after_shard(self, target, original=os.replace):
        raise Killed

    for name, place, value in (
        ("_encoded", tables, at_image), ("_keep", tables, before_shard), ("replace", tables.Path, after_shard)
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, value)
            streamed(remote, tmp_path, 6)
    check_rows(streamed(remote, tmp_path, 6))


def test_a_stream_survives_sigkill(remote, tmp_path):
    """A process that is killed inside the third shard leaves two, and the next one reads the other two images only."""
    program = f"""
import os, signal
from asymflow_ft.data import tables
from asymflow_ft.data.source import open_sources
from asymflow_ft.recipe import Data
from pathlib import Path
tables.SHARD_BYTES = {tables.SHARD_BYTES}
def keep(rows, folder, progress, state, original=tables._keep):
    if progress["shards"] == 2:
        (folder / "00002").mkdir()
        (folder / "00002/state.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(rows, folder, progress, state)
tables._keep = keep
open_sources(Data(source={remote!r}, streaming=True, limit=6), stream_folder=Path({str(tmp_path / "kept")!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -9, done.stderr
    (folder,) = (tmp_path / "kept").iterdir()
    assert json.loads((folder / "progress.json").read_text())["rows"] == 4
    check_rows(streamed(remote, tmp_path, 6))


def test_stream_mistakes(remote, tmp_path, monkeypatch):
    for options, message in (
        ({"caption_column": "alt"}, "no column 'alt'; it has image, text, label"),
        ({"caption_column": "label"}, "'label' of .* holds Value"),
        ({"image_column": "label"}, "not images"),
        ({"split": "val"}, "cannot open .*val"),
    ):
        with pytest.raises(ValueError, match=message):
            streamed(remote, tmp_path, 3, **options)
    with pytest.raises(ValueError, match="is a stream, which only"):
        open_sources(Data(source=remote, streaming=True, limit=3))

    def fail(stored, original=tables._encoded, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise ConnectionError("the line is dead")
        return original(stored)

    monkeypatch.setattr(tables, "_encoded", fail)
    with pytest.raises(ValueError, match="broke off, 2 of 6 images are kept: the line is dead"):
        streamed(remote, tmp_path, 6)
    check_rows(streamed(remote, tmp_path, 6))


# Recipes


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


# Size


def test_large_sources_are_opened_in_seconds_and_read_in_constant_time(tmp_path):
    def captions_per_second(source, rows):
        started = time.perf_counter()
        for row in rows:
            source.captions(row)
        return len(rows) / (time.perf_counter() - started)

    count = 100_000
    columns = {"image": [b"x" * 1000] * count, "text": [f"caption {i}" for i in range(count)]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "large")
    source = open_source(str(tmp_path / "large"))
    assert source.captions(count - 1) == (f"caption {count - 1}",)
    assert captions_per_second(source, range(0, count, 200)) > 2000  # a whole column takes about 0.1 s

    many = tmp_path / "many"
    many.mkdir()
    for i in range(5000):
        (many / f"{i}.png").write_bytes(b"")
        (many / f"{i}.txt").write_text(f"caption {i}")
    started = time.perf_counter()
    source = open_source(str(many))
    assert len(source) == 5000 and time.perf_counter() - started < 5
    assert captions_per_second(source, range(0, 5000, 10)) > 2000
