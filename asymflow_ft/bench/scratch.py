"""Temporary folders of a benchmark, which a signal that ends it removes as well."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: list[str] = []
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    folder = tempfile.TemporaryDirectory(prefix="asymflow-bench-")
    _held.append(folder.name)
    try:
        with folder:
            yield Path(folder.name)
    finally:
        _held.remove(folder.name)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, signals that end a process remove the scratch folders first; those that are ignored, as under nohup,
    stay so. Of the main thread alone: no other one gets signals."""
    main = threading.current_thread() is threading.main_thread()
    heeded = [number for number in _ENDING if main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    """Exit with 128 + `number`, as shells have it. Not by an exception: Python drops those that are raised in a
    callback, such as a fork's, and the benchmark would go on."""
    for folder in _held:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)
