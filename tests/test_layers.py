"""Imports go one way; docs/design.md says why."""

import ast

from tests.conftest import REPOSITORY

LAYERS = [
    {"method", "recipe_keys", "textfiles"}, {"recipe", "components"}, {"evaluation", "data", "families"}, {"hub"},
    {"training"}, {"align"}, {"export"}, {"drawing"}, {"finetune", "synthesize", "demo", "evaluate", "bench"},
    {"commands"}, {"cli"},
]  # fmt: skip
SHARED = ("base", "terms", "vae")  # what families have in common
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "asymflow_ft" else [f"asymflow_ft.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("asymflow_ft."))


def test_no_module_imports_a_higher_layer():
    package = REPOSITORY / "asymflow_ft"
    checked = 0
    for file in package.rglob("*.py"):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports(file):
            checked += 1
            assert name == own or RANK[name] < RANK[own], f"{file.name} ({own}) imports {name}"
    assert checked > 40


def test_families_do_not_import_each_other():
    for file in (REPOSITORY / "asymflow_ft/families").glob("*.py"):
        if file.stem in ("__init__", *SHARED):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asymflow_ft.families"):
                assert node.module.rpartition(".")[2] in SHARED, file
