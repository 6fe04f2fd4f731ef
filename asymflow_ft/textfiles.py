"""Text files: what users write (UTF-8, prompts, JSON lines), and logs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def text_of(file: Path) -> str:
    """A UTF-8 file, with or without the mark that Windows puts first.

    Raises:
        ValueError: it cannot be read or is not UTF-8.
    """
    try:
        return utf8(file.read_bytes(), str(file))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error


def utf8(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is not UTF-8 text (line {line}: {error.reason} at byte {error.start}); convert it"
        ) from error


def json_object(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object of keys and values")
    return record


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and content of each line that is not blank.

    Raises:
        ValueError: it cannot be read; names the file and the line.
    """
    # not splitlines(), which also splits at the line separators that JSON strings may hold
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if line.strip():
            yield number, json_object(line, f"{file}, line {number}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A log's lines, [] without one; a line that is being written or was cut short is left out."""
    lines = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def prompt_lines(file: str | Path) -> list[tuple[int, str]]:
    """Line number and text of each prompt; empty lines and lines starting with # are left out.

    Raises:
        ValueError: no such file, no UTF-8 text, or no prompts in it.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no prompt file at {path}; it is a text file with one prompt a line")
    lines = [(number, line.strip()) for number, line in enumerate(text_of(path).splitlines(), 1)]
    prompts = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def read_prompts(file: str | Path) -> list[str]:
    """The texts of `prompt_lines`."""
    return [text for _, text in prompt_lines(file)]
