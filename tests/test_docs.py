"""docs/recipes.md lists every recipe key as the code has it. `python -m tests.test_docs` rewrites its tables."""

import inspect
import re
import textwrap
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from asymflow_ft import recipe_keys
from tests.conftest import REPOSITORY

FILE = REPOSITORY / "docs/recipes.md"
START, END = "<!-- keys -->", "<!-- end of keys -->"


def type_name(kind: Any) -> str:
    if get_origin(kind) in (types.UnionType, Union):
        return " or ".join("null" if option is type(None) else type_name(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{str(option).lower()}`" for option in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {type_name(get_args(kind)[0])}"
    if is_dataclass(kind):
        return f"section {kind.__name__.lower()}"
    return {int: "whole number", float: "number", str: "text", bool: "true, false"}[kind]


def default(field: Any) -> str:
    if field.default is MISSING:
        return "required" if field.default_factory is MISSING else ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


def section(kind: type) -> str:
    comments = dict(re.findall(r"^    (\w+): [^#\n]*?# (.*)$", inspect.getsource(kind), re.MULTILINE))
    hints = get_type_hints(kind)
    subsections = [f.name for f in fields(recipe_keys.Recipe) if f.default_factory is not MISSING]
    own = [
        f
        for f in fields(kind)
        if kind is not recipe_keys.Recipe or f.name not in (*subsections, "data", "align", "sample")
    ]
    rows = [f"| `{f.name}` | {type_name(hints[f.name])} | {default(f)} | {comments.get(f.name, '')} |" for f in own]
    title = "(top level)" if kind is recipe_keys.Recipe else kind.__name__.lower()
    about = textwrap.fill(inspect.getdoc(kind), 119, break_on_hyphens=False)
    return "\n".join([f"## {title}\n", about, "\n| key | type | default | note |", "|---|---|---|---|", *rows])


def keys() -> str:
    kinds = [v for v in vars(recipe_keys).values() if is_dataclass(v) and isinstance(v, type)]
    ordered = [recipe_keys.Recipe, *(kind for kind in kinds if kind is not recipe_keys.Recipe)]
    return "\n\n".join(map(section, ordered))


def test_recipe_keys_are_documented_as_they_are():
    text = FILE.read_text()
    documented = text[text.index(START) + len(START) : text.index(END)].strip()
    assert documented == keys(), "run `python -m tests.test_docs`"


if __name__ == "__main__":
    page = FILE.read_text()
    FILE.write_text(page[: page.index(START) + len(START)] + f"\n\n{keys()}\n\n" + page[page.index(END) :])
