"""Where images and captions come from: files, tar shards, tables, Hub datasets, and mixes of them (docs/data.md)."""

import bisect
import glob
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from asymflow_ft.data.decode import UnreadableImage, decode
from asymflow_ft.data.files import (
    IMAGE_SUFFIXES,
    METADATA_FILES,
    open_images,
    open_metadata,
    open_tars,
    records_of,
    suffix_of,
    walk,
)
from asymflow_ft.data.rows import Rows
from asymflow_ft.data.tables import keep_stream, load, load_saved, open_table
from asymflow_ft.recipe import Data, Part

__all__ = ["Images", "UnreadableImage", "decode", "open_source", "open_sources"]


class Images:
    """All rows of all parts, one part after the other. The methods are those of `Rows`, and two more.

    Args:
        weights: of each part; how often one epoch goes over it.
    """

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float]):
        self.parts, self.weights = parts, weights
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def _part(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return bisect.bisect_right(self.ends, row)

    def _at(self, row: int) -> tuple[Rows, int]:
        part = self._part(row)
        return self.parts[part], row - self.ends[part] + len(self.parts[part])

    def captions(self, row: int) -> tuple[str, ...]:
        rows, inner = self._at(row)
        return rows.captions(inner)

    def conditions(self, row: int) -> int:
        rows, inner = self._at(row)
        return rows.conditions(inner)

    def name(self, row: int, image: int = 0) -> str:
        rows, inner = self._at(row)
        return rows.name(inner, image)

    def stamp(self, row: int, image: int = 0) -> str:
        rows, inner = self._at(row)
        return rows.stamp(inner, image)

    def content(self, row: int, image: int = 0) -> bytes:
        rows, inner = self._at(row)
        return rows.content(inner, image)

    def weight(self, row: int) -> float:
        return self.weights[self._part(row)]

    def image(self, row: int) -> Image.Image:
        """The decoded picture.

        Raises:
            UnreadableImage: the file is gone, cut short, or no image.
        """
        return decode(self.content(row), self.name(row))


def open_sources(data: Data, captions: bool = True, stream_folder: Path | None = None) -> Images:
    """Open a recipe's data.

    Args:
        captions: False opens images alone, without condition images too. stream_folder: where parts with `streaming`
            are kept.

    Raises:
        ValueError: a part cannot be opened, holds no images, or lacks captions that are text.
    """
    parts = data.parts()
    return Images([_open(part, captions, stream_folder) for part in parts], [part.weight for part in parts])


def open_source(
    source: str, split: str = "train", image_column: str = "image", caption_column: str | None = "text"
) -> Images:
    """Open one source; without captions if `caption_column` is None. Raises as `open_sources` does."""
    data = Data(source=source, split=split, image_column=image_column, caption_column=caption_column or "text")
    return open_sources(data, caption_column is not None)


def _open(part: Part, captions: bool, stream_folder: Path | None) -> Rows:
    if part.streaming:
        if stream_folder is None:
            raise ValueError(f"{part.source} is a stream, which only the commands with a recipe can keep on disk")
        kept = keep_stream(part, stream_folder)
        conditions = "conditions" if part.condition_column is not None and captions else None
        columns = replace(part, image_column="image", caption_column="text", condition_column=conditions)
        return open_table(kept, columns, captions)
    if not captions:
        part = replace(part, condition_column=None)
    path = Path(part.source).expanduser()
    if path.is_dir():
        return _open_folder(part, path, captions)
    if path.is_file():
        return _open_files(part, [str(path)], captions)
    if glob.has_magic(part.source):
        files = sorted(glob.glob(str(path), recursive=True))
        if not files:
            raise ValueError(f"no file matches {part.source}")
        return _open_files(part, files, captions)
    if part.source.startswith((".", "/", "~")) or part.source.count("/") > 1 or "{" in part.source:
        raise ValueError(f"there is no file or folder {part.source}; patterns such as shards/*.tar are possible")
    return open_table(load(part, part.source, split=part.split), part, captions)


def _open_folder(part: Part, folder: Path, captions: bool) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return open_table(load_saved(part, folder), part, captions)
    metadata = [str(folder / name) for name in METADATA_FILES if (folder / name).is_file()]
    if metadata:
        if len(metadata) > 1:
            raise ValueError(
                f"{folder} holds several metadata files; name one of them as source: {', '.join(metadata)}"
            )
        return _open_files(part, metadata, captions)
    files = walk(folder)
    suffixes = {suffix_of(path) for path in files}
    kinds = [suffix for suffix in (".tar", ".parquet", ".arrow") if suffix in suffixes]
    if len(kinds) > 1 or (kinds and suffixes & IMAGE_SUFFIXES):
        both = ", ".join(sorted(suffixes & {*kinds, *IMAGE_SUFFIXES}))
        raise ValueError(
            f"{folder} holds {both} files, and it is not clear which are meant; name them by a pattern, such as "
            f"{folder}/*{kinds[0]}, or move the others elsewhere"
        )
    if kinds == [".tar"]:
        return _open_files(part, [path for path in files if suffix_of(path) == ".tar"], captions)
    if kinds:
        return open_table(load(part, str(folder.resolve()), split=part.split), part, captions)
    _refuse(part, "split", "subset", "image_column", "condition_column")
    return open_images(folder, files, part.caption_column if captions else None, part.limit)


def _open_files(part: Part, files: list[str], captions: bool) -> Rows:
    _refuse(part, "split", "subset")
    caption_column = part.caption_column if captions else None
    kinds, first = {suffix_of(path) for path in files}, Path(files[0])
    if kinds == {".tar"}:
        _refuse(part, "image_column", "condition_column")
        return open_tars(files, caption_column, part.limit)
    if kinds in ({".parquet"}, {".arrow"}):
        table = load(part, first.suffix[1:].lower(), data_files=files, split="train")
        if part.image_column in table.column_names or "file_name" not in table.column_names or len(files) > 1:
            return open_table(table, part, captions)
        records = iter(table)
    elif kinds <= {".jsonl", ".csv"} and len(files) == 1:
        records = records_of(first)
    else:
        raise ValueError(
            f"{part.source} is none of: a folder, a Hub dataset, one .jsonl or .csv file, .tar, .parquet, .arrow files"
        )
    _refuse(part, "image_column")
    return open_metadata(first, records, caption_column, part.limit, part.condition_column)


def _refuse(part: Part, *keys: str) -> None:
    """Files have no splits, no subsets and no image column, so a recipe that names one means something else; only a
    table can say which condition images belong to an image."""
    given, default = vars(part), vars(Part(part.source))
    for key in keys:
        if given[key] != default[key]:
            raise ValueError(
                f"data.{key} is {given[key]!r}, but {part.source} is read as files, which have none; remove it"
            )
