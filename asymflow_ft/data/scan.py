"""One look at every image before anything expensive: what it holds, how large it is, and whether it can be decoded."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from asymflow_ft.data.decode import UnreadableImage, decode
from asymflow_ft.data.source import Images

INDEX = "index-*.jsonl"
CHUNK = 256


@dataclass(frozen=True)
class Picture:
    """sha256 of the encoded file and upright size in pixels; or, in `error`, why the row cannot be used."""

    digest: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


def scan(images: Images, rows: Sequence[int], folder: Path, process: int = 0, show: bool = True) -> None:
    """Look at the images of `rows`, condition images too, and append those whose stamp is not in the index yet to
    folder/index-<process>.jsonl.

    Images decode on threads (PIL lets go of the lock). A kill loses the last few hundred rows at most. Unusable images
    are looked at again in every run: permissions and decoders change without a trace in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {name for name, picture in read_index(folder).items() if not picture.error}
    pictures = [(row, image) for row in rows for image in range(1 + images.conditions(row))]
    # by stamp: one condition image may belong to many rows
    new = list({name: picture for picture in pictures if (name := stamp(images, *picture)) not in known}.items())
    progress = tqdm(desc="scan", total=len(new), disable=not (show and new), mininterval=1)
    with open(folder / INDEX.replace("*", str(process)), "a", encoding="utf-8") as index, ThreadPoolExecutor() as pool:
        index.write("\n")  # ends a line that a kill left open
        for start in range(0, len(new), CHUNK):
            chunk = new[start : start + CHUNK]
            # under the stamp from before the look: an image that changes meanwhile is never taken for the new one
            for (name, _), picture in zip(chunk, pool.map(lambda new: _look(images, *new[1]), chunk), strict=True):
                index.write(json.dumps({"stamp": name, **asdict(picture)}) + "\n")
                progress.update()
            index.flush()
    progress.close()


def stamp(images: Images, row: int, image: int = 0) -> str:
    """`Images.stamp`, also of a row whose file is gone."""
    try:
        return images.stamp(row, image)
    except UnreadableImage as error:
        return f"gone: {error}"


def _look(images: Images, row: int, image: int) -> Picture:
    try:
        content = images.content(row, image)
        picture = decode(content, images.name(row, image))
    except UnreadableImage as error:
        return Picture(error=str(error))
    return Picture(hashlib.sha256(content).hexdigest(), picture.width, picture.height)


def read_index(folder: Path) -> dict[str, Picture]:
    """What all processes and earlier runs found, by stamp. Of a row that was unusable, the newest word; a row that was
    usable once stays so."""
    found: dict[str, Picture] = {}
    for file in sorted(folder.glob(INDEX)):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                fields = json.loads(line)
                name = fields.pop("stamp")
                picture = Picture(**fields)
                if name not in found or found[name].error:
                    found[name] = picture
            except (ValueError, AttributeError, KeyError, TypeError):
                continue  # a line that a kill cut short
    return found
