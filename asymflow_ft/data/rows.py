"""Two ways in which images lie on a disk: as files (or stretches of tar files), or inside a `datasets` table."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import pyarrow as pa

from asymflow_ft.data.decode import UnreadableImage

FILE_COLUMNS = datasets.Features(
    {
        "path": datasets.Value("string"),
        "member": datasets.Value("string"),  # of a tar file; null: the image is the whole file
        "offset": datasets.Value("int64"),
        "size": datasets.Value("int64"),
        "captions": datasets.List(datasets.Value("string")),
    }
)

CONDITION_COLUMNS = datasets.Features({"paths": datasets.List(datasets.Value("string"))})


class Rows(Protocol):
    """Images with captions in a fixed order, any of them read at any time.

    A row may have condition images beside its own: `image` is 0 for its own and m for the m-th of those.
    """

    def __len__(self) -> int: ...

    def captions(self, row: int) -> tuple[str, ...]:
        """At least one, possibly empty; none at all where the source was opened without captions."""

    def conditions(self, row: int) -> int:
        """How many condition images the row has."""

    def name(self, row: int, image: int = 0) -> str:
        """What to call the image in a message."""

    def stamp(self, row: int, image: int = 0) -> str:
        """Changes when the stored image does; cheap, since the image itself is not read.

        Raises:
            UnreadableImage: the file is gone.
        """

    def content(self, row: int, image: int = 0) -> bytes:
        """The encoded image.

        Raises:
            UnreadableImage: the file is gone or cut short, or the row holds none.
        """


@dataclass(frozen=True)
class Files:
    """Rows of FILE_COLUMNS, and beside them in `more` the paths of each row's condition images (CONDITION_COLUMNS)."""

    table: datasets.Dataset
    more: datasets.Dataset | None = None

    def __len__(self) -> int:
        return len(self.table)

    def captions(self, row: int) -> tuple[str, ...]:
        return tuple(self.table[row]["captions"] or ())

    def _conditions(self, row: int) -> list[str]:
        return [] if self.more is None else self.more[row]["paths"]

    def conditions(self, row: int) -> int:
        return len(self._conditions(row))

    def name(self, row: int, image: int = 0) -> str:
        if image:
            return self._conditions(row)[image - 1]
        at = self.table[row]
        return at["path"] if at["member"] is None else f"{at['path']}: {at['member']}"

    def stamp(self, row: int, image: int = 0) -> str:
        if image:
            return file_stamp(self._conditions(row)[image - 1])
        at = self.table[row]
        stamp = file_stamp(at["path"])
        return stamp if at["member"] is None else f"{stamp}:{at['offset']}"

    def content(self, row: int, image: int = 0) -> bytes:
        if image:
            return read_file(self._conditions(row)[image - 1])
        at = self.table[row]
        if at["member"] is None:
            return read_file(at["path"])
        content = read_file(at["path"], at["offset"], at["size"])
        if len(content) != at["size"]:
            raise UnreadableImage(f"{self.name(row)}: the tar file was cut short since it was opened")
        return content


@dataclass(frozen=True)
class Table:
    """Rows of a `datasets` table, which is looked at column by column, so that captions do not load images.

    Args:
        images: the image column alone, in arrow format, where a path can be read without the bytes beside it.
        texts: the column of `caption_column`. fingerprint: changes with the data.
        more: the column of condition images alone, likewise in arrow format; each value is an image or a list of them.
    """

    source: str
    images: datasets.Dataset
    texts: datasets.Dataset | None
    caption_column: str
    fingerprint: str
    more: datasets.Dataset | None = None

    def __len__(self) -> int:
        return len(self.images)

    def _conditions(self, row: int) -> list[Any]:
        """Arrow scalars; one that is null inside a list is an image that is missing."""
        value = None if self.more is None else self.more[row].column(0)[0]
        if value is None or not value.is_valid:
            return []
        return list(value.values) if isinstance(value, pa.ListScalar | pa.LargeListScalar) else [value]

    def _stored(self, row: int, image: int, field: str) -> Any:
        stored = self._conditions(row)[image - 1] if image else self.images[row].column(0)[0]
        return stored[field].as_py() if stored.is_valid else None

    def conditions(self, row: int) -> int:
        return len(self._conditions(row))

    def captions(self, row: int) -> tuple[str, ...]:
        if self.texts is None:
            return ()
        return tuple(caption_list(pick(self.texts[row], self.caption_column), f"{self.source}, row {row}"))

    def name(self, row: int, image: int = 0) -> str:
        path = self._stored(row, image, "path")
        which = f", condition image {image}" if image else ""
        return f"{self.source}, row {row}{which}" + (f" ({path})" if path else "")

    def stamp(self, row: int, image: int = 0) -> str:
        path = self._stored(row, image, "path")
        on_disk = path is not None and os.path.isabs(path) and os.path.isfile(path)
        which = f":condition {image}" if image else ""
        return f"{self.fingerprint}:{row}{which}" + (f":{file_stamp(path)}" if on_disk else "")

    def content(self, row: int, image: int = 0) -> bytes:
        content, path = self._stored(row, image, "bytes"), self._stored(row, image, "path")
        if content:
            return content
        if not path:
            raise UnreadableImage(f"{self.name(row, image)}: the row holds no image")
        return read_file(path)


def pick(record: dict[str, Any], column: str) -> Any:
    """The value of a column, or of a key inside a column, such as `json.caption`."""
    if column in record:
        return record[column]
    outer, _, inner = column.partition(".")
    return None if record[outer] is None else pick(record[outer], inner)


def caption_list(value: Any, where: str) -> list[str]:
    """One caption or several as a list; a missing one becomes the empty caption.

    Raises:
        ValueError: it is not text.
    """
    values = (value or [None]) if isinstance(value, list) else [value]
    wrong = [text for text in values if not (text is None or isinstance(text, str))]
    if wrong:
        raise ValueError(f"the caption of {where} is {wrong[0]!r}, not text (recipe key data.caption_column)")
    try:
        "".join(text or "" for text in values).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ValueError(f"the caption of {where} is {error.object!r}, which UTF-8 cannot hold; mend it") from error
    return [text or "" for text in values]


def file_stamp(path: str) -> str:
    """Also with the time of the inode's change, since copying tools set the other one back."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a null character
        raise UnreadableImage(f"{path!r}: {error}") from error
    return f"{path}:{state.st_size}:{state.st_mtime_ns}:{state.st_ctime_ns}"


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise UnreadableImage(f"{path}: {error.strerror}") from error
    except ValueError as error:  # as above
        raise UnreadableImage(f"{path!r}: {error}") from error
