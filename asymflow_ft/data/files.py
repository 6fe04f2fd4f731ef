"""Sources made of files: images with .txt captions, metadata tables that name images, and WebDataset shards."""

import csv
import io
import itertools
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from asymflow_ft.data.rows import CONDITION_COLUMNS, FILE_COLUMNS, Files, caption_list
from asymflow_ft.textfiles import json_lines, json_object, text_of, utf8

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
INDEX_VERSION = 1  # part of the key under which `datasets` caches a tar index; raise it when the index changes


def walk(folder: Path) -> list[str]:
    """All files below the folder, sorted. Hidden ones are left out: macOS and notebooks leave pictures there.

    Raises:
        ValueError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def open_images(folder: Path, files: Sequence[str], caption_column: str | None, limit: int | None) -> Files:
    """The image files among `files`; each has its caption in a .txt of the same name.

    Raises:
        ValueError: no images, an image without caption, or a caption that is not UTF-8.
    """
    paths = [path for path in files if suffix_of(path) in IMAGE_SUFFIXES][:limit]
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if caption_column is None:
        return _files(paths, None)
    beside = [f"{os.path.splitext(path)[0]}.txt" for path in paths]
    known = set(files)
    bare = [os.path.basename(path) for path, text in zip(paths, beside, strict=True) if text not in known]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(paths)} images in {folder} have no .txt caption, such as {bare[0]}, "
            "and there is no metadata.jsonl, .csv or .parquet"
        )
    if caption_column != "text":
        raise ValueError(missing_column(str(folder), "caption_column", caption_column, ["text (the .txt files)"]))
    return _files(paths, [[text_of(Path(path)).strip()] for path in beside])


def open_metadata(
    file: Path, records: Iterable[dict[str, Any]], caption_column: str | None, limit: int | None,
    condition_column: str | None = None,
) -> Files:  # fmt: skip
    """Images named in the column file_name of a table (its rows are `records`), relative to the folder of `file`; and
    condition images, one or a list of them, in `condition_column`.

    Raises:
        ValueError: the table cannot be read, lacks a column, names no image that exists, or a caption is not text.
    """
    paths, captions, conditions = [], [], []
    for number, record in enumerate(itertools.islice(records, limit), 1):
        where = f"{file}, row {number}"
        if not isinstance(record.get("file_name"), str) or not record["file_name"]:
            raise ValueError(f"{where}: no file_name; it has {', '.join(map(str, record))}")
        paths.append(os.path.join(file.parent, record["file_name"]))
        if caption_column is not None:
            if caption_column not in record:
                raise ValueError(missing_column(where, "caption_column", caption_column, record))
            captions.append(caption_list(record[caption_column], where))
        if condition_column is not None:
            if condition_column not in record:
                raise ValueError(missing_column(where, "condition_column", condition_column, record))
            conditions.append(
                [os.path.join(file.parent, name) for name in _file_names(record[condition_column], where)]
            )
    if not paths:
        raise ValueError(f"{file} holds no images: the table is empty")
    gone = [path for path in paths if not os.path.isfile(path)]
    if len(gone) == len(paths):
        raise ValueError(
            f"none of the {len(paths)} images that {file} names exists, first: {gone[0]}; "
            f"file_name must be relative to {file.parent}"
        )
    if gone:
        warnings.warn(f"{len(gone)} of {len(paths)} images that {file} names do not exist, first: {gone[0]}",
                      stacklevel=2)  # fmt: skip
    return _files(paths, captions or None, conditions or None)


def open_tars(shards: Sequence[str], caption_column: str | None, limit: int | None) -> Files:
    """WebDataset shards, read in place: an index of the images is made once and kept by `datasets` in its cache.

    An image and its caption share their name up to the last dot. With caption column "text" the caption is the .txt,
    or else the key "text" of the .json; with another caption column that key of the .json.

    Raises:
        ValueError: a shard cannot be read, two images of one shard share a name, or captions are missing.
    """
    try:
        stamped = [(path, state.st_size, state.st_mtime_ns) for path in shards for state in (os.stat(path),)]
        table = datasets.Dataset.from_generator(
            _index, FILE_COLUMNS,
            gen_kwargs={"shards": stamped, "caption_column": caption_column, "version": INDEX_VERSION},
        )  # fmt: skip
    except (OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(
            str(cause) if isinstance(cause, ValueError) else f"cannot read {shards[0]}: {cause}"
        ) from error
    return Files(table if limit is None else table.select(range(min(limit, len(table)))))


def records_of(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .csv or .jsonl file. Not read by `datasets`, which guesses types: "1999" and "NA" can be captions.

    Raises:
        ValueError: it cannot be read; names the file and the line.
    """
    if file.suffix.lower() == ".csv":
        try:
            yield from csv.DictReader(io.StringIO(text_of(file), newline=""))
        except csv.Error as error:
            raise ValueError(f"cannot read {file}: {error}") from error
    else:
        yield from (record for _, record in json_lines(file))


def missing_column(source: str, key: str, column: str, existing: Iterable[Any]) -> str:
    return f"{source} has no column {column!r}; it has {', '.join(map(str, existing))} (recipe key data.{key})"


def suffix_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _file_names(value: Any, where: str) -> list[str]:
    """File names of condition images, one or several; none where the value is missing or empty."""
    names = value if isinstance(value, list) else [value] if value else []
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise ValueError(f"{where}: {wrong[0]!r} is no name of an image file (recipe key data.condition_column)")
    return names


def _files(paths: list[str], captions: list[list[str]] | None, conditions: list[list[str]] | None = None) -> Files:
    whole = [None] * len(paths)
    columns = {"path": paths, "member": whole, "offset": whole, "size": whole, "captions": captions or whole}
    try:
        more = None if conditions is None else datasets.Dataset.from_dict({"paths": conditions}, CONDITION_COLUMNS)
        return Files(datasets.Dataset.from_dict(columns, FILE_COLUMNS), more)
    except UnicodeEncodeError as error:
        raise ValueError(f"the file name {error.object!r} is not UTF-8; rename the file") from error


def _index(shards: list[tuple[str, int, int]], caption_column: str | None, version: int) -> Iterator[dict[str, Any]]:
    count = 0
    for shard, _, _ in shards:
        try:
            rows = _index_shard(shard, caption_column)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"cannot read {shard}: {error} (compressed tar files cannot be read in place)") from error
        count += len(rows)
        yield from rows
    if not count:
        raise ValueError(f"{', '.join(shard for shard, _, _ in shards)} holds no images")


def _index_shard(shard: str, caption_column: str | None) -> list[dict[str, Any]]:
    images: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, bytes] = {}
    wanted = {None: (), "text": (".txt", ".json")}.get(caption_column, (".json",))
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            stem, suffix = os.path.splitext(member.name)
            if not member.isfile() or os.path.basename(stem).startswith("."):
                continue
            if suffix.lower() in IMAGE_SUFFIXES:
                if stem in images:
                    raise ValueError(
                        f"{shard} holds two images of one name, {images[stem].name} and {member.name}; a name up to "
                        "its last dot must be unique within a tar file"
                    )
                images[stem] = member
            elif suffix in wanted:
                texts[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    if caption_column is not None:
        bare = [member.name for stem, member in images.items() if not any(stem + suffix in texts for suffix in wanted)]
        if bare:
            raise ValueError(
                f"{len(bare)} of {len(images)} images in {shard} have no {' or '.join(wanted)} caption, such as "
                f"{bare[0]} (data.caption_column is {caption_column!r})"
            )
    return [
        {
            "path": shard, "member": _printable(member.name), "offset": member.offset_data, "size": member.size,
            "captions": None if caption_column is None else _tar_captions(shard, stem, texts, caption_column),
        }
        for stem, member in images.items()
    ]  # fmt: skip


def _printable(name: str) -> str:
    """A member's name is for messages alone; old tar files hold names of other encodings."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _tar_captions(shard: str, stem: str, texts: dict[str, bytes], caption_column: str) -> list[str]:
    if f"{stem}.txt" in texts:
        return [utf8(texts[f"{stem}.txt"], f"{shard}: {stem}.txt").strip()]
    where = f"{shard}: {stem}.json"
    record = json_object(utf8(texts[f"{stem}.json"], where), where)
    if caption_column not in record:
        raise ValueError(missing_column(where, "caption_column", caption_column, record))
    return caption_list(record[caption_column], where)
