"""Checkpoints under kill -9, full disks and damaged files.

Tensors of the test checkpoints are functions of the step, so that any one read back can be checked exactly. Writers
are forked from a server process that has imported torch once.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from multiprocessing import forkserver

import pytest
import torch
from tqdm import tqdm

from asymflow_ft.training import checkpoint
from asymflow_ft.training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    verify_checkpoint,
)
from tests.conftest import REPOSITORY

FILES = ("trained.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json")
SIZE = 30_000  # numbers in the smallest tensor: writing takes most of a save


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_checkpoint"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)  # where the server can import this file
        forkserver.ensure_running()
    return context


def tensors(step, size=SIZE):
    """(trained, ema, optimizer) of a step; each file is larger than the one before."""
    value = torch.arange(size, dtype=torch.float32) + step
    trained = {"a": value.sin(), "b.weight": value.cos()}
    ema = {name: torch.cat([t, t * step]) for name, t in trained.items()}
    return trained, ema, {"state": {0: {"step": torch.tensor(step), "exp_avg": value.repeat(8)}}, "param_groups": []}


def save(folder, step, keep=2, size=SIZE, **options):
    return save_checkpoint(folder, step, *tensors(step, size), keep, **options)


def assert_is_step(path, step, size=SIZE):
    assert verify_checkpoint(path) is None
    stored_step, *stored = load_checkpoint(path)
    assert stored_step == step
    torch.testing.assert_close(stored, list(tensors(step, size)), rtol=0, atol=0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(file, kind, rng):
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[rng.randrange(len(content)) :]
    file.unlink()
    if kind != "delete":
        file.write_bytes(content)


# Kills


def write_until_killed(folder, pipe, size, step, instant=None):
    """Save step after step; with an `instant`, die of SIGKILL before that operation of the first save."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that a kill would leave behind
    seen = 0

    def note(operation, arguments):
        nonlocal seen
        if operation.split(".")[0] in ("open", "os", "shutil", "write"):
            seen += 1
            if seen == instant:
                os.kill(os.getpid(), signal.SIGKILL)

    def noted(function):
        def with_note(*arguments):
            note("write", arguments)
            return function(*arguments)

        return with_note

    if instant is not None:  # what Python does not audit by itself is noted by hand
        checkpoint.save_file, torch.save, os.fsync = map(noted, (checkpoint.save_file, torch.save, os.fsync))
        sys.addaudithook(note)
    while True:
        save(folder, step, size=size)
        pipe.send((step, seen))
        step += 1


def start(server, folder, *arguments):
    receiver, sender = server.Pipe(duplex=False)
    writer = server.Process(target=write_until_killed, args=(folder, sender, *arguments))
    writer.start()
    sender.close()
    return writer, receiver


def finish(writer, receiver):
    """What the writer announced and nobody has read: a list of (finished step, operations so far)."""
    announced = []
    try:
        while True:
            announced.append(receiver.recv())
    except EOFError:
        writer.join()
    assert writer.exitcode == -signal.SIGKILL
    return announced


def newest_step(folder, size, finished):
    """Step of the newest whole checkpoint, which is exact and not older than what was finished."""
    found, _ = newest_whole(folder)
    step = load_checkpoint(found)[0]
    assert finished <= step <= finished + 1
    assert_is_step(found, step, size)
    return step


@pytest.mark.parametrize(
    ("before", "broken"), [((1, 2), None), ((1, 2, 3), 3), ((3,), None)], ids=["new", "over broken", "over the only"]
)
def test_kill_before_every_operation_of_a_save(before, broken, tmp_path, server):
    for step in before:
        save(tmp_path / "start", step, keep=3, size=20)
    if broken:
        damage(tmp_path / "start/step-000003/ema.safetensors", "truncate", random.Random(0))
    ((_, operations), *_) = finish(*start(server, shutil.copytree(tmp_path / "start", tmp_path / "count"), 20, 3, 150))
    assert 30 < operations < 100
    finished, reached = before[-1] - bool(broken), set()
    for instant in range(1, operations + 1):
        folder = shutil.copytree(tmp_path / "start", tmp_path / f"{instant}")
        assert finish(*start(server, folder, 20, 3, instant)) == []
        assert all("step-000003/ema" in why for why in newest_whole(folder)[1])
        reached.add(step := newest_step(folder, 20, finished))
        save(folder, step + 1, size=20)
        left = [name.removesuffix(".old") for name in names(folder)]
        assert left == [f"step-{step:06d}", f"step-{step + 1:06d}"]
        shutil.rmtree(folder)
    assert reached == {finished, 3}


def test_kill_at_random_instants(tmp_path, server):
    rng = random.Random(0)
    began = time.perf_counter()
    save(tmp_path, 1)
    duration = time.perf_counter() - began
    step, inside = 1, 0
    for _ in range(40):
        writer, receiver = start(server, tmp_path, SIZE, step + 1)
        receiver.poll(10)  # the first save is through
        time.sleep(rng.uniform(0, 3 * duration))
        writer.kill()
        finished = [saved for saved, _ in finish(writer, receiver)]
        inside += any(path.suffix == ".part" for path in tmp_path.iterdir())
        step = newest_step(tmp_path, SIZE, finished[-1])
        assert newest_whole(tmp_path)[1] == []
    assert inside >= 10


# Full disks


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    (tmp_path / "step-000002.part").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 7 * 10**9, 3 * 10**9))
    monkeypatch.setattr(checkpoint, "save_file", None)
    weights = {"weight": torch.empty(10**9, dtype=torch.bfloat16, device="meta")}
    moments = {"state": {0: {"exp_avg": torch.empty(5 * 10**8, dtype=torch.float16, device="meta")}}}
    with pytest.raises(ValueError, match=r"needs 5 GB .* has 3 GB free; .*untouched.*train.keep_checkpoints"):
        save_checkpoint(tmp_path, 2, weights, weights, moments, 2)
    assert names(tmp_path) == ["step-000001"]
    assert_is_step(tmp_path / "step-000001", 1)


def save_under_limit(folder, pipe, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(folder, 3)
    except ValueError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("file", FILES[:3])
def test_a_write_that_fails_leaves_the_earlier_checkpoints(file, tmp_path, server):
    for step in (1, 2):
        save(tmp_path, step)
    limit = (tmp_path / "step-000002" / file).stat().st_size - 1  # the files before it are smaller
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=save_under_limit, args=(tmp_path, sender, limit))
    process.start()
    assert receiver.poll(20)
    assert "could not save the checkpoint" in (message := receiver.recv()) and "step-000003" in message
    process.join()
    assert names(tmp_path) == ["step-000001", "step-000002"]
    for step in (1, 2):
        assert_is_step(tmp_path / f"step-{step:06d}", step)


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.rename

    def noted_rename(old, new):
        done.append("rename")
        rename(old, new)

    def noted_fsync(handle):
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(tmp_path / "checkpoints", 1)
    part = "checkpoints/step-000001.part"
    assert set(done[:5]) == {f"{part}/{name}" for name in FILES}
    assert done[5:] == [part, "rename", "checkpoints", "."]


# Damage


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_the_one_before_is_taken(file, kind, tmp_path):
    rng = random.Random(f"{file} {kind}")
    save(tmp_path, 1, size=20)
    for _ in range(1 if kind == "delete" else 20):
        path = save(tmp_path, 2, size=20)  # in place of the damaged one
        assert_is_step(path, 2, size=20)
        damage(path / file, kind, rng)
        assert str(path / file) in verify_checkpoint(path)
        assert newest_whole(tmp_path) == (tmp_path / "step-000001", [verify_checkpoint(path)])
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_half_written_checkpoints_do_not_count(tmp_path):
    (tmp_path / "step-000004.part").mkdir()
    (tmp_path / "step-000004.part/manifest.json").write_text("{}")
    (tmp_path / "step-000006").mkdir()
    assert list_checkpoints(tmp_path) == []
    assert newest_whole(tmp_path) == (None, [f"{tmp_path / 'step-000006/manifest.json'} is missing"])
    assert newest_whole(tmp_path / "none") == (None, [])


def test_a_whole_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 1, *tensors(5), keep=1)
    save(tmp_path, 1, keep=1)
    assert names(tmp_path) == ["step-000001"]
    assert_is_step(tmp_path / "step-000001", 1)


# Rotation


def test_rotation_counts_whole_checkpoints(tmp_path):
    steps = [9, 10, 999_999, 1_000_000]  # in order of the numbers, not of the letters
    for step in steps:
        save(tmp_path, step, keep=4, size=20)
    assert list_checkpoints(tmp_path) == [tmp_path / f"step-{step:06d}" for step in steps]
    damage(tmp_path / "step-999999/ema.safetensors", "truncate", random.Random(0))
    save(tmp_path, 1_000_001, keep=3, size=20)
    assert names(tmp_path) == ["step-000010", "step-1000000", "step-1000001", "step-999999"]


def test_falling_back_does_not_lose_the_last_good_one(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3, size=20)
    for step in (20, 30):  # same sizes: rotation cannot see it
        damage(tmp_path / f"step-{step:06d}/trained.safetensors", "flip", random.Random(0))
    assert newest_whole(tmp_path)[0] == tmp_path / "step-000010"
    save(tmp_path, 15, keep=1, size=20)
    assert names(tmp_path) == ["step-000015", "step-000020", "step-000030"]
    found, broken = newest_whole(tmp_path)
    assert_is_step(found, 15, size=20)
    assert ["step-000030" in broken[0], "step-000020" in broken[1], len(broken)] == [True, True, 2]
    save(tmp_path, 30, keep=1, size=20)
    assert_is_step(newest_whole(tmp_path)[0], 30, size=20)


def test_keep_every(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, keep=2, size=20, keep_every=4)
    assert names(tmp_path) == [f"step-{step:06d}" for step in (4, 8, 10, 11)]
