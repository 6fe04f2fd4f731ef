"""Temporary folders of a benchmark, which are gone after it however it ends."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_made: list[str] = []


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="asymflow-bench-") as name:
        _made.append(name)
        yield Path(name)


def end_by_signal(number: int, _: object) -> None:
    """A signal handler: remove the scratch folders and exit with 128 + `number`, as shells have it.

    Not by an exception, which Python drops where it happens to interrupt a callback, such as a fork's.
    """
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)
