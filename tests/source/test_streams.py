"""Streams: every image is read once, whatever happens in between."""

import json
import os
import subprocess
import sys

import datasets
import pytest

from asymflow_ft.data import tables
from asymflow_ft.data.source import open_sources
from asymflow_ft.recipe import Data
from tests.conftest import REPOSITORY
from tests.source.conftest import COLORS, check_rows, png, table


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A local folder that stands for a Hub dataset of two files; each shard of the kept stream holds two images."""
    monkeypatch.setattr(tables, "SHARD_BYTES", 2 * len(png(COLORS[0])) - 20)
    for s in (0, 1):
        (tmp_path / "remote").mkdir(exist_ok=True)
        table(range(3 * s, 3 * s + 3)).to_parquet(tmp_path / f"remote/train-{s}.parquet")
    return str(tmp_path / "remote")


def streamed(remote, tmp_path, limit, **options):
    data = Data(source=remote, streaming=True, limit=limit, **options)
    return open_sources(data, stream_folder=tmp_path / "kept")


def test_streams_are_read_once(remote, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        tables, "_encoded", lambda stored, original=tables._encoded: read.append(1) or original(stored)
    )
    check_rows(streamed(remote, tmp_path, 3), range(3))
    assert len(read) == 3
    check_rows(streamed(remote, tmp_path, 5), range(5))
    assert len(read) == 5
    check_rows(streamed(remote, tmp_path, 9))
    assert len(read) == 6
    monkeypatch.setattr(datasets, "load_dataset", None)
    check_rows(streamed(remote, tmp_path, 9))
    assert streamed(remote, tmp_path, 9).stamp(5) == streamed(remote, tmp_path, 9).stamp(5)
    check_rows(streamed(remote, tmp_path, 2), range(2))
    assert len(open_sources(Data(source=remote, streaming=True, limit=4), False, tmp_path / "kept")) == 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("instant", range(6))
def test_killed_streams_go_on(instant, remote, tmp_path, monkeypatch):
    """Killed at image number `instant`, and again before and after that shard is written."""

    def at_image(stored, original=tables._encoded, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == instant + 1:
            raise Killed
        return original(stored)

    def before_shard(rows, folder, progress, state, original=tables._keep):
        raise Killed

    def after_shard(self, target, original=os.replace):
        raise Killed

    for name, place, value in (
        ("_encoded", tables, at_image), ("_keep", tables, before_shard), ("replace", tables.Path, after_shard)
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, value)
            streamed(remote, tmp_path, 6)
    check_rows(streamed(remote, tmp_path, 6))


def test_a_stream_survives_sigkill(remote, tmp_path):
    """A process that is killed inside the third shard leaves two, and the next one reads the other two images only."""
    program = f"""
import os, signal
from asymflow_ft.data import tables
from asymflow_ft.data.source import open_sources
from asymflow_ft.recipe import Data
from pathlib import Path
tables.SHARD_BYTES = {tables.SHARD_BYTES}
def keep(rows, folder, progress, state, original=tables._keep):
    if progress["shards"] == 2:
        (folder / "00002").mkdir()
        (folder / "00002/state.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(rows, folder, progress, state)
tables._keep = keep
open_sources(Data(source={remote!r}, streaming=True, limit=6), stream_folder=Path({str(tmp_path / "kept")!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -9, done.stderr
    (folder,) = (tmp_path / "kept").iterdir()
    assert json.loads((folder / "progress.json").read_text())["rows"] == 4
    check_rows(streamed(remote, tmp_path, 6))


def test_stream_mistakes(remote, tmp_path, monkeypatch):
    for options, message in (
        ({"caption_column": "alt"}, "no column 'alt'; it has image, text, label"),
        ({"caption_column": "label"}, "'label' of .* holds Value"),
        ({"image_column": "label"}, "not images"),
        ({"split": "val"}, "cannot open .*val"),
    ):
        with pytest.raises(ValueError, match=message):
            streamed(remote, tmp_path, 3, **options)
    with pytest.raises(ValueError, match="is a stream, which only"):
        open_sources(Data(source=remote, streaming=True, limit=3))

    def fail(stored, original=tables._encoded, seen=[]):  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise ConnectionError("the line is dead")
        return original(stored)

    monkeypatch.setattr(tables, "_encoded", fail)
    with pytest.raises(ValueError, match="broke off, 2 of 6 images are kept: the line is dead"):
        streamed(remote, tmp_path, 6)
    check_rows(streamed(remote, tmp_path, 6))
