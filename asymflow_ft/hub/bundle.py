"""One file of Python that holds a class of this package with all that it needs of it, to lie in a Hub repository.

diffusers downloads one file per custom component, follows relative imports one level deep and no further, and keeps
the files of all repositories in one folder by name. So the file is made from this package's own modules, imports
nothing of it, and carries a hash of itself in its name.
"""

import ast
import hashlib
import inspect
import sys
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Bundle:
    """`name`: the module's name, without .py. `source`: its text."""

    name: str
    source: str


def bundle(kind: type, what: str) -> Bundle:
    """The module that holds `kind`; the same code always has the same name, and other code another.

    Args:
        what: first word of the name, such as "pipeline".
    """
    collected = _Collected({}, {})
    _collect(sys.modules[kind.__module__], kind.__name__, collected)
    names: dict[str, set[str]] = {}
    for module, original in {used for uses in collected.imports.values() for used in uses}:
        names.setdefault(module, set()).add(original)
    plain = [f"import {name}" for name in sorted(names.pop("", ()))]
    imports = plain + [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]
    header = (
        f'"""{kind.__name__} of {PACKAGE}, with what it needs of that package.\n\n'
        f"Written by `{PACKAGE.replace('_', '-')} export`; change the package and export again, not this file.\n"
        '"""\n'
    )
    source = "\n\n\n".join([header + "\n" + "\n".join(imports), *collected.definitions.values()]) + "\n"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    major_minor = "_".join(version(PACKAGE.replace("_", "-")).split(".")[:2])
    return Bundle(f"{what}_asymflow_v{major_minor}_{digest}", source)


@dataclass(frozen=True)
class _Collected:
    """Definitions by name, each after what it needs, and by definition the (module, name) that it imports; module ""
    for a plain import."""

    definitions: dict[str, str]
    imports: dict[str, list[tuple[str, str]]]


def _collect(module: ModuleType, name: str, collected: _Collected) -> None:
    """Add the top-level `name` of a module of this package, after what it refers to."""
    if name in collected.imports:
        return
    lines = inspect.getsource(module).splitlines()
    tree = ast.parse("\n".join(lines))
    node = next(node for node in tree.body if name in _defined(node))
    collected.imports[name] = []
    origin = _origins(tree)
    for used in dict.fromkeys(n.id for n in ast.walk(node) if isinstance(n, ast.Name)):
        if used in origin:
            source, original = origin[used]
            if source.partition(".")[0] != PACKAGE:
                collected.imports[name].append(origin[used])
            elif original == used:
                _collect(sys.modules[source], used, collected)
            else:
                raise ValueError(f"{module.__name__} imports {original}, which a bundle cannot follow")
        elif used != name and any(used in _defined(other) for other in tree.body):
            _collect(module, used, collected)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    collected.definitions[name] = "\n".join(lines[first : node.end_lineno])


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines, other than by an import."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _origins(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Module and name there (with `as`, if renamed) of each imported name; module "" for a plain import."""
    origins = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            source = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            origins |= {alias.asname or alias.name: (source, ast.unparse(alias)) for alias in node.names}
    return origins
