"""Prompt suites: text files, JSON lines, and the official prompt files of GenEval, DPG-Bench and HPSv3.

A prompt's `id` names its pictures' files; their noise depends on (seed, text, number of the picture) alone. So prompts
of equal text have equal pictures: text files keep one of them, official suites keep all, since their scorers expect
every one.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from asymflow_ft.textfiles import json_lines, prompt_lines, text_of

LONG_PROMPT = 2000  # bytes in UTF-8; about the 512 tokens that text encoders keep
FORMS = (
    'a .txt file with one prompt a line, a .jsonl file of {"prompt": ...}, geneval:FILE (evaluation_metadata.jsonl), '
    "dpg:FOLDER (of .txt prompts) or hpsv3:FILE_OR_FOLDER (benchmark_*.json)"
)


@dataclass(frozen=True)
class Prompt:
    """`id`: unique in its suite, also where file names ignore case. `extra`: what else its file says of it; for
    official suites the whole entry."""

    text: str
    id: str
    category: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """`name`: "geneval", "dpg" or "hpsv3", else the name of the file. `per_prompt`: how many pictures of each prompt
    the suite asks for."""

    name: str
    prompts: list[Prompt]
    per_prompt: int
    warnings: list[str] = field(default_factory=list)


def load_suite(spec: str) -> Suite:
    """Read what `--prompts` names.

    Raises:
        ValueError: no such file, of no known form, damaged, or a prompt or id that cannot be used; names the line.
    """
    kind, _, path = spec.partition(":")
    if kind in OFFICIAL:
        read, per_prompt = OFFICIAL[kind]
        return _suite(kind, read(Path(path)), per_prompt)
    file = Path(spec)
    if not file.exists():
        raise ValueError(f"--prompts {spec}: no such file; give {FORMS}")
    if file.suffix.lower() not in (".txt", ".jsonl") or file.is_dir():
        raise ValueError(f"--prompts {spec} is of no known form; give {FORMS}")
    lines = _text_lines(file) if file.suffix.lower() == ".txt" else _json_prompts(file)
    kept, merged = _merged(lines)
    return _suite(file.name, kept, 1, merged)


def take(suite: Suite, num: int) -> Suite:
    """A part of a suite: the first prompts of all its categories in turn, so that every category has its share, and a
    larger `num` adds prompts to those of a smaller one.

    Raises:
        ValueError: there are not that many.
    """
    if not 1 <= num <= len(suite.prompts):
        raise ValueError(f"--num {num}: {suite.name} has {len(suite.prompts)} prompts")
    turns: Counter[str | None] = Counter()
    order = []
    for place, prompt in enumerate(suite.prompts):
        order.append((turns[prompt.category], place))
        turns[prompt.category] += 1
    kept = sorted(place for _, place in sorted(order)[:num])
    return replace(suite, prompts=[suite.prompts[place] for place in kept])


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


Found = list[tuple[str, Prompt]]  # where a prompt is from, and the prompt


def _text_lines(file: Path) -> Found:
    return [(where, Prompt(_visible(text, where), ""))
            for where, text in ((f"{file}, line {number}", text) for number, text in prompt_lines(file))]  # fmt: skip


def _json_prompts(file: Path) -> Found:
    found: Found = []
    for number, record in json_lines(file):
        where = f"{file}, line {number}"
        name = record.pop("id", None)
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"{where}: the id is {json.dumps(name)}; it must be text or a whole number")
        text = _string(record, "prompt", where).strip()
        category = None if record.get("category") is None else _string(record, "category", where)
        extra = {key: value for key, value in record.items() if key not in ("prompt", "category")}
        found.append((where, Prompt(text, name or "", category, extra)))
    return found


def _merged(lines: Found) -> tuple[Found, list[str]]:
    """Prompts without an id of their own get one; those that repeat another in all are left out, with a warning."""
    first: dict[tuple[str, str | None, str], str] = {}
    kept: Found = []
    repeated = []
    digits = max(4, len(str(len(lines))))
    for where, prompt in lines:
        if not prompt.id:
            key = (prompt.text, prompt.category, json.dumps(prompt.extra, sort_keys=True))
            if key in first:
                repeated.append(f"{where} repeats {first[key].rpartition(', ')[2]}")
                continue
            first[key] = where
            name = f"{len(kept):0{digits}d}-{_short(prompt.text)}"
            prompt = replace(prompt, id=name)
        kept.append((where, prompt))
    if not repeated:
        return kept, []
    return kept, [f"{len(repeated)} repeated prompt(s) are drawn once, since they would give the same pictures again; "
                  f"first: {repeated[0]}"]  # fmt: skip


def _geneval(file: Path) -> Found:
    """Lines {"tag", "include", "prompt"}; the id is the number of the folder that the official generator writes."""
    if not file.is_file():
        raise ValueError(f"geneval:{file} is no file; name prompts/evaluation_metadata.jsonl of a clone of "
                         "djghosh13/geneval")  # fmt: skip
    found: Found = []
    for number, entry in json_lines(file):
        where = f"{file}, line {number}"
        text, tag = _string(entry, "prompt", where), _string(entry, "tag", where)
        objects = entry.get("include")
        if not isinstance(objects, list) or not all(isinstance(o, dict) and {"class", "count"} <= o.keys()
                                                    for o in objects):  # fmt: skip
            raise ValueError(f'{where}: no list "include" of {{"class", "count"}}, which the scorer reads')
        found.append((where, Prompt(text, f"{len(found):05d}", tag, entry)))
    return found


def _dpg(folder: Path) -> Found:
    """One prompt a file; the id is its name, by which the scorer finds the questions."""
    files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise ValueError(f"dpg:{folder} holds no .txt prompts; name the folder dpg_bench/prompts of a clone of "
                         "TencentQQGYLab/ELLA")  # fmt: skip
    for file in files:
        if "." in file.stem:
            raise ValueError(f"{file}: the scorer of DPG-Bench takes a name up to its first dot; rename the file")
    return [(str(file), Prompt(_visible(text_of(file).strip(), str(file)), file.stem)) for file in files]


def _hpsv3(path: Path) -> Found:
    """A list of {"caption", "category"}, or a folder of such files."""
    files = sorted(path.glob("benchmark_*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"hpsv3:{path} is neither a file nor a folder of benchmark_*.json; name the folder "
                         "benchmark/ of the data set MizzenAI/HPDv3, or one file of it")  # fmt: skip
    entries: list[tuple[str, Any]] = []
    for file in files:
        try:
            content = json.loads(text_of(file))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, list):
            raise ValueError(f"{file} is no list of prompts")
        entries += [(f"{file}, entry {number}", entry) for number, entry in enumerate(content, 1)]
    found: Found = []
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is no object of keys and values")
        text, category = _string(entry, "caption", where).strip(), _string(entry, "category", where)
        if not re.fullmatch(r"\w[\w &-]*", category):
            raise ValueError(
                f"{where}: the category {category!r} cannot name a folder; use letters, digits and spaces"
            )
        found.append((where, Prompt(text, f"{len(found):05d}-{_short(text)}", category, entry)))
    return found


# name: how its prompts are read, and pictures per prompt
OFFICIAL: dict[str, tuple[Callable[[Path], Found], int]] = {
    "geneval": (_geneval, 4), "dpg": (_dpg, 4), "hpsv3": (_hpsv3, 1),
}  # fmt: skip


def _suite(name: str, found: Found, per_prompt: int, warnings: Sequence[str] = ()) -> Suite:
    if not found:
        raise ValueError(f"--prompts {name} holds no prompts")
    taken: dict[str, str] = {}
    for where, prompt in found:
        _check_id(prompt.id, where, taken)
    return Suite(name, [prompt for _, prompt in found], per_prompt, [*warnings, *_remarks(found)])


def _visible(text: str, where: str) -> str:
    """The text, if it is one that can be written and seen."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ValueError(f"{where}: {error.object!r} cannot be written as UTF-8; mend it") from error
    for place, character in enumerate(text, 1):
        if unicodedata.category(character) == "Cc" and character not in "\t\n\r":
            raise ValueError(f"{where}: control character U+{ord(character):04X} at character {place}; remove it")
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise ValueError(f"{where} has nothing to see in it: {text!r}; remove it")
    return text


def _check_id(name: str, where: str, taken: dict[str, str]) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > 200:
        raise ValueError(
            f"{where}: the id {name!r} cannot name files; use up to 200 letters, digits, '_', '-' and '.', "
            "the first no dot or dash"
        )
    key = unicodedata.normalize("NFC", name).casefold()
    if key in taken:
        raise ValueError(
            f"{where}: the id {name!r} is taken by {taken[key]} (file names may ignore case); give it another"
        )
    taken[key] = where


def _remarks(found: Found) -> list[str]:
    long = [where for where, prompt in found if len(prompt.text.encode()) > LONG_PROMPT]
    texts: dict[str, str] = {}
    repeated = [(where, texts[prompt.text]) for where, prompt in found
                if texts.setdefault(prompt.text, where) != where]  # fmt: skip
    remarks = []
    if long:
        remarks.append(f"{len(long)} prompt(s) are over {LONG_PROMPT:,} bytes long, first: {long[0]}; the text "
                       "encoder leaves out what is beyond its largest number of tokens")  # fmt: skip
    if repeated:
        where, earlier = repeated[0]
        remarks.append(f"{len(repeated)} prompt(s) have the text of an earlier one and so the same pictures, first: "
                       f"{where} and {earlier}; intervals come out too narrow")  # fmt: skip
    return remarks


def _string(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        held = f"it is {json.dumps(value)}, not text" if key in record else f"it has {', '.join(record) or 'nothing'}"
        raise ValueError(f"{where}: no {key!r}; {held}")
    return _visible(value, where)
