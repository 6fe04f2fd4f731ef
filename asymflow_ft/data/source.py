"""Where images and captions come from: a local folder or a Hub dataset, through `datasets`."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class UnreadableImage(Exception):
    """An image that PIL cannot decode; callers count these and go on."""


@dataclass(frozen=True)
class Source:
    """Images with captions, read lazily by index."""

    table: datasets.Dataset
    image_column: str
    caption_column: str | None

    def __len__(self) -> int:
        return len(self.table)

    def caption(self, index: int) -> str:
        if self.caption_column is None:
            raise ValueError("this source was opened without captions")
        return str(self.table[self.caption_column][index])

    def captions(self) -> list[str]:
        return [] if self.caption_column is None else [str(text) for text in self.table[self.caption_column]]

    def name(self, index: int) -> str:
        """What to call the image in a message."""
        return str(self.table[index][self.image_column].get("path") or f"row {index}")

    def content(self, index: int) -> bytes:
        """The encoded file.

        Raises:
            UnreadableImage: the file is gone or empty.
        """
        stored = self.table[index][self.image_column]
        try:
            return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error

    def image(self, index: int) -> tuple[Image.Image, str]:
        """The picture in RGB (transparency on white), and a hash of its file.

        Raises:
            UnreadableImage: the file is gone, truncated, or no image.
        """
        content = self.content(index)
        try:
            picture = Image.open(io.BytesIO(content))
            picture.load()
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            rgba = picture.convert("RGBA")
            picture = Image.new("RGBA", rgba.size, "white")
            picture.alpha_composite(rgba)
        return picture.convert("RGB"), hashlib.sha256(content).hexdigest()


def open_source(
    source: str, split: str = "train", image_column: str = "image", caption_column: str | None = "text"
) -> Source:
    """Open an image folder (metadata.jsonl / .csv, or one .txt beside each image) or a Hub dataset.

    Args:
        caption_column: None opens images alone.

    Raises:
        ValueError: nothing there, no images, or a column that does not exist (the existing ones are listed).
    """
    table = _open_folder(Path(source)) if Path(source).is_dir() else _open_hub(source, split)
    for key, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is not None and column not in table.column_names:
            raise ValueError(
                f"{source} has no column {column!r}; it has {', '.join(table.column_names)} (recipe key data.{key})"
            )
    if len(table) == 0:
        raise ValueError(f"{source} holds no images")
    return Source(table.cast_column(image_column, datasets.Image(decode=False)), image_column, caption_column)


def _open_folder(folder: Path) -> datasets.Dataset:
    if any(folder.glob("*.parquet")) or any(folder.glob("*.arrow")):
        return _load(str(folder), "train")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for metadata in ("metadata.jsonl", "metadata.csv"):
        if (folder / metadata).is_file():
            kind = "json" if metadata.endswith("jsonl") else "csv"
            return _join(_load(kind, "train", data_files=str(folder / metadata)), folder, metadata)
    beside = [path.with_suffix(".txt") for path in files]
    columns: dict[str, Any] = {"image": [{"path": str(path), "bytes": None} for path in files]}
    if any(text.is_file() for text in beside):
        bare = [path.name for path, text in zip(files, beside, strict=True) if not text.is_file()]
        if bare:
            raise ValueError(f"{len(bare)} of {len(files)} images in {folder} have no .txt caption, such as {bare[0]}")
        columns["text"] = [text.read_text(encoding="utf-8").strip() for text in beside]
    return datasets.Dataset.from_dict(columns)


def _join(table: datasets.Dataset, folder: Path, metadata: str) -> datasets.Dataset:
    if "file_name" not in table.column_names:
        raise ValueError(f"{folder / metadata} has no file_name column; it has {', '.join(table.column_names)}")
    images = [{"path": str(folder / name), "bytes": None} for name in table["file_name"]]
    return table.remove_columns("file_name").add_column("image", images)


def _open_hub(source: str, split: str) -> datasets.Dataset:
    if source.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {source}")
    return _load(source, split)


def _load(path: str, split: str, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(path, split=split, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise ValueError(f"cannot open the data {options.get('data_files', path)!r}: {error}") from error
