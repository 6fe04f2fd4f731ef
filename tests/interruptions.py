"""Interruptions, for tests of commands that go on where they stopped."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@contextmanager
def interrupted_after(writes: int) -> Iterator[None]:
    """KeyboardInterrupt in the write after so many: its .part file is there, the file itself is not."""
    write, left = os.fsync, writes

    def fail(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(handle)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", fail)
        yield


def two_processes(command: list[str]) -> list[subprocess.Popen]:
    """The command as two ranks of one group on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    ranks = [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [subprocess.Popen(command, env=rank, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for rank in ranks]


def kill_at_the_first_picture(command: list[str], out: Path) -> None:
    processes = two_processes(command)
    while not list(out.glob("images/*/*.png")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.communicate()


def printed_by_two(command: list[str]) -> list[str]:
    """What both print, by rank, when all goes well."""
    processes = two_processes(command)
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return said
