"""Every kind of data source gives the same rows."""

import csv
import json
import os
import tarfile
import time

import datasets
import pytest

from asymflow_ft.data.source import open_source, open_sources
from asymflow_ft.recipe import Data, Part
from tests.source.conftest import CAPTIONS, COLORS, check_rows, fill, png, shards, table, write_tar


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
