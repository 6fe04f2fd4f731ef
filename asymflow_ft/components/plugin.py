"""Functions that a user names by `file.py:function` or `module:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_plugin(name: str) -> bool:
    return ":" in name


def load_function(name: str) -> Callable[..., Any]:
    """The function that `name` points to, "networks.py:open_vgg" or "package.module:open_vgg".

    Raises:
        ValueError: it is of another form, or there is no such file, module or function.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"{name!r} names no function; write file.py:function or package.module:function")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"{name!r}: {where} does not import ({error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{name!r}: {where} has no function {function}")
    return found


def _from_file(file: Path) -> Any:
    name = f"asymflow_ft_plugin_{abs(hash(file.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
