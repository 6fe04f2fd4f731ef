"""Sources that are `datasets` tables: Hub datasets, parquet and arrow files, folders of save_to_disk, and streams."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from tqdm import tqdm

from asymflow_ft.data.files import missing_column
from asymflow_ft.data.rows import Table, caption_list, pick
from asymflow_ft.recipe import Part

SHARD_BYTES = 64 * 2**20  # of a stream; what a kill can lose
STREAM_COLUMNS = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "text": datasets.List(datasets.Value("string")),
        "conditions": datasets.List(datasets.Image(decode=False)),  # where the part has them
    }
)


def load(part: Part, path: str, **options: Any) -> datasets.Dataset | datasets.IterableDataset:
    """`datasets.load_dataset` with its many kinds of failure as one.

    Raises:
        ValueError: names the source.
    """
    try:
        return datasets.load_dataset(path, part.subset, **options)
    except Exception as error:  # the builders of `datasets` let through whatever their readers raise
        hub = "" if path != part.source or Path(path).exists() else ", which is no folder here, as a Hub dataset"
        raise ValueError(f"cannot open {part.source}{hub}: {error.__cause__ or error}") from error


def load_saved(part: Part, folder: Path) -> datasets.Dataset:
    """A folder of `save_to_disk`, of one table or of several splits.

    Raises:
        ValueError: it is damaged, or lacks the split.
    """
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise ValueError(f"cannot open {folder}: {error}") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if part.split not in saved:
        raise ValueError(f"{folder} has no split {part.split!r}; it has {', '.join(saved)} (recipe key data.split)")
    return saved[part.split]


def open_table(table: datasets.Dataset, part: Part, captions: bool) -> Table:
    """The image column and the caption column of a table; `json.caption` names a key inside the column json.

    Raises:
        ValueError: no rows, a column does not exist, or it holds neither images nor text.
    """
    check_columns(part, table.features, captions)
    fingerprint = table._fingerprint
    if part.limit is not None:
        table = table.select(range(min(part.limit, len(table))))
    if not len(table):
        raise ValueError(f"{part.source} holds no images: the table is empty")
    images = table.select_columns([part.image_column]).cast_column(part.image_column, datasets.Image(decode=False))
    texts = None
    if captions:
        column = part.caption_column
        texts = table.select_columns([column if column in table.column_names else column.partition(".")[0]])
    more = None
    if part.condition_column is not None:
        kind = _conditions_kind(table.features[part.condition_column])
        more = table.select_columns([part.condition_column]).cast_column(part.condition_column, kind)
        more = more.with_format("arrow")
    return Table(part.source, images.with_format("arrow"), texts, part.caption_column, fingerprint, more)


def check_columns(part: Part, features: datasets.Features, captions: bool) -> None:
    """Refuse columns that do not exist, or that hold neither images nor text."""
    image = features.get(part.image_column)
    text = _feature(features, part.caption_column)
    if image is None or (captions and text is None):
        key = "image_column" if image is None else "caption_column"
        column = part.image_column if image is None else part.caption_column
        raise ValueError(missing_column(part.source, key, column, features))
    _check_images(part, "image_column", part.image_column, image)
    if part.condition_column is not None:
        kind = features.get(part.condition_column)
        if kind is None:
            raise ValueError(missing_column(part.source, "condition_column", part.condition_column, features))
        _check_images(part, "condition_column", part.condition_column, kind.feature if _is_list(kind) else kind)
    if captions:
        kind = datasets.Features({"text": text}).arrow_schema.field("text").type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ValueError(
                f"the column {part.caption_column!r} of {part.source} holds {text}, not text "
                "(recipe key data.caption_column)"
            )


def _check_images(part: Part, key: str, column: str, kind: Any) -> None:
    if not (isinstance(kind, datasets.Image) or kind in (datasets.Value("binary"), datasets.Value("string"))):
        raise ValueError(f"the column {column!r} of {part.source} holds {kind}, not images (recipe key data.{key})")


def _is_list(kind: Any) -> bool:
    return isinstance(kind, datasets.List | datasets.LargeList)


def _conditions_kind(kind: Any) -> Any:
    return datasets.List(datasets.Image(decode=False)) if _is_list(kind) else datasets.Image(decode=False)


def _feature(features: datasets.Features, column: str) -> Any:
    """The type of a column, or of a key inside a column; None if there is none."""
    if column in features:
        return features[column]
    outer, _, inner = column.partition(".")
    return _feature(features[outer], inner) if isinstance(features.get(outer), dict) else None


def keep_stream(part: Part, parent: Path) -> datasets.Dataset:
    """The first `part.limit` rows of a stream, downloaded once. A killed download goes on after its last whole shard,
    as does one with a larger limit.

    Args:
        parent: the rows lie in a folder in here, named after the source.

    Returns:
        STREAM_COLUMNS: encoded images, lists of captions, and of condition images if `part` has a column of them.

    Raises:
        ValueError: the stream cannot be opened, breaks off, is empty, or its columns are not images and text.
    """
    chosen = [part.source, part.subset, part.split, part.image_column, part.caption_column]
    chosen += [] if part.condition_column is None else [part.condition_column]
    identity = "\0".join(map(str, chosen))
    name = part.source.strip("./").replace("/", "--")[-60:]
    folder = parent / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    # A shard counts once progress.json says so; what a kill leaves of another one is written over.
    progress = {"shards": 0, "rows": 0, "ended": False, "state": None}
    if (folder / "progress.json").is_file():
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if progress["rows"] < part.limit and not progress["ended"]:
        _download(part, folder, progress)
    shards = [datasets.load_from_disk(str(folder / f"{i:05d}")) for i in range(progress["shards"])]
    if not shards:
        raise ValueError(f"{part.source} holds no images: the stream is empty")
    return datasets.concatenate_datasets(shards)


def _download(part: Part, folder: Path, progress: dict[str, Any]) -> None:
    stream = load(part, part.source, split=part.split, streaming=True)
    if stream.features is None:
        raise ValueError(f"the stream of {part.source} does not say which columns it has; use data.streaming=false")
    check_columns(part, stream.features, captions=True)
    stream = stream.cast_column(part.image_column, datasets.Image(decode=False))
    if part.condition_column is not None:
        kind = _conditions_kind(stream.features[part.condition_column])
        stream = stream.cast_column(part.condition_column, kind)
    if progress["state"] is not None:
        stream.load_state_dict(progress["state"])
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        with tqdm(total=part.limit, initial=progress["rows"], desc=part.source, mininterval=1) as bar:
            for record in stream:
                content = _encoded(record[part.image_column])
                text = caption_list(pick(record, part.caption_column), f"{part.source}, row {bar.n}")
                row = {"image": {"bytes": content, "path": None}, "text": text}
                size += len(content)
                if part.condition_column is not None:
                    more = record[part.condition_column] or []
                    more = [_encoded(image) for image in (more if isinstance(more, list) else [more])]
                    row["conditions"] = [{"bytes": image, "path": None} for image in more]
                    size += sum(map(len, more))
                rows.append(row)
                bar.update()
                if size >= SHARD_BYTES or bar.n == part.limit:
                    _keep(rows, folder, progress, stream.state_dict())
                    rows, size = [], 0
                if bar.n == part.limit:
                    return
        progress["ended"] = True
        _keep(rows, folder, progress, stream.state_dict())
    except Exception as error:  # as above
        raise ValueError(
            f"the stream of {part.source} broke off, {progress['rows']} of {part.limit} images are kept: {error}"
        ) from error


def _keep(rows: list[dict[str, Any]], folder: Path, progress: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a shard, then say that it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows:
        shard = folder / f"{progress['shards']:05d}"
        columns = datasets.Features({name: STREAM_COLUMNS[name] for name in rows[0]})
        datasets.Dataset.from_list(rows, columns).save_to_disk(str(shard))
    progress |= {"shards": progress["shards"] + bool(rows), "rows": progress["rows"] + len(rows), "state": state}
    (folder / "progress.part").write_text(json.dumps(progress), encoding="utf-8")
    (folder / "progress.part").replace(folder / "progress.json")


def _encoded(stored: dict[str, Any] | None) -> bytes:
    """The bytes of an image of a stream; none where the stream has none, which makes the row an unreadable image."""
    if stored is None or (stored["bytes"] is None and not stored["path"]):
        return b""
    if stored["bytes"] is not None:
        return stored["bytes"]
    try:
        with fsspec.open(stored["path"], "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""
