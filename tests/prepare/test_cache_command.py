"""What `asymflow-ft cache` leaves: nothing stale, nothing half; what it refuses, and what --verify finds."""

import os
import re
import shutil
import subprocess
import sys
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from asymflow_ft import cli
from asymflow_ft.data import cache as cache_module
from asymflow_ft.data import rows
from asymflow_ft.data.scan import read_index, scan
from asymflow_ft.data.source import open_source
from asymflow_ft.families import flux2
from asymflow_ft.training import stages
from asymflow_ft.training.encode import Encoder
from tests.conftest import REPOSITORY
from tests.prepare.conftest import CAPTIONS, PROMPTS, RECIPE, cache, files, noise, prepared_of, recipe_of, write_table


def test_interrupted_in_every_shard_it_ends_with_the_same_files(data, tmp_path, monkeypatch, capsys):
    assert cache(data, tmp_path / "whole") == 0
    whole, written = files(tmp_path / "whole"), []

    def write(self, keys, values, original=cache_module.TensorCache.write):
        original(self, keys, values)
        written.append(keys)

    monkeypatch.setattr(cache_module.TensorCache, "write", write)
    for name in ("encode_captions", "encode_image"):

        def encode(*args, original):
            if written:
                raise KeyboardInterrupt
            return original(*args)

        original = getattr(Encoder, name)
        monkeypatch.setattr(Encoder, name, partialmethod(encode, original=original))
    codes = []
    while not codes or codes[-1]:
        written.clear()
        codes.append(cache(data, tmp_path / "halting"))
        assert len(files(tmp_path / "halting")) == len(codes)
    assert codes == [130] * 6 + [0]  # four shards of text, three of latents
    assert "Traceback" not in capsys.readouterr().err
    assert files(tmp_path / "halting") == whole


KILLED = """
import os, signal, sys
from asymflow_ft import cli
from asymflow_ft.data import cache
from asymflow_ft.training import stages

stages.TEXT_SHARD, stages.LATENT_SHARD = 8, 8
original, done = cache.save_file, []

def save_file(tensors, part, metadata):
    original(tensors, part, metadata=metadata)
    done.append(part)
    if part.parent.name == "latents" and len(done) > 5:
        os.truncate(part, part.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

cache.save_file = save_file
cli.main(sys.argv[1:])
"""


def test_killed_while_writing_a_shard_it_ends_with_the_same_files(tmp_path, monkeypatch):
    """SIGKILL with half of the second shard of latents written, on the shipped images."""
    monkeypatch.setattr(stages, "TEXT_SHARD", 8)
    monkeypatch.setattr(stages, "LATENT_SHARD", 8)
    (tmp_path / "prompts.txt").write_text("owl")
    limits = ["data.limit=24", "data.held_out=2", f"sample.prompts={tmp_path / 'prompts.txt'}"]
    start = ["cache", "--recipe", RECIPE, *limits]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *start, f"output_dir={killed}"], cwd=REPOSITORY, capture_output=True,
        timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    left = {path.suffix.rstrip("0123456789"): path for path in (killed / "cache/latents").iterdir()}
    assert left.keys() == {".part", ".safetensors"}
    os.utime(left[".part"], (0, 0))  # old enough not to be another run's
    assert cli.main([*start, f"output_dir={killed}"]) == cli.main([*start, f"output_dir={whole}"]) == 0
    assert files(killed) == files(whole) and len(files(whole)) == 4 + 3


def test_what_changes_is_encoded_anew_and_nothing_else(data, tmp_path, tiny_base, encoded):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_base, base)
    every = set(CAPTIONS) | {"", *PROMPTS}

    def runs(texts, images, *overrides, size=(64, 64)):
        encoded.texts.clear(), encoded.images.clear()
        assert cache(data, out, f"base={base}", *overrides) == 0
        assert (encoded.texts, encoded.images) == (set(texts), {(row, size) for row in images})

    runs(every, range(6))
    runs([], [])
    runs([], [], "seed=5", "data.held_out=2", "train.caption_dropout=0.5", f"cache.folder={out / 'cache'}")
    before = (data / "2.bmp").stat()
    noise(77).save(data / "2.bmp")
    os.utime(data / "2.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p do
    assert (data / "2.bmp").stat().st_size == before.st_size
    runs([], [2])
    shutil.copy(data / "2.bmp", data / "0.bmp")  # known content under another name
    runs([], [])
    write_table(data, [*CAPTIONS[:-1], "owl at night"])
    runs(["owl at night"], [])
    (tmp_path / "prompts.txt").write_text("fox")
    runs(["fox"], [])
    every = {*CAPTIONS[:-1], "owl at night", "", "fox"}
    different = range(1, 6)  # 0 is a copy of 2; the key is encoded once, from the last row that has it
    runs(every, [], "text.max_length=24")
    runs(every, [], "cache.text=fp8")
    runs([], different, "data.latents=sample")
    runs([], different, "cache.latents=float32")
    runs([], different, "data.resolution=96", size=(96, 96))
    runs([], [])
    vae = base / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(vae)
    save_file({name: value * 1.01 if "conv_in" in name else value for name, value in weights.items()}, vae)
    runs([], different)
    for name in ("text_encoder/model.safetensors", "tokenizer/chat_template.jinja"):
        os.utime(base / name)
        runs(every, [])
    runs(every, [], "train.precision=bf16")
    runs([], [])


def test_an_image_that_changes_under_the_look_is_not_taken_for_the_new_one(data, tmp_path, monkeypatch):
    images = open_source(str(data))

    def content(row, image=0, original=images.content):
        found = original(row, image)
        if row == 3:
            noise(99, (32, 32)).save(data / "3.bmp")
        return found

    monkeypatch.setattr(images, "content", content)
    with pytest.raises(ValueError, match=r"3\.bmp changed while the run looked"):
        stages.prepare(recipe_of(data, tmp_path / "out"), flux2, images, 16, Accelerator())
    images = open_source(str(data))
    scan(images, range(6), tmp_path / "out/cache", show=False)
    assert read_index(tmp_path / "out/cache")[images.stamp(3)].width == 32


def test_verify_reports_what_is_wrong_and_nothing_else(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def faults(*overrides):
        capsys.readouterr()
        code, printed = cache(data, out, *overrides, verify=True), capsys.readouterr()
        lines = [
            line for line in printed.err.splitlines() if line.startswith((str(tmp_path), "latents of", "embedding of"))
        ]
        assert (code == 1) == bool(lines)
        told = f"{len(lines)} faults found" if lines else "verified: no fault found"
        assert told in printed.out
        return lines

    assert faults() == []
    for precision in ("cache.text=fp8", "cache.latents=fp8", "train.precision=bf16", "data.latents=sample"):
        assert faults(precision) == []

    shutil.rmtree(out)
    assert faults() == []
    for kind in ("text", "latents"):
        shard = sorted((out / "cache" / kind).iterdir())[1]
        whole = shard.read_bytes()
        broken = bytearray(whole)
        broken[-7] ^= 16
        shard.write_bytes(broken)
        assert f"{shard}: the checksum differs" in faults()
        shard.write_bytes(whole)

        for wrong, told in (
            (lambda t: t.flip(0), "differs from what the models give"),
            (lambda t: t[1:], "the shape"),
        ):
            tensors = {name: wrong(value).contiguous() for name, value in load_file(shard).items()}
            save_file(tensors, shard, metadata={"sha256": cache_module._digest(tensors)})
            found = faults()
            assert len(found) == 2 and all(told in line for line in found)
            assert all(line.startswith("embedding of" if kind == "text" else "latents of") for line in found)
        shard.write_bytes(whole)

    # on a disk that keeps no times, or when it happens later
    monkeypatch.setattr(rows, "file_stamp", lambda path: path)
    assert faults() == []
    held_out = prepared_of(data, out).held_out.entries[0].row
    for row in {held_out, 5}:
        original = (data / f"{row}.bmp").read_bytes()
        noise(50 + row).save(data / f"{row}.bmp")
        assert faults() == [f"{data / f'{row}.bmp'}: the image changed since it was cached"]
        (data / f"{row}.bmp").write_bytes(original)
    assert cache(data, out, "cache.enabled=false", verify=True) == 1
    assert "nothing to cache" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(data, tmp_path, monkeypatch, capsys):
    text, latents = 8 * 32 * 96 * 4, 6 * 16 * 128 * 2  # of the tiny base
    embedding = Encoder(recipe_of(data, tmp_path), flux2, torch.device("cpu")).encode_captions([""])[0]
    text = 8 * embedding.nbytes
    for free, code in ((text + latents - 1, 1), (text + latents, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert cache(data, tmp_path / "out") == code
        assert bool(list((tmp_path / "out/cache").glob("*/*"))) == (code == 0)
    error = capsys.readouterr().err
    assert "GB free and the cache needs about" in error and "cache.folder" in error and error.count("error:") == 1


def test_a_cache_folder_that_cannot_be_is_one_message(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cache(data, tmp_path / "out", f"cache.folder={tmp_path / 'file'}") == 1
    assert re.search(r"error: cannot write to the cache folder .*/file: .*; choose another", capsys.readouterr().err)
