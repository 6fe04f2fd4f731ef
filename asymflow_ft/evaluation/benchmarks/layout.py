"""What the layouts have in common: files that are whole or absent, and no pictures but those of the suite."""

import filecmp
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from asymflow_ft.evaluation.suites import Suite


def check_pictures(suite: Suite, pictures: Sequence[Sequence[Path]]) -> None:
    """
    Raises:
        ValueError: not `suite.per_prompt` pictures of every prompt, or one does not exist.
    """
    if [len(row) for row in pictures] != [suite.per_prompt] * len(suite.prompts):
        raise ValueError(f"{suite.name}: {len(suite.prompts)} prompts need {suite.per_prompt} pictures each")
    for picture in (picture for row in pictures for picture in row):
        if not picture.is_file():
            raise ValueError(f"the picture {picture} is gone; the same command draws it again")


def fill(folder: Path, own: dict[Path, Path], texts: dict[Path, str], found: Iterable[Path], name: str) -> None:
    """Write texts, then pictures, so that whoever scores a picture has its prompt. What is there already stays.

    Args:
        own: the picture for each file. texts: by file. found: pictures that the folder holds. name: for the progress.

    Raises:
        ValueError: a file cannot be written, or the folder holds pictures of others.
    """
    refuse_others(found, own, folder)
    for file, text in texts.items():
        write_text(file, text)
    for file, picture in tqdm(own.items(), desc=name, mininterval=1):
        place(picture, file)


def place(picture: Path, file: Path) -> None:
    """`file` becomes a hard link to the picture, or a copy where that cannot be; nothing if it is one already."""
    if file.is_file() and (os.path.samefile(picture, file) or filecmp.cmp(picture, file)):
        return

    def link(part: Path) -> None:
        try:
            os.link(picture.resolve(), part)
        except OSError:  # another disk, or a file system without links
            shutil.copy2(picture, part)

    replace(file, link)


def write_text(file: Path, text: str) -> None:
    """Nothing if the file holds that text already."""
    content = text.encode()
    if not file.is_file() or file.read_bytes() != content:
        replace(file, lambda part: part.write_bytes(content))


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    part = file.with_name(f".{file.name}.part")  # of a name that no scorer takes for a picture
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        write(part)
        part.replace(file)
    except OSError as error:
        raise ValueError(f"could not write {file}: {error}; free some space and run the same command") from error


def refuse_others(found: Iterable[Path], own: Iterable[Path], folder: Path) -> None:
    """
    Raises:
        ValueError: pictures in the folder are not of this evaluation; the scorer would count them.
    """
    if others := sorted(set(found) - set(own)):
        raise ValueError(
            f"{folder} holds {len(others)} picture(s) of another evaluation, which the scorer would count; first: "
            f"{others[0]}. Move them away, or give another --out"
        )


def check_scored(scored: Sequence[str], drawn: Iterable[str], file: Path, excused: str | None = None) -> None:
    """Compare the pictures that a result file names with those of the layout.

    Args:
        excused: a picture that the scorer is known to leave out. With one, others that are left out give a warning,
            since that scorer goes on when it fails on a picture.

    Raises:
        ValueError: the file is of other pictures, names one twice, or lacks some.
    """
    layout = set(drawn)
    wrong = [f"scores {name}, which is not there" for name in scored if name not in layout]
    wrong += [f"scores {name} twice" for name, count in Counter(scored).items() if count > 1]
    missing = sorted(layout - {*scored, excused})
    lacks = f"lacks {len(missing)} of {len(layout)} pictures, first: {missing[0]}" if missing else ""
    if lacks and excused is None:
        wrong.append(lacks)
    if not scored:
        wrong.append("holds no scores")
    if wrong:
        raise ValueError(f"{file} is not of the pictures beside it: it {wrong[0]}. Remove it and score again")
    if lacks:
        warnings.warn(f"{file} {lacks}; the scorer printed why", stacklevel=3)


def last_parts(path: str, count: int) -> str:
    """The end of a path that was written on any system, joined by slashes."""
    return "/".join(re.split(r"[\\/]", path.rstrip("\\/"))[-count:])
